"""A shuffled, resumable stream of stored activations, which training reads.

Row groups of the whole run are visited in a seeded permutation; K of them at a time fill a buffer, whose tokens are
permuted and divided into batches. Files are read in whole row groups (180-450k rows/s cold at d_model 512), and a token
is mixed with K * 8192 others from the whole run. The order is a function of (seed, epoch), so the state to resume from
is three integers: a buffer is rebuilt by reading its row groups again. A thread reads the next buffer in the meantime.
Memory: two buffers, in the stored dtype: 2 * K * 8192 * d_model * itemsize (K 16, d_model 512, f16: 270 MB).

An epoch gives every kept token exactly once. Batches have one size: they continue over the end of a buffer and of
an epoch; only the last batch of the last epoch is shorter. Several readers (`n_ranks`) share the permuted row groups of
an epoch, so that together they give every token once; each goes through the epochs at its own pace.
"""

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from feature_store.activations.dtypes import to_float32
from feature_store.activations.parquet import ActivationReader, RowGroup
from feature_store.errors import InputError

SAMPLE_GROUPS = 128
"""A sample comes from at least this many row groups, or from all if there are fewer."""


class _Window(NamedTuple):
    """One buffer of the stream: its row groups, and the number of tokens of the epoch before it."""

    epoch: int
    number: int
    groups: tuple[int, ...]
    first_token: int


class TokenStream:
    """Iterable of float32 batches [batch_tokens d_model] in a seeded order.

    >>> stream = TokenStream(reader, keep_cells=split == "train", batch_tokens=4096, seed=0)
    >>> for x in stream: ...                     # endless, or for n_epochs
    >>> state = stream.state_dict()              # JSON, at any time between two batches
    >>> TokenStream(reader, ...).load_state_dict(state)   # continues with the next batch

    Args:
        reader: the run to read.
        keep_cells: bool [n_cells], indexed by cell_idx: tokens of other cells are left out. None keeps all.
        batch_tokens: tokens of a batch (may differ on resume: the state counts tokens).
        seed: determines the order.
        buffer_groups: row groups mixed at a time (K).
        n_epochs: number of epochs; None streams endlessly.
        rank, n_ranks: this reader is number `rank` of the `n_ranks` that share the row groups.

    The constructor reads the cell_idx column to count the kept tokens of each row group (8 bytes a token, under 1 % of
    the run at d_model 512 f16). InputError if no token is kept, there are more ranks than row groups, a cell_idx has no
    entry in the mask, or an option is less than 1.
    """

    def __init__(
        self,
        reader: ActivationReader,
        *,
        keep_cells: npt.NDArray[np.bool_] | None = None,
        batch_tokens: int = 4096,
        seed: int = 0,
        buffer_groups: int = 16,
        n_epochs: int | None = None,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        if batch_tokens < 1 or buffer_groups < 1 or (n_epochs is not None and n_epochs < 1):
            got = f"{batch_tokens}, {buffer_groups}, {n_epochs}"
            raise InputError(f"batch_tokens, buffer_groups and n_epochs are at least 1; got {got}")
        if not 0 <= rank < n_ranks:
            raise InputError(f"rank was {rank} of {n_ranks} ranks; it is 0 to n_ranks - 1")
        self.reader = reader
        self.batch_tokens = batch_tokens
        self.n_epochs = n_epochs
        self._keep = keep_cells
        self._seed = seed
        self._buffer_groups = buffer_groups
        self._rank, self._n_ranks = rank, n_ranks
        counts = [
            group.n_tokens if keep_cells is None else _count(reader, keep_cells, group) for group in reader.row_groups
        ]
        self._groups = [group for group, n in zip(reader.row_groups, counts, strict=True) if n]
        self._counts = np.array([n for n in counts if n], dtype=np.int64)
        self.n_tokens = int(self._counts.sum())
        """Kept tokens of one epoch, of all ranks together."""
        if not self.n_tokens:
            raise InputError(
                f"no token of {reader.run.path} belongs to a cell in keep_cells; keep other cells or extract more"
            )
        if len(self._groups) < n_ranks:
            raise InputError(
                f"{reader.run.path} has {len(self._groups)} row groups of kept tokens, fewer than {n_ranks} ranks: "
                "use fewer ranks (--num-workers), or extract in smaller shards"
            )
        self._epoch = 0
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches given so far, as JSON, for `load_state_dict` of an equal stream."""
        return {**self._identity(), "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. InputError if it belongs to another run, mask, seed or buffer size."""
        wanted = self._identity()
        differing = [
            f"{key} is {state.get(key)!r}, here {value!r}" for key, value in wanted.items() if state.get(key) != value
        ]
        if differing:
            raise InputError(f"the state belongs to another stream: {'; '.join(differing)}; start again without it")
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    def __iter__(self) -> Iterator[npt.NDArray[np.float32]]:
        """Batches from the present position on; leaving the loop and iterating again continues with the next batch."""
        pieces: list[npt.NDArray[np.float32]] = []
        n_held = 0
        for epoch, position, buffer, order in self._buffers(self._epoch, self._position):
            start = 0
            while start < len(order):
                stop = min(start + self.batch_tokens - n_held, len(order))
                pieces.append(to_float32(buffer[order[start:stop]]))
                n_held += stop - start
                start = stop
                if n_held == self.batch_tokens:
                    self._epoch, self._position = epoch, position + stop
                    yield np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
                    pieces, n_held = [], 0
        if pieces and self.n_epochs is not None:
            self._epoch, self._position = self.n_epochs, 0
            yield np.concatenate(pieces)

    def _buffers(self, epoch: int, position: int) -> Iterator[tuple[int, int, npt.NDArray[Any], npt.NDArray[np.int64]]]:
        """(epoch, tokens of the epoch before `order`, stored tokens, order of those still to give), read ahead."""
        with ThreadPoolExecutor(1, thread_name_prefix="token-stream") as reading:
            windows = self._windows(epoch, position)
            window = next(windows, None)
            upcoming = None if window is None else reading.submit(self._read, window)
            while window is not None and upcoming is not None:
                buffer, order = upcoming.result()
                present, window = window, next(windows, None)
                upcoming = None if window is None else reading.submit(self._read, window)
                skip = position - present.first_token if present.epoch == epoch else 0
                skip = max(skip, 0)
                yield present.epoch, present.first_token + skip, buffer, order[skip:]

    def _windows(self, epoch: int, position: int) -> Iterator[_Window]:
        """Every buffer from the one that holds `position` of `epoch` on."""
        while self.n_epochs is None or epoch < self.n_epochs:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._groups))
            order = order[self._rank :: self._n_ranks]
            first_token = 0
            for number, low in enumerate(range(0, len(order), self._buffer_groups)):
                groups = tuple(int(group) for group in order[low : low + self._buffer_groups])
                n_tokens = int(self._counts[list(groups)].sum())
                if first_token + n_tokens > position:
                    yield _Window(epoch, number, groups, first_token)
                first_token += n_tokens
            epoch, position = epoch + 1, 0

    def _read(self, window: _Window) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        blocks = [self._kept(self._groups[group]) for group in window.groups]
        buffer = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
        # careful: SeedSequence pads with zeros, so [seed, epoch, 0] would repeat the generator of the epoch's groups
        number = window.number * self._n_ranks + self._rank + 1
        generator = np.random.default_rng([self._seed, window.epoch, number])
        return buffer, generator.permutation(len(buffer))

    def _kept(self, group: RowGroup) -> npt.NDArray[Any]:
        block = self.reader.read(group.shard, group.group)
        return block.act if self._keep is None else block.act[_mask(self.reader, self._keep, block.cell_idx)]

    def _identity(self) -> dict[str, Any]:
        return {
            "plan_sha": self.reader.run.plan_sha,
            "seed": self._seed,
            "buffer_groups": self._buffer_groups,
            "keep_cells": None if self._keep is None else hashlib.sha256(self._keep.tobytes()).hexdigest()[:12],
            "n_tokens": self.n_tokens,
            "n_ranks": self._n_ranks,
        }


def sample_tokens(
    reader: ActivationReader, keep_cells: npt.NDArray[np.bool_], *, n_tokens: int, seed: int
) -> Iterator[npt.NDArray[np.float32]]:
    """A seeded sample of `n_tokens` tokens of the kept cells (all, if there are fewer), one block per row group.

    Row groups are drawn from the whole run until they are at least SAMPLE_GROUPS and hold `n_tokens`; the tokens are
    drawn from them without replacement. So the sample of an atlas sorted by study is not from its first study alone,
    and no other row group is read. Errors as those of `TokenStream` for the mask; no block if no token is kept.
    """
    generator = np.random.default_rng(seed)
    drawn: list[tuple[RowGroup, int]] = []
    held = 0
    for place in generator.permutation(len(reader.row_groups)):
        if held >= n_tokens and len(drawn) >= SAMPLE_GROUPS:
            break
        group = reader.row_groups[place]
        if n := _count(reader, keep_cells, group):
            drawn.append((group, n))
            held += n
    chosen = np.sort(generator.choice(held, min(n_tokens, held), replace=False))
    stops = np.cumsum([n for _, n in drawn])
    cuts = np.searchsorted(chosen, stops)
    for (group, n), stop, low, high in zip(drawn, stops, [0, *cuts], cuts, strict=False):
        if low < high:
            block = reader.read(group.shard, group.group)
            kept = np.flatnonzero(_mask(reader, keep_cells, block.cell_idx))
            yield block.act_f32()[kept[chosen[low:high] - (stop - n)]]


def _count(reader: ActivationReader, keep: npt.NDArray[np.bool_], group: RowGroup) -> int:
    return int(_mask(reader, keep, reader.cells(group.shard, group.group)).sum())


def _mask(
    reader: ActivationReader, keep: npt.NDArray[np.bool_], cell_idx: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which tokens belong to a kept cell."""
    if len(cell_idx) and int(cell_idx.max()) >= len(keep):
        raise InputError(
            f"keep_cells has {len(keep)} entries, but {reader.run.path} holds cell {int(cell_idx.max())}: "
            "the mask belongs to another data set"
        )
    kept: npt.NDArray[np.bool_] = keep[cell_idx]
    return kept
