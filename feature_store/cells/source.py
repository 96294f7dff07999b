"""An opened data set: one file of any format, or several as one.

Files are opened, never loaded (`files`), so memory does not grow with the number of values. Several files are
one data set: its cells follow each other in the order of the files, and its genes are the union of theirs. The digest
of the content is one pass over the bytes (about 1.5 GB/s), unless it is known (`file_digests`).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells.annotations import check_alike, join_genes, join_obs
from feature_store.cells.cellxgene_mark import CellxgeneMark
from feature_store.cells.column_matrices import ColumnMatrix
from feature_store.cells.file_digests import FileState, KnownDigest, file_digest, file_state, no_known_digest
from feature_store.cells.files.cell_file import CellFile
from feature_store.cells.files.recognise import FORMATS, files_of, open_file
from feature_store.cells.matrices import CSRRows, concat_rows, select_rows, sort_rows
from feature_store.cells.obs_table import JoinedObs, join_tables, obs_facts, read_obs_table
from feature_store.cells.row_parts import RowParts
from feature_store.cells.value_kinds import USABLE
from feature_store.errors import InputError
from feature_store.storage.addresses import DataPath, RemotePath, data_path, same_place
from feature_store.storage.remote_objects import RemoteContent

BLOCK_ROWS = 4096
GAP_ROWS = 64
"""Rows between two wanted cells that are read along with them: with 200 values each, a read costs as much as 90."""
OBS_CELLS = 1 << 17
"""Cells of a range in which obs is read."""
SOME_NUMBERS = 64
CELL_RANGER_NAMES = frozenset(
    f"{kind}_{matrix}{suffix}"
    for kind in ("filtered", "raw", "sample_filtered", "sample_raw")
    for matrix in ("feature_bc_matrix", "gene_bc_matrices", "gene_bc_matrices_h5")
    for suffix in ("", ".h5")
) | {"outs", "count", "matrix.mtx", "matrix.mtx.gz"}
"""Names of files and folders that are the same in every sample."""
Progress = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""Shows the progress of a pass over the data: `with progress(title, total, unit) as update`, where `update(n)` says
that n units are done."""


@contextmanager
def no_progress(_title: str, _total: int, _unit: str) -> Iterator[Callable[[int], None]]:
    """The `Progress` that shows nothing."""
    yield lambda _done: None


class Source:
    """An opened data set, made by `open_source`. It is a context manager and cannot be passed between processes.

    Attributes:
        paths: its files (or folders), or their addresses; their order determines the order of cells and genes.
        matrix: the matrix in use, such as "X", "raw" or "layers/NAME"; one for each file, comma-separated, if they
            differ.
        value_kind: "counts" or "lognorm", the same in every file.
        choices: for each file the matrix that was taken, why, and what was passed over.
        formats: the format of each file, in words.
        ignored: for each file what else of it is not read, in words.
        where: the condition by which the cells were taken (SOMA experiments alone), None without one.
        filtered: for each file how many of its cells it took, in words; "" without one.
        left_out: number of features of the files that are no genes, by their type; the matrix does not hold them.
        n_cells, n_genes: numbers of cells of all files and of genes in the union.
        n_genes_in_all: number of genes that every file has; a cell has 0 of a gene that its file lacks.
        gene_symbols: symbol of each gene [n_genes]; the var name where there is no symbol.
        ensembl_ids: Ensembl id of each gene without version, "" where unknown; None if no file has any.
        progress: shows the passes over the data.
        rows: for each file the folder of its matrix turned into parts of whole cells, "" where it needs none.
    """

    def __init__(
        self,
        files: Sequence[CellFile],
        *,
        where: str | None = None,
        progress: Progress = no_progress,
        known_digest: KnownDigest = no_known_digest,
    ) -> None:
        self.paths: tuple[DataPath, ...] = tuple(file.path for file in files)
        matrices = [file.matrix for file in files]
        self.matrix = matrices[0] if len(set(matrices)) == 1 else ",".join(matrices)
        self.value_kind = files[0].value_kind
        self.choices = tuple(file.choice for file in files)
        self.formats = tuple(file.format for file in files)
        self.ignored = tuple(tuple(file.ignored) for file in files)
        self.where, self.filtered = where, tuple(file.filtered for file in files)
        self.left_out = dict(sum((Counter(file.left_out) for file in files), Counter[str]()))
        self.progress = progress
        self.rows = ("",) * len(files)
        self._known_digest = known_digest
        self._joined: tuple[JoinedObs, ...] = ()
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
    def cellxgene(self) -> tuple[CellxgeneMark | None, ...]:
        """For each file the mark of the schema of CELLxGENE, None where it has none."""
        return tuple(file.cellxgene for file in self._files)

    @property
    def places(self) -> tuple[str | RemotePath, ...]:
        """The files as another process opens them: absolute paths, and addresses with the version that is open here."""
        return tuple(
            path.of_version(content.digest) if isinstance(path, RemotePath) and content else str(same_place(path))
            for path, content in zip(self.paths, self._of_addresses, strict=True)
        )

    @property
    def versions(self) -> tuple[str, ...]:
        """For each file its version in words if it is at an address, else ""."""
        return tuple("" if one is None else one.text for one in self._of_addresses)

    @property
    def digest(self) -> str:
        """Sha256 of the content: that of the file, or that of the digests of all files in their order, and of the
        condition by which the cells were taken.
        """
        parts = [*self.digests, *([] if self.where is None else [f"where {self.where}"])]
        return parts[0] if len(parts) == 1 else sha256("".join(f"{one}\n" for one in parts).encode()).hexdigest()

    @property
    def digests(self) -> tuple[str, ...]:
        """Sha256 of each file's content, or of its version if it is at an address. Those that are not known cost one
        pass over the bytes, on first use.

        InputError if two are the same.
        """
        return tuple(digest for _, digest in self._hashed)

    @property
    def states(self) -> tuple[FileState, ...]:
        """The state of each file before it was hashed."""
        return tuple(state for state, _ in self._hashed)

    @property
    def _of_addresses(self) -> list[RemoteContent | None]:
        """For each file what stands for its content if it is at an address."""
        return [file.content if isinstance(file.content, RemoteContent) else None for file in self._files]

    @cached_property
    def _hashed(self) -> list[tuple[FileState, str]]:
        # careful: the state is taken before the hash, so that a change in between is seen the next time
        contents = [file.content for file in self._files]
        states = [file_state(content) for content in contents]
        known = [
            self._known_digest(path, state) if one is None else one.digest
            for one, path, state in zip(self._of_addresses, self.paths, states, strict=True)
        ]
        n_bytes = sum(state.size_bytes for state, digest in zip(states, known, strict=True) if digest is None)
        read = 0

        def on_bytes(n: int) -> None:
            nonlocal read
            read += n
            update(read // 1_000_000)

        if None in known:
            with self.progress("hash", n_bytes // 1_000_000, "MB") as update:
                known = [one or file_digest(content, on_bytes) for content, one in zip(contents, known, strict=True)]
        digests = [one for one in known if one is not None]
        for i, one in enumerate(digests):
            if one in digests[:i]:
                raise InputError(
                    f"{self.paths[i]} is a copy of {self.paths[digests.index(one)]}, so its cells would count twice; "
                    "leave one of them out"
                )
        return list(zip(states, digests, strict=True))

    @property
    def column_matrices(self) -> tuple[ColumnMatrix | None, ...]:
        """For each file its matrix, if that does not lie cell by cell and was not turned; else None."""
        return tuple(file.by_column for file in self._files)

    def use_rows(self, folders: Sequence[str]) -> None:
        """Read the cells of each file from the parts in its folder (`row_parts`); "" leaves a file as it is."""
        self.rows = tuple(folders)
        for file, folder in zip(self._files, folders, strict=True):
            if folder:
                file.use_rows(RowParts(folder))

    def read_rows(self, start: int, stop: int) -> CSRRows:
        """Cells [start, stop), with genes as ascending columns. InputError names the row of an impossible value."""
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

    def read_cells(self, cells: npt.NDArray[np.int64]) -> CSRRows:
        """The given cells (ascending indices, none twice), as `read_rows` gives them.

        Cells with fewer than GAP_ROWS others between them are read as one range, of at most BLOCK_ROWS rows, from
        which they are selected: values that no cell of `cells` has are in memory for one range at a time. A range may
        report an impossible value of a cell between them. InputError for cells that do not ascend.
        """
        if len(cells) and not (0 <= cells[0] and cells[-1] < self.n_cells and (np.diff(cells) > 0).all()):
            raise InputError(f"the cells do not ascend in [0, {self.n_cells}) of {', '.join(map(str, self.paths))}")
        parts = []
        for low, high in _runs(cells):
            wanted = cells[low:high]
            start, stop = int(wanted[0]), int(wanted[-1]) + 1
            rows = self.read_rows(start, stop)
            parts.append(rows if stop - start == len(wanted) else select_rows(rows, wanted - start))
        return concat_rows(parts)

    def first_cells(self, n: int) -> npt.NDArray[np.int64]:
        """About `n` cells, the same number from the start of each file."""
        share = -(-n // len(self._files))
        starts = self._first[:-1].tolist()
        return np.concatenate(
            [np.arange(a, a + min(share, file.n_cells)) for a, file in zip(starts, self._files, strict=True)]
        )

    @cached_property
    def obs_schema(self) -> pl.Schema:
        """Name and type of every obs column, in order."""
        return self.obs(0, 0).schema

    def obs(self, start: int = 0, stop: int | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The obs columns, or those of these names, of the cells [start, stop): categories become text, NaN null;
        numbers, booleans and dates stay.

        The obs of several files lie one below the other, with a first column `file` (`annotations.join_obs`).
        """
        stop = self.n_cells if stop is None else stop
        if len(self._files) == 1:
            return self._obs_of(0, start, stop, columns)
        parts = []
        for i, (name, file) in enumerate(zip(self._short_names, self._files, strict=True)):
            low, high = (min(max(cell - int(self._first[i]), 0), file.n_cells) for cell in (start, stop))
            parts.append((name, high - low, self._obs_of(i, low, high)))
        joined = join_obs(parts)
        return joined if columns is None else joined.select(columns)

    def obs_of_cells(self, cells: npt.NDArray[np.int64], columns: Sequence[str]) -> pl.DataFrame:
        """The obs columns of these names, of the given cells (ascending indices), read as `read_cells` reads them."""
        parts = [self.obs(0, 0, columns)]
        for low, high in _runs(cells):
            wanted = cells[low:high]
            start, stop = int(wanted[0]), int(wanted[-1]) + 1
            parts.append(self.obs(start, stop, columns)[wanted - start])
        return pl.concat(parts)

    def obs_names(self, start: int = 0, stop: int | None = None) -> pl.Series:
        """Names of the cells [start, stop) in the files; they may repeat, so `cell_idx` is the key."""
        stop = self.n_cells if stop is None else stop
        return pl.concat(
            [
                file.obs_names(*(min(max(cell - first, 0), file.n_cells) for cell in (start, stop)))
                for first, file in zip(self._first[:-1].tolist(), self._files, strict=True)
            ]
        )

    def obsm(self, key: str) -> "ObsmArray":
        """The arrays of obsm of this name in all files, one below the other; nothing of them is read.

        Raises:
            InputError: a file has no such array [n_cells d] of numbers, or they differ in d.
        """
        arrays = [file.obsm(key) for file in self._files]
        widths = {str(path): array.shape[1] for path, array in zip(self.paths, arrays, strict=True)}
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{path}: {width}" for path, width in widths.items())
            raise InputError(f"obsm/{key} differs in its number of columns ({found}); give files of one d")
        return ObsmArray(arrays, self._first.tolist())

    def obsm_widths(self) -> dict[str, int]:
        """Number of columns of each array that `obsm` gives: one [n_cells d] of numbers, of the same d in all files."""
        first, *others = [file.obsm_widths() for file in self._files]
        return {key: width for key, width in first.items() if all(one.get(key) == width for one in others)}

    def check_alike(self, columns: Collection[str]) -> None:
        """Raise InputError for an obs column whose values cannot be compared between the files."""
        if len(self._files) == 1:
            return
        for name in columns:
            having = [i for i in range(len(self._files)) if name in self._columns_of(i)]
            check_alike(name, {self._short_names[i]: self._different_values(i, name) for i in having})

    def gene_names_of_files(self) -> list[tuple[int, list[str], list[str] | None]]:
        """For each file the number of cells up to its end, and the symbols and Ensembl ids that it gives to each gene
        of the union ("" where it has no such gene).
        """
        found = []
        for file, columns, stop in zip(self._files, self._columns, self._first[1:].tolist(), strict=True):
            names = []
            for own in (file.gene_symbols, file.ensembl_ids):
                placed = np.full(self.n_genes, "", dtype=object)
                placed[columns] = own if own is not None else ""
                names.append(placed.tolist())
            found.append((stop, names[0], None if file.ensembl_ids is None else names[1]))
        return found

    @cached_property
    def _short_names(self) -> list[str]:
        return short_names(self.paths)

    def join_obs(self, paths: Sequence[DataPath]) -> None:
        """Add the columns of tables beside the data: one for all files, or one for each (`obs_table`)."""
        tables = [read_obs_table(path) for path in paths]
        names = [file.obs_names() for file in self._files]
        self._joined = tuple(join_tables(tables, names, list(map(str, self.paths))))

    @property
    def obs_tables(self) -> tuple[DataPath, ...]:
        """The tables that columns of obs come from: one for all files, or one for each."""
        paths = [one.table.path for one in self._joined]
        return tuple(paths[:1] if len({id(one.table) for one in self._joined}) == 1 else paths)

    @property
    def obs_digests(self) -> tuple[str, ...]:
        """Sha256 of each table that columns of obs come from."""
        return tuple(dict.fromkeys(one.table.sha256 for one in self._joined))

    @property
    def obs_table_columns(self) -> tuple[str, ...]:
        """The columns of obs that come from tables beside the data."""
        return tuple(dict.fromkeys(name for one in self._joined for name in one.columns))

    @property
    def obs_facts(self) -> list[str]:
        """For each table beside the data, how many cells it has, in words."""
        return obs_facts(self._joined, [file.obs_columns for file in self._files]) if self._joined else []

    def _columns_of(self, i: int) -> list[str]:
        """The names of the obs columns of a file, with those of its table."""
        added = self._joined[i].columns if self._joined else ()
        return list(dict.fromkeys([*self._files[i].obs_columns, *added]))

    def _obs_of(self, i: int, start: int, stop: int, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The obs columns of a file, with those of its table, of its cells [start, stop)."""
        if not self._joined:
            return self._files[i].obs(start, stop, columns)
        names = self._columns_of(i) if columns is None else list(columns)
        added = {name for name in names if name in self._joined[i].columns}
        own = self._files[i].obs(start, stop, [name for name in names if name not in added])
        found = {one.name: one for one in (*own, *self._joined[i].read(start, stop, sorted(added)))}
        return pl.DataFrame([found[name] for name in names])

    def _different_values(self, i: int, name: str) -> pl.Series:
        """The different values of an obs column of a file in the order of their appearance; of numbers, not all where
        there are many.

        Numbers differ from what is no number by any one of them.
        """
        # careful: methods of a series fail where its name is a pattern
        found = self._obs_of(i, 0, 0, [name])[name].rename("")
        n_cells = self._files[i].n_cells
        for start in range(0, n_cells, OBS_CELLS):
            block = self._obs_of(i, start, min(start + OBS_CELLS, n_cells), [name])[name].rename("")
            found = pl.concat([found, block.unique(maintain_order=True)]).unique(maintain_order=True)
            if found.dtype.is_numeric() and found.drop_nulls().len() > SOME_NUMBERS:
                break
        return found

    def _in_joined_genes(self, rows: CSRRows, i: int) -> CSRRows:
        if len(self._files) == 1:
            return rows
        return sort_rows(rows._replace(indices=self._columns[i][rows.indices]), where=str(self.paths[i]))


class ObsmArray:
    """The arrays of one name in the obsm of all files, in ranges of cells; made by `Source.obsm`.

    Attributes:
        shape: number of cells of all files, and of columns.
        dtype: number type of each file, joined if they differ.
    """

    def __init__(self, arrays: Sequence[Any], first: Sequence[int]) -> None:
        self._arrays, self._first = arrays, first
        self.shape: tuple[int, int] = (first[-1], int(arrays[0].shape[1]))
        self.dtype = ", ".join(dict.fromkeys(str(array.dtype) for array in arrays))

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The rows of the cells [start, stop)."""
        parts = [
            array[max(start - low, 0) : stop - low]
            for array, low, high in zip(self._arrays, self._first[:-1], self._first[1:], strict=True)
            if start < high and low < stop
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.shape[1]), np.float32)


def open_source(
    paths: str | DataPath | Sequence[str | DataPath],
    *,
    matrix: str | None = None,
    where: str | None = None,
    progress: Progress = no_progress,
    known_digest: KnownDigest = no_known_digest,
    obs: Sequence[str | DataPath] = (),
    rows: Sequence[str] = (),
) -> Source:
    """Open a file or folder of cells (`files`), or its address, or several as one data set.

    `matrix` is a matrix of every file, such as "X", "raw" or "layers/NAME", or one for each, comma-separated; None
    chooses in each file the best matrix of a kind that all files have (`matrix_choice`). `where` is a condition on obs
    in the syntax of SOMA's value filters: of SOMA experiments, the cells that fulfil it are taken. `progress` shows the
    long passes; a file is hashed unless `known_digest` has its digest. `obs` are tables of further obs columns, one for
    all files or one for each (`obs_table`). `rows` are those of another source of the same files (`Source.rows`).
    InputError as from `open_file`, for a file given twice, files of counts and of
    log-normalised values together, and files without a gene in common.
    """
    files = data_files(paths)
    for i, path in enumerate(files):
        if same_place(path) in {same_place(other) for other in files[:i]}:
            raise InputError(f"{path} was given twice, so its cells would count twice; give each file once")
    if not files:
        raise InputError(f"no file was given; give {FORMATS}")
    named = [matrix] * len(files) if matrix is None or len(files) == 1 else matrix.split(",")
    named = named * len(files) if len(named) == 1 else named
    if len(named) != len(files):
        raise InputError(
            f"--matrix was {matrix!r}, {len(named)} matrices for {len(files)} files; name one, or one for each file"
        )
    opened = [open_file(path, matrix=name, where=where) for path, name in zip(files, named, strict=True)]
    if len({file.value_kind for file in opened}) > 1 and not (matrix is None and _use_one_kind(opened)):
        kinds = "; ".join(f"{file.path}: {file.matrix} holds {file.value_kind}" for file in opened)
        raise InputError(
            f"files of counts and of log-normalised values cannot be joined ({kinds}); name matrices of the same kind "
            "for all files, for example --matrix X,layers/counts"
        )
    source = Source(opened, where=where, progress=progress, known_digest=known_digest)
    if obs:
        source.join_obs([data_path(path) for path in obs])
    if any(rows):
        source.use_rows(rows)
    return source


def data_files(paths: str | DataPath | Sequence[str | DataPath]) -> list[DataPath]:
    """The files that some paths stand for: a collection of AnnData is several files (`files.recognise`)."""
    given = [data_path(path) for path in ([paths] if isinstance(paths, str | DataPath) else paths)]
    return [file for path in given for file in files_of(path)]


def _runs(cells: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Positions [start, stop) in `cells` of those that are read as one range of rows."""
    ends = [*(np.flatnonzero(np.diff(cells) > GAP_ROWS) + 1).tolist(), len(cells)]
    start = 0
    for end in ends:
        while start < end:
            stop = min(int(np.searchsorted(cells, cells[start] + BLOCK_ROWS)), end)
            yield start, stop
            start = stop


def _use_one_kind(files: Sequence[CellFile]) -> bool:
    """Take in every file a matrix of the same kind, counts if every file has them; False if there is no such kind."""
    for kind in USABLE:
        if all(any(one.kind == kind for one in file.candidates) for file in files):
            return all(file.use_kind(kind) for file in files)
    return False


def short_names(paths: Sequence[DataPath]) -> list[str]:
    """The files' names, with as many parent folders as make them unique, so that a run does not depend on its path.

    What Cell Ranger calls its files and folders names no sample: `s1/outs/filtered_feature_bc_matrix.h5` is `s1`.
    """
    parts = [path.parts if isinstance(path, RemotePath) else path.absolute().parts for path in paths]
    samples = [_sample(part) for part in parts]
    parts = samples if len(set(samples)) == len(parts) else parts
    depth = next(n for n in range(1, max(map(len, parts)) + 1) if len({part[-n:] for part in parts}) == len(parts))
    return ["/".join(part[-depth:]) for part in parts]


def _sample(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of a path up to the sample: without the names that Cell Ranger gives in every sample."""
    n = len(parts)
    while n > 1 and parts[n - 1] in CELL_RANGER_NAMES:
        n -= 1
    return parts[:n]
