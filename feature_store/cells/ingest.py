"""Cells and genes of a data set: one AnnData file, or several as one.

Files are opened, never loaded (`anndata_file`), so memory does not grow with the cells but by what the
cell table itself needs: 16 bytes a cell and column, and the cells' names. Several files are one data set whose cells
follow each other in the order of the files and whose genes are the union. The digest is one pass over the bytes (about
1.5 GB/s), the gene table another.

Measured (`tests/benchmarks/bench_ingest.py`, 2 cores of an AMD EPYC, 2,000 genes, 20 values a cell, 5 obs columns):
opening and writing 10 thousand cells takes .7 CPU seconds and 225 MB at its peak, a million 2.2 s and 435 MB.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import polars as pl

from feature_store.cells import splits
from feature_store.cells.anndata_file import AnnDataFile, digest, files_below, listing, open_file
from feature_store.cells.annotations import join_genes, join_obs, without_clashes
from feature_store.cells.matrices import CSRRows, concat_rows, sort_rows
from feature_store.errors import InputError
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout, run_id

BLOCK_ROWS = 4096
Watch = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""Shows a pass over the data: `with watch(title, total, unit) as tick`, where `tick(n)` says that n units are done."""


@contextmanager
def unwatched(_title: str, _total: int, _unit: str) -> Iterator[Callable[[int], None]]:
    """The `Watch` that shows nothing."""
    yield lambda _done: None


class Source:
    """An opened data set; make one with `open_source`. A context manager; not for passing between processes.

    Attributes:
        paths: its files (or zarr folders); their order is part of what the data set is.
        matrix: the matrix in use, "X", "raw" or "layers/NAME"; one for each file, comma-separated, where they differ.
        value_kind: "counts" or "lognorm", the same in every file.
        n_cells, n_genes: cells of all files together, and the union of their genes.
        n_genes_in_all: genes that every file has; a cell counts 0 of those that its file has not.
        gene_symbols: symbol of each gene [n_genes]; the var name where there is no symbol.
        ensembl_ids: Ensembl id of each gene without version, "" where unknown; None if no file has any.
        watch: shows the passes over the data.
    """

    def __init__(self, files: Sequence[AnnDataFile], *, watch: Watch = unwatched) -> None:
        self.paths = tuple(file.path for file in files)
        matrices = [file.matrix for file in files]
        self.matrix = matrices[0] if len(set(matrices)) == 1 else ",".join(matrices)
        self.value_kind = files[0].value_kind
        self.watch = watch
        self._files = tuple(files)
        # file i holds the cells [_first[i], _first[i + 1])
        self._first = np.cumsum([0, *(file.n_cells for file in files)])
        self.n_cells = int(self._first[-1])
        genes = join_genes([(file.gene_symbols, file.ensembl_ids) for file in files], list(map(str, self.paths)))
        self.gene_symbols, self.ensembl_ids, self.n_genes_in_all = genes.symbols, genes.ensembl, genes.n_in_all
        self.n_genes = len(genes.symbols)
        self._columns = genes.columns

    def __repr__(self) -> str:
        files = ", ".join(repr(str(path)) for path in self.paths)
        return f"Source({files}, {self.matrix}: {self.value_kind}, {self.n_cells} x {self.n_genes})"

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    @property
    def digest(self) -> str:
        """Sha256 of the content, wherever it lies: the file's own, or that of all files' in their order."""
        if len(self.digests) == 1:
            return self.digests[0]
        return sha256("".join(f"{one}\n" for one in self.digests).encode()).hexdigest()

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Sha256 of each file's content: one pass over its bytes, on first use. InputError if two are the same."""
        sizes = [sum(part.stat().st_size for part in files_below(path)) for path in self.paths]
        read = 0
        with self.watch("hash", sum(sizes) // 1_000_000, "MB") as tick:

            def on_bytes(n: int) -> None:
                nonlocal read
                read += n
                tick(read // 1_000_000)

            found = tuple(digest(path, on_bytes) for path in self.paths)
        for i, one in enumerate(found):
            if one in found[:i]:
                raise InputError(
                    f"{self.paths[i]} is a copy of {self.paths[found.index(one)]}: its cells would count twice; "
                    "leave one of them out"
                )
        return found

    def read_rows(self, start: int, stop: int) -> CSRRows:
        """Cells [start, stop), genes as ascending columns. InputError naming the row of a value that cannot be."""
        if not 0 <= start <= stop <= self.n_cells:
            raise InputError(
                f"rows [{start}, {stop}) are not in [0, {self.n_cells}) of {', '.join(map(str, self.paths))}"
            )
        parts = []
        for i, file in enumerate(self._files):
            low, high = max(start, int(self._first[i])), min(stop, int(self._first[i + 1]))
            if low < high:
                rows = file.read_rows(low - int(self._first[i]), high - int(self._first[i]))
                parts.append(self._in_joined_genes(rows, i))
        return concat_rows(parts)

    def read_first(self, n: int) -> CSRRows:
        """About `n` cells, as many from the start of each file: a look at the data."""
        share = -(-n // len(self._files))
        starts = self._first[:-1].tolist()
        return concat_rows(
            [self.read_rows(a, a + min(share, file.n_cells)) for a, file in zip(starts, self._files, strict=True)]
        )

    def obs(self) -> pl.DataFrame:
        """Every obs column, in order: categories as strings, numbers, booleans and dates kept, NaN as null.

        Of several files, one below the other, behind a column `file` (`annotations.join_obs`).
        """
        if len(self._files) == 1:
            return self._files[0].obs()
        names = _short_names(self.paths)
        return join_obs([(name, file.n_cells, file.obs()) for name, file in zip(names, self._files, strict=True)])

    def obs_names(self) -> pl.Series:
        """Names of the cells as the files have them [n_cells]; they may repeat, so `cell_idx` is the key."""
        return pl.concat([file.obs_names() for file in self._files])

    def _in_joined_genes(self, rows: CSRRows, i: int) -> CSRRows:
        if len(self._files) == 1:
            return rows
        return sort_rows(rows._replace(indices=self._columns[i][rows.indices]), where=str(self.paths[i]))


def open_source(
    paths: str | Path | Sequence[str | Path], *, matrix: str | None = None, watch: Watch = unwatched
) -> Source:
    """Open an .h5ad file or an AnnData .zarr folder, or several as one data set.

    `matrix` is "X", "raw" or "layers/NAME" in every file, or one for each, comma-separated; None chooses in each file
    (`anndata_file.open_file`). `watch` shows the long passes. InputError as from `open_file`, for the same file twice,
    files of counts and of log-normalised values together, and files without a gene in common.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    for i, path in enumerate(files):
        if path.resolve() in {other.resolve() for other in files[:i]}:
            raise InputError(f"{path} was given twice: its cells would count twice; give each file once")
    if not files:
        raise InputError("no file was given; give an .h5ad file or an AnnData .zarr folder")
    named = [matrix] * len(files) if matrix is None or len(files) == 1 else matrix.split(",")
    named = named * len(files) if len(named) == 1 else named
    if len(named) != len(files):
        raise InputError(f"--matrix was {matrix!r}, {len(named)} for {len(files)} files; name one, or one for each")
    opened = [open_file(path, matrix=name) for path, name in zip(files, named, strict=True)]
    if len({file.value_kind for file in opened}) > 1:
        kinds = "; ".join(f"{file.path}: {file.matrix} holds {file.value_kind}" for file in opened)
        raise InputError(
            f"counts and log-normalised values cannot be one data set ({kinds}); name the matrices that hold the same "
            "with --matrix, one for each file: --matrix X,layers/counts"
        )
    return Source(opened, watch=watch)


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
    split_column: str | None = None,
    known_splits: Mapping[str, str] | None = None,
) -> pl.DataFrame:
    """Write the tables `cells` and `genes` of a data set, splits included, and return the cells.

    `donor`, `batch` and `cell_type` name obs columns, which become the columns of that name (null where None); every
    obs column is kept as well. An obs column that has the name of one of the table's own columns is dropped where it
    is the one that was asked for, and else gets the suffix `_obs`. `labels` names further obs columns of interest;
    they are checked and noted in the plan. `dataset` None takes the file's name and a hash of its content and of
    these options.

    Of several files, a name of a donor (batch, cell type) is one donor in whichever file it stands: if two files call
    different people "1", the split keeps them together, which loses some balance and leaks nothing.

    Splits are dealt (`splits.make`; `known_splits` are those that units have already, `read_unit_splits`), or those of
    the obs column `split_column` (`splits.given`).

    Calling it again with the same arguments writes nothing. The genes cost one pass over the matrix, which checks every
    value on the way. Raises InputError for an obs column that does not exist (nothing is written), PlanMismatchError if
    the data set's name is taken by other content.
    """
    split = split or splits.SplitConfig()
    obs = source.obs()
    asked = {"donor": donor, "batch": batch, "cell_type": cell_type}
    for option, column in (*asked.items(), ("split", split_column), *(("label", label) for label in labels)):
        if column is not None and column not in obs.columns:
            raise InputError(
                f"--{option.replace('_', '-')} was {column!r}, no obs column of {', '.join(map(str, source.paths))}; "
                f"there are {listing(column, obs.columns)}"
            )
    named = {key: None if column is None else obs[column].cast(pl.String) for key, column in asked.items()}
    if split_column is None:
        split_of_cell, record = splits.make(
            source.n_cells, donor=named["donor"], batch=named["batch"], known=known_splits, config=split
        )
    else:
        split_of_cell, record = splits.given(
            obs[split_column], name=split_column, donor=named["donor"], batch=named["batch"]
        )
    plan = {
        "digest": source.digest,
        **asked,
        "labels": list(labels),
        "split": {**asdict(split), **asdict(record)},
    }
    if split_column is not None:
        plan["split_column"] = split_column
    elif kept := _kept(named[record.unit] if record.unit in named else None, known_splits):
        plan["kept_splits"] = kept
    if len(source.paths) > 1:
        plan["sources"] = _short_names(source.paths)
    dataset = dataset or f"{_slug(source.paths)}-{run_id({**plan, 'matrix': source.matrix})[:6]}"
    own = {
        "cell_idx": pl.int_range(source.n_cells, dtype=pl.Int64, eager=True),
        "cell_id": source.obs_names(),
        "dataset": pl.Series([dataset], dtype=pl.String).new_from_index(0, source.n_cells),
        "split": pl.Series(split_of_cell.tolist(), dtype=pl.String),
        **{key: pl.Series([None], dtype=pl.String).new_from_index(0, source.n_cells) if column is None else column
           for key, column in named.items()},
    }  # fmt: skip
    taken = {**asked, "split": split_column}
    cells = schemas.conform("cells", pl.DataFrame(own).hstack(without_clashes(obs, taken, tuple(own))))
    genes_plan = {"table": "genes", "dataset": dataset, "digest": source.digest, "matrix": source.matrix}
    commit.write_table(layout.genes_dir(dataset), lambda: gene_table(source), genes_plan)
    commit.write_table(layout.cells_dir(dataset), cells, {"table": "cells", "dataset": dataset, **plan})
    return cells


def read_cells(folder: str | Path) -> pl.DataFrame:
    """The cell table in `Layout.cells_dir(dataset)`, sorted by cell_idx. NotFoundError, IncompleteRunError."""
    return commit.read_table(folder)


def read_splits(folder: str | Path) -> splits.Labels:
    """The split of each cell in `Layout.cells_dir(dataset)`, indexed by cell_idx: 8 bytes a cell, no other column."""
    return splits.labels_of(commit.read_table(folder, ["split"])["split"])


def read_split_record(folder: str | Path) -> splits.SplitRecord:
    """How the cells in `Layout.cells_dir(dataset)` were split, and whether donors could be kept whole."""
    content = commit.Run.open(folder).plan["split"]
    return splits.SplitRecord(**{key: content[key] for key in ("unit", "n_units", "cells", "units", "fallback")})


def read_unit_splits(folder: str | Path, unit: str) -> dict[str, str]:
    """The split of each donor (`unit` "donor") or batch in `Layout.cells_dir(dataset)`; empty if they are not whole."""
    if read_split_record(folder).unit != unit:
        return {}
    return dict(commit.read_table(folder, [unit, "split"]).drop_nulls().unique().iter_rows())


def gene_table(source: Source) -> pl.DataFrame:
    """The table `genes`: for each gene the cells with a value above 0 and the mean over all cells, in one pass."""
    n_cells = np.zeros(source.n_genes, dtype=np.int64)
    total = np.zeros(source.n_genes)
    with source.watch("check values", source.n_cells, "cells") as tick:
        for start in range(0, source.n_cells, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, source.n_cells)
            rows = source.read_rows(start, stop)
            n_cells += np.bincount(rows.indices[rows.data > 0], minlength=source.n_genes)
            total += np.bincount(rows.indices, weights=rows.data, minlength=source.n_genes)
            tick(stop)
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


def _kept(units: pl.Series | None, known: Mapping[str, str] | None) -> dict[str, str]:
    """Those of the known splits that are of units of these cells, in order."""
    present = set() if units is None else set(units.unique())
    return {name: split for name, split in sorted((known or {}).items()) if name in present}


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The files' names, with as many folders before them as tell them apart: a run does not depend on where it lies."""
    parts = [path.absolute().parts for path in paths]
    depth = next(n for n in range(1, max(map(len, parts)) + 1) if len({part[-n:] for part in parts}) == len(parts))
    return ["/".join(part[-depth:]) for part in parts]


def _slug(paths: Sequence[Path]) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", paths[0].stem).strip("-_") or "data"
    return name if len(paths) == 1 else f"{name}-and-{len(paths) - 1}-more"
