"""The tables of a store: which ones a lineage has, in which folders their rows are, and which command makes each.

Most tables are a run of their own, that is a folder with a manifest. There are three exceptions: `codes` are stored in
two sort orders, `training` is a file in the run of the SAE, and a steering table has a folder in every steering run.

Opening checks whether one or two files exist for each table; nothing is read before `frame` is called, which compares
the bytes of the parts with those that were committed, once a process (`commit.Run.checked_parts`). A table that was
committed and is gone is still a table of the store, and its `frame` an error; so are the tables of those kinds of run
that `Lineage.unreadable` names.
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import polars as pl

from feature_store.codes import CodeReader
from feature_store.errors import IntegrityError, NotFoundError, QueryError, StoreError
from feature_store.query.runs import Lineage, lineage_of
from feature_store.query.suggestions import did_you_mean
from feature_store.storage.commit import Run, mark_damaged
from feature_store.storage.filesystem import parquet_source, scan_source
from feature_store.storage.layout import (
    ASSOCIATION_TABLES,
    COMPARISON_TABLES,
    HISTORY,
    MANIFEST,
    MEASURED_BY,
    MEASURED_TABLES,
    Layout,
    creation_time,
)

_STEERING: Mapping[str, str] = {
    "steering": "results",
    "steering_variants": "variants",
    "steering_scores": "scores",
    "steering_head": "head",
    "steering_map": "map",
}
"""Table -> the folder of a steering run with its rows."""
_MAP: Mapping[str, str] = {"feature_umap": "umap", "feature_neighbour": "neighbours"}
"""Table -> the folder of the map of an SAE with its rows."""
_CODES: Mapping[str, str] = {
    "compact_codes": "compact",
    "cell_tokens": "stats/cell",
    "feature_cell": "merged/feature_cell",
    "feature_firing": "merged/firing",
    "top_cell_token": "top_cells",
}
"""Table -> the folder of a codes run with its rows."""
_KIND_OF: Mapping[str, str] = {
    **dict.fromkeys(_STEERING, "steering"),
    **{table: kind for kind, tables in MEASURED_TABLES.items() for table in tables},
    "feature_match": "matches",
    **dict.fromkeys(COMPARISON_TABLES, "comparisons"),
}
"""Table -> the kind of its run, of those kinds that `Lineage.unreadable` can name."""
MADE_BY: Mapping[str, str] = {
    **dict.fromkeys(("cells", "genes"), "scsae extract DATA"),
    "training": "scsae train",
    **dict.fromkeys(("codes", *_CODES), "scsae encode"),
    **dict.fromkeys(ASSOCIATION_TABLES, "scsae associate"),
    **dict.fromkeys(_STEERING, "scsae steer"),
    **dict.fromkeys(("umap", *_MAP, "profile_umap", "steering_map"), "scsae serve"),
    **{table: MEASURED_BY[kind] for kind, tables in MEASURED_TABLES.items() for table in tables},
    "feature_match": "scsae match --other SAE",
    **dict.fromkeys(COMPARISON_TABLES, "scsae compare"),
}
"""Table -> the command that makes it."""


class Tables:
    """The tables of one lineage by name, as lazy frames."""

    def __init__(self, layout: Layout, lineage: Lineage) -> None:
        self.layout = layout
        self.lineage = lineage
        self.folders = _folders(layout, lineage)
        self._frames: dict[str, pl.LazyFrame] = {}

    def names(self) -> list[str]:
        """The names of the tables that the store has, those that cannot be read among them."""
        return list(self.folders)

    def frame(self, table: str) -> pl.LazyFrame:
        """A table as a lazy frame.

        Raises:
            QueryError: it is missing; the message names the command that makes it.
            IntegrityError: it was committed and is gone, or is damaged.
        """
        if table not in self.folders:
            raise QueryError(self.no_table(table))
        if reason := self.lineage.unreadable.get(_KIND_OF.get(table, "")):
            raise IntegrityError(reason)
        if table not in self._frames:
            self._frames[table] = self._scan(table)
        return self._frames[table]

    @cached_property
    def codes(self) -> CodeReader:
        """The codes, in both sort orders. Raises NotFoundError if there are none."""
        if self.lineage.codes is None:
            raise NotFoundError(f"{self.layout.root} has no codes; make them with `{self.made_by('codes')}`")
        return CodeReader(self.layout.codes_dir(self.lineage.codes))

    def panel_tokens(self) -> pl.LazyFrame:
        """The rows of `cell_tokens` of the panel's cells, whose parts come first."""
        (folder,) = self.folders["cell_tokens"]
        return _scan(folder, n_parts=self.codes.run.cut.n_panel_shards)

    def manifests(self) -> dict[str, str]:
        """The sha256 of the manifest of each table that a single run holds, or why it is "unreadable: ..."."""
        return {
            table: self._manifest(table, of[0])
            for table, of in self.folders.items()
            if len(of) == 1 or _KIND_OF.get(table) in self.lineage.unreadable
        }

    def state(self) -> str:
        """A hash of the runs that are read and of the times at which their tables were committed."""
        times = {
            str(folder): creation_time(folder / MANIFEST) for folders in self.folders.values() for folder in folders
        }
        return hashlib.sha256(repr((self.lineage, sorted(times.items()))).encode()).hexdigest()[:16]

    def raise_if_damaged(self, error: Exception) -> None:
        """Raise IntegrityError with the names of parts of the tables that were read, if any are missing or damaged."""
        problems: dict[str, None] = {}
        folders = {folder for table in self._frames for folder in self.folders[table]}
        if "codes" in self._frames or "codes" in self.__dict__:
            read = ("by_cell", "by_feature", "compact", "stats/cell")
            folders |= {run.path for name, run in self.codes.run.tables.items() if name in read}
        for folder in folders:
            try:
                Run.open(folder).checked_parts()
            except StoreError as problem:
                problems[str(problem)] = None
        if problems:
            raise IntegrityError("; ".join(sorted(problems))) from error

    def made_by(self, table: str) -> str:
        """The command that makes a table, whether or not it is there. Raises QueryError for an unknown table."""
        if table not in MADE_BY:
            raise QueryError(self.no_table(table))
        return f"{MADE_BY[table]} {self.layout.store_option}"

    def no_table(self, name: str) -> str:
        """The message of an error: the table is not made yet, or its name is unknown."""
        known = ", ".join(self.names())
        if name in MADE_BY:
            if self._is_made_now(name):
                return f"no table {name!r}, which was made after the store was opened: `store.renewed()` has it"
            return f"no table {name!r} yet: `{self.made_by(name)}` makes it; tables: {known}"
        return f"no table {name!r}{did_you_mean(name, self.names())}; tables: {known}"

    def _is_made_now(self, name: str) -> bool:
        """Whether a table that was missing when the store was opened is there by now."""
        runs = {kind: getattr(self.lineage, kind) for kind in ("associations", "codes", "dataset")}
        try:
            return name in _folders(self.layout, lineage_of(self.layout, **runs))
        except StoreError:
            return False

    def _manifest(self, table: str, folder: Path) -> str:
        reason = self.lineage.unreadable.get(_KIND_OF.get(table, ""))
        try:
            return f"unreadable: {reason}" if reason else Run.open(folder).manifest().sha
        except StoreError as error:
            return f"unreadable: {error}"

    def _scan(self, table: str) -> pl.LazyFrame:
        folders = self.folders[table]
        if table == "codes":
            return self.codes.scan()
        if table == "compact_codes":
            return self.codes.scan_compact()
        if table == "training":
            return _training(folders[0])
        if table in _STEERING or _KIND_OF.get(table) in MEASURED_TABLES:
            frames = [_scan(folder).with_columns(pl.lit(folder.parent.name).alias("run")) for folder in folders]
            return pl.concat(frames, how="diagonal_relaxed")
        if table == "feature_match":
            every = pl.concat([_scan(folder) for folder in folders])
            return every if self.lineage.sae is None else every.filter(pl.col("sae") == self.lineage.sae)
        return _scan(folders[0])


def _folders(layout: Layout, lineage: Lineage) -> dict[str, list[Path]]:
    """The run folders of each table; only those of steering, matches and MEASURED_TABLES can have several."""
    folders: dict[str, list[Path]] = {}
    if lineage.dataset is not None:
        folders["cells"] = [layout.cells_dir(lineage.dataset)]
        if layout.is_present(layout.genes_dir(lineage.dataset)):
            folders["genes"] = [layout.genes_dir(lineage.dataset)]
    if lineage.sae is not None:
        sae = {"training": layout.saes_dir(lineage.sae)}
        sae |= {table: layout.feature_map_dir(lineage.sae) / name for table, name in _MAP.items()}
        folders |= {table: [folder] for table, folder in sae.items() if layout.is_present(folder)}
    if lineage.codes is not None:
        codes = layout.codes_dir(lineage.codes)
        folders["codes"] = [codes / "by_cell"]
        folders |= {table: [codes / name] for table, name in _CODES.items() if layout.is_present(codes / name)}
        if layout.is_present(layout.umap_dir(lineage.codes)):
            folders["umap"] = [layout.umap_dir(lineage.codes)]
    if lineage.associations is not None:
        folder = layout.associations_dir(lineage.associations)
        folders |= {table: [folder / table] for table in ASSOCIATION_TABLES}
        if layout.is_present(layout.profile_map_dir(lineage.associations)):
            folders["profile_umap"] = [layout.profile_map_dir(lineage.associations)]
    steering = _read_or_all(layout, "steering", lineage.steering, lineage)
    for table, folder_name in _STEERING.items():
        every = [layout.steering_dir(run) / folder_name for run in steering]
        # the tables of scores, masked genes and maps are optional in a steering run
        if found := [folder for folder in every if layout.is_present(folder)]:
            folders[table] = found
    for kind, tables in MEASURED_TABLES.items():
        runs = _read_or_all(layout, kind, lineage.measured.get(kind, ()), lineage)
        folders |= {table: [layout.run_dir(kind, run) / table for run in runs] for table in (tables if runs else ())}
    if matches := _read_or_all(layout, "matches", lineage.matches, lineage):
        folders["feature_match"] = [layout.matches_dir(run) / "feature_match" for run in matches]
    compared = () if lineage.comparison is None else (lineage.comparison,)
    for run in _read_or_all(layout, "comparisons", compared, lineage)[:1]:
        folders |= {table: [layout.comparisons_dir(run) / table] for table in COMPARISON_TABLES}
    return folders


def _read_or_all(layout: Layout, kind: str, runs: tuple[str, ...], lineage: Lineage) -> tuple[str, ...]:
    """The runs of a kind that are read; all of them where it cannot be told which are, so that their tables are named.

    Their frames are errors then.
    """
    if kind not in lineage.unreadable:
        return runs
    return tuple(info.run for info in layout.runs(kind) if info.complete or info.lost)


def _training(folder: Path) -> pl.LazyFrame:
    """The metrics that training logged, one row per step; no rows for a baseline, which is fitted without steps."""
    rows = Run.open(folder).read_json(HISTORY)
    frame = pl.DataFrame(rows, infer_schema_length=None) if rows else pl.DataFrame(schema={"step": pl.Float64})
    return frame.select(pl.col("step").cast(pl.Int64), pl.exclude("step")).lazy()


def _scan(folder: Path, *, n_parts: int | None = None) -> pl.LazyFrame:
    """The parts of a complete run, or the first `n_parts` of them, as one lazy frame."""
    run = Run.open(folder)
    parts = run.checked_parts(run.manifest().shards[:n_parts])
    try:
        with parquet_source(parts[0]) as source:
            schema = pl.read_parquet_schema(source)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise IntegrityError(f"{parts[0]} cannot be read: {error}; {mark_damaged(parts[0])}") from error
    # filtering first reads 100 rows of a million cells of 15 columns in 40 ms instead of 60 ms
    return pl.scan_parquet([scan_source(part) for part in parts], schema=schema, glob=False, parallel="prefiltered")
