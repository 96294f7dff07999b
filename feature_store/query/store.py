"""Questions to a store: lazy Polars frames under the tables' names, SQL over them, and the everyday look-ups.

`FeatureStore.open` settles once what is read (its `lineage`): an associations run, the codes run and the data set that
it came from; their parts are those of finished manifests, so a writer beside it changes nothing. Nothing is ever
written. Codes are read along the sort order that the question needs, in SQL too (`feature_store.codes.code_reader`).

In SQL the tables are `cells`, `genes`, `training`, `feature_umap`, `feature_neighbour`, `codes`, `umap`, `features`,
`feature_label`, `feature_gene`, `feature_geneset`, `feature_token`, `profile_umap`, `steering`, `steering_variants`,
`steering_scores`, `steering_head`, `steering_map`, `feature_match`, `comparison` and `representation`: those of them
that the store has (`feature_store.query.tables`). All are of the SAE that the associations are of, so that they join by
feature_id; a column `run` tells steering runs apart.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import polars as pl

from feature_store.errors import IntegrityError, NotFoundError, QueryError
from feature_store.query.runs import Lineage, lineage_of, plans_of
from feature_store.query.suggestions import closest_names, did_you_mean, join_names, same_but_for_case
from feature_store.query.tables import Tables
from feature_store.storage.commit import Run
from feature_store.storage.filesystem import REPAIR, read_bytes, read_sealed
from feature_store.storage.layout import ASSOCIATION_TABLES, KINDS, MANIFEST, PLAN, SUMMARY, Layout

if TYPE_CHECKING:
    import anndata

_READS_ONLY = re.compile(r"\s*(?:SELECT|WITH|SHOW|EXPLAIN|FROM|\()", re.IGNORECASE)
_READS_FILES = re.compile(r"\bread_(?:csv|ipc|json|ndjson|parquet)\s*\(", re.IGNORECASE)
_NO_COLUMN = re.compile(r"(?:unable to find column|no column named) [\"']([^\"']+)[\"']")
_NO_TABLE = re.compile(r"relation '([^']+)' was not found")
CELLS_KEPT = 2_000_000
"""A cell table of at most so many rows is kept in memory when a second look-up needs it (a million cells of 15 columns:
80 MB and .21 s of CPU; the first look-up takes .14 s for the rows it needs, a later one nothing)."""
_TEXT_ASKED = re.compile(r"\"?\b(\w+)\"?\s*(?:=|IN\s*\()\s*'([^']*)'", re.IGNORECASE)
_ABOUT_FEATURE = ("feature_id", "class", "density", "top_genes", "top_label")


P = ParamSpec("P")
_Method = Callable[Concatenate["FeatureStore", P], pl.DataFrame]


def _naming_damage(ask: _Method[P]) -> _Method[P]:
    """Answer, or name the damaged parts where reading failed because of them."""

    @wraps(ask)
    def asked(store: "FeatureStore", /, *args: P.args, **kwargs: P.kwargs) -> pl.DataFrame:
        try:
            return ask(store, *args, **kwargs)
        except (OSError, pl.exceptions.PolarsError) as error:
            store.refuse_damage(error)
            raise

    return asked


class FeatureStore:
    """A read-only view of one store; make one with `FeatureStore.open(root)`.

    >>> store = FeatureStore.open("scsae-store")
    >>> store.sql("SELECT feature_id, auroc FROM feature_label WHERE label = 'CD19+ B' ORDER BY auroc DESC LIMIT 5")
    >>> store.features_for(gene="MS4A1"), store.top_cells(17), store.features_of(0)
    >>> store.frame("features").filter(~pl.col("dead")).collect()
    """

    def __init__(self, layout: Layout, lineage: Lineage) -> None:
        self.layout = layout
        self.lineage = lineage
        self._tables = Tables(layout, lineage)
        self._cells_asked = False

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.layout.root)!r}, {', '.join(self.tables())})"

    @classmethod
    def open(
        cls,
        root: str | Path,
        *,
        associations: str | None = None,
        codes: str | None = None,
        dataset: str | None = None,
    ) -> "FeatureStore":
        """Open a store at its newest complete associations run that is no control (a baseline, a model with random
        weights), or at the runs named (ids, or their beginnings).

        What is not named follows from what is: the codes that associations are of, the newest associations of codes or
        of a data set, the data set of codes, else the newest one. Kinds that the store does not have yet simply give no
        tables. NotFoundError for a root without any run, an unknown run, and runs that do not belong together.
        """
        layout = Layout(root)
        if not any(layout.runs(kind) for kind in KINDS):
            raise NotFoundError(f"{layout.root} holds no runs; make some with `scsae demo --store {layout.root}`")
        lineage = lineage_of(layout, associations=associations, codes=codes, dataset=dataset)
        return cls(layout, lineage)

    def tables(self) -> list[str]:
        """Names of the tables that this store has."""
        return self._tables.names()

    def frame(self, table: str) -> pl.LazyFrame:
        """A table as a lazy frame; nothing is read until it is collected. QueryError with the nearest name."""
        return self._tables.frame(table)

    def made_by(self, table: str) -> str:
        """The command that makes a table, whether or not this store has it. QueryError if there is none such."""
        return self._tables.made_by(table)

    def refuse_damage(self, error: Exception) -> None:
        """IntegrityError naming the parts that are missing or not of their size, if any is: what to ask where a frame
        could not be collected.
        """
        self._tables.refuse_damage(error)

    @_naming_damage
    def sql(self, query: str) -> pl.DataFrame:
        """Answer a SELECT over the tables (Polars SQL).

        QueryError for an unknown table or column, with the nearest names, for a syntax error, and for a statement that
        does anything but read these tables. IntegrityError naming a part that is missing or truncated; Polars checks no
        page, so a flipped byte is found by `scsae verify` and by the stages that read on, not here.
        """
        if not _READS_ONLY.match(query) or _READS_FILES.search(query):
            raise QueryError(
                f"only queries over the store's tables are answered (SELECT, WITH, SHOW TABLES, EXPLAIN); got {query!r}"
            )
        try:
            return pl.SQLContext({table: self.frame(table) for table in self.tables()}, eager=True).execute(query)
        except pl.exceptions.PolarsError as error:
            self.refuse_damage(error)
            raise QueryError(self._explain(str(error))) from error

    def why_empty(self, query: str) -> str:
        """Why a query found no rows: the first text in it that its column does not hold, with what is near.

        A help for people: `column = 'text'` is looked for in the words of the query, not in its meaning.
        """
        for column, text in _TEXT_ASKED.findall(query):
            tables = [table for table in self.tables() if re.search(rf"\b{table}\b", query, re.IGNORECASE)]
            known = {table: self._values(table, column) for table in tables if self._is_text(table, column)}
            if known and not any(text in values for values in known.values()):
                values = sorted({value for values in known.values() for value in values})
                return f"no {column} is {text!r} in {', '.join(known)}{did_you_mean(text, values, n=3)}"
        return "no row meets all the conditions"

    @_naming_damage
    def features_for(
        self,
        *,
        gene: str | None = None,
        label: str | None = None,
        gene_set: str | None = None,
        kind: str | None = None,
    ) -> pl.DataFrame:
        """Features that go with one gene, label or gene set, strongest first, each with its class and genes.

        A label: by AUROC. A gene: by the correlation of the cell code with its expression. A gene set: by p. They are
        ranked on `select` cells (column `select_auroc`, ...) and the figures shown are those of `test` cells: the best
        of many on the cells it is reported on would be flattered. A name in another case is found. `kind` (of a label:
        its label_kind, of a gene set: its collection) tells two of one name apart. QueryError if not exactly one name
        is given, it is not in the table, it may be two, or it has no figures of `test` cells.
        """
        given = {"gene": gene, "label": label, "gene_set": gene_set}
        asked = {column: name for column, name in given.items() if name is not None}
        if len(asked) != 1:
            raise QueryError(f"ask for one of gene, label and gene_set; got {', '.join(asked) or 'none'}")
        column, name = next(iter(asked.items()))
        table, key, descending = RANKED_BY[column]
        found = _of_one_kind(self._rows_about(table, column, name), column, name, kind)
        if "split" in found.columns:
            if "test" not in (splits := found["split"].unique().to_list()):
                raise QueryError(f"{column} {name!r} has figures of {join_names(splits)} cells and none of test cells")
            names = [n for n in ("feature_id", "label_kind", "label", "gene", "collection", "gene_set") if n in found]
            chosen = found.filter(pl.col("split") == "select").select(*names, pl.col(key).alias(f"select_{key}"))
            found = found.filter(pl.col("split") == "test").join(chosen, on=names, how="left")
            key = f"select_{key}"
        return self._describe(found.sort(key, "feature_id", descending=[descending, False], nulls_last=True))

    @_naming_damage
    def top_cells(self, feature: int, n: int = 20) -> pl.DataFrame:
        """The n cells with the largest code of a feature, with their columns of the cell table.

        Reads a row group or a few of the one part of codes/by_feature that holds the feature. QueryError for a feature
        that the codes do not have.
        """
        self._check_feature(feature)
        top = self._tables.codes.top_cells(feature, n)
        if "cells" not in self._tables.folders:
            return top
        return top.join(self._cells_of(top["cell_idx"]), on="cell_idx", how="left", maintain_order="left")

    @_naming_damage
    def features_of(self, cell: int | str, n: int = 20) -> pl.DataFrame:
        """The n features with the largest code in a cell (its cell_idx, or its cell_id), each with class and genes.

        Reads a row group of the one part of codes/by_cell that holds the cell. QueryError for a cell that is not in the
        cell table.
        """
        codes = self._tables.codes
        return self._describe(codes.features_of(self._cell_idx(cell)).head(n))

    def provenance(self) -> dict[str, Any]:
        """Where the tables come from: the runs read, the sha of each table's manifest, and the plans of the runs, from
        the activations (model, data set) to the associations.
        """
        return {
            "runs": {kind: run for kind, run in asdict(self.lineage).items() if isinstance(run, str)},
            "manifests": self._tables.manifests(),
            "plans": plans_of(self.layout, self.lineage),
        }

    def sae_facts(self, sae: str | None = None) -> dict[str, Any]:
        """What an SAE is and how well it does: its run, its plan (model, site, dataset, `sae` and `train`: options; a
        baseline has `control` instead of `train`) and, under `summary`, its figures on held-out tokens.

        The SAE of the codes, or any of the store, such as one that its features are matched with. NotFoundError if the
        codes name none, or it was deleted; IntegrityError if it lost a file.
        """
        sae = sae or self.lineage.sae
        if sae is None or not (self.layout.saes_dir(sae) / MANIFEST).is_file():
            raise NotFoundError(
                f"{self.layout.root} has no SAE {sae or 'that its codes name'}; train one with "
                f"`{self.made_by('training')}`"
            )
        folder = self.layout.saes_dir(sae)
        try:
            return {"run": sae, **read_sealed(folder / PLAN), "summary": json.loads(read_bytes(folder / SUMMARY))}
        except FileNotFoundError as error:
            raise IntegrityError(f"{folder} lost a file ({error}); {REPAIR}") from error

    def to_anndata(
        self,
        *,
        cells: pl.Expr | Sequence[int | str] | None = None,
        features: Sequence[int] | None = None,
        tables: Sequence[str] | None = None,
        key: str = "X_sae",
    ) -> "anndata.AnnData":
        """Cells with their codes as AnnData, for scanpy and for files (`.write_h5ad`).

        >>> store.to_anndata(cells=pl.col("split") == "test", features=[17, 256])

        `obs` is the cell table, by cell_id (by cell_idx where ids repeat); `obsm[key]` holds the codes, sparse [n_cells
        n_features]; `uns["sae"]` (`key` without its "X_") the tables about features, `features` a row for each column
        of the codes, and `provenance`, its plans as JSON. There is no X: the values are in the file that was encoded.

        Args:
            cells: a condition on the cell table, or cell_idx or cell_id in the order wanted; default: all.
            features: feature ids, in the order wanted; default: all.
            tables: tables about features to take along; default: all that associations made.
            key: name of the codes.

        Raises:
            NotFoundError: the store has no codes.
            QueryError: a cell, a feature or a table that is not there, or a condition that cannot be read.
        """
        from feature_store.cells import to_anndata
        from feature_store.codes import load_cell_codes

        codes = self._tables.codes
        wanted = [int(feature) for feature in (range(codes.n_features) if features is None else features)]
        for feature in wanted:
            self._check_feature(feature)
        obs = self._chosen_cells(cells)
        order = pl.DataFrame({"feature_id": wanted}, schema={"feature_id": pl.Int32})
        known = [table for table in ASSOCIATION_TABLES if table in self._tables.folders]
        about = {}
        for table in known if tables is None else tables:
            if "feature_id" not in self.frame(table).collect_schema():
                raise QueryError(f"table {table!r} is not about features; those are {', '.join(known)}")
            rows = self.frame(table).filter(pl.col("feature_id").is_in(wanted)).collect()
            joined = order.join(rows, on="feature_id", how="left", maintain_order="left")
            about[table] = joined if table == "features" else rows
        found = load_cell_codes(codes.by_cell.run, self._n_cells, obs["cell_idx"].to_numpy())
        provenance = self.provenance()
        return to_anndata(
            obs,
            found[:, wanted],
            key=key,
            about={
                **about,
                "feature_id": order["feature_id"].to_numpy(),
                "provenance": {**provenance, "plans": json.dumps(provenance["plans"], sort_keys=True)},
            },
        )

    def _chosen_cells(self, cells: pl.Expr | Sequence[int | str] | None) -> pl.DataFrame:
        """Rows of the cell table that meet a condition, or of these cell_idx in their order."""
        table = self.frame("cells")
        if cells is None or isinstance(cells, pl.Expr):
            try:
                return (table if cells is None else table.filter(cells)).collect()
            except pl.exceptions.PolarsError as error:
                raise QueryError(self._explain(str(error))) from error
        indices = [self._cell_idx(cell if isinstance(cell, str) else int(cell)) for cell in cells]
        chosen = pl.DataFrame({"cell_idx": indices}, schema={"cell_idx": pl.Int64})
        rows = self._cells_of(chosen["cell_idx"].unique())
        return chosen.join(rows, on="cell_idx", how="left", maintain_order="left")

    def _check_feature(self, feature: int) -> None:
        if not 0 <= feature < self._tables.codes.n_features:
            raise QueryError(f"no feature {feature}; the codes have features 0 to {self._tables.codes.n_features - 1}")

    @cached_property
    def _n_cells(self) -> int:
        """Cells of the data set; their cell_idx are 0 to one less."""
        (folder,) = self._tables.folders["cells"]
        return Run.open(folder).manifest().rows

    def _cells_of(self, cell_idx: pl.Series) -> pl.DataFrame:
        """Rows of the cell table, in any order."""
        first, self._cells_asked = not self._cells_asked, True
        if first or self._n_cells > CELLS_KEPT:
            return self.frame("cells").filter(pl.col("cell_idx").is_in(cell_idx.implode())).collect()
        return self._kept_cells[cell_idx.filter(cell_idx < self._n_cells).to_list()]

    @cached_property
    def _kept_cells(self) -> pl.DataFrame:
        return self.frame("cells").collect()

    @cached_property
    def _about_features(self) -> pl.DataFrame:
        return self.frame("features").select(_ABOUT_FEATURE).collect()

    def _rows_about(self, table: str, column: str, name: str) -> pl.DataFrame:
        """Rows of a table with this name in a column; of a name in another case if there is but one."""
        rows = self.frame(table)
        found = rows.filter(pl.col(column) == name).collect()
        if not found.is_empty():
            return found
        known = self._values(table, column)
        same = same_but_for_case(name, known)
        if len(same) != 1:
            raise QueryError(
                f"no {column} {name!r} in {table}{did_you_mean(name, known, n=3)}; it has {join_names(known)}"
            )
        return rows.filter(pl.col(column) == same[0]).collect()

    def _is_text(self, table: str, column: str) -> bool:
        return self.frame(table).collect_schema().get(column) == pl.String

    def _values(self, table: str, column: str) -> list[str]:
        return self.frame(table).select(pl.col(column).drop_nulls().unique()).collect()[column].to_list()

    def _cell_idx(self, cell: int | str) -> int:
        if isinstance(cell, int) and 0 <= cell < self._n_cells:
            return cell
        cell_id, hint = pl.col("cell_id"), ""
        if isinstance(cell, str):
            cells = self.frame("cells").select("cell_idx", "cell_id")
            found = cells.filter(cell_id == cell).collect()["cell_idx"].to_list()
            if len(found) == 1:
                return int(found[0])
            if found:
                raise QueryError(f"cell_id {cell!r} is of {len(found)} cells; ask by cell_idx: {join_names(found)}")
            # the same barcode with more, or less, before or after it
            alike = cell_id.str.to_lowercase().str.contains(cell.lower(), literal=True)
            alike |= pl.lit(cell.lower()).str.contains(cell_id.str.to_lowercase(), literal=True)
            hint = did_you_mean(cell, cells.filter(alike).head(3).collect()["cell_id"].to_list(), n=3)
        raise QueryError(
            f"no cell {cell!r}{hint}; data set {self.lineage.dataset} has cell_idx 0 to {self._n_cells - 1}"
        )

    def _describe(self, found: pl.DataFrame) -> pl.DataFrame:
        if "features" not in self._tables.folders:
            return found
        about = self._about_features
        about = about.select("feature_id", *(name for name in _ABOUT_FEATURE[1:] if name not in found.columns))
        return found.join(about, on="feature_id", how="left", maintain_order="left")

    def _explain(self, message: str) -> str:
        message = message.split("\n\n")[0].strip()
        if no_table := _NO_TABLE.search(message):
            name = no_table[1]
            return self._tables.no_table(name)
        if no_column := _NO_COLUMN.search(message):
            name = no_column[1]
            columns = {table: self.frame(table).collect_schema().names() for table in self.tables()}
            alike = closest_names(name, sorted({c for names in columns.values() for c in names}))
            places = [f"{c} ({', '.join(t for t, names in columns.items() if c in names)})" for c in alike]
            hint = f"; near ones: {', '.join(places)}" if places else ""
            return f"no column {name!r}{hint}; `SELECT * FROM features LIMIT 1` shows what a table has"
        return f"the query cannot be answered: {message}"


def _of_one_kind(found: pl.DataFrame, column: str, name: str, kind: str | None) -> pl.DataFrame:
    """The rows of one label or gene set, where several kinds or collections have one of the name."""
    of = KIND_OF.get(column)
    if of is None:
        if kind is not None:
            raise QueryError(f"a {column} has no kind; got kind {kind!r} with {column} {name!r}")
        return found
    kinds = found[of].unique().to_list()
    if kind is None and len(kinds) > 1:
        raise QueryError(
            f"{column} {name!r} is in {len(kinds)} of {of}: {join_names(kinds)}; say which one is meant: --kind"
        )
    if kind is not None and kind not in kinds:
        raise QueryError(
            f"no {column} {name!r} in {of} {kind!r}{did_you_mean(kind, kinds)}; it is in {join_names(kinds)}"
        )
    return found if kind is None else found.filter(pl.col(of) == kind)


RANKED_BY: Mapping[str, tuple[str, str, bool]] = {
    "gene": ("feature_gene", "pearson", True),
    "label": ("feature_label", "auroc", True),
    "gene_set": ("feature_geneset", "p", False),
}
"""What features are asked for: the table, the column that they are ranked by, and whether the largest comes first."""
KIND_OF: Mapping[str, str] = {"label": "label_kind", "gene_set": "collection"}
"""The column that tells two labels, or gene sets, of one name apart."""
