"""Steered vectors are x + (z' - z) W_dec, cell by cell; a vector that is not edited keeps its bits."""

from __future__ import annotations

import pytest
import torch

from sae_core.errors import ConfigError
from sae_core.sae import SAEConfig, SparseAutoencoder
from sae_core.steering import Ablate, Add, Displace, GroupMeans, SteeredVectors, Steering, Toward


@pytest.fixture
def vectors() -> torch.Tensor:
    return torch.randn(9, 16, generator=torch.Generator().manual_seed(1)) + 3


def test_an_edit_adds_the_change_of_the_code_through_the_decoder(trained, vectors):
    z = trained.encode(vectors).to_dense()
    features = z.sum(0).topk(5).indices.sort().values.tolist()
    running = SteeredVectors(vectors, trained)
    ablated = running.steered(Steering(sae=trained, intervention=Ablate(features=features)))
    edited = z.clone()
    edited[:, features] = 0
    torch.testing.assert_close(ablated, vectors + (edited - z) @ trained.W_dec)
    kept = (z[:, features] == 0).all(1)
    assert torch.equal(ablated[kept], vectors[kept])
    added = running.steered(Steering(sae=trained, intervention=Add(features=[3], dose=2.0)))
    torch.testing.assert_close(added, vectors + 2.0 * trained.W_dec[3])
    assert torch.equal(running.steered(None), vectors)


def test_a_cell_does_not_depend_on_the_others_bit_for_bit(trained, vectors):
    steering = Steering(sae=trained, intervention=Ablate(features=list(range(20))))
    together = SteeredVectors(vectors, trained).steered(steering)
    alone = [SteeredVectors(vectors[i : i + 1], trained).steered(steering) for i in range(len(vectors))]
    assert torch.equal(together, torch.cat(alone))


def test_groups_move_to_their_means_and_are_displaced_by_their_vectors(trained, vectors):
    group = torch.arange(9) % 2
    means = GroupMeans(group=torch.tensor([1]), values=torch.full((1, 2), 0.5))
    z = trained.encode(vectors).to_dense()
    moved = SteeredVectors(vectors, trained).steered(
        Steering(sae=trained, intervention=Toward(features=[4, 7], mean_code=means, group_of_cell=group))
    )
    change = torch.zeros_like(z)
    change[:, [4, 7]] = 0.5 - z[:, [4, 7]]
    change[group == 0] = 0
    torch.testing.assert_close(moved, vectors + change @ trained.W_dec)
    step = GroupMeans(group=torch.tensor([0]), values=torch.arange(16.0)[None])
    displaced = SteeredVectors(vectors, trained).steered(Displace(vectors=step, group_of_cell=group, amount=0.5))
    wanted = vectors + 0.5 * torch.arange(16.0) * (group == 0)[:, None]
    torch.testing.assert_close(displaced, wanted)


def test_what_does_not_fit_is_refused(trained, vectors):
    with pytest.raises(ConfigError, match=r"d_model = 16.*have 8"):
        SteeredVectors(vectors[:, :8], trained)
    running = SteeredVectors(vectors, trained)
    other = SparseAutoencoder(SAEConfig(d_model=16, n_features=64, k=4)).requires_grad_(False)
    with pytest.raises(ConfigError, match="another autoencoder"):
        running.steered(Steering(sae=other, intervention=Ablate(features=[1])))
    means = GroupMeans(group=torch.tensor([0]), values=torch.zeros(1, 16))
    with pytest.raises(ConfigError, match=r"3 entries.*9 cells"):
        running.steered(Displace(vectors=means, group_of_cell=torch.zeros(3, dtype=torch.int64)))


def test_no_cells_give_no_vectors(trained):
    assert SteeredVectors(torch.empty(0, 16), trained).steered(None).shape == (0, 16)
