"""Codes by feature, built from the finished codes by cell: one part (bucket) for each range of features.

One pass over by_cell gathers a group of buckets; each bucket is then sorted by feature, falling value and cell, and
committed. Groups are independent, so actors share them. How buckets are grouped changes no byte. A pass
takes 15 ns a nonzero of by_cell, sorting 50 ns a nonzero of the bucket (Polars' sort by three columns: 360); memory is
14 bytes times the nonzeros of a group plus three times those of one bucket.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_store.codes.parquet import read_columns, write_by_feature
from feature_store.storage.commit import Manifest, Run
from feature_store.storage.layout import as_path
from feature_store.storage.plans import ByFeaturePlan, CodesPlan

N_BUCKETS = 64
BUCKET_ROWS = 20_000_000
"""The most nonzeros that a bucket has on average."""
GROUP_ROWS = 60_000_000
"""The most nonzeros of a group of buckets, unless a single bucket has more."""
MOST_BUCKETS = 1 << 15


class ByFeature:
    """The run by_feature/ of a codes folder, which any number of processes may build together.

    `n_buckets`: number of parts, which is part of the content; default: N_BUCKETS, or more, so that a bucket has at
    most BUCKET_ROWS nonzeros on average. IncompleteRunError if by_cell is not finished.
    """

    def __init__(self, folder: str | Path, *, n_buckets: int | None = None) -> None:
        folder = as_path(folder)
        self.by_cell = Run.open(folder / "by_cell")
        manifest = self.by_cell.manifest()
        self.n_rows = manifest.rows
        self.plan = CodesPlan.of(self.by_cell)
        self.n_features = self.plan.n_features
        wanted = n_buckets or max(N_BUCKETS, -(-self.n_rows // BUCKET_ROWS))
        n = min(wanted, self.n_features, MOST_BUCKETS)
        self.bounds = [bucket * self.n_features // n for bucket in range(n + 1)]
        by_cell = ByFeaturePlan(by_cell=manifest.sha, n_features=self.n_features, level=self.plan.level)
        self.run = Run.create(folder / "by_feature", by_cell.table("by_feature", n_shards=n))

    def groups(self, *, max_rows: int = GROUP_ROWS) -> list[tuple[int, int]]:
        """The buckets [first, stop) still to be written, in groups of one bucket or of at most `max_rows` nonzeros."""
        pending = self.run.pending()
        rows = self._rows_of_buckets() if pending and self.n_rows > max_rows else np.zeros(self.run.n_shards, np.int64)
        groups: list[tuple[int, int]] = []
        for bucket in pending:
            first, stop = groups[-1] if groups else (bucket, bucket)
            if bucket == stop and rows[first : bucket + 1].sum() <= max_rows and groups:
                groups[-1] = first, bucket + 1
            else:
                groups.append((bucket, bucket + 1))
        return groups

    def write(self, first: int, stop: int) -> int:
        """Write and commit the buckets [first, stop), and return the number of their nonzeros."""
        gathered = self._gather(self.bounds[first : stop + 1])
        n_rows = 0
        for bucket in range(first, stop):
            parts = gathered.pop(0)
            columns = {name: np.concatenate(pieces) for name, pieces in parts.items()}
            write = partial(_write_sorted, columns=columns, n_features=self.n_features)
            low, high = self.bounds[bucket : bucket + 2]
            n_rows += self.run.commit_shard(bucket, write, start=low, stop=high).rows
        return n_rows

    def finalize(self) -> Manifest:
        """Finish the run and return its manifest. IncompleteRunError names missing buckets."""
        return self.run.finalize()

    def _rows_of_buckets(self) -> npt.NDArray[np.int64]:
        total = np.zeros(self.n_features, dtype=np.int64)
        for path in self.by_cell.checked_parts():
            total += np.bincount(read_columns(path, ["feature_id"])[0], minlength=self.n_features)
        return np.add.reduceat(total, self.bounds[:-1])

    def _gather(self, bounds: Sequence[int]) -> list[dict[str, list[npt.NDArray[Any]]]]:
        """The rows of each bucket, as one piece per part of by_cell, in the order of by_cell."""
        names = ["cell_idx", "feature_id", "value"]
        if self.plan.level == "token":
            names = ["cell_idx", "token_pos", "gene_id", "feature_id", "value"]
        gathered: list[dict[str, list[npt.NDArray[Any]]]] = [{name: [] for name in names} for _ in bounds[1:]]
        bucket_of = np.searchsorted(bounds, np.arange(self.n_features), side="right").astype(np.uint16) - np.uint16(1)
        for path in self.by_cell.checked_parts():
            columns = dict(zip(names, read_columns(path, names), strict=True))
            # careful: the number of a feature before the first bucket wraps around to a large one
            bucket = bucket_of[columns["feature_id"]]
            inside = np.flatnonzero(bucket < len(gathered))
            order = inside[np.argsort(bucket[inside], kind="stable")]
            cuts = np.cumsum(np.bincount(bucket[inside], minlength=len(gathered)))[:-1]
            for name, column in columns.items():
                for pieces, piece in zip(gathered, np.split(column[order], cuts), strict=True):
                    pieces[name].append(piece)
        return gathered


def build_by_feature(folder: str | Path, *, n_buckets: int | None = None, max_rows: int = GROUP_ROWS) -> Manifest:
    """Build by_feature/ of a codes folder in this process. IncompleteRunError if by_cell is not finished."""
    building = ByFeature(folder, n_buckets=n_buckets)
    for first, stop in building.groups(max_rows=max_rows):
        building.write(first, stop)
    return building.finalize()


def _write_sorted(path: Path, columns: dict[str, npt.NDArray[Any]], n_features: int) -> int:
    order = falling_by_feature(columns["feature_id"], columns["value"])
    return write_by_feature(path, {name: column[order] for name, column in columns.items()}, n_features=n_features)


def falling_by_feature(feature_id: npt.NDArray[Any], value: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The order of rows by feature, then by falling value, then as given; values >= 0, fewer than 2^32 rows."""
    if not len(feature_id):
        return np.empty(0, np.int64)
    feature = feature_id - feature_id.min()
    # a stable sort of 16 bits is a radix sort; only a bucket of more than 2^16 features needs more bits
    order = np.argsort(feature.astype(np.uint16) if feature.max() < 1 << 16 else feature, kind="stable")
    # the bits of a float >= 0 rise with it: inverted they are the upper half of an integer, the row is its lower half
    key = (~value[order].view(np.uint32)).astype(np.uint64) << np.uint64(32)
    key |= np.arange(len(key), dtype=np.uint64)
    for low, high in pairwise([0, *np.cumsum(np.bincount(feature))]):
        key[low:high].sort()
    return order[(key & np.uint64(0xFFFFFFFF)).astype(np.int64)]
