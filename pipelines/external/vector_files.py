"""Files of vectors, one a cell: .npy, .safetensors, .pt and .parquet are opened, and read in ranges of rows.

.npy, .safetensors and .pt are memory-mapped (a .pt of torch before 1.6 is read whole). Parquet is read a row group at a
time; where its rows are in another order than the cells, each process that reads it first writes them in theirs to a
temporary file (4 bytes a number), which is memory-mapped. Nothing is unpickled: numpy and torch refuse files that hold
more than numbers.
"""

import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_store.cells import Source
from feature_store.errors import InputError
from feature_store.storage.data_files import refuse_unfetched

if TYPE_CHECKING:
    from torch import Tensor

CELL_ID = "cell_id"
PANDAS_INDEX = "__index_level_0__"
"""The column in which pandas writes an index without a name."""
READ_ROWS = 4096
MAPPED = "memory-mapped"
Rows = Callable[[int, int], npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """Vectors that were opened and not loaded.

    Attributes:
        where: what messages call them.
        n_rows, width: their shape.
        dtype: the type that they are stored in.
        way: how they are read, in words.
        rows: the vectors [start, stop) in the type that they are stored in.
        joined: how they were joined with the cells; "" if in their order.
    """

    where: str
    n_rows: int
    width: int
    dtype: str
    way: str
    rows: Rows
    joined: str = ""

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """The vectors [start, stop) as float32; a value beyond its range is infinite."""
        if start == stop:
            return np.empty((0, self.width), np.float32)
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(self.rows(start, stop), dtype=np.float32)

    def read_cells(self, cells: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The vectors of the given cells (ascending), of which those in a range of READ_ROWS are read together."""
        parts, low = [np.empty((0, self.width), np.float32)], 0
        while low < len(cells):
            start = int(cells[low])
            high = int(np.searchsorted(cells, start + READ_ROWS))
            chosen = cells[low:high]
            parts.append(self.read(start, int(chosen[-1]) + 1)[chosen - start])
            low = high
        return np.concatenate(parts)


def open_vector_file(path: Path, key: str | None, source: Source) -> Vectors:
    """Open a file of vectors of the cells of `source`; its rows are these cells, or are joined with them.

    Raises:
        InputError: the file is missing, damaged, of another kind than its name says, holds pickled objects, or no one
            array of numbers [n_cells d]; or its cell ids do not match.
    """
    if not path.is_file():
        beside = sorted(file.name for file in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        others = ", ".join(beside) or f"no {path.suffix} file"
        raise InputError(f"--vectors: there is no file {path}; its folder has {others}")
    refuse_unfetched(path)
    if path.suffix == ".npy":
        return _open_npy(path)
    if path.suffix == ".parquet":
        return _open_parquet(path, source)
    return _open_safetensors(path, key) if path.suffix == ".safetensors" else _open_torch(path, key)


def vectors_of(
    where: str, shape: Sequence[int], dtype: object, *, is_number: bool, rows: Rows, way: str = MAPPED
) -> Vectors:
    """Vectors of an array. InputError unless it has two dimensions, columns, and numbers in them."""
    if len(shape) != 2 or not shape[1] or not is_number:
        raise InputError(
            f"{where} holds an array of shape {tuple(shape)} of {dtype}; vectors are an array of numbers [n_cells d]"
        )
    return Vectors(where=where, n_rows=int(shape[0]), width=int(shape[1]), dtype=str(dtype), way=way, rows=rows)


def _open_npy(path: Path) -> Vectors:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} cannot be read as an array of numbers ({error}); write it with numpy.save({path.name!r}, vectors)"
        ) from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is an archive of arrays (.npz); write the one array with numpy.save")
    is_number = array.dtype.kind in "fiu"
    return vectors_of(str(path), array.shape, array.dtype, is_number=is_number, rows=lambda a, b: array[a:b])


def _open_safetensors(path: Path, key: str | None) -> Vectors:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no safetensors file, or is damaged ({error}); fetch or write it again") from error
    name = _one_array(path, key, shapes)
    chosen = slices[name]

    def rows(start: int, stop: int) -> npt.NDArray[Any]:
        return _as_numpy(chosen[start:stop])

    dtype = chosen.get_dtype()
    is_number = dtype.startswith(("F", "BF", "I", "U"))
    return vectors_of(f"{path}:{name}", shapes[name], dtype, is_number=is_number, rows=rows)


def _open_torch(path: Path, key: str | None) -> Vectors:
    import torch

    found = _load_torch(path)
    if isinstance(found, Mapping):
        tensors = {str(name): one for name, one in found.items() if isinstance(one, torch.Tensor)}
        name = _one_array(path, key, {name: tuple(one.shape) for name, one in tensors.items()})
        where, tensor = f"{path}:{name}", tensors[name]
    elif isinstance(found, torch.Tensor) and key is None:
        where, tensor = str(path), found
    else:
        what = "one tensor, without keys" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        raise InputError(f"{path} holds {what}; give a file with a tensor [n_cells d], or FILE.pt:KEY of a dictionary")
    tensor = tensor.detach()
    is_number = tensor.layout is torch.strided and not (
        tensor.is_complex() or tensor.is_quantized or tensor.dtype is torch.bool
    )
    rows: Rows = lambda a, b: _as_numpy(tensor[a:b])  # noqa: E731
    way = MAPPED if zipfile.is_zipfile(path) else "read whole, as a file of torch before 1.6"
    return vectors_of(where, tensor.shape, tensor.dtype, is_number=is_number, rows=rows, way=way)


def _load_torch(path: Path) -> Any:
    import torch

    try:
        # careful: only zip files, those of torch 1.6 and later, can be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds pickled objects or is no torch file, and nothing is unpickled here; write the tensor alone: "
            f"torch.save(torch.as_tensor(vectors), {path.name!r})"
        ) from error
    except Exception as error:
        raise InputError(f"{path} is no torch file, or is damaged ({error}); fetch or write it again") from error


def _as_numpy(tensor: "Tensor") -> npt.NDArray[Any]:
    # numpy has no bfloat16
    exact = tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
    array: npt.NDArray[Any] = exact.numpy()
    return array


def _one_array(path: Path, key: str | None, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The key of the array that is meant: the one given, or the only one of two dimensions."""
    held = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no tensor"
    if key is not None:
        if key not in shapes:
            raise InputError(f"--vectors: {path} has no {key!r}; it holds {held}")
        return key
    able = [name for name, shape in shapes.items() if len(shape) == 2]
    if len(able) != 1:
        raise InputError(f"--vectors: {path} holds {held}; name the array [n_cells d] that is meant: {path}:KEY")
    return able[0]


def _open_parquet(path: Path, source: Source) -> Vectors:
    try:
        file = pq.ParquetFile(path, memory_map=True)
        schema = file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is no Parquet file, or is damaged ({error}); fetch or write it again") from error
    id_column = next((name for name in (CELL_ID, PANDAS_INDEX) if name in schema.names), None)
    table = _VectorTable(path, file, [name for name in schema.names if name != id_column])
    if not table.width:
        raise InputError(f"--vectors: {path} is empty: it has {table.n_rows} rows of {table.width or 0} numbers")
    about: Any = {"where": str(path), "width": table.width, "dtype": table.dtype, "way": "a row group at a time"}
    if id_column is None:
        rows: Rows = lambda a, b: table.take(np.arange(a, b))  # noqa: E731
        return Vectors(**about, n_rows=table.n_rows, rows=rows)
    order = _row_of_cell(path, table.ids(id_column), source)
    n_left_out = table.n_rows - len(order)
    joined = f"{len(order):,} of {source.n_cells:,} cells by {CELL_ID}" + (
        f"; {n_left_out:,} rows of other cells left out" if n_left_out else ""
    )
    if (np.diff(order) > 0).all():
        in_order: Rows = lambda a, b: table.take(order[a:b])  # noqa: E731
        return Vectors(**about, n_rows=len(order), rows=in_order, joined=joined)
    about["way"] += ", into a temporary file in the order of the cells"
    return Vectors(**about, n_rows=len(order), rows=_Reordered(table, order).read, joined=joined)


class _VectorTable:
    """A Parquet file with vectors in one column of lists, or in a numeric column for each dimension."""

    def __init__(self, path: Path, file: pq.ParquetFile, columns: Sequence[str]) -> None:
        self.path, self._file, self._columns = path, file, list(columns)
        types = {name: file.schema_arrow.field(name).type for name in columns}
        self._is_list = len(types) == 1 and all(map(_is_list_of_numbers, types.values()))
        wrong = {name: kind for name, kind in types.items() if not (self._is_list or _is_number(kind))}
        if wrong or not types:
            held = ", ".join(f"{name} ({kind})" for name, kind in wrong.items()) or "no other column"
            raise InputError(
                f"--vectors: {path} has to hold numeric columns, one for each dimension, or one column of lists of "
                f"numbers, beside {CELL_ID}; it has {held}"
            )
        self.dtype = ", ".join(dict.fromkeys(str(kind) for kind in types.values()))
        metadata = file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._first = np.cumsum([0, *sizes])
        self.n_rows = int(self._first[-1])
        self._held: tuple[int, npt.NDArray[Any]] | None = None
        self.width: int | None = None if self._is_list else len(columns)
        if self._is_list and self.n_rows:
            self._group(0)

    def ids(self, column: str) -> pl.Series:
        """The cell ids as text."""
        read = self._file.read(columns=[column]).column(column)
        return pl.Series(CELL_ID, pl.from_arrow(read)).cast(pl.String)

    def groups(self) -> Iterator[npt.NDArray[np.int64]]:
        """The rows of each row group."""
        for start, stop in zip(self._first[:-1].tolist(), self._first[1:].tolist(), strict=True):
            yield np.arange(start, stop)

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """The vectors of these rows, in this order."""
        group = np.searchsorted(self._first, rows, side="right") - 1
        out = np.empty((len(rows), self.width or 0), np.float64)
        for number in np.unique(group).tolist():
            own = group == number
            out[own] = self._group(number)[rows[own] - self._first[number]]
        return out

    def _group(self, number: int) -> npt.NDArray[Any]:
        """The vectors of a row group; the one that was read last is held."""
        if self._held is None or self._held[0] != number:
            try:
                table = self._file.read_row_group(number, columns=self._columns)
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"{self.path}, row group {number}, cannot be read: {error}") from error
            found = self._of_lists(table.column(0).combine_chunks(), number) if self._is_list else _of_columns(table)
            self._held = number, found
        return self._held[1]

    def _of_lists(self, lists: Any, number: int) -> npt.NDArray[Any]:
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        if self.width is None:
            self.width = int(lengths[0])
        if len(wrong := np.flatnonzero(lengths != self.width)):
            row = int(wrong[0])
            raise InputError(
                f"--vectors: row {self._first[number] + row} of {self.path} is a list of {lengths[row]} numbers, and "
                f"the first one has {self.width}; all vectors have one length"
            )
        flat = lists.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat, dtype=np.float64).reshape(len(lists), self.width)


class _Reordered:
    """The vectors of a table in another order of rows, in a temporary file that is made when it is first read."""

    def __init__(self, table: _VectorTable, order: npt.NDArray[np.int64]) -> None:
        self._table, self._order = table, order
        self._made: npt.NDArray[np.float32] | None = None

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The vectors [start, stop)."""
        if self._made is None:
            self._made = self._make()
        return self._made[start:stop]

    def _make(self) -> npt.NDArray[np.float32]:
        place = np.full(self._table.n_rows, -1)
        place[self._order] = np.arange(len(self._order))
        with tempfile.TemporaryFile() as file, np.errstate(over="ignore"):
            # careful: the map keeps the file, which has no name, until it is dropped itself
            made = np.memmap(file, np.float32, shape=(len(self._order), self._table.width or 0))
            for rows in self._table.groups():
                wanted = rows[place[rows] >= 0]
                if len(wanted):
                    made[place[wanted]] = self._table.take(wanted)
        return made


def _of_columns(table: pa.Table) -> npt.NDArray[Any]:
    return np.stack([column.to_numpy().astype(np.float64) for column in table.columns], axis=1)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_list_of_numbers(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and _is_number(kind.value_type))


def _row_of_cell(path: Path, ids: pl.Series, source: Source) -> npt.NDArray[np.int64]:
    """The row of each cell of the data, by its name.

    Raises:
        InputError: names of cells, or of rows that are wanted, occur twice, or a cell has no row.
    """
    cells = source.obs_names().rename(CELL_ID)
    if (twice := cells.filter(cells.is_duplicated())).len():
        raise InputError(
            f"--vectors: {path} has a column {CELL_ID}, but {', '.join(map(str, source.paths))} has "
            f"{int((cells == twice[0]).sum())} cells of the name {twice[0]!r}; give the vectors in the order of the "
            f"cells, without {CELL_ID}"
        )
    rows = pl.DataFrame({CELL_ID: ids, "row": np.arange(ids.len())}).filter(pl.col(CELL_ID).is_in(cells.implode()))
    if (again := rows.filter(pl.col(CELL_ID).is_duplicated())).height:
        raise InputError(f"--vectors: {path} has several rows of the cell {again[CELL_ID][0]!r}; leave one of them")
    found = pl.DataFrame({CELL_ID: cells}).join(rows, on=CELL_ID, how="left", maintain_order="left")
    missing = found.filter(pl.col("row").is_null())[CELL_ID]
    if missing.len():
        some = ", ".join(missing.head(3).to_list())
        raise InputError(
            f"--vectors: {cells.len() - missing.len():,} of {cells.len():,} cells have a row in {path} by {CELL_ID}, "
            f"and {missing.len():,} have none ({some}{', ...' if missing.len() > 3 else ''}; the file has "
            f"{', '.join(ids.head(3).cast(pl.String).fill_null('null').to_list())}, ...); every cell needs one"
        )
    return found["row"].to_numpy().astype(np.int64)
