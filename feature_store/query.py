"""Questions to a store: lazy Polars frames under the tables' names, SQL over them, and the everyday look-ups.

`FeatureStore.open` settles once what is read (its `lineage`): an associations run, the codes run and the data set that
it came from; their parts are those of finished manifests, so a writer beside it changes nothing. Nothing is ever
written. A look-up by feature or by cell opens only the part of the right sort order that the manifest names: 9 ms warm
at 6M nonzeros on a busy machine; SQL over `codes` by feature reads them all (170 ms), as `codes` is sorted by cell.

In SQL the tables are `cells`, `genes`, `codes`, `features`, `feature_label`, `feature_gene`, `feature_geneset`,
`feature_token` and `steering`: those of them that the store has.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import polars as pl

from feature_store.commit import Run, ShardMarker
from feature_store.errors import IntegrityError, NotFoundError, QueryError
from feature_store.files import REPAIR, parquet_source, scan_source, size_bytes
from feature_store.layout import ASSOCIATION_TABLES, KINDS, Layout, RunInfo

_READS_ONLY = re.compile(r"\s*(?:SELECT|WITH|SHOW|EXPLAIN|FROM|\()", re.IGNORECASE)
_READS_FILES = re.compile(r"\bread_(?:csv|ipc|json|ndjson|parquet)\s*\(", re.IGNORECASE)
_NO_COLUMN = re.compile(r"(?:unable to find column|no column named) [\"']([^\"']+)[\"']")
_NO_TABLE = re.compile(r"relation '([^']+)' was not found")
_ABOUT_FEATURE = ("feature_id", "class", "density", "top_genes", "top_label")


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The runs that a FeatureStore reads; None where the store has none yet."""

    dataset: str | None
    codes: str | None
    associations: str | None
    steering: tuple[str, ...]


P = ParamSpec("P")
_Method = Callable[Concatenate["FeatureStore", P], pl.DataFrame]


def _naming_damage(ask: _Method[P]) -> _Method[P]:
    """Answer, or name the damaged parts where reading failed because of them."""

    @wraps(ask)
    def asked(store: "FeatureStore", /, *args: P.args, **kwargs: P.kwargs) -> pl.DataFrame:
        try:
            return ask(store, *args, **kwargs)
        except (OSError, pl.exceptions.PolarsError) as error:
            store._refuse_damage(error)
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
        self._frames: dict[str, pl.LazyFrame] = {}

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
        """Open a store at its newest complete associations run, or at the runs named (ids, or their beginnings).

        The codes run is the one in that run's plan (key `codes`), else the newest; the data set the one in the codes'
        plan (key `dataset`), else the only one. Kinds that the store does not have yet simply give no tables.
        NotFoundError for a root without any run, an unknown run, or several data sets of which none is named.
        """
        layout = Layout(root)
        if not any(layout.runs(kind) for kind in KINDS):
            raise NotFoundError(f"{layout.root} holds no runs; make some with `scsae demo --store {layout.root}`")
        chosen = _choose(layout, "associations", associations)
        plan = _plan_of(chosen)
        chosen_codes = _choose(layout, "codes", codes or plan.get("codes"))
        plan = {**_plan_of(chosen_codes), **plan}
        steering = tuple(info.run for info in layout.runs("steering") if info.complete)
        lineage = Lineage(
            dataset=_choose_dataset(layout, dataset or plan.get("dataset")),
            codes=chosen_codes.run if chosen_codes else None,
            associations=chosen.run if chosen else None,
            steering=steering,
        )
        return cls(layout, lineage)

    def tables(self) -> list[str]:
        """Names of the tables that this store has."""
        return list(self._folders)

    def frame(self, table: str) -> pl.LazyFrame:
        """A table as a lazy frame; nothing is read until it is collected. QueryError with the nearest name."""
        if table not in self._folders:
            raise QueryError(self._no_table(table))
        if table not in self._frames:
            self._frames[table] = self._scan(table)
        return self._frames[table]

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
            self._refuse_damage(error)
            raise QueryError(self._explain(str(error))) from error

    @_naming_damage
    def features_for(
        self, *, gene: str | None = None, label: str | None = None, gene_set: str | None = None
    ) -> pl.DataFrame:
        """Features that go with one gene, label or gene set, strongest first, each with its class and genes.

        A label: by AUROC. A gene: by the correlation of the cell code with its expression. A gene set: by p. They are
        ranked on `select` cells (column `select_auroc`, ...) and the figures shown are those of `test` cells: the best
        of many on the cells it is reported on would be flattered. QueryError if not exactly one is given, or the name
        is not in the table.
        """
        given = {"gene": gene, "label": label, "gene_set": gene_set}
        asked = {column: name for column, name in given.items() if name is not None}
        if len(asked) != 1:
            raise QueryError(f"ask for one of gene, label and gene_set; got {', '.join(asked) or 'none'}")
        column, name = next(iter(asked.items()))
        table, key, descending = _ASKED[column]
        found = self.frame(table).filter(pl.col(column) == name).collect()
        if found.is_empty():
            known = self.frame(table).select(pl.col(column).unique()).collect()[column].to_list()
            raise QueryError(f"no {column} {name!r} in {table}{_did_you_mean(name, known)}; it has {_some(known)}")
        if "split" in found.columns:
            names = [n for n in ("feature_id", "label_kind", "label", "gene", "collection", "gene_set") if n in found]
            chosen = found.filter(pl.col("split") == "select").select(*names, pl.col(key).alias(f"select_{key}"))
            found = found.filter(pl.col("split") == "test").join(chosen, on=names, how="left")
            key = f"select_{key}"
        return self._describe(found.sort(key, "feature_id", descending=[descending, False], nulls_last=True))

    @_naming_damage
    def top_cells(self, feature: int, n: int = 20) -> pl.DataFrame:
        """The n cells with the largest code of a feature, with their columns of the cell table.

        Reads the one part of codes/by_feature that holds the feature. QueryError for a feature that the codes do not
        have.
        """
        run = self._codes_run("by_feature")
        self._check_feature(feature, run)
        found = _read_where(run, "feature_id", feature)
        if "token_pos" in found.columns:
            found = found.group_by("cell_idx", maintain_order=True).agg(pl.col("value").max())
        top = found.select("cell_idx", "value").sort("value", "cell_idx", descending=[True, False]).head(n)
        if "cells" not in self._folders:
            return top
        cells = self.frame("cells").filter(pl.col("cell_idx").is_in(top["cell_idx"].implode())).collect()
        return top.join(cells, on="cell_idx", how="left", maintain_order="left")

    @_naming_damage
    def features_of(self, cell: int | str, n: int = 20) -> pl.DataFrame:
        """The n features with the largest code in a cell (its cell_idx, or its cell_id), each with class and genes.

        Reads the one part of codes/by_cell that holds the cell. QueryError for a cell that is not in the cell table.
        """
        run = self._codes_run("by_cell")
        found = _read_where(run, "cell_idx", self._cell_idx(cell))
        if "token_pos" in found.columns:
            found = found.group_by("feature_id", maintain_order=True).agg(pl.col("value").max())
        found = found.select(pl.col("feature_id").cast(pl.Int32), "value")
        return self._describe(found.sort("value", "feature_id", descending=[True, False]).head(n))

    @cached_property
    def _folders(self) -> dict[str, list[Path]]:
        """The run folders of each table; several for steering alone."""
        layout, lineage = self.layout, self.lineage
        folders: dict[str, list[Path]] = {}
        if lineage.dataset is not None:
            folders["cells"] = [layout.cells_dir(lineage.dataset)]
            if layout.genes_dir(lineage.dataset).exists():
                folders["genes"] = [layout.genes_dir(lineage.dataset)]
        if lineage.codes is not None:
            folders["codes"] = [layout.codes_dir(lineage.codes) / "by_cell"]
        if lineage.associations is not None:
            folder = layout.associations_dir(lineage.associations)
            folders |= {table: [folder / table] for table in ASSOCIATION_TABLES}
        if lineage.steering:
            folders["steering"] = [layout.steering_dir(run) / "results" for run in lineage.steering]
        return folders

    def _scan(self, table: str) -> pl.LazyFrame:
        folders = self._folders[table]
        if table == "codes":
            return _scan(folders[0], feature_id=pl.Int32)
        if table == "steering":
            frames = [_scan(folder).with_columns(pl.lit(folder.parent.name).alias("run")) for folder in folders]
            return pl.concat(frames, how="diagonal_relaxed")
        return _scan(folders[0])

    def _refuse_damage(self, error: Exception) -> None:
        """IntegrityError naming the parts that are missing or not of their size, if any is."""
        damaged = []
        for folder in {folder for folders in self._folders.values() for folder in folders}:
            run = Run.open(folder)
            for marker in run.manifest().shards:
                if size_bytes(run.part(marker.shard)) != marker.bytes:
                    damaged.append(str(run.part(marker.shard)))
        if damaged:
            raise IntegrityError(f"damaged or missing: {', '.join(sorted(damaged))}; {REPAIR}") from error

    def _no_table(self, name: str) -> str:
        known = ", ".join(self.tables())
        if name in _MADE_BY:
            return f"no table {name!r} yet: `{_MADE_BY[name]} --store {self.layout.root}` makes it; tables: {known}"
        return f"no table {name!r}{_did_you_mean(name, self.tables())}; tables: {known}"

    def _codes_run(self, order: str) -> Run:
        if self.lineage.codes is None:
            raise NotFoundError(
                f"{self.layout.root} has no codes; make them with `scsae encode --store {self.layout.root}`"
            )
        return Run.open(self.layout.codes_dir(self.lineage.codes) / order)

    def _check_feature(self, feature: int, run: Run) -> None:
        n_features = run.plan["n_features"]
        if not 0 <= feature < n_features:
            raise QueryError(f"no feature {feature}; the codes have features 0 to {n_features - 1}")

    def _cell_idx(self, cell: int | str) -> int:
        cells = self.frame("cells")
        column = "cell_idx" if isinstance(cell, int) else "cell_id"
        found = cells.filter(pl.col(column) == cell).select("cell_idx").collect()["cell_idx"].to_list()
        if len(found) == 1:
            return int(found[0])
        if found:
            raise QueryError(f"cell_id {cell!r} is of {len(found)} cells; ask by cell_idx: {_some(found)}")
        n_cells = cells.select(pl.len()).collect().item()
        raise QueryError(f"no cell {cell!r}; data set {self.lineage.dataset} has cell_idx 0 to {n_cells - 1}")

    def _describe(self, found: pl.DataFrame) -> pl.DataFrame:
        if "features" not in self._folders:
            return found
        about = self.frame("features").select(_ABOUT_FEATURE).collect()
        about = about.select("feature_id", *(name for name in _ABOUT_FEATURE[1:] if name not in found.columns))
        return found.join(about, on="feature_id", how="left", maintain_order="left")

    def _explain(self, message: str) -> str:
        message = message.split("\n\n")[0].strip()
        if no_table := _NO_TABLE.search(message):
            name = no_table[1]
            return self._no_table(name)
        if no_column := _NO_COLUMN.search(message):
            name = no_column[1]
            columns = {table: self.frame(table).collect_schema().names() for table in self.tables()}
            near = difflib.get_close_matches(name, {c for names in columns.values() for c in names}, n=3, cutoff=0.5)
            places = [f"{c} ({', '.join(t for t, names in columns.items() if c in names)})" for c in near]
            hint = f"; near ones: {', '.join(places)}" if places else ""
            return f"no column {name!r}{hint}; `SELECT * FROM features LIMIT 1` shows what a table has"
        return f"the query cannot be answered: {message}"


_MADE_BY: Mapping[str, str] = {
    **dict.fromkeys(("cells", "genes"), "scsae extract DATA"),
    "codes": "scsae encode",
    **dict.fromkeys(ASSOCIATION_TABLES, "scsae associate"),
    "steering": "scsae steer",
}
_ASKED: Mapping[str, tuple[str, str, bool]] = {
    "gene": ("feature_gene", "pearson", True),
    "label": ("feature_label", "auroc", True),
    "gene_set": ("feature_geneset", "p", False),
}


def _choose(layout: Layout, kind: str, run: str | None) -> RunInfo | None:
    complete = [info for info in layout.runs(kind) if info.complete]
    if run is None:
        return complete[0] if complete else None
    matches = [info for info in complete if info.run.startswith(run)]
    if len(matches) != 1:
        known = ", ".join(info.run for info in complete) or "none"
        raise NotFoundError(
            f"{run!r} names {len(matches) or 'none'} of the complete {kind} runs in {layout.root}: {known}"
        )
    return matches[0]


def _choose_dataset(layout: Layout, dataset: str | None) -> str | None:
    known = [info.run for info in layout.runs("cells") if info.complete]
    if dataset is None and len(known) > 1:
        raise NotFoundError(f"{layout.root} has several data sets ({', '.join(known)}); name one: dataset=")
    if dataset is not None and dataset not in known:
        raise NotFoundError(f"no data set {dataset!r} in {layout.root}; there are {', '.join(known) or 'none'}")
    return dataset or (known[0] if known else None)


def _plan_of(info: RunInfo | None) -> dict[str, Any]:
    if info is None:
        return {}
    table = {"associations": "features", "codes": "by_cell"}[info.kind]
    return Run.open(info.path / table).plan


def _scan(folder: Path, **widened: type[pl.DataType]) -> pl.LazyFrame:
    """The parts of a complete run as one lazy frame; `widened` integer columns are read as the wider dtype given."""
    parts = Run.open(folder).parts()
    try:
        with parquet_source(parts[0]) as source:
            schema = {**pl.read_parquet_schema(source), **{name: dtype() for name, dtype in widened.items()}}
    except (OSError, pl.exceptions.PolarsError) as error:
        raise IntegrityError(f"{parts[0]} cannot be read: {error}; {REPAIR}") from error
    cast_options = pl.ScanCastOptions(integer_cast="upcast")
    return pl.scan_parquet([scan_source(part) for part in parts], schema=schema, cast_options=cast_options, glob=False)


def _read_where(run: Run, column: str, value: int) -> pl.DataFrame:
    """Rows with this value from the parts whose range on the run's axis covers it."""

    def covers(marker: ShardMarker) -> bool:
        return marker.start <= value < marker.stop

    manifest = run.manifest()
    parts = [scan_source(run.part(marker.shard)) for marker in manifest.shards if covers(marker)]
    if not parts:
        return pl.scan_parquet(scan_source(run.part(0))).head(0).collect()
    return pl.scan_parquet(parts, glob=False).filter(pl.col(column) == value).collect()


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    known = {other.lower(): other for other in names}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {known[near[0]]!r}?" if near else ""


def _some(names: Sequence[Any], n: int = 10) -> str:
    shown = ", ".join(str(name) for name in sorted(names)[:n])
    return shown if len(names) <= n else f"{shown}, ... ({len(names)})"
