"""Obs columns and ranges of rows of the arrays of a TileDB-SOMA experiment, read in bounded memory.

    obs            a row for each cell, by its soma_joinid; a filter (`--where`) takes some of them
    X layers       a value for each (soma_joinid of a cell, soma_joinid of a gene) that is not 0

The cells are those that the filter takes, in the order of their soma_joinid, which need not follow each other. A range
of obs is read between the first and the last soma_joinid of the range, with the filter; rows of a matrix are read by
their soma_joinids, `BLOCK_CELLS` at a time, and a block becomes CSR. In memory are 8 bytes a cell, what TileDB reads
into (`BUFFER_BYTES` for a column; its own memory is limited by `BUDGET_BYTES`), and a block with 20 bytes a value
beside what is returned. TileDB uses as many threads as Arrow in this process, so that an actor keeps to its cores.

Format: TileDB-SOMA, the specification of single-cell-data/SOMA.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from feature_store.cells.canonical import canonical_text
from feature_store.cells.matrices import CSRRows, check_numeric, concat_rows, sort_rows
from feature_store.cells.obs_table import plain_column
from feature_store.errors import InputError

JOIN_ID = "soma_joinid"
EXPERIMENT, SPARSE = "SOMAExperiment", "SOMASparseNDArray"
BUFFER_BYTES = 1 << 26
"""Bytes of each column that one step of a read fills; a value takes 20 in the three columns of a matrix."""
BUDGET_BYTES = 1 << 31
"""Bytes that TileDB takes for tiles at most."""
BLOCK_CELLS = 4096
_IDs = npt.NDArray[np.int64]


def open_soma(path: Path) -> Any:
    """The opened SOMA object in a folder. InputError where the package is missing, and for a damaged folder."""
    try:
        import tiledbsoma
    except ImportError as error:
        raise InputError(
            f"{path} is a SOMA experiment, which needs one more package ({error}): pip install 'scsae[soma]'"
        ) from error
    config = {
        "soma.init_buffer_bytes": BUFFER_BYTES,
        "sm.mem.total_budget": BUDGET_BYTES,
        "sm.compute_concurrency_level": pa.cpu_count(),
        "sm.io_concurrency_level": pa.cpu_count(),
    }
    with reading_soma(path, "the experiment"):
        context = tiledbsoma.SOMATileDBContext(tiledb_config=config)
        return tiledbsoma.open(str(path.absolute()), context=context)


@contextmanager
def reading_soma(path: Path, what: str) -> Iterator[None]:
    """Turn an error of TileDB into one line that names the part and the experiment."""
    import tiledbsoma

    try:
        yield
    except InputError:
        raise
    except (
        *(tiledbsoma.SOMAError, pa.ArrowException, pl.exceptions.PolarsError),
        *(KeyError, ValueError, OSError, TypeError, RuntimeError, AttributeError),
    ) as error:
        raise InputError(
            f"{what} of {path} cannot be read ({reason_of(error)}); the experiment is damaged or was copied in part; "
            "copy it again"
        ) from error


def reason_of(error: Exception) -> str:
    """The first line of an error of TileDB, which is followed by places in its code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].removeprefix("SOMAError: ").strip("'")


class ObsArray:
    """obs of an opened experiment, and the cells that a filter takes.

    Attributes:
        ids: the ascending soma_joinid of each cell [n_cells].
        columns: names of the columns but soma_joinid, in order.
    """

    def __init__(self, frame: Any, where: str | None, path: Path) -> None:
        self._frame, self._where, self._path = frame, where, path
        with reading_soma(path, "obs"):
            self._schema = frame.schema
            self._is_by_id = tuple(frame.index_column_names) == (JOIN_ID,)
        self.columns = [name for name in self._schema.names if name != JOIN_ID]
        self.ids = self._ids()

    def _ids(self) -> _IDs:
        if self._where is not None:
            self._check_filter(self._where)
        with reading_soma(self._path, "obs"):
            tables = self._frame.read(column_names=[JOIN_ID], value_filter=self._where)
            ids = np.concatenate([np.empty(0, np.int64), *(np.asarray(one[JOIN_ID]) for one in tables)])
        ids.sort()
        if (np.diff(ids) < 1).any():
            raise InputError(f"obs of {self._path} has a {JOIN_ID} twice; write the experiment again")
        if len(ids) == 0 and self._where is not None:
            raise InputError(
                f"no cell of {self._path} is as --where says ({self._where}); see `scsae inspect` for the columns of "
                "obs, and write the values as they are there"
            )
        return ids

    def _check_filter(self, where: str) -> None:
        """Raise InputError for a filter that SOMA does not take."""
        import tiledbsoma

        try:
            # careful: this reads the filter and no cell, so that the error is one of the filter and not of the data
            self._frame.read(column_names=[JOIN_ID], value_filter=where)
        except (tiledbsoma.SOMAError, ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
            raise InputError(
                f"--where was {where!r}, which is no condition on obs of {self._path} ({reason_of(error)}); compare "
                "columns with values, for example --where \"tissue == 'lung' and is_primary_data == True\"; the "
                f"columns are {', '.join(self.columns)}"
            ) from error

    def read(self, name: str, start: int, stop: int) -> pl.Series:
        """The values of a column of the cells [start, stop): categories become text, NaN null."""
        if start >= stop:
            return _as_obs(name, pa.chunked_array([], type=self._schema.field(name).type))
        with reading_soma(self._path, f"obs column {name!r}"):
            table = self._between(name, int(self.ids[start]), int(self.ids[stop - 1]))
            ids = np.asarray(table[JOIN_ID])
            if not np.array_equal(np.sort(ids), self.ids[start:stop]):
                raise InputError(
                    f"obs of {self._path} changed while it was read: run the command again when nothing writes to it"
                )
            return _as_obs(name, table[name]).gather(np.argsort(ids)).rename(name)

    def read_names(self, name: str | None, start: int, stop: int) -> pl.Series:
        """The texts of a column of the cells [start, stop), "" where missing; without a column their soma_joinid."""
        found = pl.Series("cell_id", self.ids[start:stop]) if name is None else self.read(name, start, stop)
        return found.cast(pl.String).fill_null("")

    def _between(self, name: str, low: int, high: int) -> Any:
        """The column and the soma_joinid of the cells from `low` to `high`, in any order."""
        coordinates: tuple[slice, ...] = (slice(low, high),)
        condition = self._where
        if not self._is_by_id:
            bounds = f"{JOIN_ID} >= {low} and {JOIN_ID} <= {high}"
            coordinates, condition = (), bounds if self._where is None else f"({self._where}) and {bounds}"
        return self._frame.read(coordinates, column_names=[JOIN_ID, name], value_filter=condition).concat()


def _as_obs(name: str, column: Any) -> pl.Series:
    """A column of SOMA as one of obs; its enumerations are the categories of an AnnData."""
    has_categories = pa.types.is_dictionary(column.type)
    # careful: Polars takes categories of text alone
    series = pl.from_arrow(column.cast(column.type.value_type) if has_categories else column)
    assert isinstance(series, pl.Series)
    is_other = has_categories and series.dtype != pl.String
    return (canonical_text(series) if is_other else plain_column(series)).rename(name)


class LayerRows:
    """The cells and genes of an X layer as rows and columns: a `matrices.RowMatrix`.

    `cells` and `genes` are ascending soma_joinids [n_cells], [n_genes]; `what` names the layer in errors. InputError
    for an array that is not sparse or holds no numbers, and for one that is smaller than obs.
    """

    by_column = None

    def __init__(self, array: Any, cells: _IDs, genes: _IDs, *, what: str, path: Path) -> None:
        self.shape = (len(cells), len(genes))
        self._array, self._cells, self._genes, self._what, self._path = array, cells, genes, what, path
        self._where = f"{what} of {path}"
        if array.soma_type != SPARSE:
            raise InputError(f"{self._where} is {array.soma_type}, not {SPARSE}; write it as a sparse array")
        with reading_soma(path, what):
            values = np.empty(0, array.schema.field("soma_data").type.to_pandas_dtype())
            n_rows = int(array.shape[0])
        check_numeric(values, self._where)
        if len(cells) and cells[-1] >= n_rows:
            raise InputError(
                f"{self._where} has {n_rows:,} rows, but obs has the {JOIN_ID} {cells[-1]}; the experiment was put "
                "together from two data sets, or its writing was not finished: write it again"
            )

    def read(self, start: int, stop: int) -> CSRRows:
        """Rows [start, stop), with ascending columns. InputError names a value outside var, and a row that has a
        column twice.
        """
        return concat_rows([self._block(low, min(low + BLOCK_CELLS, stop)) for low in range(start, stop, BLOCK_CELLS)])

    def _block(self, start: int, stop: int) -> CSRRows:
        cells = self._cells[start:stop]
        follow_each_other = int(cells[-1] - cells[0]) == len(cells) - 1
        wanted = slice(int(cells[0]), int(cells[-1])) if follow_each_other else pa.array(cells)
        with reading_soma(self._path, f"rows [{start}, {stop}) of {self._what}"):
            tables = list(self._array.read((wanted, slice(None))).tables())
            cell, gene = (_joined(tables, name, np.int64) for name in ("soma_dim_0", "soma_dim_1"))
            # a value beyond float32 becomes infinite, and is refused where rows are checked
            with np.errstate(over="ignore"):
                values = _joined(tables, "soma_data", np.float32)
        del tables
        # a block has fewer than 65,536 rows, and NumPy sorts integers of 16 bits in one pass
        row = np.searchsorted(cells, cell).astype(np.uint16)
        order = np.argsort(row, kind="stable")
        n_values = np.bincount(row, minlength=len(cells))
        rows = CSRRows(
            indptr=np.concatenate([[0], np.cumsum(n_values)]).astype(np.int64),
            indices=self._columns(gene, cell)[order],
            data=values[order],
        )
        return sort_rows(rows, where=self._where, start=start)

    def _columns(self, gene: _IDs, cell: _IDs) -> npt.NDArray[np.int32]:
        """The column of each value, by the soma_joinid of its gene."""
        column = np.minimum(np.searchsorted(self._genes, gene), len(self._genes) - 1)
        if (unknown := self._genes[column] != gene).any():
            i = int(np.argmax(unknown))
            raise InputError(
                f"{self._where} has a value at the {JOIN_ID} {gene[i]} of a gene (cell {cell[i]}), which var does not "
                "have; the experiment is damaged: write it again"
            )
        return column.astype(np.int32)


def _joined(tables: Sequence[Any], name: str, dtype: Any) -> npt.NDArray[Any]:
    """A column of all tables as one array."""
    parts = [np.asarray(table[name]).astype(dtype, copy=False) for table in tables]
    return np.concatenate([np.empty(0, dtype), *parts])
