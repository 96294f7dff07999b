"""One AnnData file (.h5ad, .zarr): it is opened, its matrix is chosen, and its cells and genes are read.

The file is opened, never loaded: var is read whole, obs and the matrix in ranges of rows (`annotations`, `matrices`).
Counts of all genes are preferred, log-normalised values accepted, other values refused (`matrix_choice`); what a matrix
holds is told from sampled rows and checked again on every row that is read (`value_kinds`). Features that are no genes
are left out (`feature_types`). Format: anndata on-disk specification 0.1.0 and 0.2.0. Opening costs .05-.4 s.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import polars as pl

from feature_store.cells.annotations import ObsColumn, gene_names, obs_column, obs_series, string_column
from feature_store.cells.feature_types import GeneColumns, GeneFeatures, gene_features
from feature_store.cells.matrices import CSRRows, RowMatrix, open_matrix
from feature_store.cells.matrix_choice import Candidate, MatrixChoice, choose_matrix, named_matrix
from feature_store.cells.value_kinds import check_rows, values_of
from feature_store.errors import InputError
from feature_store.storage.data_files import refuse_other_than_hdf5, refuse_unfetched, refuse_unfetched_below

COLUMNWISE = "0.2.0"
"""The version of obs on disk whose columns can be read one by one; an older obs is read whole."""


class AnnDataFile:
    """An opened .h5ad file or AnnData .zarr folder; made by `open_file`. It cannot be passed between processes.

    Attributes:
        path: the file or zarr folder.
        candidates: the matrices of the file that were looked at, and what they hold.
        choice: the matrix in use, why it was taken, and what was passed over.
        matrix: its name, "X", "raw" or "layers/NAME".
        value_kind: "counts" or "lognorm".
        n_cells, n_genes: shape of that matrix, of which the columns are genes alone.
        left_out: number of features that are no genes, by their type.
        gene_symbols: symbol of each gene [n_genes]; the var name where there is no symbol.
        ensembl_ids: Ensembl id of each gene without version, "" where unknown; None if the file has none.
    """

    def __init__(self, path: Path, file: Any, *, matrix: str | None = None) -> None:
        self.path = path
        self._file = file
        self._vars: dict[str, tuple[Any, GeneFeatures]] = {}
        names = _matrix_names(file)
        if matrix is not None and matrix not in names:
            raise InputError(
                f"--matrix was {matrix!r}, not a matrix of {path}; it has {names_with_closest(matrix, names)}"
            )
        self._errors: dict[str, InputError] = {}
        self.candidates = [self._candidate(name) for name in (names if matrix is None else [matrix])]
        choice = choose_matrix(self.candidates)
        if choice is None:
            raise self._no_usable_matrix(names, requested=matrix)
        self._use(choice if matrix is None else named_matrix(choice.taken))

    def use_kind(self, kind: str) -> bool:
        """Take the best matrix of values of this kind instead; False, and no change, if there is none."""
        choice = choose_matrix(self.candidates, kind=kind)
        if choice is not None:
            self._use(choice)
        return choice is not None

    def _use(self, choice: MatrixChoice) -> None:
        self.choice = choice
        self.matrix, self.value_kind = choice.taken.name, choice.taken.kind
        self._rows = self._gene_matrix(self.matrix)
        self.n_cells, self.n_genes = self._rows.shape
        var, features = self._var(self.matrix)
        self.left_out = features.left_out
        with _reading(self.path, "var"):
            self.gene_symbols, self.ensembl_ids = gene_names(var[features.is_gene])

    def _candidate(self, name: str) -> Candidate:
        """What a matrix holds, or why it cannot be used."""
        where = f"{name} of {self.path}"
        try:
            matrix = self._gene_matrix(name)
            return Candidate(name=name, n_genes=matrix.shape[1], values=values_of(matrix, where))
        except InputError as error:
            self._errors[name] = error
            return Candidate(name=name, problem=str(error).removeprefix(where).lstrip(" ,:").partition(";")[0])

    def _gene_matrix(self, name: str) -> RowMatrix:
        """The matrix of this name, with genes as columns."""
        matrix = open_matrix(self._file["raw/X" if name == "raw" else name], name, str(self.path))
        if 0 in matrix.shape:
            raise InputError(f"{name} of {self.path} is empty: {matrix.shape[0]} cells x {matrix.shape[1]} genes")
        is_gene = self._var(name)[1].is_gene
        if len(is_gene) != matrix.shape[1]:
            raise InputError(
                f"{name} of {self.path} has {matrix.shape[1]} columns, but var has {len(is_gene)} genes; "
                "write the file again with anndata"
            )
        return matrix if is_gene.all() else GeneColumns(matrix, is_gene)

    def _var(self, matrix: str) -> tuple[Any, GeneFeatures]:
        """The var frame of a matrix, and which of its features are genes."""
        name = "raw/var" if matrix == "raw" else "var"
        if name not in self._vars:
            with _reading(self.path, "var"):
                var = _read(self._file[name])
            self._vars[name] = (var, gene_features(var, str(self.path)))
        return self._vars[name]

    def _no_usable_matrix(self, names: Sequence[str], *, requested: str | None) -> InputError:
        """The error for a file of which no matrix, or not the requested one, can be used."""
        if self._errors and len({one.problem for one in self.candidates}) == 1:
            return next(iter(self._errors.values()))
        others = [one for one in map(self._candidate, names) if one.name != requested] if requested else []
        every = [*self.candidates, *others]
        usable = [one.name for one in every if one.is_usable]
        subject = (
            f"matrix {requested} of {self.path} holds neither counts nor"
            if requested
            else f"no matrix of {self.path} holds counts or"
        )
        advice = f"use --matrix {usable[0]}" if usable else "store the raw counts, for example in layers['counts']"
        contents = "; ".join(f"{one.name}: {one.says()}" for one in every) or "it has none"
        return InputError(f"{subject} log-normalised values ({contents}); {advice}")

    def close(self) -> None:
        """Close the file."""
        if hasattr(self._file, "close"):
            self._file.close()

    def read_rows(self, start: int, stop: int) -> CSRRows:
        """Cells [start, stop), with genes as ascending columns. InputError names the row of an impossible value."""
        rows = self._rows.read(start, stop)
        check_rows(rows, self.value_kind, start, f"{self.matrix} of {self.path}")
        return rows

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns, in order."""
        return list(self._obs)

    def obs(self, start: int = 0, stop: int | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The obs columns, or those of these names, of the cells [start, stop), as by `annotations.obs_column`."""
        stop = self.n_cells if stop is None else stop
        found = []
        for name in self._obs if columns is None else columns:
            with _reading(self.path, f"obs column {name!r}"):
                found.append(self._obs[name].read(start, stop))
        return pl.DataFrame(found)

    def obs_names(self, start: int = 0, stop: int | None = None) -> pl.Series:
        """Names of the cells [start, stop) in the file; they may repeat."""
        with _reading(self.path, "the index of obs"):
            return self._obs_index.read(start, self.n_cells if stop is None else stop)

    @cached_property
    def _obs(self) -> dict[str, ObsColumn]:
        node, columns = self._file["obs"], {}
        if node.attrs.get("encoding-version") != COLUMNWISE:
            with _reading(self.path, "obs"):
                frame = self._obs_frame
                return {str(name): ObsColumn.of_series(obs_series(str(name), frame[name])) for name in frame.columns}
        for name in map(str, node.attrs["column-order"]):
            with _reading(self.path, f"obs column {name!r}"):
                columns[name] = obs_column(name, node[name], _read)
            self._check_length(f"obs column {name!r}", columns[name].n_cells)
        return columns

    @cached_property
    def _obs_index(self) -> ObsColumn:
        node = self._file["obs"]
        with _reading(self.path, "the index of obs"):
            if node.attrs.get("encoding-version") == COLUMNWISE:
                index = string_column("cell_id", node[node.attrs["_index"]], _read)
            else:
                names = [str(name) for name in self._obs_frame.index]
                index = ObsColumn.of_series(pl.Series("cell_id", names, dtype=pl.String))
        self._check_length("the index of obs", index.n_cells)
        return index

    @cached_property
    def _obs_frame(self) -> Any:
        return _read(self._file["obs"])

    def _check_length(self, what: str, length: int) -> None:
        if length != self.n_cells:
            raise InputError(
                f"{what} of {self.path} has {length} entries, but {self.matrix} has {self.n_cells} cells; "
                "write the file again with anndata"
            )


def open_file(path: Path, *, matrix: str | None = None) -> AnnDataFile:
    """Open an .h5ad file or an AnnData .zarr folder.

    `matrix` is "X", "raw" or "layers/NAME"; None takes the best (`matrix_choice`). InputError for a missing or damaged
    file, one that is not an AnnData, an empty matrix, and one without a matrix of counts or of log-normalised values
    (the message lists what every matrix of the file holds).
    """
    file = _open(path)
    missing = [name for name in ("obs", "var") if name not in file]
    if "mod" in file and "X" not in file:
        modalities = ", ".join(file["mod"])
        command = f"import mudata; mudata.read({str(path)!r})['rna'].write_h5ad('rna.h5ad')"
        raise InputError(f'{path} is a MuData with {modalities}; write its RNA alone: python -c "{command}"')
    if missing:
        raise InputError(
            f"{path} is not an AnnData: it has no {' and no '.join(missing)}; it has {', '.join(file) or 'nothing'}; "
            "give an .h5ad file or an AnnData .zarr folder"
        )
    try:
        return AnnDataFile(path, file, matrix=matrix)
    except InputError:
        if hasattr(file, "close"):
            file.close()
        if path.is_dir():
            refuse_unfetched_below(path)
        raise


def names_with_closest(name: str, names: Iterable[str]) -> str:
    """The existing names, for an error message, and the one closest to the unknown `name`."""
    names = list(names)
    closest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return (", ".join(names) or "none") + (f"; did you mean {closest[0]!r}?" if closest else "")


def _open(path: Path) -> Any:
    if not path.exists():
        beside = sorted(file.name for file in path.parent.glob("*.h5ad")) if path.parent.is_dir() else []
        raise InputError(f"there is no file {path}; its folder has {names_with_closest(path.name, beside)}")
    if path.is_dir():
        if not any((path / name).exists() for name in ("zarr.json", ".zgroup")):
            raise InputError(f"{path} is a folder but not a zarr group; give an .h5ad file or an AnnData .zarr folder")
        import zarr

        for name in ("zarr.json", ".zgroup"):
            if (path / name).is_file():
                refuse_unfetched(path / name)
        try:
            return zarr.open_group(path, mode="r")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(f"{path} is not a zarr group, or is damaged ({error}); copy the folder again") from error
    refuse_other_than_hdf5(path)
    try:
        return h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise InputError(f"{path} is not an HDF5 file, or is damaged ({error}); give an .h5ad file") from error


def _matrix_names(file: Any) -> list[str]:
    names = ["X"] if _is_there(file, "X") else []
    names += [f"layers/{name}" for name in file["layers"]] if "layers" in file else []
    return names + (["raw"] if _is_there(file, "raw/X") and "raw/var" in file else [])


def _is_there(file: Any, name: str) -> bool:
    return name in file and file[name].attrs.get("encoding-type") != "null"


def _read(node: Any) -> Any:
    import anndata

    return anndata.io.read_elem(node)


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn an error of the reader into one that names the part and the file."""
    try:
        yield
    except (KeyError, ValueError, OSError, TypeError, RuntimeError, AttributeError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{what} of {path} cannot be read ({error}); write the file again with anndata") from error
