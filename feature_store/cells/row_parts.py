"""A matrix that was turned: parts of whole cells, in the store, of a matrix that does not lie cell by cell.

    <root>/rows/<id>/      plan.json  part-00012.parquet  ...  MANIFEST.json

The id depends on the content of the file and on the name of the matrix, so a matrix is turned once for all data sets
and stages. One pass over the entries puts them into a scratch file for each part (12 bytes a value, removed at the
end; beside the parts, or in the temporary folder where the store is on object storage); then one part after the other
is sorted, checked and committed. Memory is that of a block of entries and of one part, `PART_VALUES` values on
average. A turning that was killed resumes with the parts that are left; it passes over the entries again. A part has
a row for each cell, with the ascending features and the values of all of them, those that are no genes too.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from feature_store.cells.column_matrices import ColumnMatrix, Entries, rows_of
from feature_store.cells.list_parts import OpenParts
from feature_store.cells.matrices import CSRRows, concat_rows
from feature_store.errors import InputError, IntegrityError
from feature_store.storage import commit, filesystem
from feature_store.storage.layout import TEMPORARY, Layout
from feature_store.storage.plans import RowsPlan

GENES, VALUES = "genes", "values"
PART_VALUES = 1 << 20
"""Values of a part, on average."""
ROW_GROUP_CELLS = 1024
ENTRY = np.dtype([("cell", "<i4"), ("gene", "<i4"), ("value", "<f4")])
Update = Callable[[int], None]


class RowParts:
    """The rows of a matrix that was turned, in a folder: a `matrices.RowMatrix`. NotFoundError, IncompleteRunError."""

    by_column = None

    def __init__(self, folder: str | Path) -> None:
        run = commit.Run.open(folder)
        plan = RowsPlan.of(run)
        self.shape = plan.n_cells, plan.n_features
        sizes = [marker.rows for marker in run.manifest().shards]
        self._parts = OpenParts(run.checked_parts(max_bytes=0), sizes, genes=GENES, values=VALUES, checked=True)

    def read(self, start: int, stop: int) -> CSRRows:
        """Rows [start, stop), with ascending columns. IntegrityError for a damaged part."""
        try:
            found = [
                # careful: Arrow's arrays cannot be written to, which torch warns about
                CSRRows(lists.indptr, np.array(lists.genes), np.array(lists.values))
                for _, _, lists in self._parts.read(start, stop)
            ]
        except InputError as error:
            raise IntegrityError(f"{error}; {commit.mark_damaged(self._part_of(start))}") from error
        return concat_rows(found)

    def _part_of(self, row: int) -> Path:
        return self._parts.paths[int(np.searchsorted(self._parts.first, row, side="right")) - 1]


def rows_plan(matrix: ColumnMatrix, *, digest: str, name: str) -> RowsPlan:
    """The plan of turning a matrix: `digest` is that of the content of its file, `name` that of the matrix in it."""
    n_cells, n_features = matrix.shape
    cells = max(PART_VALUES * n_cells // max(matrix.n_values, 1) // ROW_GROUP_CELLS, 1) * ROW_GROUP_CELLS
    return RowsPlan(digest=digest, matrix=name, n_cells=n_cells, n_features=n_features, shard_cells=min(cells, n_cells))


def is_turned(layout: Layout, plan: RowsPlan) -> bool:
    """Whether all parts of a matrix are there."""
    return commit.is_intact(layout.rows_dir(plan.id))


def turn(
    layout: Layout, plan: RowsPlan, matrix: ColumnMatrix, refuse: Callable[[Entries], None], update: Update
) -> int:
    """Write the parts of a matrix that are not committed, and return the bytes of all of them.

    `refuse` raises InputError for an impossible value; it sees every entry before anything is committed. `update` gets
    how many entries were read. InputError, too, for an entry outside the matrix, or a gene that a cell has twice; then
    nothing is left in the store. BusyError if another process is at work on the matrix.
    """
    folder = layout.rows_dir(plan.id)
    new = [path for path in (folder, folder.parent, layout.root) if not path.exists()]
    run = commit.Run.create(folder, plan.table("rows", n_shards=plan.n_shards))
    try:
        with run.exclusive():
            _remove_scratch(folder)
            if pending := run.pending():
                with filesystem.scratch_folder(folder) as scratch:
                    _scatter(matrix, plan, set(pending), Path(scratch), refuse, update)
                    made = ((shard, _rows_of(Path(scratch), plan, shard, matrix.where)) for shard in pending)
                    for shard, rows in made:
                        start, stop = plan.range_of(shard)
                        run.commit_shard(shard, partial(_write_rows, rows=rows), start=start, stop=stop)
                        # Arrow keeps what it freed, which would be more with every part
                        pa.default_memory_pool().release_unused()
            return run.finalize().bytes
    except InputError:
        if new:
            filesystem.remove_folder(folder)
        for path in new[1:] if filesystem.is_local(folder) else ():
            with suppress(OSError):
                path.rmdir()
        raise


def _remove_scratch(folder: Path) -> None:
    """Remove what a killed turning left; no other process is at work on the folder."""
    for path in folder.glob(f"{TEMPORARY}*") if filesystem.is_local(folder) else ():
        if path.is_dir():
            filesystem.remove_folder(path)


def _scatter(
    matrix: ColumnMatrix,
    plan: RowsPlan,
    shards: set[int],
    scratch: Path,
    refuse: Callable[[Entries], None],
    update: Update,
) -> None:
    """Append every entry to the scratch file of its shard, if that is one of `shards`."""
    wanted = np.zeros(plan.n_shards, dtype=np.bool_)
    wanted[list(shards)] = True
    for entries in matrix.entries(update):
        refuse(entries)
        packed = np.empty(len(entries.cell), dtype=ENTRY)
        packed["cell"], packed["gene"], packed["value"] = entries
        shard = packed["cell"] // np.int32(plan.shard_cells)
        if (np.diff(shard) < 0).any():
            order = np.argsort(shard, kind="stable")
            packed, shard = packed[order], shard[order]
        starts = np.flatnonzero(np.concatenate([[True], np.diff(shard) > 0]))
        for low, high in zip(starts.tolist(), [*starts[1:].tolist(), len(shard)], strict=True):
            if wanted[shard[low]]:
                with _scratch_file(scratch, int(shard[low])).open("ab") as file:
                    file.write(packed[low:high].data)


def _scratch_file(scratch: Path, shard: int) -> Path:
    return scratch / f"{shard:05d}"


def _rows_of(scratch: Path, plan: RowsPlan, shard: int, where: str) -> CSRRows:
    """The rows of a shard, from its scratch file, which is removed."""
    path = _scratch_file(scratch, shard)
    start, stop = plan.range_of(shard)
    found = np.fromfile(path, dtype=ENTRY) if path.exists() else np.empty(0, dtype=ENTRY)
    path.unlink(missing_ok=True)
    cell, gene, value = found["cell"] - np.int32(start), found["gene"].copy(), found["value"].copy()
    del found
    rows = sparse.csr_array((value, (cell, gene)), shape=(stop - start, plan.n_features))
    # careful: scipy adds up the values of a gene that a cell has twice, which is an error here
    if rows.nnz < len(value):
        return rows_of([Entries(cell.astype(np.int64) + start, gene, value)], start, stop, where)
    return CSRRows(indptr=rows.indptr.astype(np.int64), indices=rows.indices, data=rows.data)


def _write_rows(path: Path, rows: CSRRows) -> int:
    """Write rows as reproducible Parquet and return their number."""
    n = len(rows.indptr) - 1
    schema = pa.schema([(GENES, pa.list_(pa.int32())), (VALUES, pa.list_(pa.float32()))])
    with pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=1, use_dictionary=False, write_page_checksum=True
    ) as writer:
        for start in range(0, max(n, 1), ROW_GROUP_CELLS):
            writer.write_table(_table(rows, start, min(start + ROW_GROUP_CELLS, n), schema))
    return n


def _table(rows: CSRRows, start: int, stop: int, schema: Any) -> Any:
    low, high = int(rows.indptr[start]), int(rows.indptr[stop])
    offsets = pa.array((rows.indptr[start : stop + 1] - low).astype(np.int32))
    columns = [pa.ListArray.from_arrays(offsets, pa.array(part[low:high])) for part in (rows.indices, rows.data)]
    return pa.table(columns, schema=schema)


def refuse_values(is_counts: bool, where: str) -> Callable[[Entries], None]:
    """What raises InputError for an entry that is not finite, is negative or, in counts, is not whole."""

    def refuse(entries: Entries) -> None:
        value = entries.value
        problems: Iterator[tuple[npt.NDArray[np.bool_], str]] = iter(
            (
                (~np.isfinite(value), "is not finite"),
                (value < 0, "is negative"),
                ((value != np.rint(value)) & is_counts, "is not a whole number, although the sampled values are"),
            )
        )
        for bad, problem in problems:
            if bad.any():
                i = int(np.argmax(bad))
                raise InputError(
                    f"{where}, cell {entries.cell[i]}, feature {entries.gene[i]}: the value {value[i]:g} {problem}; "
                    "repair the file, or name another matrix with --matrix"
                )

    return refuse
