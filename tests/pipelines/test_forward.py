"""The forward pass in blocks: bounded by tokens, the same numbers whatever the cuts, smaller where memory runs out."""

import dataclasses

import numpy as np
import pytest
import torch

from pipelines import forward
from pipelines.errors import RunFailedError
from pipelines.extract import forward_job
from pipelines.forward import Forward, cut_cells, is_out_of_memory
from pipelines.inputs import load_inputs
from pipelines.shard_size import cells_per_shard
from sae_core.scfm import Site

SITES = (Site.parse("layer.0"), Site.parse("layer.1"))
CELLS = np.arange(72)


@pytest.fixture(scope="module")
def job(extract_options):
    return forward_job(extract_options, load_inputs(extract_options))


def everything(blocks):
    """Keys and activations of all blocks, joined."""
    blocks = list(blocks)
    keys = [np.concatenate([getattr(b, name) for b in blocks]) for name in ("cell_idx", "token_pos", "gene_id")]
    return keys, {site: np.concatenate([b.act[site] for b in blocks]) for site in blocks[0].act}


def test_cells_are_cut_into_runs_of_at_most_so_many_tokens_and_a_longer_cell_stands_alone():
    assert cut_cells(np.array([3, 3, 4, 1, 12, 0, 2]), 10) == [(0, 3), (3, 4), (4, 5), (5, 7)]
    assert cut_cells(np.array([], dtype=np.int64), 10) == []
    assert cut_cells(np.array([99, 99]), 10) == [(0, 1), (1, 2)]


def test_no_block_holds_more_tokens_than_its_bound_and_all_cells_come_once_in_order(job, monkeypatch):
    whole = everything(Forward(job).blocks(CELLS, SITES))
    monkeypatch.setattr(forward, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(forward, "READ_CELLS", 10)
    blocks = list(Forward(job).blocks(CELLS, SITES))
    # special tokens count for the bound and are not kept
    assert len(blocks) > 10
    assert max(block.n_tokens for block in blocks) <= 64
    keys, acts = everything(blocks)
    for mine, theirs in zip(keys, whole[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for site in SITES:
        np.testing.assert_allclose(acts[site], whole[1][site], atol=1e-5)


def test_scattered_cells_have_the_activations_that_they_have_among_all(job):
    whole_keys, whole = everything(Forward(job).blocks(CELLS, SITES))
    some = np.array([0, 3, 4, 5, 17, 40, 70, 71])
    sampled = dataclasses.replace(job, tokens_per_cell=3)
    for of, (keys, acts) in ((job, (whole_keys, whole)), (sampled, everything(Forward(sampled).blocks(CELLS, SITES)))):
        mine, found = everything(Forward(of).blocks(some, SITES))
        inside = np.isin(keys[0], some)
        for own, every in zip(mine, keys, strict=True):
            np.testing.assert_array_equal(own, every[inside])
        for site in SITES:
            np.testing.assert_allclose(found[site], acts[site][inside], atol=1e-5)


def test_a_cell_vector_is_the_models_own_readout_of_the_cell(job, tiny_cells):
    forward_pass = Forward(dataclasses.replace(job, readout="mean"))
    keys, acts = everything(forward_pass.blocks(CELLS, SITES))
    rows = tiny_cells.X.tocsr()
    tokens = forward_pass.model.tokenize(rows.indptr, rows.indices, rows.data, forward_pass.match, seed=0)
    np.testing.assert_array_equal(keys[0], np.arange(72))
    assert set(keys[2]) == {len(forward_pass.model.vocabulary.tokens)}, "a cell is no gene"
    for site in SITES:
        np.testing.assert_allclose(acts[site], forward_pass.model.embed(tokens, site=site).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_where_memory_runs_out_the_batch_is_halved_and_the_numbers_stay(job, monkeypatch, error):
    whole = everything(Forward(job).blocks(CELLS, SITES))[1]
    forward_pass = Forward(job)
    run = forward_pass.model.activations
    asked = []

    def scarce(tokens, sites, *, max_batch_tokens):
        asked.append(max_batch_tokens)
        if max_batch_tokens > 2048:
            raise error
        return run(tokens, sites, max_batch_tokens=max_batch_tokens)

    monkeypatch.setattr(forward_pass.model, "activations", scarce)
    found = everything(forward_pass.blocks(CELLS, SITES))[1]
    assert asked[:3] == [8192, 4096, 2048]
    assert forward_pass.halvings == 2
    for site in SITES:
        np.testing.assert_allclose(found[site], whole[site], atol=1e-5)


def test_a_cell_that_does_not_fit_alone_ends_the_run_with_what_to_do(job, monkeypatch):
    forward_pass = Forward(job)

    def never(*_args, **_options):
        raise MemoryError

    monkeypatch.setattr(forward_pass.model, "activations", never)
    with pytest.raises(RunFailedError, match=r"a batch of one cell \(\d+ tokens, on cpu\).*--precision bf16"):
        next(forward_pass.blocks(CELLS, SITES))


def test_other_failures_are_not_taken_for_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_shard_is_as_large_as_asked_else_a_sixteenth_of_the_cells_or_what_fits(extract_options):
    options = extract_options.model_copy(update={"shard_cells": None})

    def cells(n_cells, **update):
        return cells_per_shard(
            options.model_copy(update=update),
            mean_tokens=500.0,
            n_cells=n_cells,
            default="1MB",
            row_bytes=2.0,
            rows_per_cell=None,
        )

    assert cells(10**6, shard_cells=7) == 7
    assert cells(1600, shard_size="10KB") == 10
    assert cells(1600) == 100
    assert cells(72) == 32, "not a handful of cells"
    assert cells(10**6) == 1000, "1 MB of cells of 1 kB"
