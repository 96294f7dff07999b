"""Codes of tokens made by hand, and the codes run that they give when they are reduced as an encoder does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from toy_plans import toy_plan

from feature_store.codes import CodesRun, build_merged
from feature_store.codes.cut import cells_of_shard, span_of_shard
from feature_store.storage.plans import CodesCut, CodesPlan
from feature_store.storage.schemas import SPLITS
from pipelines.encode import TokenBlock, reduce_shard
from sae_core.sae import SparseCodes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from scipy import sparse

    from feature_store.codes.parquet import Columns
    from feature_store.storage.commit import ShardMarker

BLOCK = 8192


@dataclass(frozen=True, kw_only=True)
class TokenCodes:
    """Codes of tokens by ascending cell, CSR [n_tokens n_features], and cell, position and gene of each token."""

    cell_idx: np.ndarray
    token_pos: np.ndarray
    gene_id: np.ndarray
    codes: sparse.csr_array

    def select(self, keep: np.ndarray) -> TokenCodes:
        """The tokens where `keep` [n_tokens] is True."""
        return TokenCodes(
            cell_idx=self.cell_idx[keep],
            token_pos=self.token_pos[keep],
            gene_id=self.gene_id[keep],
            codes=self.codes[np.flatnonzero(keep)],
        )


def cut_of(n_cells: int, shard_cells: int, *, n_panel: int | None = None, other_cells: int = 25_000) -> CodesCut:
    """A cut whose panel is all cells, unless it is given."""
    return CodesCut(
        n_cells=n_cells,
        n_panel=n_cells if n_panel is None else n_panel,
        panel_cells=shard_cells,
        other_cells=other_cells,
    )


def toy_codes(cut: CodesCut, **given: Any) -> CodesPlan:
    """The plan of a codes run made by hand."""
    return toy_plan(CodesPlan, **{"cut": cut, "keep": 4, "top_cells": 100, "top_tokens": 20, **given})


def commit_tokens(
    run: CodesRun, shard: int, tokens: TokenCodes, *, start: int, stop: int, split_of_cell: Any
) -> ShardMarker:
    """Reduce the tokens of a shard and commit them; `split_of_cell` names the split of each cell of the data set."""
    return run.commit_shard(
        shard, lambda write: reduced(run, shard, tokens, split_of_cell, write), start=start, stop=stop
    )


def reduced(run: CodesRun, shard: int, tokens: TokenCodes, split_of_cell: Any, write: Any) -> Mapping[str, Columns]:
    """What an encoder gives of a shard: the codes of its cells to `write`, and the statistics of its tokens."""
    names = np.asarray(split_of_cell)[tokens.cell_idx].astype(str)
    split = np.select([names == name for name in SPLITS], range(len(SPLITS))).astype(np.uint8)
    blocks = (
        TokenBlock(
            sparse_codes(tokens.codes[rows]),
            tokens.cell_idx[rows],
            tokens.token_pos[rows],
            tokens.gene_id[rows],
            split[rows],
        )
        for rows in (slice(low, low + BLOCK) for low in range(0, len(tokens.cell_idx), BLOCK))
    )
    return reduce_shard(run, shard, blocks, write)


def sparse_codes(matrix: sparse.csr_array) -> SparseCodes:
    """A CSR matrix [n_tokens n_features] as codes, without stored zeros."""
    matrix = matrix.copy()
    matrix.eliminate_zeros()
    matrix.sort_indices()
    return SparseCodes(
        crow=torch.from_numpy(matrix.indptr.astype(np.int64)),
        col=torch.from_numpy(matrix.indices.astype(np.int32)),
        value=torch.from_numpy(matrix.data.astype(np.float32)),
        n_features=matrix.shape[1],
    )


def write_codes(folder: Path, plan: CodesPlan, tokens: Iterable[TokenCodes], split_of_cell: Any) -> CodesRun:
    """A finished codes run whose panel is all cells, of the tokens of each shard in order."""
    run = CodesRun.create(folder, plan)
    for shard, part in enumerate(tokens):
        start = shard * plan.cut.panel_cells
        stop = min(start + plan.cut.panel_cells, plan.cut.n_cells)
        commit_tokens(run, shard, part, start=start, stop=stop, split_of_cell=split_of_cell)
    finish(run)
    return run


def write_codes_of_panel(
    folder: Path, plan: CodesPlan, tokens: TokenCodes, split_of_cell: Any, panel: np.ndarray
) -> CodesRun:
    """A finished codes run of the tokens of all cells, of which those of the panel (ascending) have all their codes."""
    run = CodesRun.create(folder, plan)
    for shard in range(run.cut.n_shards):
        own = tokens.select(np.isin(tokens.cell_idx, cells_of_shard(run.cut, shard, panel)))
        start, stop = span_of_shard(run.cut, shard, panel)
        commit_tokens(run, shard, own, start=start, stop=stop, split_of_cell=split_of_cell)
    finish(run)
    return run


def pooled(tokens: TokenCodes, n_cells: int) -> np.ndarray:
    """The largest code of the tokens of each cell, dense [n_cells n_features]."""
    dense = np.zeros((n_cells, tokens.codes.shape[1]), np.float32)
    np.maximum.at(dense, tokens.cell_idx, tokens.codes.toarray())
    return dense


def finish(run: CodesRun) -> None:
    """Finish a run whose shards are committed."""
    run.finalize_shards()
    build_merged(run.folder)
