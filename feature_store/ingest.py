"""Cells and genes from AnnData files (.h5ad, .zarr): the one place that knows the format.

The file is opened, never loaded: obs and var are read whole, the matrix in ranges of rows (`feature_store.matrices`),
so memory does not grow with the cells. Raw counts are preferred, log-normalised values accepted, scaled ones refused;
which one a matrix is, is found by sampling rows and checked again on every row that is read. Format: anndata on-disk
specification 0.1.0 and 0.2.0. Opening costs .05-.4 s, the digest one pass over the file (about 1.5 GB/s).
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl

from feature_store import commit, schemas, splits
from feature_store.annotations import gene_names, obs_series, without_clashes
from feature_store.errors import InputError
from feature_store.layout import Layout, run_id
from feature_store.matrices import KINDS, USABLE, CSRRows, RowMatrix, check_rows, open_matrix, value_kind

BLOCK_ROWS = 4096


class Source:
    """An opened data set; make one with `open_source`. A context manager; not for passing between processes.

    Attributes:
        path: the file or zarr folder.
        matrix: the matrix in use, "X", "raw" or "layers/NAME".
        value_kind: "counts" or "lognorm".
        n_cells, n_genes: shape of that matrix.
        gene_symbols: symbol of each gene [n_genes]; the var name where there is no symbol.
        ensembl_ids: Ensembl id of each gene without version, "" where unknown; None if the file has none.
    """

    def __init__(self, path: Path, file: Any, *, matrix: str, kind: str) -> None:
        self.path = path
        self.matrix = matrix
        self.value_kind = kind
        self._file = file
        self._rows: RowMatrix = _matrix(file, matrix, path)
        self.n_cells, self.n_genes = self._rows.shape
        self.gene_symbols, self.ensembl_ids = gene_names(_read(file["raw/var" if matrix == "raw" else "var"], path))

    def __repr__(self) -> str:
        return f"Source({str(self.path)!r}, {self.matrix}: {self.value_kind}, {self.n_cells} x {self.n_genes})"

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if hasattr(self._file, "close"):
            self._file.close()

    @cached_property
    def digest(self) -> str:
        """Sha256 of the content, wherever the file lies: one pass over its bytes (1.5 GB/s), on first use."""
        return _digest(self.path)

    def read_rows(self, start: int, stop: int) -> CSRRows:
        """Cells [start, stop), genes as columns. InputError naming the row of a value that cannot be."""
        if not 0 <= start <= stop <= self.n_cells:
            raise InputError(f"rows [{start}, {stop}) are not in [0, {self.n_cells}) of {self.path}")
        rows = self._rows.read(start, stop)
        check_rows(rows, self.value_kind, start, self.matrix)
        return rows

    def obs(self) -> pl.DataFrame:
        """Every obs column, in order: categories as strings, numbers, booleans and dates kept, NaN as null."""
        frame = self._obs
        return pl.DataFrame([obs_series(str(name), frame[name]) for name in frame.columns])

    def obs_names(self) -> list[str]:
        """Names of the cells as the file has them; they may repeat, so `cell_idx` is the key."""
        return [str(name) for name in self._obs.index]

    @cached_property
    def _obs(self) -> Any:
        return _read(self._file["obs"], self.path)


def open_source(path: str | Path, *, matrix: str | None = None) -> Source:
    """Open an .h5ad file or an AnnData .zarr folder.

    `matrix` is "X", "raw" or "layers/NAME"; None takes the first of: X if it holds counts, layers/counts if it does,
    raw (counts or log-normalised), X if it is log-normalised. InputError for a missing or damaged file, one that is
    no AnnData, an empty matrix, a matrix stored by column, NaN, and values that are neither counts nor log-normalised
    (the message lists what every matrix of the file holds).
    """
    path = Path(path)
    file = _open(path)
    missing = [name for name in ("obs", "var") if name not in file]
    if missing:
        raise InputError(
            f"{path} is no AnnData: it has no {' and no '.join(missing)}; it has {', '.join(file) or 'nothing'}"
        )
    names = _matrix_names(file)
    if matrix is not None and matrix not in names:
        raise InputError(f"{path} has no matrix {matrix!r}; it has {listing(matrix, names)}")
    kinds: dict[str, str] = {}
    for name, wanted in _PREFERENCE if matrix is None else ((matrix, USABLE),):
        if name in names and name not in kinds:
            kinds[name] = value_kind(_matrix(file, name, path), name)
        if kinds.get(name) in wanted:
            return Source(path, file, matrix=name, kind=kinds[name])
    raise InputError(_no_usable_matrix(file, path, names, asked=matrix))


def write_cells(
    layout: Layout,
    source: Source,
    *,
    dataset: str | None = None,
    donor: str | None = None,
    batch: str | None = None,
    cell_type: str | None = None,
    labels: Sequence[str] = (),
    split: splits.SplitConfig | None = None,
) -> pl.DataFrame:
    """Write the tables `cells` and `genes` of a data set, splits included, and return the cells.

    `donor`, `batch` and `cell_type` name obs columns, which become the columns of that name (null where None); every
    obs column is kept as well. An obs column that has the name of one of the table's own columns is dropped where it
    is the one that was asked for, and else gets the suffix `_obs`. `labels` names further obs columns of interest;
    they are checked and noted in the plan. `dataset` None takes the file's name and a hash of its content and of
    these options.

    Calling it again with the same arguments writes nothing. The genes cost one pass over the matrix, which checks every
    value on the way. Raises InputError for an obs column that does not exist (nothing is written), PlanMismatchError if
    the data set's name is taken by other content.
    """
    split = split or splits.SplitConfig()
    obs = source.obs()
    asked = {"donor": donor, "batch": batch, "cell_type": cell_type}
    for option, column in (*asked.items(), *(("label", label) for label in labels)):
        if column is not None and column not in obs.columns:
            raise InputError(
                f"--{option.replace('_', '-')} was {column!r}, no obs column of {source.path}; "
                f"there are {listing(column, obs.columns)}"
            )
    named = {key: None if column is None else obs[column].cast(pl.String) for key, column in asked.items()}
    split_of_cell, record = splits.make(
        source.n_cells, donor=_units(named["donor"]), batch=_units(named["batch"]), config=split
    )
    plan = {
        "digest": source.digest,
        **asked,
        "labels": list(labels),
        "split": {**asdict(split), **asdict(record)},
    }
    dataset = dataset or f"{_slug(source.path.stem)}-{run_id({**plan, 'matrix': source.matrix})[:6]}"
    own = {
        "cell_idx": pl.int_range(source.n_cells, dtype=pl.Int64, eager=True),
        "cell_id": pl.Series(source.obs_names(), dtype=pl.String),
        "dataset": pl.Series([dataset], dtype=pl.String).new_from_index(0, source.n_cells),
        "split": pl.Series(split_of_cell.tolist(), dtype=pl.String),
        **{key: pl.Series([None], dtype=pl.String).new_from_index(0, source.n_cells) if column is None else column
           for key, column in named.items()},
    }  # fmt: skip
    cells = schemas.conform("cells", pl.DataFrame(own).hstack(without_clashes(obs, asked, tuple(own))))
    genes_plan = {"table": "genes", "dataset": dataset, "digest": source.digest, "matrix": source.matrix}
    commit.write_table(layout.genes_dir(dataset), lambda: gene_table(source), genes_plan)
    commit.write_table(layout.cells_dir(dataset), cells, {"table": "cells", "dataset": dataset, **plan})
    return cells


def read_cells(folder: str | Path) -> pl.DataFrame:
    """The cell table in `Layout.cells_dir(dataset)`, sorted by cell_idx. NotFoundError, IncompleteRunError."""
    return commit.read_table(folder)


def read_split_record(folder: str | Path) -> splits.SplitRecord:
    """How the cells in `Layout.cells_dir(dataset)` were split, and whether donors could be kept whole."""
    content = commit.Run.open(folder).plan["split"]
    return splits.SplitRecord(**{key: content[key] for key in ("unit", "n_units", "cells", "units", "fallback")})


def gene_table(source: Source) -> pl.DataFrame:
    """The table `genes`: for each gene the cells with a value above 0 and the mean over all cells, in one pass."""
    n_cells = np.zeros(source.n_genes, dtype=np.int64)
    total = np.zeros(source.n_genes)
    for start in range(0, source.n_cells, BLOCK_ROWS):
        rows = source.read_rows(start, min(start + BLOCK_ROWS, source.n_cells))
        n_cells += np.bincount(rows.indices[rows.data > 0], minlength=source.n_genes)
        total += np.bincount(rows.indices, weights=rows.data, minlength=source.n_genes)
    ensembl = source.ensembl_ids
    frame = pl.DataFrame(
        {
            "gene_idx": np.arange(source.n_genes, dtype=np.int32),
            "symbol": source.gene_symbols,
            "ensembl_id": pl.Series([name or None for name in ensembl or [""] * source.n_genes], dtype=pl.String),
            "n_cells": n_cells,
            "mean": total / source.n_cells,
        }
    )
    return schemas.conform("genes", frame)


def listing(asked: str, names: Iterable[str]) -> str:
    """What there is, for an error message, with the name nearest to the one asked for."""
    names = list(names)
    near = difflib.get_close_matches(asked, names, n=1, cutoff=0.5)
    return (", ".join(names) or "none") + (f"; did you mean {near[0]!r}?" if near else "")


_PREFERENCE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("X", ("counts",)),
    ("layers/counts", ("counts",)),
    ("raw", USABLE),
    ("X", USABLE),
)


def _open(path: Path) -> Any:
    if not path.exists():
        beside = sorted(file.name for file in path.parent.glob("*.h5ad")) if path.parent.is_dir() else []
        raise InputError(f"no file {path}; in its folder there is {listing(path.name, beside)}")
    if path.is_dir():
        if not any((path / name).exists() for name in ("zarr.json", ".zgroup")):
            raise InputError(f"{path} is a folder and no zarr group; give an .h5ad file or an AnnData .zarr folder")
        import zarr

        return zarr.open_group(path, mode="r")
    try:
        return h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise InputError(f"{path} is no HDF5 file, or a damaged one ({error}); give an .h5ad file") from error


def _matrix_names(file: Any) -> list[str]:
    names = ["X"] if _is_there(file, "X") else []
    names += [f"layers/{name}" for name in file["layers"]] if "layers" in file else []
    return names + (["raw"] if _is_there(file, "raw/X") and "raw/var" in file else [])


def _is_there(file: Any, name: str) -> bool:
    return name in file and file[name].attrs.get("encoding-type") != "null"


def _matrix(file: Any, name: str, path: Path) -> RowMatrix:
    matrix = open_matrix(file["raw/X" if name == "raw" else name], name, str(path))
    if 0 in matrix.shape:
        raise InputError(f"{name} of {path} is empty: {matrix.shape[0]} cells x {matrix.shape[1]} genes")
    return matrix


def _no_usable_matrix(file: Any, path: Path, names: Sequence[str], *, asked: str | None) -> str:
    found, usable = [], []
    for name in names:
        try:
            kind = value_kind(_matrix(file, name, path), name)
        except InputError as error:
            found.append(f"{name}: {error}")
            continue
        found.append(f"{name}: {KINDS[kind]}")
        usable += [name] if kind in USABLE else []
    what = f"matrix {asked} of {path} holds" if asked else f"no matrix of {path} holds"
    advice = f"name one that does: --matrix {usable[0]}" if usable else "store the raw counts, e.g. in layers['counts']"
    no = " neither" if asked else ""
    return (
        f"{what}{no} counts {'nor' if asked else 'or'} log-normalised values ({'; '.join(found) or 'none'}); {advice}"
    )


def _read(node: Any, path: Path) -> Any:
    import anndata

    try:
        return anndata.io.read_elem(node)
    except (KeyError, ValueError, OSError, TypeError) as error:
        raise InputError(
            f"{node.name} of {path} cannot be read ({error}); write the file again with anndata"
        ) from error


def _digest(path: Path) -> str:
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for part in sorted(file for file in path.rglob("*") if file.is_file()):
        total.update(f"{part.relative_to(path).as_posix()}:{_digest(part)}\n".encode())
    return total.hexdigest()


def _units(column: pl.Series | None) -> list[str | None] | None:
    return None if column is None else column.to_list()


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_") or "data"
