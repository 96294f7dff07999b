"""`FeatureStore`: the tables of a store as lazy Polars frames, SQL over them, and the everyday look-ups.

`FeatureStore.open` decides once which runs are read (its `lineage`): an associations run, its codes run and its data
set. Only the parts of finished manifests are read, so a process that writes into the store at the same time changes no
answer, and nothing is ever written. Codes are read in the sort order that suits the query, in SQL too
(`feature_store.codes`).

In SQL the tables are `cells`, `genes`, `training`, `feature_umap`, `feature_neighbour`, `codes`, `compact_codes`,
`cell_tokens`, `feature_cell`, `feature_firing`, `top_cell_token`, `umap`, `features`, `feature_label`,
`feature_number`, `feature_gene`, `feature_geneset`, `feature_token`, `gene_sets`, `profile_umap`, `steering`,
`steering_variants`, `steering_scores`, `steering_head`, `steering_map`, `feature_match`, `comparison` and
`representation`, as far as the store has them (`feature_store.query.tables`). All of them are about the SAE of the
associations, so they join by feature_id; the column `run` tells steering runs apart.

Of a large data set a panel of cells is drawn (`FeatureStore.panel`), and tables differ in the cells that they are of:

    codes            the panel's cells, with all their codes; of a cell outside the panel there is no row
    compact_codes    every other cell, with its largest codes; there is no such table where the panel is all cells
    feature_cell     all cells: those with the largest codes of each feature
    feature_firing   all cells: in how many cells and tokens of each split each feature fires
    feature_token    all cells: the top-activating tokens of each feature
    top_cell_token   the tokens, in order, of the cell in which each feature fires most
    cells            all cells, with a column `panel`; `cell_tokens` has those that have tokens
    umap, features, feature_label, feature_number, feature_gene, feature_geneset
                     measured on the panel's cells
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property, wraps
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import polars as pl

from feature_store.cells import canonical_name
from feature_store.errors import NotFoundError, QueryError, StoreError
from feature_store.query.names import (
    MeantNames,
    gene_note,
    other_names,
    sets_note,
    symbols_of,
    without_version,
)
from feature_store.query.panel import Panel
from feature_store.query.runs import Lineage, lineage_of, plans_of
from feature_store.query.statements import check_statement
from feature_store.query.suggestions import closest_names, did_you_mean, join_names, names_with_words, same_but_for_case
from feature_store.query.tables import Tables
from feature_store.storage import schemas
from feature_store.storage.commit import Run, read_table
from feature_store.storage.layout import ASSOCIATION_TABLES, KINDS, SUMMARY, Layout
from feature_store.storage.obs_columns import column_of, find_column
from feature_store.storage.plans import AssociationsPlan, CellsPlan

if TYPE_CHECKING:
    import anndata

    from feature_store.query.anndata_parts import ExpressionValues

_NO_COLUMN = re.compile(r"(?:unable to find column|no column named) [\"']([^\"']+)[\"']")
_NO_TABLE = re.compile(r"relation '([^']+)' was not found")
MOST_SEARCHED = 20
"""Number of other associations that are searched for a name that the opened ones lack."""
CELLS_KEPT = 2_000_000
"""Largest number of rows of a cell table that is kept in memory from the second look-up on (a million cells of 15
columns take 80 MB and .21 s of CPU; without it, each look-up takes .14 s)."""
_TEXT_CONDITION = re.compile(r"\"?\b(\w+)\"?\s*(?:=|IN\s*\()\s*'([^']*)'", re.IGNORECASE)
_ABOUT_FEATURE = ("feature_id", "class", "density", "top_genes", "top_label")


P = ParamSpec("P")
_Query = Callable[Concatenate["FeatureStore", P], pl.DataFrame]


def _names_damage(query: _Query[P]) -> _Query[P]:
    """Wrap a method so that it raises IntegrityError where reading fails because parts are damaged or missing."""

    @wraps(query)
    def checked(store: "FeatureStore", /, *args: P.args, **kwargs: P.kwargs) -> pl.DataFrame:
        try:
            return query(store, *args, **kwargs)
        except (OSError, pl.exceptions.PolarsError) as error:
            store.raise_if_damaged(error)
            raise

    return checked


class FeatureStore:
    """A read-only view of one store, which `FeatureStore.open` makes.

    >>> store = FeatureStore.open("scsae-store")
    >>> store.features_for(label="CD19+ B")
    >>> store.sql("SELECT class, count(*) AS n FROM features GROUP BY class")
    """

    def __init__(self, layout: Layout, lineage: Lineage, *, named: Mapping[str, str | None] | None = None) -> None:
        self.layout = layout
        self.lineage = lineage
        self.named = dict(named or {})
        """The runs that were named when the store was opened, by parameter of `open`."""
        self._tables = Tables(layout, lineage)
        self._has_read_cells = False

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.layout.root)!r}, {', '.join(self.tables())})"

    def _repr_html_(self) -> str:
        from feature_store.query.described import described_tables
        from feature_store.query.html_table import html_table

        kinds = ("dataset", "sae", "codes", "associations")
        read = [(kind, run) for kind in kinds if (run := getattr(self.lineage, kind)) is not None]
        with suppress(StoreError):
            # what cannot be read is an error of the query that needs it, and not of a picture of the store
            read = [*read, *self._facts()]
        tables = described_tables(self.tables()).select("table", "row", "measured_on").rows()
        return html_table(f"store {self.layout.root}", read) + html_table(
            "tables", tables, ("table", "a row is", "measured on")
        )

    def _facts(self) -> list[tuple[str, str]]:
        """What a notebook shows of the store besides the names of the runs."""
        facts = []
        if "cells" in self._tables.folders:
            is_all = self.panel.n_panel == self.panel.n_cells
            facts.append(("cells", f"{self.panel.n_cells:,}" if is_all else self.panel.words))
        plan = plans_of(self.layout, self.lineage).get("saes", {})
        if {"model", "site", "sae"} <= plan.keys():
            of_model = f"{plan['sae']['n_features']:,} features of {plan['model']}, {plan['site']}"
            facts.append(("features", of_model))
        return facts

    def runs(self, kind: str | None = None) -> pl.DataFrame:
        """The runs of the store, or those of a kind, in any state, by kind and the newest of each first.

        >>> store.runs("saes")

        `state` is "complete", "incomplete" (the same command resumes it), "lost", "damaged" or "of another version";
        `control` names a baseline; `bytes` is the size of its tables. Raises InputError for an unknown kind.
        """
        from feature_store.query.run_list import run_list

        return run_list(self.layout, kind)

    @classmethod
    def open(
        cls,
        root: str | Path,
        *,
        associations: str | None = None,
        codes: str | None = None,
        dataset: str | None = None,
    ) -> "FeatureStore":
        """Open a store at its newest complete associations run, or at the runs that are named by their ids.

        >>> FeatureStore.open("scsae-store", associations="4f2a")

        The beginning of an id is enough. A control (a baseline, or the SAE of a model with random weights) is opened
        only if it is named. Runs that are not named follow from those that are: the codes of the associations, the
        newest associations of the codes or of the data set, and the data set of the codes, else the newest one. A kind
        of run that the store does not have yet gives no tables.

        Raises:
            NotFoundError: the store has no runs, a run is unknown, or the runs do not belong together.
        """
        layout = Layout(root)
        if not any(layout.runs(kind) for kind in KINDS):
            raise NotFoundError(no_runs(layout))
        named = {"associations": associations, "codes": codes, "dataset": dataset}
        return cls(layout, lineage_of(layout, **named), named=named)

    def renewed(self) -> "FeatureStore":
        """The store as it is now: this one if no run or table was added, taken away or made anew, else a new one.

        >>> store = store.renewed()

        Runs that were named when it was opened stay those. Two small files are read for a run, and one for a table.
        Raises as `open`.
        """
        found = FeatureStore.open(self.layout.root, **self.named)
        return self if found.state == self.state else found

    @cached_property
    def state(self) -> str:
        """A short text that differs where other runs are read, or a run of the same name was made anew."""
        return self._tables.state()

    def tables(self) -> list[str]:
        """The names of the tables that this store has, for example `['cells', 'codes', 'features']`."""
        return self._tables.names()

    def frame(self, table: str) -> pl.LazyFrame:
        """A table as a lazy frame, of which nothing is read until it is collected.

        >>> store.frame("features").filter(~pl.col("dead")).collect()

        Raises QueryError for an unknown table, with the nearest name or the command that makes it.
        """
        return self._tables.frame(table)

    def describe(self, table: str | None = None) -> pl.DataFrame:
        """What the columns of a table hold, with type and unit; without a table, what each table of this store holds.

        >>> store.describe("feature_label")

        Raises QueryError for an unknown table, with the nearest name or the command that makes it.
        """
        from feature_store.query.described import described_columns, described_tables

        if table is None:
            return described_tables(self.tables())
        return described_columns(table, self.frame(table).collect_schema())

    def panel_cells(self) -> pl.LazyFrame:
        """The cells that statistics are of: those of the panel (all cells of a data set that is not larger), without
        cells that have no tokens, such as empty droplets.

        >>> store.panel_cells().select(pl.len()).collect()

        Where the store has no codes, nothing says which cells have tokens, and all of the panel are there.
        """
        cells = self.frame("cells").filter("panel")
        if "cell_tokens" not in self.tables():
            return cells
        with_tokens = self._tables.panel_tokens().select("cell_idx")
        return cells.join(with_tokens, on="cell_idx", how="semi", maintain_order="left")

    @cached_property
    def panel(self) -> Panel:
        """How many cells the panel has, of how many, and how it was drawn.

        >>> store.panel.words
        'panel of 200,000 of 1,048,576 cells'

        Raises QueryError if the store has no cells.
        """
        n_panel = self.frame("cells").select(pl.col("panel").sum()).collect(engine="streaming").item()
        (folder,) = self._tables.folders["cells"]
        return Panel(
            n_panel=n_panel,
            n_cells=self._n_cells,
            keep=None if self.lineage.codes is None else self._tables.codes.plan.keep,
            drawn=None if n_panel == self._n_cells else CellsPlan.of(Run.open(folder)).panel,
        )

    def cells_at(self, cell_idx: pl.Series) -> pl.DataFrame:
        """The rows of the cell table of some cells, in any order, with a row for each that there is.

        >>> store.cells_at(pl.Series([3, 17]))
        """
        is_first, self._has_read_cells = not self._has_read_cells, True
        if is_first or self._n_cells > CELLS_KEPT:
            return self.frame("cells").filter(pl.col("cell_idx").is_in(cell_idx.implode())).collect()
        return self._kept_cells[cell_idx.filter(cell_idx < self._n_cells).to_list()]

    def made_by(self, table: str) -> str:
        """The command that makes a table, whether or not this store has it.

        >>> store.made_by("steering")
        'scsae steer --store scsae-store'

        Raises QueryError for an unknown table.
        """
        return self._tables.made_by(table)

    def raise_if_damaged(self, error: Exception) -> None:
        """Raise IntegrityError with the names of the parts that are missing or have another size, if there are any.

        Call it with the error of a frame that could not be collected.
        """
        self._tables.raise_if_damaged(error)

    @_names_damage
    def sql(self, query: str) -> pl.DataFrame:
        """The result of a SELECT over the tables, in the SQL of Polars.

        >>> store.sql("SELECT feature_id, auroc FROM feature_label WHERE label = 'CD19+ B' ORDER BY auroc DESC LIMIT 5")

        Raises:
            QueryError: a table or column is unknown (the nearest names are given), the syntax is wrong, or the
                statement does anything but read these tables (`feature_store.query.statements`).
            IntegrityError: a table that the query names was committed and is gone, or a part of it is missing or has
                other bytes than were committed. Of parts of more than 256 MB, and on object storage, only the size and
                the end are compared here; `scsae verify` hashes every part.
        """
        check_statement(query)
        try:
            return pl.SQLContext(self._frames_for(query), eager=True).execute(query)
        except pl.exceptions.PolarsError as error:
            self.raise_if_damaged(error)
            raise QueryError(self._explain(str(error), query)) from error

    def _frames_for(self, query: str) -> dict[str, pl.LazyFrame]:
        """A frame of each table, empty where the text of the query does not hold its name: it is not opened then."""
        return {
            table: self.frame(table) if table.lower() in query.lower() else pl.LazyFrame() for table in self.tables()
        }

    def _tables_in(self, query: str) -> list[str]:
        """The tables whose names are in the text of a query."""
        return [table for table in self.tables() if re.search(rf"\b{table}\b", query, re.IGNORECASE)]

    def why_empty(self, query: str) -> str:
        """Why a query found no rows: the first text in it that its column does not hold, with the nearest values.

        >>> store.why_empty("SELECT * FROM feature_label WHERE label = 'CD19 B'")
        "no label is 'CD19 B' in feature_label; did you mean 'CD19+ B'?"

        It looks for `column = 'text'` in the text of the query and does not parse it.
        """
        for column, text in _TEXT_CONDITION.findall(query):
            tables = self._tables_in(query)
            known = {table: self._values(table, column) for table in tables if self._is_text(table, column)}
            if known and not any(text in values for values in known.values()):
                values = sorted({value for values in known.values() for value in values})
                near, where = did_you_mean(text, values, n=3), [table for table in known if table in ASSOCIATION_TABLES]
                elsewhere = self.elsewhere(where[0], column, text) if where else ""
                return f"no {column} is {text!r} in {', '.join(known)}{near}{elsewhere}"
        if "compact_codes" in self.tables() and re.search(r"\bcodes\b", query, re.IGNORECASE):
            return (
                f"no row meets all the conditions; codes has the {self.panel.words}, and compact_codes the largest "
                "codes of each other cell"
            )
        return "no row meets all the conditions"

    @_names_damage
    def features_for(
        self,
        *,
        gene: str | None = None,
        label: str | None = None,
        gene_set: str | None = None,
        number: str | None = None,
        kind: str | None = None,
    ) -> pl.DataFrame:
        """The features of one gene, label, gene set or number of the cells, the strongest first, with class and genes.

        >>> store.features_for(label="CD19+ B")
        >>> store.features_for(gene="MS4A1").head(5)
        >>> store.features_for(number="pct_mito")

        Features of a label are ranked by AUROC, those of a gene by the correlation of the cell code with its
        expression, those of a gene set by p, and those of a number by Spearman's correlation within donors. The rank is
        that on `select` cells (column `select_auroc`, for example), and the other columns are measured on `test` cells,
        because the best of many is flattered on the cells on which it was chosen. `holds_on_test` says whether the
        association is significant on `test` cells (q <= 0.05) and has the direction of `select` cells. Upper and lower
        case do not matter.
        `kind`, the label_kind of a label or the collection of a gene set, tells two of the same name apart. A gene may
        be given by another name of it (CD20, ENSG00000156738), and gene sets by words in their names: `meant_by` says
        what is taken.

        Raises:
            QueryError: not exactly one name is given, or the name is unknown, ambiguous, or not measured on `test`
                cells.
        """
        given = {"gene": gene, "label": label, "gene_set": gene_set, "number": number}
        named = {column: name for column, name in given.items() if name is not None}
        if len(named) != 1:
            raise QueryError(f"give exactly one of gene, label, gene_set and number; got {', '.join(named) or 'none'}")
        column, name = next(iter(named.items()))
        table, key, descending = RANKED_BY[column]
        if column == "label":
            name = canonical_name(name) or name
        found = _of_one_kind(self._rows_about(table, column, name), column, name, kind)
        if "split" in found.columns:
            if "test" not in (splits := found["split"].unique().to_list()):
                raise QueryError(
                    f"{column} {name!r} is measured on {join_names(splits)} cells but not on test cells; its rows: "
                    f"`SELECT * FROM {table}`"
                )
            named_by = ("feature_id", "label_kind", "label", "gene", "collection", "gene_set", "number")
            names = [n for n in named_by if n in found]
            chosen = found.filter(pl.col("split") == "select").select(*names, pl.col(key).alias(f"select_{key}"))
            found = found.filter(pl.col("split") == "test").join(chosen, on=names, how="left")
            if "q" in found.columns:
                # not above: `sql` needs no statistics
                from feature_store.associations.claims import is_significant, keeps_side

                side = keeps_side(f"select_{key}", key, CHANCE[column]) if column in CHANCE else pl.lit(value=True)
                found = found.with_columns(holds_on_test=is_significant() & side)
            key = f"select_{key}"
        return self._describe(found.sort(key, "feature_id", descending=[descending, False], nulls_last=True))

    @_names_damage
    def top_cells(self, feature: int, n: int = 20) -> pl.DataFrame:
        """The n cells with the largest code of a feature among all cells, with their columns of the cell table.

        >>> store.top_cells(17, n=5)

        This reads a row group of the table `feature_cell`. Raises QueryError for a feature that the codes do not have,
        and for more cells than are kept of a feature, unless the panel holds all cells.
        """
        self.check_feature(feature)
        top = self._tables.codes.top_cells(feature, n)
        if "cells" not in self._tables.folders:
            return top
        return top.join(self.cells_at(top["cell_idx"]), on="cell_idx", how="left", maintain_order="left")

    @_names_damage
    def codes_of(self, feature: int) -> pl.DataFrame:
        """cell_idx and value of the panel's cells in which a feature fires, by cell.

        >>> store.codes_of(17)["value"].mean()

        Raises QueryError for a feature that the codes do not have.
        """
        self.check_feature(feature)
        return self._tables.codes.codes_of(feature)

    @_names_damage
    def codes_between(self, start: int, stop: int) -> pl.DataFrame:
        """feature_id, cell_idx and value of the panel's cells in which the features start to stop - 1 fire, by feature
        and cell.

        >>> store.codes_between(0, 16).group_by("feature_id").len()

        Raises QueryError for a feature that the codes do not have.
        """
        self.check_feature(start)
        self.check_feature(stop - 1)
        return self._tables.codes.codes_between(start, stop)

    @_names_damage
    def features_of(self, cell: int | str, n: int = 20) -> pl.DataFrame:
        """The n features with the largest code in a cell, each with class and top genes.

        >>> store.features_of("AAACATTGAGCTAC-1", n=5)  # the cell of this cell_id
        >>> store.features_of(17)  # the cell at this place, its cell_idx; "17" is a cell_id

        This reads one row group of the one part that holds the cell. Where the panel is not all cells, the column `of`
        says of what the n are the largest: "all codes" of a cell of the panel, and, for example, "256 largest codes" of
        any other, of which no more are kept. Raises QueryError for a cell that is not in the cell table.
        """
        codes, place = self._tables.codes, self._cell_idx(cell)
        found = codes.features_of(place).head(n)
        if not codes.of_all_cells:
            in_panel = self.frame("cells").filter(pl.col("cell_idx") == place).select("panel").collect().item()
            found = found.with_columns(of=pl.lit("all codes" if in_panel else f"{codes.plan.keep} largest codes"))
        return self._describe(found)

    def provenance(self) -> dict[str, Any]:
        """Where the tables come from: the ids of the runs, the sha256 of the manifest of each table, and the plans from
        the activations (with model and data set) to the associations.

        >>> store.provenance()["runs"]
        """
        return {
            "runs": {kind: run for kind, run in asdict(self.lineage).items() if isinstance(run, str)},
            "manifests": self._tables.manifests(),
            "plans": plans_of(self.layout, self.lineage),
        }

    def sae_facts(self, sae: str | None = None) -> dict[str, Any]:
        """The run, the plan and, under `summary`, the metrics on held-out tokens of the SAE of the codes, or of another
        SAE of the store by its id.

        >>> store.sae_facts()["summary"]["test_fvu"]

        The plan holds the model, site, data set, and the options `sae` and `train`; that of a baseline has `control`
        instead of `train`. Raises NotFoundError if the codes name no SAE or it was deleted, and IntegrityError if one
        of its files is missing.
        """
        sae = sae or self.lineage.sae
        if sae is None or not self.layout.is_present(self.layout.saes_dir(sae)):
            raise NotFoundError(
                f"{self.layout.root} has no SAE {sae or 'that its codes name'}; train one with "
                f"`{self.made_by('training')}`"
            )
        run = Run.open(self.layout.saes_dir(sae))
        return {"run": sae, **run.plan, "summary": run.read_json(SUMMARY)}

    def to_anndata(
        self,
        *,
        cells: pl.Expr | Sequence[int | str] | None = None,
        features: Sequence[int] | None = None,
        tables: Sequence[str] | None = None,
        key: str = "X_sae",
        X: "ExpressionValues | None" = "lognorm",
        model: bool = True,
        features_as_var: bool = False,
    ) -> "anndata.AnnData":
        """The cells with expression, codes, map and annotations as an AnnData, for scanpy, cellxgene, or `.write_h5ad`.

        >>> adata = store.to_anndata(cells=pl.col("split") == "test", features=[17, 256])
        >>> sc.pl.umap(adata, color=["cell_type", "MS4A1"])
        >>> sc.tl.rank_genes_groups(store.to_anndata(features_as_var=True), "cell_type")

        - `X` holds the genes, and `var` the table of genes, named by symbol.
        - `obs` is the cell table, indexed by cell_id, or by cell_idx where ids repeat.
        - `obsm[key]` holds the codes, sparse [n_cells n_features]; those of a cell outside the panel (obs `panel` is
          False) are its largest, and its smaller ones are 0 there.
        - `obsm["X_umap"]` holds the map of the codes, where it was drawn (`scsae serve`, `scsae plot umap`), and
          `obsm["X_model"]` the mean activation of each cell, where activations of these cells are stored. A cell that
          the map or a sample of activations lacks is NaN there.
        - `uns["sae"]` (`key` without its "X_") holds the tables about features, where `features` has a row for each
          column of the codes, and the provenance with its plans as JSON.

        X and codes are sparse. Memory: 8 bytes a value of X and a code, 4 bytes a number of `X_model`, and more while
        they are put together.

        Args:
            cells: a condition on the cell table, or cell_idx (numbers) or cell_id (texts) in the order wanted; default:
                all.
            features: feature ids in the order wanted; default: all.
            tables: the tables about features to include; default: all that associations made.
            key: the name of the codes in `obsm`.
            X: "lognorm" for log1p of counts per 10,000, "counts" for the values of the data, None for no genes. The
                files of the data set are read again for counts, and for cells whose expression is not in the store.
            model: whether there is `obsm["X_model"]`; for tokens, all their activations are read (.3 GB a second).
            features_as_var: put the codes into `X` and the table of features into `var`, named "feature 17", instead of
                the genes; there is no `obsm[key]` then.

        Raises:
            NotFoundError: the store has no codes.
            QueryError: a cell, feature or table is unknown, the condition is invalid, or X cannot be had: the data hold
                no counts, or their files are gone or changed.
        """
        from feature_store.cells import to_anndata
        from feature_store.codes import load_cell_codes
        from feature_store.query.anndata_parts import gene_matrix, map_of_cells, vectors_of_model

        codes = self._tables.codes
        wanted = [int(feature) for feature in (range(codes.n_features) if features is None else features)]
        for feature in wanted:
            self.check_feature(feature)
        obs = self._chosen_cells(cells)
        places, dataset = obs["cell_idx"].to_numpy(), codes.plan.dataset
        order = pl.DataFrame({"feature_id": wanted}, schema={"feature_id": pl.Int32})
        about = self._tables_about(order, tables)
        found = load_cell_codes(codes.run, places)[:, wanted]
        values, var, names = None, None, None
        if features_as_var:
            values, var, names = found, self._features_as_var(order), pl.Series([f"feature {one}" for one in wanted])
        elif X is not None:
            values, var = gene_matrix(self.layout, dataset, places, X), self.frame("genes").sort("gene_idx").collect()
            names = var["symbol"]
        obsm: dict[str, Any] = {} if features_as_var else {key: found}
        # the map may have been drawn since the store was opened
        if self.layout.is_present(map_dir := self.layout.umap_dir(codes.folder.name)):
            obsm["X_umap"] = map_of_cells(read_table(map_dir), places)
        if model and (vectors := vectors_of_model(self.layout, self.lineage.sae, dataset, places)) is not None:
            obsm["X_model"] = vectors
        provenance = self.provenance()
        return to_anndata(
            obs,
            X=values,
            var=var,
            var_names=names,
            obsm=obsm,
            uns={
                key.removeprefix("X_"): {
                    **about,
                    "feature_id": order["feature_id"].to_numpy(),
                    "provenance": {**provenance, "plans": json.dumps(provenance["plans"], sort_keys=True)},
                }
            },
        )

    def _tables_about(self, order: pl.DataFrame, tables: Sequence[str] | None) -> dict[str, pl.DataFrame]:
        """The rows about some features of the tables named, or of all that associations made; `features` in order."""
        about_features = [table for table in ASSOCIATION_TABLES if "feature_id" in schemas.schema(table).columns]
        known = [table for table in about_features if table in self._tables.folders]
        about = {}
        for table in known if tables is None else tables:
            if "feature_id" not in self.frame(table).collect_schema():
                raise QueryError(f"table {table!r} is not about features; allowed are {', '.join(known)}")
            rows = self.frame(table).filter(pl.col("feature_id").is_in(order["feature_id"].implode())).collect()
            joined = order.join(rows, on="feature_id", how="left", maintain_order="left")
            about[table] = joined if table == "features" else rows
        return about

    def _features_as_var(self, order: pl.DataFrame) -> pl.DataFrame:
        """The table of features in an order, as far as there is one. QueryError for a feature that is there twice."""
        if not order["feature_id"].is_unique().all():
            raise QueryError(f"features were {order['feature_id'].to_list()}; as var, give each once")
        return self._tables_about(order, ["features"])["features"] if "features" in self._tables.folders else order

    def _chosen_cells(self, cells: pl.Expr | Sequence[int | str] | None) -> pl.DataFrame:
        """The rows of the cell table that meet a condition, or those of cell_idx (numbers) or cell_id (texts) in the
        order given.
        """
        table = self.frame("cells")
        if cells is None or isinstance(cells, pl.Expr):
            try:
                return (table if cells is None else table.filter(cells)).collect()
            except pl.exceptions.PolarsError as error:
                raise QueryError(self._explain(str(error), "cells")) from error
        indices = [self._cell_idx(cell) for cell in cells]
        chosen = pl.DataFrame({"cell_idx": indices}, schema={"cell_idx": pl.Int64})
        rows = self.cells_at(chosen["cell_idx"].unique())
        return chosen.join(rows, on="cell_idx", how="left", maintain_order="left")

    def check_feature(self, feature: int) -> None:
        """Raise QueryError for a feature that the codes do not have.

        >>> store.check_feature(17)
        """
        if not 0 <= feature < self._tables.codes.n_features:
            raise QueryError(
                f"no feature {feature} in codes {self.lineage.codes} (data set {self.lineage.dataset}), which have "
                f"features 0 to {self._tables.codes.n_features - 1}{self.elsewhere('features', 'feature_id', feature)}"
            )

    @cached_property
    def _n_cells(self) -> int:
        """Number of cells of the data set; cell_idx runs from 0 to one less."""
        (folder,) = self._tables.folders["cells"]
        return Run.open(folder).manifest().rows

    @cached_property
    def _kept_cells(self) -> pl.DataFrame:
        return self.frame("cells").collect()

    @cached_property
    def _about_features(self) -> pl.DataFrame:
        return self.frame("features").select(_ABOUT_FEATURE).collect()

    def meant_by(self, column: str, name: str) -> MeantNames:
        """The names that a gene, label, gene set or number has in this store, and a sentence on what was taken.

        >>> store.meant_by("gene", "CD20")
        MeantNames(names=('MS4A1',), note='CD20 is another name of MS4A1, whose features are shown')

        A name is taken as it is where it is there, else in another case if one name only differs by it; of genes, by
        another name of the gene (`feature_store.query.names`) or its Ensembl id; of gene sets, all that have its words
        in their names. Raises QueryError for a name that means nothing here, with the nearest ones, and for one that
        several genes have.
        """
        table = RANKED_BY[column][0]
        rows = self.frame(table)
        if not rows.filter(pl.col(column) == name).head(1).collect().is_empty():
            return MeantNames((name,))
        known = self._values(table, column)
        same = same_but_for_case(name, known)
        if len(same) == 1:
            return MeantNames((same[0],))
        if column == "gene" and (genes := self._genes_called(name, set(known))):
            if len(genes) > 1:
                raise QueryError(f"{name} is another name of {' and '.join(genes)}; name one of them")
            return MeantNames(genes, gene_note(name, genes[0]))
        if column == "gene_set" and (sets := names_with_words(name, known)):
            return MeantNames(tuple(sets), sets_note(name, sets))
        raise QueryError(self._unknown(table, column, name, known))

    def _genes_called(self, name: str, known: set[str]) -> tuple[str, ...]:
        """The genes of the table `feature_gene` that have another name, or an Ensembl id."""
        if "genes" in self.tables():
            of_id = self.frame("genes").filter(pl.col("ensembl_id") == without_version(name)).select("symbol")
            if found := [symbol for symbol in of_id.collect()["symbol"].to_list() if symbol in known]:
                return tuple(dict.fromkeys(found))
        return other_names(name, known)

    def _unknown(self, table: str, column: str, name: str, known: list[str]) -> str:
        """The message about a name that a table does not have."""
        other = "number" if column == "label" else "label_kind" if column == "number" else None
        of_number = other == "number" and name in self._values("feature_number", other)
        hint = f"; it is a number of the cells: ask for it with number {name!r}" if of_number else ""
        if column == "gene" and (symbols := symbols_of(name)):
            hint = f"; its other names ({join_names(symbols)}) are not there either"
        if column == "gene_set" and not known:
            hint = "; no set that was tested shares a gene with any feature: `scsae associate --gmt FILE` tests others"
        near, elsewhere, has = did_you_mean(name, known, n=3), self.elsewhere(table, column, name), join_names(known)
        return f"no {column} {name!r} in {table} of {self._asked}{near}{hint}{elsewhere}; it has {has or 'none'}"

    @property
    def _asked(self) -> str:
        """The runs that an answer about features is of, in words."""
        return f"associations {self.lineage.associations} (data set {self.lineage.dataset})"

    def elsewhere(self, table: str, column: str, value: str | int) -> str:
        """Which other associations of the store have a value in a column of a table, for the message of an error; empty
        where none of the MOST_SEARCHED newest has it.

        >>> store.elsewhere("feature_label", "label", "CD19+ B")
        '; other associations have it: --associations 4f2a81c09d11 (data set pbmc68k_reduced-6f7c3f)'

        Upper and lower case do not matter. Controls are not searched.
        """
        known = pl.col(column)
        known = known.str.to_lowercase() == value.lower() if isinstance(value, str) else known == value
        found = []
        runs = [info.run for info in self.layout.runs("associations") if info.complete]
        for run in [run for run in runs if run != self.lineage.associations][:MOST_SEARCHED]:
            # what cannot be read is no reason not to name the others
            with suppress(StoreError, OSError, pl.exceptions.PolarsError):
                plan = AssociationsPlan.of(Run.open(self.layout.associations_dir(run) / "features"))
                other = FeatureStore.open(self.layout.root, associations=run)
                if plan.control_of is None and other.frame(table).filter(known).head(1).collect().height:
                    found.append(f"--associations {run} (data set {plan.dataset})")
        return f"; other associations have it: {' or '.join(found[:3])}" if found else ""

    def _rows_about(self, table: str, column: str, name: str) -> pl.DataFrame:
        """The rows of a table about the names that a name means."""
        meant = self.meant_by(column, name)
        return self.frame(table).filter(pl.col(column).is_in(meant.names)).collect()

    def _is_text(self, table: str, column: str) -> bool:
        return self.frame(table).collect_schema().get(column) == pl.String

    def _values(self, table: str, column: str) -> list[str]:
        return self.frame(table).select(pl.col(column).drop_nulls().unique()).collect()[column].to_list()

    def _cell_idx(self, cell: int | str) -> int:
        """The cell_idx of a cell that is named by its cell_id, a text, or by its place, a whole number."""
        if isinstance(cell, str):
            return self._cell_named(cell)
        try:
            place = index(cell)
        except TypeError as error:
            raise QueryError(
                f"a cell was {cell!r}; give a cell_id as a text or a cell_idx as a whole number"
            ) from error
        if not 0 <= place < self._n_cells:
            raise QueryError(
                f"no cell has cell_idx {place}; those of data set {self.lineage.dataset} are 0 to {self._n_cells - 1}"
            )
        return place

    def _cell_named(self, name: str) -> int:
        cells = self.frame("cells").select("cell_idx", "cell_id")
        cell_id = pl.col("cell_id")
        found = cells.filter(cell_id == name).collect()["cell_idx"].to_list()
        if len(found) == 1:
            return int(found[0])
        if found:
            raise QueryError(
                f"{len(found)} cells have cell_id {name!r}; give the cell_idx of one (--cell-idx): {join_names(found)}"
            )
        # the same barcode with a longer or shorter prefix or suffix
        alike = cell_id.str.to_lowercase().str.contains(name.lower(), literal=True)
        alike |= pl.lit(name.lower()).str.contains(cell_id.str.to_lowercase(), literal=True)
        hint = did_you_mean(name, cells.filter(alike).head(3).collect()["cell_id"].to_list(), n=3)
        raise QueryError(
            f"no cell of data set {self.lineage.dataset} has cell_id {name!r}{hint}; a cell can be named by its place "
            f"as well, cell_idx 0 to {self._n_cells - 1} (--cell-idx)"
        )

    def _describe(self, found: pl.DataFrame) -> pl.DataFrame:
        if "features" not in self._tables.folders:
            return found
        about = self._about_features
        about = about.select("feature_id", *(name for name in _ABOUT_FEATURE[1:] if name not in found.columns))
        return found.join(about, on="feature_id", how="left", maintain_order="left")

    def _explain(self, message: str, query: str) -> str:
        """The message about a query that failed, from that of Polars; of a query over the cells alone it is "cells"."""
        message = message.split("\n\n")[0].strip()
        if no_table := _NO_TABLE.search(message):
            name = no_table[1]
            return self._tables.no_table(name)
        if no_column := _NO_COLUMN.search(message):
            name = no_column[1]
            columns: dict[str, list[str]] = {}
            for table in self.tables():
                with suppress(StoreError):
                    # a damaged table is no reason not to name the columns of the others
                    columns[table] = self.frame(table).collect_schema().names()
            of_obs = [column_of(name)] if column_of(name) in columns.get("cells", []) else []
            alike = of_obs or closest_names(name, sorted({c for names in columns.values() for c in names}))
            places = [f"{c} ({', '.join(t for t, names in columns.items() if c in names)})" for c in alike]
            if places:
                return (
                    f"no column {name!r}; did you mean {' or '.join(places)}? `scsae describe TABLE` lists the columns"
                )
            has = [f"{t} has {', '.join(columns[t])}" for t in self._tables_in(query) if t in columns]
            return f"no column {name!r}; {'; '.join(has) or '`scsae describe TABLE` lists those of a table'}"
        return f"the query failed: {message}"


def no_runs(layout: Layout) -> str:
    """The message about a store that holds nothing: where was looked, and what may be wrong."""
    there = "holds no run of scsae" if layout.root.exists() else "does not exist"
    return (
        f"there is no store to read: {layout.root.absolute()} {there}; is the path right (--store, $SCSAE_STORE)? "
        f"`scsae demo {layout.store_option}` fills a new store"
    )


def _of_one_kind(found: pl.DataFrame, column: str, name: str, kind: str | None) -> pl.DataFrame:
    """The rows of one label or gene set, chosen by `kind` if several kinds or collections have its name."""
    of = KIND_OF.get(column)
    if of is None:
        if kind is not None:
            raise QueryError(f"a {column} has no kind; leave out --kind {kind!r}, or ask for a label or a gene set")
        return found
    kinds = found[of].unique().to_list()
    # of several gene sets that a word names, all are shown
    if kind is None and len(kinds) > 1 and found[column].n_unique() == 1:
        raise QueryError(
            f"{column} {name!r} is in {len(kinds)} values of {of}: {join_names(kinds)}; choose one with --kind"
        )
    kind = kind if kind is None or column == "gene_set" else find_column(kind, kinds) or kind
    if kind is not None and kind not in kinds:
        raise QueryError(
            f"no {column} {name!r} in {of} {kind!r}{did_you_mean(kind, kinds)}; it is in {join_names(kinds)}"
        )
    return found if kind is None else found.filter(pl.col(of) == kind)


RANKED_BY: Mapping[str, tuple[str, str, bool]] = {
    "gene": ("feature_gene", "pearson", True),
    "label": ("feature_label", "auroc", True),
    "gene_set": ("feature_geneset", "p", False),
    "number": ("feature_number", "spearman", True),
}
"""For each kind of look-up: the table, the column that ranks the features, and whether the largest is first."""
CHANCE: Mapping[str, float] = {"gene": 0.0, "label": 0.5, "number": 0.0}
"""The value of the column that ranks the features without any association; the p of a gene set has no direction."""
KIND_OF: Mapping[str, str] = {"label": "label_kind", "gene_set": "collection"}
"""The column that tells two labels, or two gene sets, of the same name apart."""
