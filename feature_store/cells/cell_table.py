"""The table `cells` of a data set, with the split of each cell; writing it writes `genes` and `digests` as well.

The cell table takes 16 bytes a cell and column in memory, and the cells' names; the gene table is one pass over the
matrix. Measured (`tests/benchmarks/bench_ingest.py`, 2 cores of an AMD EPYC, 2,000 genes, 20 values a cell, 5 obs
columns): opening and writing 10 thousand cells takes .7 CPU seconds and 225 MB at its peak, a million 2.2 s and 435 MB.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells.canonical import canonical_text
from feature_store.cells.cell_digests import known_splits, same_cells
from feature_store.cells.factors import Factor, factorize
from feature_store.cells.files.cell_file import names_with_closest
from feature_store.cells.gene_table import MakeTables, matrix_tables, shard_cells, stored_tables, write_digests
from feature_store.cells.label_columns import LabelKind, read_groups
from feature_store.cells.panel import PANEL_CELLS, draw_panel
from feature_store.cells.source import OBS_CELLS, Source, short_names
from feature_store.cells.splits import (
    UNKNOWN,
    KnownSplits,
    SplitConfig,
    SplitNumbers,
    SplitRecord,
    split_numbers,
    splits_from_column,
)
from feature_store.errors import InputError
from feature_store.storage import commit, filesystem, schemas
from feature_store.storage.addresses import DataPath
from feature_store.storage.layout import PLAN, Layout
from feature_store.storage.obs_columns import column_of, columns_of_cells, find_column, shown_name
from feature_store.storage.plans import CellsPlan, DigestsPlan, GenesPlan, PanelPlan, SplitPlan

PART_CELLS = 1 << 17
"""Cells of a part of the tables `cells` and `digests`."""


def write_cells(
    layout: Layout,
    source: Source,
    *,
    dataset: str | None = None,
    donor: str | None = None,
    batch: str | None = None,
    cell_type: str | None = None,
    labels: Sequence[str] = (),
    split: SplitConfig | None = None,
    split_column: str | None = None,
    panel: int = PANEL_CELLS,
    trained_on: str | None = None,
    make_tables: MakeTables = matrix_tables,
) -> str:
    """Write the tables `cells`, `genes` and `digests` of a data set, splits included, and return the data set's name.

    `donor`, `batch` and `cell_type` name obs columns, which become the columns of that name (null if None); every obs
    column is kept as well, under the name of `obs_columns.column_of`. Ids and labels are canonical text (`canonical`),
    so a donor is one donor whatever type a file stores its id in; labels with so many values that they are measured as
    numbers stay numbers (`label_columns`). An obs column with the name of a column of the table is dropped if the
    table's column is made of it. `labels` names further obs columns of interest; they are checked and
    noted in the plan. `dataset` None takes the file's name and a hash of its content and of these options.

    In several files, equal names of donors (batches, cell types) mean one donor: if two files call different people
    "1", they share a split, which loses some balance and leaks nothing.

    The splits are made by `make_splits`, or come from the obs column `split_column` (`splits_from_column`). Cells that
    are among those of the data set `trained_on`, on which an SAE was trained, keep the splits that they have there, and
    so do its donors (or batches) by their names.

    The panel has at most `panel` cells (`panel.draw_panel`); it is the same whatever `panel` is where all cells are
    in it.

    Calling it again with the same arguments writes nothing. Genes and digests cost one pass over the matrix, which
    checks every value, by `make_tables`; with `trained_on` it precedes the splits. They are copied where the store
    holds a data set of the same content. Raises
    InputError for an obs column that does not exist (nothing is written), PlanMismatchError if the data set's name is
    taken by other content. InputError also where a label, batch or cell type has a value of its own in most cells.
    """
    split = split or SplitConfig()
    columns = {"donor": donor, "batch": batch, "cell_type": cell_type}
    options = (*columns.items(), ("split", split_column), *(("label", label) for label in labels))
    refuse_unknown_columns(source, options)
    given = [column for _, column in options if column is not None]
    source.check_alike(given)
    read = read_groups(
        source, given, groups=[column for option, column in options if option != "label" and column is not None]
    )
    for option, column in options:
        if column is not None and option in ("cell_type", "batch", "label"):
            read[column].refuse_names(f"--{option.replace('_', '-')}", column, as_text=option != "label")
    numbers = tuple(name for name in dict.fromkeys(labels) if read[name].kind is LabelKind.NUMBERS)
    factors = {name: one.factor for name, one in read.items() if one.factor is not None}
    named = {key: None if column is None else factors[column] for key, column in columns.items()}
    tables = cache(lambda: stored_tables(layout, source) or make_tables(source))
    known = None if trained_on is None else _known_splits(layout, trained_on, source, lambda: tables().digests)
    make = partial(split_numbers, source.n_cells, donor=named["donor"], batch=named["batch"], config=split)
    if split_column is not None:
        split_of_cell, record = splits_from_column(
            factors[split_column], name=split_column, donor=named["donor"], batch=named["batch"], known=known
        )
        known = None
    else:
        split_of_cell, record = make()
        if known is not None and _changes(known, split_of_cell, named):
            split_of_cell, record = make(known=known)
        else:
            known = None
    strata = {key: factor for key, factor in named.items() if factor is not None and key != "batch"}
    for name in labels:
        if name not in (*numbers, donor, cell_type):
            strata[name if columns.get(name) == name else column_of(name)] = factors[name]
    in_panel, panel_plan = _panel(split_of_cell, strata, n_wanted=panel, seed=split.seed)
    plan = CellsPlan(
        digest=source.digest,
        matrix=source.matrix,
        value_kind=source.value_kind,
        left_out=source.left_out,
        **columns,
        labels=tuple(labels),
        numbers=numbers,
        split=SplitPlan(**asdict(split), **asdict(record)),
        split_column=split_column,
        kept_splits=None if known is None else _kept_units(known, named) or None,
        kept_cells=None if known is None or not record.n_kept else sha256(known.cells.tobytes()).hexdigest(),
        panel=panel_plan,
        sources=tuple(short_names(source.paths)) if len(source.paths) > 1 else (),
        obs=source.obs_digests,
        obs_columns=source.obs_table_columns,
        where=source.where,
    )
    dataset = dataset or f"{_slug(source.paths)}-{plan.id[:6]}"
    is_dropped = {key for key, column in {**columns, "split": split_column}.items() if column == key}
    texts = [name for name in dict.fromkeys(labels) if name not in numbers and name not in is_dropped]

    def cells(start: int, stop: int) -> pl.DataFrame:
        n = stop - start
        table = {
            "cell_idx": pl.int_range(start, stop, dtype=pl.Int64, eager=True),
            "cell_id": source.obs_names(start, stop),
            "dataset": pl.Series([dataset], dtype=pl.String).new_from_index(0, n),
            "split": pl.Series(list(schemas.SPLITS)).gather(split_of_cell[start:stop]),
            "panel": pl.Series(in_panel[start:stop]),
            **{key: pl.Series([None], dtype=pl.String).new_from_index(0, n) if factor is None else
               factor.texts(start, stop) for key, factor in named.items()},
        }  # fmt: skip
        obs = source.obs(start, stop)
        obs = obs.select(
            canonical_text(obs[name]) if name in texts else obs[name] for name in obs.columns if name not in is_dropped
        )
        return schemas.conform("cells", pl.DataFrame(table).hstack(obs.rename(column_of)))

    if filesystem.size_bytes(layout.cells_dir(dataset) / PLAN) is None:
        # of a small data set, a column that cannot be read is found before anything is written
        cells(0, min(OBS_CELLS, source.n_cells))
    content = {"dataset": dataset, "digest": source.digest, "matrix": source.matrix}
    size = shard_cells(source.n_cells)
    genes_plan = GenesPlan(**content, shard_cells=size)
    digests_plan = DigestsPlan(**content, n_cells=source.n_cells, shard_cells=size)
    commit.write_table(layout.genes_dir(dataset), lambda: tables().genes, genes_plan.table("genes"))
    write_digests(layout.digests_dir(dataset), digests_plan, tables)
    tables.cache_clear()
    n_shards = -(-source.n_cells // PART_CELLS)
    _write_parts(
        layout.cells_dir(dataset), cells, source.n_cells, plan.table("cells", n_shards=n_shards, dataset=dataset)
    )
    return dataset


def refuse_unknown_columns(source: Source, options: Iterable[tuple[str, str | None]]) -> None:
    """Raise InputError if one of `options`, pairs of an option and its column, names no column of obs."""
    for option, column in options:
        if column is not None and column not in source.obs_schema:
            raise InputError(
                f"--{option.replace('_', '-')} was {column!r}, which is not an obs column of "
                f"{', '.join(map(str, source.paths))}; they have {names_with_closest(column, source.obs_schema)}"
            )


def _write_parts(folder: Path, rows: Callable[[int, int], pl.DataFrame], n_cells: int, plan: Mapping[str, Any]) -> None:
    """Write a table of cells in parts of PART_CELLS, of which one is in memory; those that are there are left alone."""
    run = commit.Run.create(folder, plan)
    for shard in run.pending():
        start, stop = shard * PART_CELLS, min((shard + 1) * PART_CELLS, n_cells)
        run.commit_shard(shard, partial(commit.write_frame, frame=rows(start, stop)), start=start, stop=stop)
    run.finalize()


def read_cells(folder: str | Path) -> pl.DataFrame:
    """The cell table in `Layout.cells_dir(dataset)`, sorted by cell_idx. Raises NotFoundError, IncompleteRunError."""
    return commit.read_table(folder)


def read_panel(folder: str | Path) -> npt.NDArray[np.int64]:
    """The ascending cell_idx of the panel of the cells in `Layout.cells_dir(dataset)`; it reads no other column."""
    return np.flatnonzero(commit.read_table(folder, ["panel"])["panel"].to_numpy()).astype(np.int64)


def read_panel_cells(folder: str | Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """The rows of the panel's cells in `Layout.cells_dir(dataset)`, by cell_idx, with all columns or some.

    One part of the table is in memory at a time.
    """
    names = None if columns is None else list(dict.fromkeys([*columns, "panel"]))
    rows = [commit.read_part(part, names).filter("panel") for part in commit.Run.open(folder).checked_parts()]
    return pl.concat(rows if columns is None else [part.select(columns) for part in rows])


def read_split_numbers(folder: str | Path, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
    """The split of each of the cells [start, stop) in `Layout.cells_dir(dataset)`, as its position in SPLITS; without
    `stop` of all from `start` on. Only the parts that hold them are read.
    """
    run = commit.Run.open(folder)
    shards = run.manifest().shards
    stop = shards[-1].stop if stop is None else stop
    numbers = [np.empty(0, dtype=np.uint8)]
    for marker in shards:
        if marker.start < stop and start < marker.stop:
            (part,) = run.checked_parts([marker])
            split = commit.read_part(part, ["split"])["split"]
            split = split[max(start - marker.start, 0) : stop - marker.start]
            places = range(len(schemas.SPLITS))
            numbers.append(split.replace_strict(list(schemas.SPLITS), places, return_dtype=pl.UInt8).to_numpy())
    return np.concatenate(numbers)


class StoredObs:
    """Columns of obs, by the names that they have in the data, of the cells in `Layout.cells_dir(dataset)`.

    Parts of the table are read as cells of them are wanted; the last one stays in memory.

    Attributes:
        columns: the names that `read` takes.
    """

    def __init__(self, folder: str | Path) -> None:
        self._run = commit.Run.open(folder)
        self._shards = self._run.manifest().shards
        known = columns_of_cells(commit.read_part(self._run.checked_parts(self._shards[:1])[0]))
        self.columns = [shown_name(name) for name in known]
        self._known = known
        self._part: tuple[tuple[int, list[str]], pl.DataFrame] = ((-1, []), pl.DataFrame())

    def read(self, cells: npt.NDArray[np.int64], columns: Sequence[str]) -> pl.DataFrame:
        """The columns of the given cells (ascending indices). InputError for a column that the table lacks."""
        stored = [find_column(name, self._known) for name in columns]
        if None in stored:
            missing = columns[stored.index(None)]
            close = names_with_closest(missing, self.columns)
            raise InputError(f"the cells have no column {missing!r}; they have {close}")
        wanted = [column for column in stored if column is not None]
        found: list[pl.DataFrame] = []
        for i, marker in enumerate(self._shards):
            low, high = np.searchsorted(cells, [marker.start, marker.stop])
            if low == high and (found or i + 1 < len(self._shards)):
                continue
            if self._part[0] != (i, wanted):
                (part,) = self._run.checked_parts([marker])
                self._part = (i, wanted), commit.read_part(part, list(dict.fromkeys(wanted)))
            found.append(self._part[1][cells[low:high] - marker.start])
        rows = pl.concat(found)
        return pl.DataFrame([rows[column].alias(name) for name, column in zip(columns, wanted, strict=True)])


def draw_cells(folder: str | Path, n: int, *, seed: int) -> npt.NDArray[np.int64]:
    """A sample of n cells of those in `Layout.cells_dir(dataset)`, drawn as a panel is (`draw_panel`), ascending."""
    plan = CellsPlan.of(commit.Run.open(folder))
    own = {"donor": plan.donor, "batch": plan.batch, "cell_type": plan.cell_type}
    strata = [key for key in ("donor", "cell_type") if own[key] is not None]
    labels = [
        name if own.get(name) == name else column_of(name)
        for name in plan.labels
        if name not in (*plan.numbers, plan.donor, plan.cell_type)
    ]
    columns = list(dict.fromkeys(["split", *strata, *labels]))
    cells = commit.read_table(folder, columns)
    codes = [factorize(cells[name], cells.height).unit_of_cell for name in columns]
    return np.flatnonzero(draw_panel(codes, cells.height, n_wanted=n, seed=seed)).astype(np.int64)


def read_split_record(folder: str | Path) -> SplitRecord:
    """How the cells in `Layout.cells_dir(dataset)` were split, and whether each donor is in one split."""
    plan = CellsPlan.of(commit.Run.open(folder)).split
    return SplitRecord(**{field.name: getattr(plan, field.name) for field in fields(SplitRecord)})


def _panel(
    split_of_cell: SplitNumbers, strata: Mapping[str, Factor], *, n_wanted: int, seed: int
) -> tuple[npt.NDArray[np.bool_], PanelPlan]:
    """Whether each cell is in the panel [n_cells], and its plan; the strata are those of split and `strata`."""
    n_cells = len(split_of_cell)
    if n_cells <= n_wanted:
        plan = PanelPlan(wanted=None, n_cells=n_cells, seed=None, strata=(), sha256=None)
        return np.ones(n_cells, dtype=np.bool_), plan
    codes = [split_of_cell, *(factor.unit_of_cell for factor in strata.values())]
    in_panel = draw_panel(codes, n_cells, n_wanted=n_wanted, seed=seed)
    drawn = sha256(np.flatnonzero(in_panel).astype("<i8").tobytes()).hexdigest()
    return in_panel, PanelPlan(wanted=n_wanted, n_cells=n_wanted, seed=seed, strata=("split", *strata), sha256=drawn)


def _known_splits(layout: Layout, trained_on: str, source: Source, digests: Callable[[], pl.DataFrame]) -> KnownSplits:
    """What the data set of a trained SAE says of the cells of a source."""
    run = commit.Run.open(layout.cells_dir(trained_on))
    plan = CellsPlan.of(run)
    unit = plan.split.unit
    known = commit.read_table(run.path, list(dict.fromkeys(["cell_id", "split", *([] if unit == "cell" else [unit])])))
    if plan.digest == source.digest:
        return same_cells(known, unit)
    known = known.hstack(commit.read_table(layout.digests_dir(trained_on)).drop("cell_idx"))
    mine = source.obs_names().to_frame("cell_id").hstack(digests().drop("cell_idx"))
    return known_splits(mine, known, unit)


def _changes(known: KnownSplits, split_of_cell: SplitNumbers, units: Mapping[str, Factor | None]) -> bool:
    """Whether the known splits differ from those of cells that were split without them, or leave cells unknown."""
    unit = units.get(known.unit)
    named = np.full(len(split_of_cell), UNKNOWN, dtype=np.int8)
    if unit is not None:
        of_unit = [schemas.SPLITS.index(known.units[name]) if name in known.units else UNKNOWN for name in unit.names]
        named = np.array(of_unit, dtype=np.int8)[unit.unit_of_cell]
    is_known = (known.cells != UNKNOWN) | (named != UNKNOWN)
    agrees = ((known.cells == UNKNOWN) | (known.cells == split_of_cell)) & (
        (named == UNKNOWN) | (named == split_of_cell)
    )
    return bool(is_known.any() and not (is_known & agrees).all())


def _kept_units(known: KnownSplits, units: Mapping[str, Factor | None]) -> dict[str, str]:
    """The known splits of the units of these cells, in the order of their names."""
    unit = units.get(known.unit)
    present = set() if unit is None else set(unit.names)
    return {name: split for name, split in sorted(known.units.items()) if name in present}


def _slug(paths: Sequence[DataPath]) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", paths[0].stem).strip("-_") or "data"
    return name if len(paths) == 1 else f"{name}-and-{len(paths) - 1}-more"
