"""One AnnData file (.h5ad, .zarr): it is opened, its matrix is chosen, and its cells and genes are read.

The file is opened, never loaded: var is read whole, obs and the matrix in ranges of rows (`annotations`, `matrices`).
Counts of all genes are preferred, log-normalised values accepted, other values refused (`matrix_choice`); what a matrix
holds is told from sampled rows and checked again on every row that is read (`value_kinds`). Features that are no genes
are left out (`feature_types`). Format: anndata on-disk specification 0.1.0 and 0.2.0. Opening costs .05-.4 s.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any

import polars as pl

from feature_store.cells.annotations import ObsColumn, gene_names, obs_column, obs_series, string_column
from feature_store.cells.cellxgene_mark import CellxgeneMark, cellxgene_mark
from feature_store.cells.column_matrices import ColumnMatrix, CSCMatrix, column_matrix
from feature_store.cells.feature_types import GeneColumns, GeneFeatures, gene_features
from feature_store.cells.files.cell_file import Content, local, names_with_closest, read_obs, reading
from feature_store.cells.matrices import CSRRows, RowMatrix, open_matrix, parts_of_sparse
from feature_store.cells.matrix_choice import Candidate, MatrixChoice, choose_matrix, named_matrix
from feature_store.cells.value_kinds import check_rows, values_of
from feature_store.errors import InputError
from feature_store.storage.addresses import DataPath
from feature_store.storage.collection import collect_if_due

COLUMNWISE = "0.2.0"
"""The version of obs on disk whose columns can be read one by one; an older obs is read whole."""


class AnnDataFile:
    """An opened .h5ad file or AnnData .zarr folder: see `CellFile`. Its matrices are "X", "raw" and "layers/NAME"."""

    ignored: Sequence[str] = ()
    filtered = ""
    by_column: ColumnMatrix | None

    def __init__(self, path: DataPath, file: Any, *, matrix: str | None = None, content: Content | None = None) -> None:
        self.path: DataPath = path
        self.content: Content = content or local(path)
        # a group of zarr has its store
        self.format = "AnnData .zarr" if hasattr(file, "store") else "AnnData .h5ad"
        self._file = file
        self._vars: dict[str, tuple[Any, GeneFeatures]] = {}
        names = _matrix_names(file)
        if matrix is not None and matrix not in names:
            raise InputError(
                f"--matrix was {matrix!r}, not a matrix of {path}; it has {names_with_closest(matrix, names)}"
            )
        self._errors: dict[str, InputError] = {}
        self.candidates: Sequence[Candidate] = [
            self._candidate(name) for name in (names if matrix is None else [matrix])
        ]
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
        self.by_column = column_matrix(self._rows)
        self.n_cells, self.n_genes = self._rows.shape
        var, features = self._var(self.matrix)
        self.left_out = features.left_out
        with _reading(self.path, "var"):
            self.gene_symbols, self.ensembl_ids = gene_names(var[features.is_gene])

    def use_rows(self, rows: RowMatrix) -> None:
        """Read the cells from these rows of all features: the matrix in use, turned."""
        self._rows, self.by_column = self._genes_of(self.matrix, rows), None

    def _candidate(self, name: str) -> Candidate:
        """What a matrix holds, or why it cannot be used."""
        where = f"{name} of {self.path}"
        try:
            matrix = self._gene_matrix(name)
            by_column = column_matrix(matrix) is not None
            values = values_of(matrix, where)
            return Candidate(name=name, n_genes=matrix.shape[1], values=values, by_column=by_column)
        except InputError as error:
            self._errors[name] = error
            return Candidate(name=name, problem=str(error).removeprefix(where).lstrip(" ,:").partition(";")[0])

    def _gene_matrix(self, name: str) -> RowMatrix:
        """The matrix of this name, with genes as columns."""
        return self._genes_of(name, self._feature_matrix(name))

    def _feature_matrix(self, name: str) -> RowMatrix:
        node, where = self._file["raw/X" if name == "raw" else name], f"{name} of {self.path}"
        if node.attrs.get("encoding-type") == "csc_matrix":
            indptr, indices, data, shape = parts_of_sparse(node, where)
            return CSCMatrix(indptr, indices, data, shape=shape, where=where)
        return open_matrix(node, name, str(self.path))

    def _genes_of(self, name: str, matrix: RowMatrix) -> RowMatrix:
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

    @property
    def cellxgene(self) -> CellxgeneMark | None:
        """The mark of the schema of CELLxGENE; None if the file has none."""
        with _reading(self.path, "uns"):
            return cellxgene_mark(self._file)

    def close(self) -> None:
        """Close the file."""
        if hasattr(self._file, "close"):
            self._file.close()

    def read_rows(self, start: int, stop: int) -> CSRRows:
        """Cells [start, stop), with genes as ascending columns. InputError names the row of an impossible value."""
        collect_if_due()
        rows = self._rows.read(start, stop)
        check_rows(rows, self.value_kind, start, f"{self.matrix} of {self.path}")
        return rows

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns, in order."""
        return list(self._obs)

    def obs(self, start: int = 0, stop: int | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The obs columns, or those of these names, of the cells [start, stop), as by `annotations.obs_column`."""
        return read_obs(self._obs, columns, start, self.n_cells if stop is None else stop, partial(_reading, self.path))

    def obs_names(self, start: int = 0, stop: int | None = None) -> pl.Series:
        """Names of the cells [start, stop) in the file; they may repeat."""
        with _reading(self.path, "the index of obs"):
            return self._obs_index.read(start, self.n_cells if stop is None else stop)

    def obsm(self, key: str) -> Any:
        """The array of obsm of this name, on disk: shape [n_cells d], dtype, and ranges of rows as numpy.

        Raises:
            InputError: there is no such key, or it holds no array of numbers of two dimensions.
        """
        with _reading(self.path, "obsm"):
            keys = self._obsm_keys()
            node = self._file["obsm"][key] if key in keys else None
        if node is None:
            raise InputError(f"{self.path} has no obsm/{key}; its obsm has {names_with_closest(key, keys)}")
        if not _is_table_of_numbers(node):
            holds = f"an array {node.shape} of {node.dtype}" if hasattr(node, "shape") else "a table or a sparse matrix"
            raise InputError(
                f"obsm/{key} of {self.path} holds {holds}; it has to be an array of numbers [n_cells d], as "
                f"adata.obsm[{key!r}] = numpy.asarray(...) makes it; such arrays are "
                f"{', '.join(self.obsm_widths()) or 'none of its obsm'}"
            )
        self._check_length(f"obsm/{key}", node.shape[0])
        return node

    def obsm_widths(self) -> dict[str, int]:
        """Number of columns of each array of obsm that `obsm` gives, by name."""
        with _reading(self.path, "obsm"):
            nodes = {key: self._file["obsm"][key] for key in self._obsm_keys()}
            return {
                key: int(node.shape[1])
                for key, node in nodes.items()
                if _is_table_of_numbers(node) and node.shape[0] == self.n_cells and node.shape[1]
            }

    def _obsm_keys(self) -> list[str]:
        return list(self._file["obsm"]) if "obsm" in self._file else []

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


def _is_table_of_numbers(node: Any) -> bool:
    """Whether a part of a file is an array of numbers of two dimensions."""
    return hasattr(node, "shape") and len(node.shape) == 2 and node.dtype.kind in "fiu"


def _matrix_names(file: Any) -> list[str]:
    names = ["X"] if _is_there(file, "X") else []
    names += [f"layers/{name}" for name in file["layers"]] if "layers" in file else []
    return names + (["raw"] if _is_there(file, "raw/X") and "raw/var" in file else [])


def _is_there(file: Any, name: str) -> bool:
    return name in file and file[name].attrs.get("encoding-type") != "null"


def _read(node: Any) -> Any:
    import anndata

    return anndata.io.read_elem(node)


def _reading(path: DataPath, what: str) -> AbstractContextManager[None]:
    return reading(path, what, "write the file again with anndata")
