"""The reduction of one shard: blocks of tokens in, complete cells out, and the statistics at the end."""

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae.codes import SparseCodes
from sae_core.sae.reductions.largest import largest_of_each
from sae_core.sae.reductions.ordering import to_numpy
from sae_core.sae.reductions.pooling import POOLINGS, CellPooling, PooledCells, Pooling
from sae_core.sae.reductions.results import CellCodes, CellTokens, Int32s, Int64s, ShardStatistics, UInt8s
from sae_core.sae.reductions.state import BlockTokens, ShardState

Level = Literal["cell", "token"]
LEVELS: tuple[Level, ...] = ("cell", "token")


class _Cells(NamedTuple):
    """The cells of a block, ascending; the first one is the open cell, if there is one."""

    cell_idx: Int64s
    n_tokens: Int64s
    split: UInt8s

    def rows(self, span: slice) -> "_Cells":
        return _Cells(self.cell_idx[span], self.n_tokens[span], self.split[span])


class _Entries(NamedTuple):
    """Nonzeros of tokens, in order; `cell` counts the cells of the block."""

    cell: Int64[Tensor, " nnz"]
    feature: Int[Tensor, " nnz"]
    value: Float[Tensor, " nnz"]
    token_pos: Int[Tensor, " nnz"]
    gene_id: Int[Tensor, " nnz"]

    def where(self, chosen: Tensor) -> "_Entries":
        return _Entries(*(column[chosen] for column in self))

    def of_first_cell(self) -> "_Entries":
        return self._replace(cell=torch.zeros_like(self.cell))


class ShardReduction:
    """Reduces the token codes of one shard, block by block.

    Args:
        n_features: features of the SAE.
        pooling: how the codes of a cell's tokens become the code of the cell.
        keep: return the `keep` largest codes of each cell (of equal ones, the first features); None returns all.
        level: "cell" returns cell codes, "token" the token codes of the same features.
        n_top_cells, n_top_tokens: cells and tokens of the largest code that are kept of each feature; of equal codes,
            the first cells and positions.
        by_gene: count tokens by gene too.
        n_splits: number of splits of the cells.

    Raises:
        ConfigError: an argument has a value that is not allowed.
    """

    def __init__(
        self,
        *,
        n_features: int,
        pooling: Pooling,
        keep: int | None,
        level: Level,
        n_top_cells: int,
        n_top_tokens: int,
        by_gene: bool,
        n_splits: int = 3,
    ) -> None:
        if pooling not in POOLINGS or level not in LEVELS:
            raise ConfigError(
                f"pooling is one of {', '.join(POOLINGS)} and level one of {', '.join(LEVELS)}; got {pooling!r}, "
                f"{level!r}"
            )
        for name, value, least in (
            ("n_features", n_features, 1),
            ("keep", 1 if keep is None else keep, 1),
            ("n_top_cells", n_top_cells, 0),
            ("n_top_tokens", n_top_tokens, 0),
            ("n_splits", n_splits, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} is at least {least}; got {value}")
        self.n_features, self.n_splits = n_features, n_splits
        self.pooling, self.keep, self.level = pooling, keep, level
        self.n_top_cells, self.n_top_tokens, self.by_gene = n_top_cells, n_top_tokens, by_gene
        self._cells: list[CellTokens] = [CellTokens(np.empty(0, np.int64), np.empty(0, np.int32))]
        self._open: _Cells | None = None
        self._last_pos = -1
        self._held: _Entries | None = None
        """Entries of the open cell's tokens, at level "token"."""
        self._finished = False
        self._start(torch.device("cpu"))

    def _start(self, device: torch.device) -> None:
        self._device = device
        self._pool = CellPooling(self.n_features, self.pooling, device)
        self._state = ShardState(
            n_features=self.n_features,
            n_splits=self.n_splits,
            n_top_cells=self.n_top_cells,
            n_top_tokens=self.n_top_tokens,
            by_gene=self.by_gene,
            token_max=self.pooling != "max",
            device=device,
        )

    def add(
        self,
        codes: SparseCodes,
        *,
        cell_idx: npt.NDArray[np.int64],
        token_pos: npt.NDArray[np.int32],
        gene_id: npt.NDArray[np.int32],
        split: npt.NDArray[np.uint8],
    ) -> CellCodes | None:
        """Reduce one block; return the codes of the cells that are complete now, or None if no cell is.

        Codes are finite and above 0, on one device for the whole shard. Keys have one entry for each token [n_tokens]:
        `cell_idx` ascends over the whole shard, `token_pos` within a cell, and `split` is the split of the token's
        cell. A cell may go on in the next block.

        Raises:
            ConfigError: the codes or keys are not as above, or the shard is finished.
        """
        self._check(codes, cell_idx, token_pos, gene_id, split)
        if not len(cell_idx):
            return None
        if self._open is None and codes.value.device != self._device:
            self._start(codes.value.device)
        codes = codes.with_value(codes.value.detach().float())
        cells, ordinal = self._cells_of(cell_idx, split)
        tokens = BlockTokens(
            *(self._on_device(key) for key in (cell_idx, token_pos, gene_id, split.astype(int), ordinal))
        )
        self._state.add_tokens(codes, tokens)
        self._state.add_genes(codes, tokens, split, gene_id)
        parts = self._pooled(codes, tokens, cells, ordinal)
        done = cells.rows(slice(0, -1))
        self._cells.append(CellTokens(done.cell_idx, done.n_tokens.astype(np.int32)))
        self._open, self._last_pos = cells.rows(slice(-1, None)), int(token_pos[-1])
        return self._join(parts) if parts else None

    def finish(self) -> tuple[CellCodes, ShardStatistics]:
        """The codes of the last cell, and the statistics of the shard.

        Raises:
            ConfigError: the shard is finished already.
        """
        self._check_unfinished()
        self._finished = True
        parts = []
        if self._open is not None:
            pooled = self._pool.finish(self._on_device(self._open.n_tokens))
            entries = None if self._held is None else self._held.of_first_cell()
            parts = [self._complete(pooled, self._open, entries)]
            self._cells.append(CellTokens(self._open.cell_idx, self._open.n_tokens.astype(np.int32)))
        cell_idx, n_tokens = (np.concatenate(column) for column in zip(*self._cells, strict=True))
        return self._join(parts), self._state.statistics(CellTokens(cell_idx, n_tokens))

    def _check_unfinished(self) -> None:
        if self._finished:
            raise ConfigError("this shard is finished: make a new ShardReduction for the next shard.")

    def _check(self, codes: SparseCodes, cell_idx: Int64s, token_pos: Int32s, gene_id: Int32s, split: UInt8s) -> None:
        self._check_unfinished()
        lengths = [len(key) for key in (cell_idx, token_pos, gene_id, split)]
        if {*lengths} != {codes.n_tokens} or codes.n_features != self.n_features:
            raise ConfigError(
                f"give codes of {self.n_features} features, and one cell, position, gene and split per token; got "
                f"{lengths} for codes of {codes.n_tokens} tokens and {codes.n_features} features"
            )
        if not len(cell_idx):
            return
        last_cell, last_split = (-1, 0) if self._open is None else (self._open.cell_idx[0], int(self._open.split[0]))
        cell_step = np.diff(cell_idx, prepend=last_cell)
        same = cell_step == 0
        if cell_step.min() < 0 or np.diff(token_pos, prepend=self._last_pos)[same].min(initial=0) < 0:
            raise ConfigError("tokens come in order of cell and position: sort the tokens of the shard first")
        if split.max() >= self.n_splits or np.diff(split.astype(int), prepend=last_split)[same].any():
            raise ConfigError(
                f"a cell has one split from 0 to {self.n_splits - 1}; got split {split.max()}, or two in a cell: give "
                "the split of each token's cell"
            )
        if gene_id.min() < 0:
            raise ConfigError(f"gene_id is at least 0; got {gene_id.min()}: leave out the tokens that are no genes")
        if codes.nnz:
            least, most = (float(bound) for bound in codes.value.detach().aminmax())
            if not (least > 0 and most < np.inf):
                raise ConfigError(f"codes are finite and above 0; got values from {least} to {most}: drop the others")

    def _cells_of(self, cell_idx: Int64s, split: UInt8s) -> tuple[_Cells, Int64s]:
        """The cells of a block, and which of them each token belongs to."""
        starts = np.concatenate([[0], np.flatnonzero(np.diff(cell_idx)) + 1])
        n_tokens = np.diff(starts, append=len(cell_idx))
        ordinal = np.repeat(np.arange(len(starts)), n_tokens)
        cells, before = _Cells(cell_idx[starts], n_tokens, split[starts]), self._open
        if before is None:
            return cells, ordinal
        if before.cell_idx[0] == cell_idx[0]:
            n_tokens[0] += before.n_tokens[0]
            return cells, ordinal
        joined = _Cells(
            np.concatenate([before.cell_idx, cells.cell_idx]),
            np.concatenate([before.n_tokens, cells.n_tokens]),
            np.concatenate([before.split, cells.split]),
        )
        return joined, ordinal + 1

    def _pooled(self, codes: SparseCodes, tokens: BlockTokens, cells: _Cells, ordinal: Int64s) -> list[CellCodes]:
        """The codes of all cells of a block but the last, which stays open."""
        cell = tokens.ordinal.index_select(0, codes.row)
        last = len(cells.cell_idx) - 1
        stops = codes.crow[self._on_device(np.searchsorted(ordinal, np.arange(last + 1), side="right"))].tolist()
        entries = None
        if self.level == "token":
            entries = _Entries(cell, codes.col, codes.value, tokens.token_pos[codes.row], tokens.gene_id[codes.row])
            if self._held is not None:
                entries = _Entries(*(torch.cat(pair) for pair in zip(self._held.of_first_cell(), entries, strict=True)))
            self._held = entries.where(entries.cell == last)
        n_tokens = self._on_device(cells.n_tokens)
        pooled = self._pool.add(cell, codes.col, codes.value, entry_stops=stops, n_tokens=n_tokens)
        return [self._complete(part, cells, entries) for part in pooled]

    def _complete(self, pooled: PooledCells, cells: _Cells, entries: _Entries | None) -> CellCodes:
        """Count complete cells, and return their codes."""
        n_cells = len(pooled.dense)
        those = cells.rows(slice(pooled.first, pooled.first + n_cells))
        self._state.add_cells(pooled, self._on_device(those.cell_idx), self._on_device(those.split.astype(int)))
        kept = None if self.keep is None else largest_of_each(pooled.dense, self.keep).view(-1)
        if entries is None:
            columns = [pooled.cell, pooled.feature, pooled.value]
        else:
            entries = entries.where((entries.cell >= pooled.first) & (entries.cell < pooled.first + n_cells))
            columns = [entries.cell - pooled.first, *entries[1:]]
        if kept is not None:
            among = kept[columns[0] * self.n_features + columns[1]]
            columns = [column[among] for column in columns]
        cell, feature, value, *keys = columns
        n_codes = to_numpy(torch.bincount(cell, minlength=n_cells))
        token_pos, gene_id = (to_numpy(key) for key in keys) if keys else (None, None)
        return CellCodes(
            np.repeat(those.cell_idx, n_codes), to_numpy(feature.int()), to_numpy(value), token_pos, gene_id
        )

    def _join(self, parts: list[CellCodes]) -> CellCodes:
        """The codes of several parts, one after another; those of none are empty."""
        ids = np.empty(0, np.int32)
        keys = (ids, ids) if self.level == "token" else (None, None)
        if len(parts) == 1:
            return parts[0]
        parts = [CellCodes(np.empty(0, np.int64), ids, np.empty(0, np.float32), *keys), *parts]
        columns = [
            np.concatenate(column) for column in list(zip(*parts, strict=True))[: 5 if keys[0] is not None else 3]
        ]
        return CellCodes(*columns)

    def _on_device(self, array: npt.NDArray[Any]) -> Tensor:
        """A copy of the array on the device of the codes."""
        return torch.from_numpy(np.array(array)).to(self._device)
