"""10x: the folder of matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv), each of which may be compressed (.gz).

The text holds a line for each value, "FEATURE BARCODE COUNT", which count from 1; a matrix that was written as
cells x genes, as some tools do, is known by its numbers of rows and columns. Lines cannot be found without reading
those before them, so the matrix is turned before it is used (`column_matrices`); reading takes about .3 s a million
values. Files of a sample may have a common beginning: GSM123_matrix.mtx.gz. Formats: NIST, "Matrix Market Exchange
Formats"; Cell Ranger, "Feature-Barcode Matrices".
"""

import gzip
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells.annotations import ObsColumn
from feature_store.cells.column_matrices import BLOCK_VALUES, SAMPLE_VALUES, ColumnMatrix, Entries
from feature_store.cells.files.cell_file import OneMatrixFile, named_or_only
from feature_store.errors import InputError
from feature_store.storage.data_files import refuse_unfetched
from feature_store.storage.text_files import read_text

MATRIX_NAME = "matrix"
BLOCK_BYTES = 1 << 20
_ENDS = ("matrix.mtx", "matrix.mtx.gz")
_BARCODES = ("barcodes.tsv", "barcodes.tsv.gz")
_FEATURES = ("features.tsv", "features.tsv.gz", "genes.tsv", "genes.tsv.gz")
_BANNER = b"%%matrixmarket"
_TOO_SHORT = "it ends in the middle: the file is damaged, or its download was cut off; fetch it again"
_Floats = npt.NDArray[np.float64]


class MtxFiles(NamedTuple):
    """The three files of a sample."""

    matrix: Path
    barcodes: Path
    features: Path


def matrices_in(folder: Path) -> list[Path]:
    """The Matrix Market files of a folder, by name; GSM1_matrix.mtx is one as well."""
    return sorted(path for path in folder.iterdir() if path.name.endswith(_ENDS) and path.is_file())


def is_mtx(path: Path) -> bool:
    """Whether a file, which may be compressed, begins as a Matrix Market file does."""
    with path.open("rb") as file:
        head = file.read(len(_BANNER))
    if head.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(path) as file:
                head = file.read(len(_BANNER))
        except (OSError, EOFError, zlib.error):
            # a file of this name that is cut off is said to be so when it is read
            return path.name.endswith(".mtx.gz")
    return head.lower() == _BANNER


def open_mtx(path: Path, *, matrix: str | None = None) -> OneMatrixFile:
    """Open the folder of a sample, or its .mtx file beside the other two.

    InputError for a folder without the three files, or with those of several samples, for a header that is not that
    of a matrix of counts or that does not fit to the barcodes and features, and as from `OneMatrixFile`.
    """
    files = _files(path)
    named_or_only([MATRIX_NAME], matrix, path)
    barcodes = _lines(files.barcodes).str.extract(r"^([^\t]*)").rename("cell_id")
    features = [line.split("\t") for line in _lines(files.features).to_list()]
    text = MtxMatrix(files.matrix, n_cells=len(barcodes), n_features=len(features))
    return OneMatrixFile(
        path,
        format="10x matrix.mtx" + (", cells x genes" if text.is_by_cell else ""),
        name=MATRIX_NAME,
        rows=text,
        var=_var(features),
        index=ObsColumn.of_series(barcodes),
        content=tuple(files),
        reason="the only matrix of the folder",
    )


def _files(path: Path) -> MtxFiles:
    folder = path if path.is_dir() else path.parent
    matrices = matrices_in(folder) if path.is_dir() else [path]
    if len(matrices) != 1:
        samples = ", ".join(found.name for found in matrices[:3])
        raise InputError(
            f"{path} holds {len(matrices)} matrices ({samples}{', ...' if len(matrices) > 3 else ''}); give each as a "
            f"file of its own: {' '.join(map(str, matrices[:2]))}"
        )
    name = matrices[0].name
    start = next((name.removesuffix(end) for end in _ENDS if name.endswith(end)), "")
    found = []
    for names in (_BARCODES, _FEATURES):
        there = [folder / f"{start}{one}" for one in names if (folder / f"{start}{one}").is_file()]
        if not there:
            raise InputError(
                f"{matrices[0]} has no {start}{names[0]} beside it (or {', '.join(names[1:])}), so its rows and "
                "columns have no names; put the three files of the sample into one folder"
            )
        found.append(there[0])
    return MtxFiles(matrices[0], *found)


def _lines(path: Path) -> pl.Series:
    text = read_text(path, "the table", wanted="a text with a line for each cell or feature")
    # as texts of Polars: those of Python take six times the memory
    lines = pl.Series([text.removesuffix("\n")] if text else [], dtype=pl.String)
    return lines.str.split("\n").explode()


def _var(features: list[list[str]]) -> Any:
    """The features as the var frame of an AnnData: id, name and, from Cell Ranger 3 on, type."""
    import pandas as pd

    names = [one[1] if len(one) > 1 and one[1] else one[0] for one in features]
    columns = {"gene_ids": [one[0] for one in features]}
    if features and all(len(one) > 2 for one in features):
        columns["feature_types"] = [one[2] for one in features]
    return pd.DataFrame(columns, index=names)


class MtxMatrix(ColumnMatrix):
    """The values of a Matrix Market file, of cells and features whose numbers are known.

    Attributes:
        is_by_cell: whether the file has cells as rows, and not features.
    """

    def __init__(self, path: Path, *, n_cells: int, n_features: int) -> None:
        refuse_unfetched(path)
        self._path = path
        self.where = str(path)
        self.shape = (n_cells, n_features)
        self.size_bytes = path.stat().st_size
        with self._opened() as file:
            self._is_integer, (n_rows, n_columns, self.n_values), self._n_header = self._header(file)
        if (n_rows, n_columns) not in ((n_features, n_cells), (n_cells, n_features)):
            raise InputError(
                f"{path} has {n_rows:,} rows and {n_columns:,} columns, but there are {n_features:,} features and "
                f"{n_cells:,} barcodes beside it; put the three files of one sample into the folder"
            )
        self.is_by_cell = (n_rows, n_columns) != (n_features, n_cells)

    @property
    def gives_cells_in_order(self) -> bool:
        """True: Cell Ranger writes cell after cell."""
        return True

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        with self._path.open("rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        try:
            with gzip.open(self._path) if is_gzip else self._path.open("rb") as file:
                yield file  # type: ignore[misc]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{self._path} cannot be unpacked ({error}); {_TOO_SHORT}") from error

    def _header(self, file: IO[bytes]) -> tuple[bool, tuple[int, int, int], int]:
        """Whether the values are said to be integers, the numbers of rows, columns and values, and of lines read."""
        banner = file.readline().decode(errors="replace").split()
        words = [word.lower() for word in banner[1:]]
        if len(banner) != 5 or banner[0].lower().encode() != _BANNER:
            raise InputError(f"{self._path} is not a Matrix Market file: it begins with {' '.join(banner)[:60]!r}")
        if words[:2] != ["matrix", "coordinate"] or words[2] not in ("integer", "real") or words[3] != "general":
            raise InputError(
                f"{self._path} is a Matrix Market file of {' '.join(words)}; give one of `matrix coordinate integer "
                "general` (or real), as Cell Ranger and scipy.io.mmwrite write"
            )
        n_lines = 1
        while (line := file.readline()).startswith(b"%") or (line and not line.strip()):
            n_lines += 1
        try:
            n_rows, n_columns, n_values = map(int, line.split())
        except ValueError:
            raise InputError(
                f"{self._path}, line {n_lines + 1}: {line.decode(errors='replace').strip()[:60]!r} is not the numbers "
                "of rows, columns and values; fetch the file again"
            ) from None
        return words[2] == "integer", (n_rows, n_columns, n_values), n_lines + 1

    def entries(self, on_values: Callable[[int], None] = lambda _done: None) -> Iterator[Entries]:
        """See `ColumnMatrix`. InputError for other numbers of values than the header says, too."""
        n_read, n_lines = 0, self._n_header
        with self._opened() as file:
            self._header(file)
            rest = b""
            while True:
                block = file.read(BLOCK_BYTES)
                text, rest = _whole_lines(rest + block) if block else (rest, b"")
                if text:
                    numbers = self._numbers(text, n_lines)
                    n_lines += text.count(b"\n")
                    n_read += len(numbers)
                    if n_read > self.n_values:
                        raise self._other_number(f"more than {self.n_values:,}")
                    for low in range(0, len(numbers), BLOCK_VALUES):
                        yield self._entries(numbers[low : low + BLOCK_VALUES], n_read - len(numbers) + low)
                    on_values(n_read)
                if not block:
                    break
        if n_read != self.n_values:
            raise self._other_number(f"{n_read:,}")

    def some_entries(self) -> Iterator[Entries]:
        """See `ColumnMatrix`: the first ones."""
        n = 0
        for block in self.entries():
            left = SAMPLE_VALUES - n
            yield Entries(block.cell[:left], block.gene[:left], block.value[:left])
            n += len(block.cell)
            if n >= SAMPLE_VALUES:
                return

    def _other_number(self, found: str) -> InputError:
        return InputError(
            f"{self._path} has {found} values, but its header says {self.n_values:,}; the file was cut off or put "
            "together by hand: fetch it again"
        )

    def _numbers(self, text: bytes, n_before: int) -> _Floats:
        """The numbers of whole lines [n_lines 3]. InputError names a line that is not three numbers."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                numbers: _Floats = np.fromstring(text.decode("ascii"), dtype=np.float64, sep=" ")
        except (ValueError, DeprecationWarning):
            raise self._bad_line(text, n_before) from None
        n_lines = text.count(b"\n") + (not text.endswith(b"\n"))
        if numbers.size != 3 * n_lines and any(len(line.split()) not in (0, 3) for line in text.split(b"\n")):
            raise self._bad_line(text, n_before)
        return numbers.reshape(-1, 3)

    def _bad_line(self, text: bytes, n_before: int) -> InputError:
        for i, line in enumerate(text.split(b"\n")):
            try:
                is_good = len([float(word) for word in line.split()]) in (0, 3)
            except ValueError:
                is_good = False
            if not is_good:
                shown = line.decode(errors="replace")[:60]
                return InputError(
                    f"{self._path}, line {n_before + i + 1}: {shown!r} is not a row, a column and a value; fetch the "
                    "file again"
                )
        return InputError(f"{self._path}: lines from {n_before + 1} on are no numbers; fetch the file again")

    def _entries(self, numbers: _Floats, n_before: int) -> Entries:
        row, column, value = numbers.T
        n_rows, n_columns = self.shape if self.is_by_cell else self.shape[::-1]
        for what, index, size in (("row", row, n_rows), ("column", column, n_columns)):
            bad = ~((index >= 1) & (index <= size)) | (index != np.rint(index))
            if bad.any():
                place = int(np.argmax(bad))
                reason = (
                    "they count from 1, and this file from 0: add 1 to its rows and columns"
                    if index[place] == 0
                    else "the file is damaged or of another sample; fetch it again"
                )
                raise InputError(
                    f"{self._path}, value {n_before + place + 1}: {what} {index[place]:g} is not in [1, {size}]; "
                    f"{reason}"
                )
        if self._is_integer and (bad := value != np.rint(value)).any():
            place = int(np.argmax(bad))
            raise InputError(
                f"{self._path}, value {n_before + place + 1}: {value[place]:g} is not an integer, as the header says; "
                "give the file of the raw counts"
            )
        cell, gene = (row, column) if self.is_by_cell else (column, row)
        with np.errstate(over="ignore"):
            return Entries(cell.astype(np.int64) - 1, gene.astype(np.int32) - 1, value.astype(np.float32))


def _whole_lines(text: bytes) -> tuple[bytes, bytes]:
    """The text up to its last newline, and the rest."""
    end = text.rfind(b"\n") + 1
    return text[:end], text[end:]
