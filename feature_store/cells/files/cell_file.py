"""What a data set needs of one file, whatever its format, and the file of one matrix that most formats are.

A format has to say where its rows, its genes and its obs are; which matrix is taken, what its values are and which of
its features are genes is decided here, as for AnnData (`matrix_choice`, `value_kinds`, `feature_types`).
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from feature_store.cells.annotations import ObsColumn, gene_names
from feature_store.cells.cellxgene_mark import CellxgeneMark
from feature_store.cells.column_matrices import ColumnMatrix, column_matrix
from feature_store.cells.feature_types import GeneColumns, gene_features
from feature_store.cells.matrices import CSRRows, RowMatrix
from feature_store.cells.matrix_choice import Candidate, MatrixChoice
from feature_store.cells.value_kinds import KINDS, check_rows, values_of
from feature_store.errors import InputError
from feature_store.storage import remote_objects
from feature_store.storage.addresses import DataPath
from feature_store.storage.collection import collect_if_due

Content = Path | tuple[Path, ...] | remote_objects.RemoteContent
"""What the digest of a file covers: the file or all of a folder, or these files alone; or the version at an address."""


class CellFile(Protocol):
    """An opened file of cells; made by `recognise.open_file`. It cannot be passed between processes.

    Attributes:
        path: the file or folder, or its address, as it was given.
        format: its format, in words.
        content: the files that its digest covers.
        candidates: the matrices of the file that were looked at, and what they hold.
        choice: the matrix in use, why it was taken, and what was passed over.
        matrix: its name; `open_file` takes it.
        value_kind: "counts" or "lognorm".
        n_cells, n_genes: shape of that matrix, of which the columns are genes alone.
        left_out: number of features that are no genes, by their type.
        gene_symbols: symbol of each gene [n_genes]; the name of the gene where there is no symbol.
        ensembl_ids: Ensembl id of each gene without version, "" where unknown; None if the file has none.
        ignored: what else of the file is not read, in words.
        filtered: how many of the cells a condition took, in words; "" without one.
        by_column: the matrix in use with all its features, if it does not lie cell by cell: only its first cells can be
            read until it is turned (`turning`).
    """

    path: DataPath
    format: str
    content: Content
    candidates: Sequence[Candidate]
    choice: MatrixChoice
    matrix: str
    value_kind: str
    n_cells: int
    n_genes: int
    left_out: Mapping[str, int]
    gene_symbols: list[str]
    ensembl_ids: list[str] | None
    ignored: Sequence[str]
    filtered: str
    by_column: ColumnMatrix | None

    @property
    def cellxgene(self) -> CellxgeneMark | None:
        """The mark of the schema of CELLxGENE; None if the file has none."""

    def use_rows(self, rows: RowMatrix) -> None:
        """Read the cells from these rows of all features: the matrix in use, turned."""

    def use_kind(self, kind: str) -> bool:
        """Take the best matrix of values of this kind instead; False, and no change, if there is none."""

    def read_rows(self, start: int, stop: int) -> CSRRows:
        """Cells [start, stop), with genes as ascending columns. InputError names the row of an impossible value."""

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns, in order."""

    def obs(self, start: int = 0, stop: int | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The obs columns, or those of these names, of the cells [start, stop), as by `annotations.obs_column`."""

    def obs_names(self, start: int = 0, stop: int | None = None) -> pl.Series:
        """Names of the cells [start, stop) in the file; they may repeat."""

    def obsm(self, key: str) -> Any:
        """The array of obsm of this name, on disk: shape [n_cells d], dtype, and ranges of rows as numpy.

        InputError if there is none.
        """

    def obsm_widths(self) -> dict[str, int]:
        """Number of columns of each array of obsm that `obsm` gives, by name."""

    def close(self) -> None:
        """Close the file."""


class OneMatrixFile:
    """A file of one matrix: see `CellFile`.

    `rows` holds all features, of which `var` is the frame (a pandas frame, as of an AnnData). InputError for an empty
    matrix, one that is not as large as `var` and `index` say, one that holds neither counts nor log-normalised values,
    and one without genes.
    """

    filtered = ""

    def __init__(
        self,
        path: DataPath,
        *,
        format: str,
        name: str,
        rows: RowMatrix,
        var: Any,
        index: ObsColumn,
        obs: Mapping[str, ObsColumn] | None = None,
        content: Content | None = None,
        ignored: Sequence[str] = (),
        reason: str = "the only matrix of the file",
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.format, self.matrix = path, format, name
        self.ignored: Sequence[str] = tuple(ignored)
        self.content: Content = content or local(path)
        self._where = f"{name} of {path}"
        self._close, self._index, self._obs = close, index, dict(obs or {})
        n_cells, n_features = rows.shape
        if 0 in rows.shape:
            raise InputError(f"{self._where} is empty: {n_cells} cells x {n_features} features")
        if (n_cells, n_features) != (index.n_cells, len(var.index)):
            raise InputError(
                f"{self._where} has {n_cells:,} cells x {n_features:,} features, but there are names of "
                f"{index.n_cells:,} cells and {len(var.index):,} features; the file is damaged or was put together "
                "from two data sets: fetch or write it again"
            )
        features = gene_features(var, str(path))
        self.left_out = features.left_out
        self._is_gene = features.is_gene
        self._use(rows)
        self.gene_symbols, self.ensembl_ids = gene_names(var[features.is_gene])
        values = values_of(self._rows, self._where)
        taken = Candidate(name=name, n_genes=self.n_genes, values=values, by_column=self.by_column is not None)
        if not taken.is_usable:
            raise InputError(
                f"{self._where} holds neither counts nor log-normalised values ({KINDS[taken.kind]}); give the file of "
                "the raw counts"
            )
        self.candidates: Sequence[Candidate] = [taken]
        self.choice = MatrixChoice(taken=taken, reason=reason)
        self.value_kind = taken.kind

    def _use(self, rows: RowMatrix) -> None:
        self._rows: RowMatrix = rows if self._is_gene.all() else GeneColumns(rows, self._is_gene)
        self.by_column = column_matrix(rows)
        self.n_cells, self.n_genes = self._rows.shape

    @property
    def cellxgene(self) -> CellxgeneMark | None:
        """None: the schema of CELLxGENE is one of AnnData."""
        return None

    def use_rows(self, rows: RowMatrix) -> None:
        """Read the cells from these rows of all features: the matrix, turned."""
        self._use(rows)

    def use_kind(self, kind: str) -> bool:
        """Return whether the matrix is of this kind: there is no other."""
        return kind == self.value_kind

    def read_rows(self, start: int, stop: int) -> CSRRows:
        """Cells [start, stop), with genes as ascending columns. InputError names the row of an impossible value."""
        collect_if_due()
        rows = self._rows.read(start, stop)
        check_rows(rows, self.value_kind, start, self._where)
        return rows

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns, in order."""
        return list(self._obs)

    def obs(self, start: int = 0, stop: int | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The obs columns, or those of these names, of the cells [start, stop)."""
        return read_obs(self._obs, columns, start, self.n_cells if stop is None else stop, partial(reading, self.path))

    def obs_names(self, start: int = 0, stop: int | None = None) -> pl.Series:
        """Names of the cells [start, stop) in the file; they may repeat."""
        with reading(self.path, "the names of the cells"):
            return self._index.read(start, self.n_cells if stop is None else stop).rename("cell_id")

    def obsm(self, key: str) -> Any:
        """InputError: an array beside the matrix is AnnData's alone."""
        raise InputError(
            f"{self.path} is {self.format}, which has no obsm/{key}; give the vectors as a file of their own, for "
            "example --vectors vectors.npy"
        )

    def obsm_widths(self) -> dict[str, int]:
        """None: an array beside the matrix is AnnData's alone."""
        return {}

    def close(self) -> None:
        """Close the file."""
        self._close()


def local(path: DataPath) -> Path:
    """The path of a file that is at no address: what stands for the content of one is known when it is opened."""
    assert isinstance(path, Path)
    return path


def read_obs(
    obs: Mapping[str, ObsColumn],
    columns: Sequence[str] | None,
    start: int,
    stop: int,
    reading_of: Callable[[str], AbstractContextManager[None]],
) -> pl.DataFrame:
    """The obs columns of these names, or all, of the cells [start, stop); `reading_of` names the column in an error."""
    found = []
    for name in obs if columns is None else columns:
        with reading_of(f"obs column {name!r}"):
            found.append(obs[name].read(start, stop))
    return pl.DataFrame(found)


def named_or_only(names: Sequence[str], matrix: str | None, path: DataPath, *, what: str = "matrices") -> str:
    """The name that `--matrix` gives, or the only one. InputError for another name, and for none of several."""
    if matrix is None and len(names) == 1:
        return names[0]
    if matrix is None:
        raise InputError(f"{path} holds {len(names)} {what}: {', '.join(names)}; name one: --matrix {names[0]}")
    if matrix not in names:
        raise InputError(f"--matrix was {matrix!r}, not a matrix of {path}; it has {names_with_closest(matrix, names)}")
    return matrix


def names_with_closest(name: str, names: Iterable[str]) -> str:
    """The existing names, for an error message, and the one closest to the unknown `name`."""
    names = list(names)
    closest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return (", ".join(names) or "none") + (f"; did you mean {closest[0]!r}?" if closest else "")


@contextmanager
def reading(path: DataPath, what: str, advice: str = "fetch or write the file again") -> Iterator[None]:
    """Turn an error of a reader into one that names the part and the file."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, ValueError, OSError, TypeError, RuntimeError, AttributeError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{what} of {path} cannot be read ({error}); {advice}") from error
