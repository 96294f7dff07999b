"""How the features of a codes run are split into ranges, and the tables on disk that were measured of each range.

    <root>/associations/<run>/measured/{features,labels,numbers,minima,pairs,tests,sets,tokens,splits}/
        a part per range

Each table of `Measured` is a run of its own, and all of them are written range by range, so an association resumes
where it was killed. A range is as large as memory allows, because each range costs one pass over the expression.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from feature_store.associations.inputs import Ints
from feature_store.cells import split_by_size
from feature_store.errors import IntegrityError, NotFoundError
from feature_store.storage.commit import Run, read_part, write_frame
from feature_store.storage.layout import as_path
from feature_store.storage.plans import AssociationsPlan, RangesPlan

NONZERO_BYTES = 70
"""Memory in bytes that a nonzero of the codes of a range takes while the range is measured: the slope between ranges of
32 and of 96 full features (`bench_associations.py --wide`)."""
RANGE_PAIRS = 2_000_000
"""Largest number of pairs of a feature and a gene in a range, unless there are more genes than that."""
RANGES = 16
"""Least number of ranges, so that several actors have work, if ranges then hold RANGE_FEATURES features."""
RANGE_FEATURES = 64
"""Least number of features in a range, as far as memory allows."""
COLUMNLESS = "nothing"
"""Name of the one column of a table without columns, which Parquet cannot store."""


def feature_ranges(nonzeros: Ints, n_genes: int, *, range_bytes: int, bounds: Sequence[int]) -> list[int]:
    """The bounds of the ranges of features: where each begins, and at the end the number of features.

    nonzeros: the number of codes of each feature [n_features]; range_bytes: the memory for the codes of a range,
    approximately; a single feature may need more; bounds: where the groups of features begin that are stored together,
    ascending. A range is made of whole groups, unless a group alone is more than a range can be.
    """
    n_features = len(nonzeros)
    wanted = max(n_features // RANGES, RANGE_FEATURES)
    most = max(1, min(wanted, RANGE_PAIRS // max(n_genes, 1)))
    limit = range_bytes / NONZERO_BYTES
    before = np.r_[0, np.cumsum(nonzeros)]
    ranges = [0]
    for start, stop in pairwise(sorted({0, *bounds, n_features})):
        if stop - ranges[-1] > most or before[stop] - before[ranges[-1]] > limit:
            ranges += [start] if start > ranges[-1] else []
            n_pieces = max(-(-(stop - start) // most), math.ceil((before[stop] - before[start]) / limit))
            pieces = split_by_size(nonzeros[start:stop].tolist(), limit=limit, most=-(-(stop - start) // n_pieces))
            ranges += [start + piece for piece in pieces[1:-1]]
    return [*ranges, n_features]


class Measured(NamedTuple):
    """The tables that are measured of one range of features.

    features: class, density, scale, and the candidates for top_identity_genes; labels: the rows of `feature_label`
    without q and p_max; numbers: the rows of `feature_number` without q; minima: the smallest p under permuted labels
    (`familywise`); pairs: the candidates for `feature_gene` (`gene_table.pair_rows`); tests: split and p of all
    features x genes, ascending; sets: the rank tests of gene sets (`gene_set_table.measure_gene_sets`); tokens: the
    rows of `feature_token`; splits: n, n_donors and n_cells of each split, the same in all ranges.
    """

    features: pl.DataFrame
    labels: pl.DataFrame
    numbers: pl.DataFrame
    minima: pl.DataFrame
    pairs: pl.DataFrame
    tests: pl.DataFrame
    sets: pl.DataFrame
    tokens: pl.DataFrame
    splits: pl.DataFrame


class MeasuredRun:
    """The tables of `Measured` of every range of features; see there. `bounds`: where the ranges of features begin."""

    def __init__(self, folder: Path, runs: Mapping[str, Run]) -> None:
        self.folder = folder
        self.runs = runs
        self.bounds = list(RangesPlan.of(next(iter(runs.values()))).bounds)

    @staticmethod
    def folders(folder: Path) -> list[Path]:
        """The folders of the runs."""
        return [folder / name for name in Measured._fields]

    @classmethod
    def create(cls, folder: str | Path, plan: AssociationsPlan, *, bounds: Sequence[int]) -> "MeasuredRun":
        """Make or reopen the runs; those that were begun keep their bounds, which decide nothing but the memory.

        PlanMismatchError, InputError as `Run.create`.
        """
        folder = as_path(folder)
        bounds = _begun_with(folder) or bounds
        tables = {name: plan.table(name, n_shards=len(bounds) - 1, bounds=bounds) for name in Measured._fields}
        return cls(folder, {name: Run.create(folder / name, table) for name, table in tables.items()})

    @classmethod
    def open(cls, folder: str | Path) -> "MeasuredRun":
        """Open existing runs, complete or not. NotFoundError."""
        folder = as_path(folder)
        return cls(folder, {name: Run.open(folder / name) for name in Measured._fields})

    def pending(self) -> list[int]:
        """The numbers of the ranges that any of the runs still lacks, ascending; see `Run.pending`."""
        return sorted({number for run in self.runs.values() for number in run.pending()})

    def is_committed(self, number: int) -> bool:
        """Whether all tables of a range are committed."""
        return all(run.committed(number) for run in self.runs.values())

    def commit(self, number: int, measured: Measured) -> int:
        """Commit the tables of a range; returns their size in bytes."""
        start, stop = self.bounds[number], self.bounds[number + 1]
        size = 0
        for name, run in self.runs.items():
            # Parquet cannot store a table without columns
            frame: pl.DataFrame = getattr(measured, name)
            frame = frame if frame.width else pl.DataFrame(schema={COLUMNLESS: pl.Null})
            size += run.commit_shard(number, partial(write_frame, frame=frame), start=start, stop=stop).bytes
        return size

    def finalize(self) -> None:
        """Finish all runs. IncompleteRunError names missing ranges."""
        for run in self.runs.values():
            run.finalize()

    def read(self, table: str, number: int) -> pl.DataFrame:
        """One table of one range, as it was measured. IntegrityError."""
        run = self.runs[table]
        frame = read_part(run.checked_part(number))
        return pl.DataFrame() if frame.columns == [COLUMNLESS] else frame

    def read_parts(self, table: str) -> list[pl.DataFrame]:
        """One table of each range, of those in which it has columns. IntegrityError."""
        parts = (self.read(table, number) for number in range(len(self.bounds) - 1))
        return [part for part in parts if part.width]

    def read_all(self, table: str) -> pl.DataFrame:
        """One table of all ranges; it has no columns where no range has any. IntegrityError."""
        parts = self.read_parts(table)
        return pl.concat(parts) if parts else pl.DataFrame()


def _begun_with(folder: Path) -> list[int]:
    """The bounds in the first plan that exists and is intact; an empty list where there is none."""
    for path in MeasuredRun.folders(folder):
        with suppress(NotFoundError, IntegrityError):
            return list(RangesPlan.of(Run.open(path)).bounds)
    return []
