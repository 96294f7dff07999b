"""Token codes and mean activations of a sample of `train` and `select` cells, from which features are chosen.

The choice of features and the group means need the token codes of both labels and of every type, again for every draw
of shuffled labels. The codes are therefore computed once and stored in the folder `survey`. The sample takes equal
numbers of cells of each (label, type) as far as there are enough, so that rare types have means. Test cells are never
sampled.

Cost: 8 bytes per nonzero in memory; 4,000 cells of 240 tokens at k = 16 have 15 million nonzeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from feature_store.storage import commit
from pipelines.steering.context import Block, Cells, SteeringPaths, open_context

TOKEN_SHARD_CELLS = 256
"""Number of cells whose tokens an actor encodes between two commits."""
SAMPLE_CELLS = 2000
"""Largest number of cells of each split in the sample."""
KEYS = ("cell_idx", "token_pos", "gene_id")


def sample_cells(
    cells: pl.DataFrame, *, most: int, seed: int, strata: Sequence[str], equal: bool = False
) -> npt.NDArray[np.int64]:
    """The ascending cell_idx of at most `most` of these cells, of one split, drawn by (seed, cell_idx, split).

    Every stratum (a combination of values of the columns `strata`) keeps its share; with `equal`, strata get the same
    number, as far as they have enough cells. The sample depends on these cells alone, and not on other splits.
    """
    if cells.height <= most:
        return np.sort(cells["cell_idx"].to_numpy())
    order = np.random.default_rng(seed).permutation(cells.height)
    of_stratum = pl.struct(pl.col(name).alias(str(place)) for place, name in enumerate(strata)) if strata else pl.lit(0)
    drawn = cells.sort("cell_idx").select("cell_idx", stratum=of_stratum).with_columns(draw=pl.Series(order))
    rank = pl.col("draw").rank("ordinal").over("stratum")
    size = pl.len().over("stratum")
    place = rank if equal else (rank - 0.5) / size
    kept = drawn.with_columns(place=place).sort("place", "draw").head(most)
    return np.sort(kept["cell_idx"].to_numpy())


@dataclass(frozen=True, kw_only=True)
class TokenSampleJob:
    """The inputs with which an actor encodes any shard, as plain values that Ray can send to it.

    Attributes:
        paths: the paths of model, data and SAE.
        codes, means: the folders of the two runs that are written, one of token codes and one with a row per cell.
        cells: the cell_idx [n_cells] of the sample, ascending; a shard is TOKEN_SHARD_CELLS of them.
        shard_cells: the number of cells of a shard.
    """

    paths: SteeringPaths
    codes: str
    means: str
    cells: Cells
    shard_cells: int


class TokenSampler:
    """Writes the shards of a `TokenSampleJob`; it is the body of an actor and works without Ray."""

    def __init__(self, job: TokenSampleJob) -> None:
        self.job = job
        self.context = open_context(job.paths)
        self.codes, self.means = commit.Run.open(job.codes), commit.Run.open(job.means)

    def shard(self, number: int) -> dict[str, int]:
        """Encode and commit shard `number` unless it is committed; return counts."""
        start = number * self.job.shard_cells
        cells = self.job.cells[start : start + self.job.shard_cells]
        if not (self.codes.committed(number) and self.means.committed(number)):
            found = [self._encode(block) for block in self.context.blocks(cells)]
            for run, at in ((self.means, 1), (self.codes, 0)):
                frame = pl.concat([pair[at] for pair in found])
                run.commit_shard(
                    number,
                    lambda path, frame=frame: commit.write_frame(path, frame),  # type: ignore[misc]
                    start=start,
                    stop=start + len(cells),
                )
        return {"shards": 1, "cells": len(cells), "variants": 1}

    def _encode(self, block: Block) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The codes of the gene tokens of a block, and the mean activation of each of its cells."""
        import torch

        tokens = block.tokens
        x = self.context.activations(block)
        at = np.flatnonzero(~tokens.is_special)
        cell = tokens.cell_of_token()[at]
        codes = self.context.sae.encode(x[at].to(self.context.device))
        n_active = np.diff(codes.crow.cpu().numpy())
        # a token on which no feature fires has one row without a feature, so that means count it
        rows = np.repeat(np.arange(len(at)), np.maximum(n_active, 1))
        is_code = np.repeat(n_active > 0, np.maximum(n_active, 1))
        feature, value = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.float32)
        feature[is_code], value[is_code] = codes.col.cpu().numpy(), codes.value.float().cpu().numpy()
        frame = pl.DataFrame(
            {
                "cell_idx": block.cells[cell[rows]],
                "token_pos": (at - tokens.offsets[cell])[rows].astype(np.int32),
                "gene_id": tokens.gene_id[at][rows].astype(np.int32),
                "feature_id": feature,
                "value": value,
            }
        ).with_columns(pl.when(pl.Series(is_code)).then(pl.col(name)).alias(name) for name in ("feature_id", "value"))
        n_tokens = np.bincount(cell, minlength=len(block.cells))
        total = torch.zeros(len(block.cells), x.shape[1], dtype=torch.float64)
        total.index_add_(0, torch.from_numpy(cell), x[at].double())
        mean = (total.numpy() / np.maximum(n_tokens, 1)[:, None]).astype(np.float32)
        means = pl.DataFrame(
            {"cell_idx": block.cells, "n_tokens": n_tokens.astype(np.int32), "mean": mean},
            schema_overrides={"mean": pl.Array(pl.Float32, mean.shape[1])},
        )
        return frame, means


@dataclass(frozen=True, kw_only=True)
class TokenSample:
    """A sample of tokens in memory.

    Attributes:
        cell_idx: the sampled cells, with or without gene tokens, ascending [n_cells].
        n_tokens: the number of gene tokens of each cell [n_cells].
        mean: the mean activation of its gene tokens, float32 [n_cells d_model]; 0 if it has none.
        cell: the index into `cell_idx` of each token [n_tokens].
        gene_id: the vocabulary id of each token [n_tokens].
        codes: the token codes, float32 [n_tokens n_features], sparse by feature.
    """

    cell_idx: Cells
    n_tokens: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float32]
    cell: npt.NDArray[np.int64]
    gene_id: npt.NDArray[np.int64]
    codes: sparse.csc_array

    @property
    def mean_codes(self) -> sparse.csr_array:
        """The mean code of each cell's gene tokens, float64 [n_cells n_features]."""
        n_tokens = len(self.cell)
        weight = 1.0 / np.maximum(self.n_tokens, 1)[self.cell]
        pool = sparse.csr_array((weight, (self.cell, np.arange(n_tokens))), shape=(len(self.cell_idx), n_tokens))
        return sparse.csr_array(pool @ self.codes.astype(np.float64))


def read_token_sample(codes: Path, means: Path, n_features: int) -> TokenSample:
    """The sample that the runs `codes` and `means` hold."""
    of_cell = commit.read_table(means)
    cell_idx = of_cell["cell_idx"].to_numpy()
    cell, gene, feature, value, lengths = [], [], [], [], []
    for part in commit.Run.open(codes).checked_parts():
        frame = commit.read_part(part)
        key = frame.select(KEYS[:2]).to_numpy()
        first = np.flatnonzero(np.r_[len(key) > 0, (np.diff(key, axis=0) != 0).any(1)][: len(key)])
        active = frame["feature_id"].is_not_null().to_numpy()
        cell.append(np.searchsorted(cell_idx, key[first, 0]))
        gene.append(frame["gene_id"].to_numpy()[first].astype(np.int64))
        feature.append(frame["feature_id"].drop_nulls().to_numpy())
        value.append(frame["value"].drop_nulls().to_numpy())
        lengths.append(np.add.reduceat(active.astype(np.int64), first) if len(first) else np.empty(0, np.int64))
    crow = np.r_[0, np.cumsum(np.concatenate(lengths))]
    shape = (len(crow) - 1, n_features)
    by_token = sparse.csr_array((np.concatenate(value), np.concatenate(feature), crow), shape=shape)
    return TokenSample(
        cell_idx=cell_idx,
        n_tokens=of_cell["n_tokens"].to_numpy().astype(np.int64),
        mean=of_cell["mean"].to_numpy(),
        cell=np.concatenate(cell),
        gene_id=np.concatenate(gene),
        codes=sparse.csc_array(by_token),
    )
