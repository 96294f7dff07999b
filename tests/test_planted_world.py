"""The world of known features that architectures are held against, and what is said of a dictionary of it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from planted_world import CHILDREN, LEAST_TOKENS, ROOTS_OF_TOPIC, World, recovery

from sae_core.sae import SAEConfig, SparseAutoencoder

N_TOKENS = 20_000


@pytest.fixture(scope="module")
def world() -> World:
    return World(256, 64, l0=8.0)


@pytest.fixture(scope="module")
def batch(world):
    return world.sample(N_TOKENS, 1)


def test_features_fire_as_often_as_the_world_says_and_a_batch_follows_its_seed(world, batch):
    is_on = (batch.active.to_dense() > 0).double()
    assert float(world.density.sum()) == pytest.approx(8.0, rel=1e-3)
    torch.testing.assert_close(is_on.mean(0), world.density.double(), rtol=0.25, atol=0.003)
    assert world.density.max() / world.density.min() > 20
    again, other = world.sample(64, 5), world.sample(64, 6)
    torch.testing.assert_close(again.x, world.sample(64, 5).x, rtol=0, atol=0)
    assert not torch.equal(again.x, other.x)
    noise = batch.x - batch.active.to_dense() @ world.directions
    assert float(noise.std()) == pytest.approx(0.05 / 8, rel=0.02)


def test_an_autoencoder_of_the_same_seed_does_not_start_at_the_truth(world):
    config = SAEConfig(d_model=64, n_features=256, k=8)
    rows = SparseAutoencoder(config, generator=torch.Generator().manual_seed(world.seed)).W_dec.detach()
    # of 256 random rows in 64 dimensions the nearest has a cosine of about .35
    assert float((world.directions @ rows.T).amax(1).max()) < 0.75


def test_lengths_are_those_of_their_feature_and_fall_with_its_density(world, batch):
    length = batch.active.to_dense().double()
    n = (length > 0).sum(0)
    mean = length.sum(0) / n
    often = n > 200
    torch.testing.assert_close(mean[often], world.mean_length.double()[often], rtol=0.05, atol=0)
    deviation = (((length - mean) ** 2) * (length > 0)).sum(0).div(n).sqrt()
    torch.testing.assert_close(deviation[often], world.length_deviation.double()[often], rtol=0.2, atol=0.01)
    densest, rarest = int(world.density.argmax()), int(world.density.argmin())
    assert float(world.mean_length[densest]) == pytest.approx(1)
    assert float(world.mean_length[rarest]) == pytest.approx(0.8, abs=0.02)


def test_children_fire_with_their_root_alone_and_one_at_a_time(world, batch):
    is_on = batch.active.to_dense() > 0
    for root in range(world.n_roots):
        children = is_on[:, list(world.child_of(root))]
        assert not (children.any(1) & ~is_on[:, root]).any()
        assert children.sum(1).max() <= 1
    assert len(world.child_of(0)) == CHILDREN


def test_roots_of_a_topic_go_together(world, batch):
    is_on = (batch.active.to_dense() > 0)[:, : world.n_roots].double()
    r = torch.corrcoef(is_on.T)
    topic = torch.arange(world.n_roots) // ROOTS_OF_TOPIC
    same = (topic[:, None] == topic) & ~torch.eye(world.n_roots, dtype=torch.bool)
    assert r[same].mean() > 0.05
    assert abs(float(r[topic[:, None] != topic].mean())) < 0.01


def test_the_worlds_own_dictionary_recovers_everything(world, batch):
    codes = batch.active.to_dense()
    found = recovery(world, world.directions, zip(codes.split(4096), codes.split(4096), strict=True))
    assert found[:4] == (pytest.approx(1), 1, 1, 1)
    assert (found.precision, found.recall, found.f1, found.split, found.absorption) == (1, 1, 1, 0, 0)
    assert abs(found.composition) < 0.02


def test_precision_recall_and_f1_are_those_of_sklearn(world, batch):
    from sklearn.metrics import precision_recall_fscore_support

    generator = torch.Generator().manual_seed(4)
    is_on = batch.active.to_dense()[:6000] > 0
    fires = is_on & (torch.rand(is_on.shape, generator=generator) < 0.8)
    fires |= torch.rand(is_on.shape, generator=generator) < 0.002
    found = recovery(world, world.directions, [(fires.float(), is_on.float())])
    assert is_on.sum(0).min() >= LEAST_TOKENS
    precision, recall, f1, _ = precision_recall_fscore_support(is_on.numpy(), fires.numpy(), average="macro")
    assert (found.precision, found.recall, found.f1) == pytest.approx((precision, recall, f1), abs=1e-6)
    assert 0.5 < found.precision < 0.95
    assert abs(found.absorption) < 0.05


def test_absorption_is_seen_where_a_child_silences_its_root(world, batch):
    codes = batch.active.to_dense().clone()
    directions = world.directions.clone()
    for root in range(world.n_roots):
        children = list(world.child_of(root))
        codes[codes[:, children].any(1), root] = 0
        directions[children] = functional.normalize(world.directions[children] + world.directions[root], dim=1)
    silent = recovery(world, world.directions, [(codes, batch.active)])
    assert silent.absorption == pytest.approx(1)
    assert silent.recall < 1
    # the row of a child points to its root as well: it is no recovered child, and no second row of the root
    absorbed = recovery(world, directions, [(codes, batch.active)])
    assert absorbed.absorption == pytest.approx(1)
    assert absorbed.composition == pytest.approx(0.5**0.5, abs=0.01)
    assert (absorbed.roots, absorbed.children, absorbed.split) == (1, 0, 0)


def test_splitting_is_seen_where_features_have_two_rows_that_fire(world, batch):
    generator = torch.Generator().manual_seed(5)
    codes, blurred = batch.active.to_dense(), torch.randn(world.directions.shape, generator=generator)
    twice = torch.cat([world.directions, functional.normalize(world.directions + 0.02 * blurred, dim=1)])
    assert recovery(world, twice, [(torch.cat([codes, codes], 1), batch.active)]).split == 1
    dead = torch.cat([codes, torch.zeros_like(codes)], 1)
    assert recovery(world, twice, [(dead, batch.active)]).split == 0


def test_random_directions_recover_nothing(world, batch):
    other = functional.normalize(torch.randn(256, 64, generator=torch.Generator().manual_seed(3)), dim=1)
    nothing = recovery(world, other, [(batch.active, batch.active)])
    assert (nothing.share, nothing.roots, nothing.children) == (0, 0, 0)
    assert nothing.cosine < 0.6
    assert nothing.f1 < 0.2
    assert math.isnan(nothing.precision)


def test_a_number_of_features_that_is_no_forest_is_refused():
    with pytest.raises(ValueError, match="multiple of 64"):
        World(100, 16)


def test_a_baseline_at_another_k_equals_the_one_fitted_at_it(monkeypatch):
    import bench_world

    for name, value in {"FIT_TOKENS": 4096, "HELD_OUT": 4096, "CALIBRATION": 4096}.items():
        monkeypatch.setattr(bench_world, name, value)
    options = argparse.Namespace(features=64, d_model=16, l0=4.0, width=None)
    bench = bench_world.Bench(options)
    bench.baseline("ica", 2)
    again, fitted = bench.baseline("ica", 4), bench_world.Bench(options).baseline("ica", 4)
    for name, value in fitted.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_the_benchmark_makes_each_row_once_and_draws_them(monkeypatch, capsys, tmp_path):
    import bench_world

    for name, value in {"FIT_TOKENS": 8192, "HELD_OUT": 4096, "CALIBRATION": 4096, "SEARCH_STEPS": 5}.items():
        monkeypatch.setattr(bench_world, name, value)
    out, picture = tmp_path / "world.jsonl", tmp_path / "world.png"
    size = "--features 64 --d-model 32 --l0 4 --k 4 --steps 20 --batch 256 --threads 1 --arch batchtopk gated"
    words = ["bench", *size.split(), "--baseline", "pca", "random", "truth", "--out", str(out)]

    def printed(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [*words, *arguments])
        before = torch.get_num_threads()
        bench_world.main()
        torch.set_num_threads(before)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]

    rows = printed()
    assert [row.split(" | ")[0].strip("| ") for row in rows[1:]] == ["pca", "random", "truth", "batchtopk", "gated"]
    assert [json.loads(line)["share"] for line in out.read_text().splitlines()][:3] == [0, 0, 1]
    made = out.read_text()
    assert printed() == rows
    assert printed("--draw", str(picture)) == []
    assert out.read_text() == made
    assert picture.read_bytes().startswith(b"\x89PNG")
