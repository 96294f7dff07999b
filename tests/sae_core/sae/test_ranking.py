"""Ranking by integers selects what float32 selects, and a run ranks in one precision from its start to its end."""

from __future__ import annotations

import pytest
import torch

from sae_core.errors import CheckpointError
from sae_core.sae import Normaliser, SAEConfig, TrainConfig, Trainer, ranking
from sae_core.sae.kernels import CPU
from sae_core.sae.ranking import batch_topk_by_int8, has_int8, ranking_on
from sae_core.sae.selectors import batch_topk

HERE = torch.device("cpu")
needs_int8 = pytest.mark.skipif(not has_int8(HERE), reason="needs an x86 processor with AVX2")


def batch(n_tokens: int = 700, d_model: int = 48, n_features: int = 300, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Activations, encoder rows and biases."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, d_model, generator=generator)
    W_enc = torch.nn.functional.normalize(torch.randn(n_features, d_model, generator=generator), dim=1)
    return x, W_enc, 0.1 * torch.randn(n_features, generator=generator)


def places(codes) -> set[int]:
    return set((codes.row * codes.n_features + codes.col).tolist())


@needs_int8
@pytest.mark.parametrize("change", ["none", "a dimension 50 times as large", "long encoder rows", "unequal tokens"])
def test_ranking_by_integers_selects_the_largest_entries_of_the_float32_product(change):
    x, W_enc, b_enc = batch()
    if change == "a dimension 50 times as large":
        x[:, 3] *= 50
        W_enc[:, 3] /= 50
    elif change == "long encoder rows":
        W_enc[::7] *= 5
    elif change == "unequal tokens":
        x *= torch.rand(len(x), 1, generator=torch.Generator().manual_seed(2)) + 0.5
    codes, dense = batch_topk_by_int8(x, W_enc, b_enc, 6, CPU), torch.addmm(b_enc, x, W_enc.T)
    exact = batch_topk(dense, 6)
    assert codes is not None
    assert codes.nnz == exact.nnz == 6 * 700
    # float32 sums in two orders may rank two entries at the cutoff otherwise
    assert len(places(codes) - places(exact)) <= 2
    torch.testing.assert_close(codes.value, dense[codes.row, codes.col.long()])


@needs_int8
def test_without_a_cutoff_or_with_coarse_integers_float32_has_to_rank():
    x, W_enc, b_enc = batch()
    assert batch_topk_by_int8(x, W_enc, b_enc - 100, 6, CPU) is None  # no entry is positive
    assert batch_topk_by_int8(x, W_enc, b_enc, 300, CPU) is None  # fewer are positive than are wanted
    assert batch_topk_by_int8(x.index_fill(0, torch.tensor([5]), torch.nan), W_enc, b_enc, 6, CPU) is None
    x[5] *= 1e4  # the others have two or three steps left
    assert batch_topk_by_int8(x, W_enc, b_enc, 6, CPU) is None


@needs_int8
def test_a_sample_that_is_louder_than_the_batch_leaves_the_ranking_to_float32():
    x, W_enc, b_enc = batch()
    x[:: 700 // ranking.SAMPLE] *= 3
    assert batch_topk_by_int8(x, W_enc, b_enc, 6, CPU) is None


@pytest.mark.parametrize(
    ("amx", "device", "precision", "over_batch", "expected"),
    [
        (False, "cpu", "bf16", True, "f32"),
        (True, "cpu", "bf16", True, "bf16"),
        (True, "cpu", "bf16", False, "bf16"),
        (False, "cuda", "bf16", True, "bf16"),
        (False, "cuda", "int8", True, "f32"),
        (False, "cpu", "int8", False, "f32"),
        (False, "cpu", "f32", True, "f32"),
    ],
)
def test_a_precision_is_used_only_where_it_is_faster(monkeypatch, amx, device, precision, over_batch, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert ranking_on(torch.device(device), precision, over_batch=over_batch) == expected


def trainer(synthetic, precision: str) -> Trainer:
    config, train = SAEConfig(d_model=32, n_features=64, k=3), TrainConfig(n_steps=6, encoder_precision=precision)
    return Trainer(config, train, Normaliser.fit([synthetic.sample(256, 0)]))


@needs_int8
def test_a_resumed_run_that_ranks_by_integers_equals_an_undisturbed_one_bit_for_bit(synthetic, monkeypatch):
    taken = []
    real = batch_topk_by_int8
    monkeypatch.setattr(
        "sae_core.sae.trainer.batch_topk_by_int8", lambda *a: taken.append(real(*a) is not None) or real(*a)
    )
    batches = [synthetic.sample(300, seed) for seed in range(6)]
    undisturbed, first, resumed = (trainer(synthetic, "int8") for _ in range(3))
    expected = [undisturbed.step(x) for x in batches]
    for x in batches[:3]:
        first.step(x)
    resumed.load_state_dict(first.state_dict())
    assert [resumed.step(x) for x in batches[3:]] == expected[3:]
    assert any(taken)


def test_a_resumed_run_ranks_in_the_precision_of_its_start(synthetic, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    state = trainer(synthetic, "bf16").state_dict()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    resumed = trainer(synthetic, "bf16")
    assert resumed.ranking == "f32"
    resumed.load_state_dict(state)
    assert resumed.ranking == "bf16"
    del state.meta["ranking"]  # as earlier versions wrote it
    resumed.load_state_dict(state)
    assert resumed.ranking == "bf16"


def test_a_run_that_ranks_by_integers_cannot_continue_where_that_is_not_possible(synthetic, monkeypatch):
    learner = trainer(synthetic, "int8")
    state = learner.state_dict()
    state.meta["ranking"] = "int8"
    monkeypatch.setattr("sae_core.sae.trainer.has_int8", lambda _: False)
    with pytest.raises(CheckpointError, match="int8, which is not possible on cpu: continue it on a CPU"):
        learner.load_state_dict(state)
