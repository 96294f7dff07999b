"""The world of known features that architectures are held against, and what is said of a dictionary of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from planted_world import CHILDREN, ROOTS_OF_TOPIC, World, recovery

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
    assert float(noise.std()) == pytest.approx(1.5 * 0.05 / 8, rel=0.02)


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
    found = recovery(world, world.directions, batch.active, batch.active)
    assert found[:4] == (pytest.approx(1), 1, 1, 1)
    assert (found.split, found.absorption) == (0, 0)


def test_absorption_and_splitting_are_seen_where_they_are_planted(world, batch):
    codes = batch.active.to_dense().clone()
    # the row of a root is silent wherever one of its children is active
    for root in range(world.n_roots):
        codes[codes[:, list(world.child_of(root))].any(1), root] = 0
    absorbed = recovery(world, world.directions, codes, batch.active)
    assert absorbed.absorption == pytest.approx(1)
    assert absorbed.recall < 1
    # every direction twice
    near = functional.normalize(world.directions + 0.02 * torch.randn_like(world.directions), dim=1)
    twice = recovery(world, torch.cat([world.directions, near]), torch.cat([codes, codes], 1), batch.active)
    assert twice.split == 1
    other = functional.normalize(torch.randn(256, 64, generator=torch.Generator().manual_seed(3)), dim=1)
    nothing = recovery(world, other, batch.active, batch.active)
    assert nothing.share == 0
    assert nothing.cosine < 0.6


def test_a_number_of_features_that_is_no_forest_is_refused():
    with pytest.raises(ValueError, match="multiple of 64"):
        World(100, 16)


def test_the_benchmark_runs(monkeypatch, capsys):
    import bench_world

    monkeypatch.setattr(bench_world, "FIT_TOKENS", 8192)
    monkeypatch.setattr(bench_world, "HELD_OUT", 2048)
    words = "bench --features 64 --d-model 32 --l0 4 --k 4 --steps 20 --batch 256 --arch batchtopk gated --threads 1"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--baseline", "pca", "random"])
    before = torch.get_num_threads()
    bench_world.main()
    torch.set_num_threads(before)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows[1:]] == ["pca", "random", "batchtopk", "gated"]
