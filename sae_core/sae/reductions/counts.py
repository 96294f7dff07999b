"""Integer counts: how often each feature fires, and on which genes.

Pairs of a feature and a gene are counted by sorting: the key of a nonzero is (feature * n_splits + split) * capacity +
gene, where the capacity is a power of two above all genes so far. Keys wait in a buffer of some millions, whose sorted,
counted rows are a run; a run is merged with the one before it once it is half as large, so that each row is merged a
logarithmic number of times. A row takes 8 bytes, 12 where keys need 64 bits.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from sae_core.sae.codes import SparseCodes
from sae_core.sae.reductions.ordering import merge_order, run_starts, sort_keys, to_numpy
from sae_core.sae.reductions.results import FeatureGeneTokens, GeneTokens, Int32s, UInt8s

BUFFER = 1 << 22


def count_keys(counts: Int64[Tensor, " n_keys"], key: Int64[Tensor, " n"]) -> None:
    """Add 1 to `counts[key]` for every key."""
    counts.scatter_add_(0, key, torch.ones_like(key))


class _Run(NamedTuple):
    """Distinct keys, ascending, and how often each occurs."""

    key: Int[Tensor, " row"]
    n: Int[Tensor, " row"]


class FeatureGeneCounts:
    """Counts the tokens of each (split, gene) on which each feature fires."""

    def __init__(self, n_features: int, n_splits: int, buffer: int = BUFFER) -> None:
        self.n_features, self.n_splits, self.buffer = n_features, n_splits, buffer
        self.capacity = 1
        self._waiting: list[Tensor] = []
        self._n_waiting = 0
        self._runs: list[_Run] = []

    def add(self, codes: SparseCodes, *, split: Int[Tensor, " token"], gene: Int[Tensor, " token"], top: int) -> None:
        """Count a block; `top` is the largest gene."""
        if top >= self.capacity:
            self._grow(1 << top.bit_length())
        dtype = self._dtype()
        of_token = (split * self.capacity + gene).to(dtype)
        key = codes.col.to(dtype) * (self.n_splits * self.capacity)
        key += of_token.index_select(0, codes.row)
        self._waiting.append(key)
        self._n_waiting += key.numel()
        if self._n_waiting >= self.buffer:
            self._flush()

    def rows(self) -> FeatureGeneTokens:
        """The counts, sorted by feature, split and gene; they are given away, and counting begins anew."""
        self._flush()
        while len(self._runs) > 1:
            self._merge_last()
        if not self._runs:
            none = np.empty(0, np.int32)
            return FeatureGeneTokens(none, none.astype(np.uint8), none, none)
        (key, n), self._runs = self._runs[0], []
        # the rows are the largest arrays of a shard, so they are divided in place
        group = torch.div(key, self.capacity, rounding_mode="floor")
        gene = key.sub_(group, alpha=self.capacity).int()
        feature = torch.div(group, self.n_splits, rounding_mode="floor")
        split = group.sub_(feature, alpha=self.n_splits).to(torch.uint8)
        return FeatureGeneTokens(to_numpy(feature.int()), to_numpy(split), to_numpy(gene), to_numpy(n))

    def _dtype(self) -> torch.dtype:
        return torch.int32 if self.n_features * self.n_splits * self.capacity < 2**31 else torch.int64

    def _grow(self, capacity: int) -> None:
        self._flush()
        old, self.capacity = self.capacity, capacity
        dtype = self._dtype()
        for place, (key, n) in enumerate(self._runs):
            group = torch.div(key, old, rounding_mode="floor")
            self._runs[place] = _Run(group.to(dtype) * capacity + (key - group * old).to(dtype), n)

    def _flush(self) -> None:
        if not self._n_waiting:
            return
        keys = sort_keys(torch.cat(self._waiting))
        self._waiting, self._n_waiting = [], 0
        starts = run_starts(keys)
        n = torch.diff(starts, append=starts.new_tensor([keys.numel()])).int()
        self._runs.append(_Run(keys[starts], n))
        while len(self._runs) > 1 and self._runs[-2].key.numel() < 2 * self._runs[-1].key.numel():
            self._merge_last()

    def _merge_last(self) -> None:
        """Replace the last two runs by their sum."""
        first, second = self._runs[-2:]
        del self._runs[-2:]
        keys = torch.cat([first.key, second.key])
        order = merge_order(keys)
        keys = keys[order]
        n = torch.cat([first.n, second.n])[order]
        del first, second, order
        # a key is in each run once at most: the second of a pair is added to the first, and goes
        seconds = torch.nonzero(keys[1:] == keys[:-1]).squeeze(1) + 1
        n[seconds - 1] += n[seconds]
        keeps = torch.ones_like(keys, dtype=torch.bool)
        keeps[seconds] = False
        self._runs.append(_Run(keys[keeps], n[keeps]))


class GeneCounts:
    """Counts the tokens of each (split, gene), in main memory."""

    def __init__(self, n_splits: int) -> None:
        self.counts = np.zeros((n_splits, 0), np.int64)

    def add(self, split: UInt8s, gene: Int32s, top: int) -> None:
        """Count the tokens of a block; `top` is the largest gene."""
        n_splits, n_genes = self.counts.shape
        if top >= n_genes:
            self.counts = np.pad(self.counts, ((0, 0), (0, (1 << top.bit_length()) - n_genes)))
            n_genes = self.counts.shape[1]
        self.counts += np.bincount(split.astype(np.int64) * n_genes + gene, minlength=self.counts.size).reshape(
            n_splits, n_genes
        )

    def rows(self) -> GeneTokens:
        """The counts above 0, sorted by split and gene."""
        split, gene = np.nonzero(self.counts)
        return GeneTokens(split.astype(np.uint8), gene.astype(np.int32), self.counts[split, gene])
