"""Blocks of tokens from another program: their cells and genes are found in the data, and they are held by shard."""

from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from feature_store.cells import Source
from feature_store.errors import InputError
from pipelines.external.vectors import LARGEST

Ints = npt.NDArray[np.int64]


class BlockOfTokens(NamedTuple):
    """Tokens by ascending cell, those of a cell in their order: keys [n_tokens], `act` [n_tokens d_model]."""

    cell_idx: Ints
    gene_id: Ints
    act: npt.NDArray[Any]

    def positions(self) -> npt.NDArray[np.int32]:
        """The position of each token among those of its cell, from 0."""
        first = np.searchsorted(self.cell_idx, self.cell_idx)
        return (np.arange(len(self.cell_idx)) - first).astype(np.int32)

    def of_shards(self, shard: Ints, wanted: set[int]) -> tuple[Self, Ints]:
        """The tokens of the wanted shards, and the shard of each of them."""
        own = np.isin(shard, sorted(wanted))
        return (self, shard) if own.all() else (self.rows(own), shard[own])

    def rows(self, chosen: npt.NDArray[Any]) -> Self:
        """Some of the tokens."""
        return self._replace(cell_idx=self.cell_idx[chosen], gene_id=self.gene_id[chosen], act=self.act[chosen])


class TokenNames:
    """The cells and genes of a data set by name."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._cells: dict[str, int] | None = None
        self._genes: dict[str, int] | None = None

    def cell(self, number: int) -> str:
        """The name of a cell."""
        return str(self._source.obs_names(number, number + 1)[0])

    def block(self, cells: Any, genes: Any, vectors: Any, *, d_model: int, dtype: str) -> BlockOfTokens:
        """The tokens of a block, checked; see `ActivationWriter.write`."""
        act = as_numpy(vectors)
        cell_idx, gene_id = self._cell_numbers(as_numpy(cells)), self._gene_numbers(as_numpy(genes))
        if act.shape != (len(cell_idx), d_model) or len(gene_id) != len(cell_idx) or act.dtype.kind != "f":
            raise InputError(
                f"a block has {len(cell_idx)} cells, {len(gene_id)} genes and vectors {act.shape} of {act.dtype}; give "
                f"a cell and a gene for each token, and floats [n_tokens {d_model}]"
            )
        bad = np.flatnonzero(~(np.abs(act) <= LARGEST[dtype]).all(axis=1))
        if len(bad):
            token = int(bad[0])
            value = act[token][~(np.abs(act[token]) <= LARGEST[dtype])][0]
            why = "is not finite" if not np.isfinite(value) else f"is beyond {dtype}: give dtype='bf16' or 'f32'"
            raise InputError(
                f"the activation {value:g} of token {token} (cell {self.cell(int(cell_idx[token]))!r}, gene "
                f"{self._source.gene_symbols[int(gene_id[token])]!r}) {why}"
            )
        order = np.argsort(cell_idx, kind="stable")
        return BlockOfTokens(cell_idx[order], gene_id[order], act[order])

    def _cell_numbers(self, cells: npt.NDArray[Any]) -> Ints:
        if cells.dtype.kind in "iu" or not cells.size:
            return _in_range(cells, self._source.n_cells, "cell", self._files)
        if self._cells is None:
            names = self._source.obs_names()
            if (twice := names.filter(names.is_duplicated())).len():
                raise InputError(
                    f"cells are given by name, and {int((names == twice[0]).sum())} cells of {self._files} are called "
                    f"{twice[0]!r}; give the numbers of the cells, from 0"
                )
            self._cells = {name: number for number, name in enumerate(names.to_list())}
        return _looked_up(cells, self._cells, f"cells of {self._files}", "cell")

    def _gene_numbers(self, genes: npt.NDArray[Any]) -> Ints:
        if genes.dtype.kind in "iu" or not genes.size:
            return _in_range(genes, self._source.n_genes, "gene", self._files)
        if self._genes is None:
            self._genes = {}
            ensembl = self._source.ensembl_ids or []
            # the first of several genes of one name, and symbols before Ensembl ids
            for names in (self._source.gene_symbols, ensembl):
                for number, name in enumerate(names):
                    self._genes.setdefault(name, number)
            self._genes.pop("", None)
        return _looked_up(genes, self._genes, f"genes of {self._files}", "gene")

    @property
    def _files(self) -> str:
        return ", ".join(map(str, self._source.paths))


def as_numpy(values: Any) -> npt.NDArray[Any]:
    """An array, a tensor on any device or a sequence as a numpy array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # numpy has no bfloat16
        return np.asarray(values.float() if values.is_floating_point() and values.itemsize < 4 else values)
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InputError(f"a block holds rows of unequal length ({error}); fill them up with '' or -1") from error


def _in_range(numbers: npt.NDArray[Any], n: int, what: str, files: str) -> Ints:
    found: Ints = numbers.astype(np.int64).ravel()
    if found.ndim != numbers.ndim:
        raise InputError(f"the {what}s of a block have shape {numbers.shape}; give one for each token, [n_tokens]")
    if len(found) and not (0 <= found.min() and found.max() < n):
        wrong = found[(found < 0) | (found >= n)][0]
        raise InputError(f"there is no {what} {wrong}: the {what}s of {files} have the numbers 0 to {n - 1}")
    return found


def _looked_up(names: npt.NDArray[Any], known: dict[str, int], where: str, what: str) -> Ints:
    if names.ndim != 1 or names.dtype.kind not in "UTO":
        raise InputError(
            f"the {what}s of a block have shape {names.shape} and type {names.dtype}; give a name or a number for each "
            "token, [n_tokens]"
        )
    different, place = np.unique(names.astype(str), return_inverse=True)
    numbers = np.array([known.get(name, -1) for name in different.tolist()], dtype=np.int64)
    if (numbers < 0).any():
        unknown = different[numbers < 0].tolist()
        some = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        advice = "; leave out tokens that are no genes of the data" if what == "gene" else ""
        raise InputError(f"{len(unknown)} names are not among the {where}: {some}{advice}")
    return numbers[place]


class Spool:
    """Tokens of shards that are not complete, in memory and, beyond `buffer_bytes`, in files of a folder."""

    def __init__(self, folder: Path, *, buffer_bytes: int) -> None:
        self._folder, self._buffer_bytes = folder, buffer_bytes
        self._held: dict[int, list[BlockOfTokens]] = {}
        self._bytes: dict[int, int] = {}

    def add(self, shard: int, cell_idx: Ints, gene_id: Ints, act: npt.NDArray[Any]) -> None:
        """Hold tokens of a shard."""
        self._held.setdefault(shard, []).append(BlockOfTokens(cell_idx, gene_id, act))
        self._bytes[shard] = self._bytes.get(shard, 0) + act.nbytes + 2 * cell_idx.nbytes

    def spill(self) -> None:
        """Write the largest shards to files until what is held is no more than the buffer."""
        while sum(self._bytes.values()) > self._buffer_bytes:
            shard = max(self._bytes, key=lambda one: self._bytes[one])
            with self._file(shard).open("ab") as file:
                for block in self._held.pop(shard):
                    for column in block:
                        np.save(file, column, allow_pickle=False)
            del self._bytes[shard]

    def take(self, shard: int, *, d_model: int) -> BlockOfTokens:
        """Return the tokens of a shard, by cell and then in the order in which they were added."""
        blocks = [*self._spilled(shard), *self._held.get(shard, [])]
        if not blocks:
            empty = np.empty(0, np.int64)
            return BlockOfTokens(empty, empty, np.empty((0, d_model), np.float32))
        joined = BlockOfTokens(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))
        return joined.rows(np.argsort(joined.cell_idx, kind="stable"))

    def drop(self, shard: int) -> None:
        """Forget the tokens of a shard that was committed."""
        self._held.pop(shard, None)
        self._bytes.pop(shard, None)
        self._file(shard).unlink(missing_ok=True)

    def _spilled(self, shard: int) -> list[BlockOfTokens]:
        path = self._file(shard)
        blocks: list[BlockOfTokens] = []
        if path.exists():
            with path.open("rb") as file:
                end = path.stat().st_size
                while file.tell() < end:
                    blocks.append(BlockOfTokens(*(np.load(file, allow_pickle=False) for _ in range(3))))
        return blocks

    def _file(self, shard: int) -> Path:
        return self._folder / f"{shard}.npy"
