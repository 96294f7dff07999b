"""The matrices of a data set that do not lie cell by cell are turned, once, into parts of whole cells in the store.

The cost is said before and after, because a large file takes minutes and space: a pass over the file, 12 bytes a value
of scratch space until the end, and 2.2 bytes a value in the store (counts of 1 to 5, measured).
"""

import time
from collections.abc import Callable, Sequence

from feature_store.cells.column_matrices import ColumnMatrix
from feature_store.cells.row_parts import ENTRY, is_turned, refuse_values, rows_plan, turn
from feature_store.cells.source import Source
from feature_store.errors import InputError
from feature_store.storage.layout import Layout
from feature_store.storage.plans import RowsPlan


def cost_of_turning(matrix: ColumnMatrix) -> str:
    """What it takes to turn a matrix, in words."""
    scratch = matrix.n_values * ENTRY.itemsize
    return f"reads {_size(matrix.size_bytes)}, and {_size(scratch)} of space until it is done"


def turn_matrices(layout: Layout, source: Source, say: Callable[[str], None] = lambda _text: None) -> None:
    """Turn those matrices of a source that need it and are not turned in this store; the source reads its cells from
    the parts afterwards.

    `say` gets a line before and after each. InputError for an impossible value, an entry outside the matrix, or a gene
    that a cell has twice: then nothing is left in the store. BusyError if another process turns the matrix.
    """
    folders = list(source.rows)
    for i, matrix, plan in _to_turn(source):
        if not is_turned(layout, plan):
            started = time.monotonic()
            say(f"{matrix.where} does not lie cell by cell: it is turned once ({cost_of_turning(matrix)})")
            refuse = refuse_values(source.value_kind == "counts", matrix.where)
            with source.progress("turn", matrix.n_values, "values") as update:
                size = turn(layout, plan, matrix, refuse, update)
            seconds = time.monotonic() - started
            say(f"turned in {seconds:.0f} s: {_size(size)} in {layout.rows_dir(plan.id)}, read from now on")
        folders[i] = str(layout.rows_dir(plan.id).resolve())
    source.use_rows(folders)


def use_turned(layout: Layout, source: Source) -> None:
    """Read the cells from the parts of matrices that were turned in this store; nothing is written.

    InputError if one that needs it was not turned.
    """
    folders = list(source.rows)
    for i, matrix, plan in _to_turn(source):
        if not is_turned(layout, plan):
            raise InputError(
                f"{matrix.where} does not lie cell by cell, and its parts of whole cells are not in {layout.root}; "
                f"`scsae associate {layout.store_option}` makes them again"
            )
        folders[i] = str(layout.rows_dir(plan.id).resolve())
    source.use_rows(folders)


def _to_turn(source: Source) -> list[tuple[int, ColumnMatrix, RowsPlan]]:
    """The matrices of a source that do not lie cell by cell: number of the file, matrix, and plan of its parts."""
    matrices = source.column_matrices
    names = _names(source.matrix, len(matrices))
    return [
        (i, matrix, rows_plan(matrix, digest=source.digests[i], name=names[i]))
        for i, matrix in enumerate(matrices)
        if matrix is not None
    ]


def _names(matrix: str, n_files: int) -> Sequence[str]:
    names = matrix.split(",") if n_files > 1 else [matrix]
    return names * n_files if len(names) == 1 else names


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"
