from __future__ import annotations

import pytest
import torch

from sae_core.errors import ConfigError
from sae_core.scfm.sites import TokenInfo
from sae_core.steering import Ablate, Add, Clamp, Scale, Steering, Toward
from sae_core.steering import apply as module


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that tells -0.0 from 0.0."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def many_tokens(n_cells: int = 6, per_cell: int = 20, seed: int = 0) -> tuple[torch.Tensor, TokenInfo]:
    n_tokens = n_cells * per_cell
    x = 3 + torch.randn(n_tokens, 16, generator=torch.Generator().manual_seed(seed))
    position = torch.arange(n_tokens)
    return x, TokenInfo(
        gene_id=position % 7,
        cell=position // per_cell,
        position=position % per_cell,
        is_special=position % per_cell == 0,
        is_masked_gene=torch.zeros(n_tokens, dtype=torch.bool),
    )


def test_ablating_takes_exactly_the_features_contribution_out(sae, x, info):
    steered = Steering(sae=sae, intervention=Ablate(features=[0]))(x, info)
    expected = x.clone()
    expected[[1, 3, 4], 0] = 0.0
    assert torch.equal(steered, expected)


def test_the_part_of_x_that_the_autoencoder_does_not_explain_stays(sae, x, info):
    steered = Steering(sae=sae, intervention=Ablate(features=[0, 1, 2, 3]))(x, info)
    assert steered[1].tolist() == [0.0, -4.0, pytest.approx(0.1), 0.0]
    assert torch.equal(steered[2], x[2])


@pytest.mark.parametrize(
    ("intervention", "row_2", "row_3"),
    [
        (Clamp(features=[2], dose=7.0), [0.2, 0.3, 6.6, 0.5], [5.0, 1.5, 7.0, 0.0]),
        (Add(features=[0], dose=2.0), [2.2, 0.3, -0.4, 0.5], [7.0, 1.5, 0.0, 0.0]),
        (Toward(features=[6], mean_code=torch.full((8,), 4.0), amount=0.5), [0.2, 0.3, -2.4, 0.5], [5.0, 1.5, -2, 0]),
    ],
)
def test_features_that_were_inactive_are_activated(sae, x, info, intervention, row_2, row_3):
    steered = Steering(sae=sae, intervention=intervention)(x, info)
    torch.testing.assert_close(steered[2], torch.tensor(row_2))
    torch.testing.assert_close(steered[3], torch.tensor(row_3))


@pytest.mark.parametrize(
    "intervention",
    [
        Add(features=[0, 1], dose=0.0),
        Scale(features=[0, 1], factor=1.0),
        Ablate(features=[3]),  # active nowhere
        Toward(features=[0, 1], mean_code=torch.ones(8), amount=0.0),
    ],
)
def test_doing_nothing_is_the_identity_bit_for_bit(sae, x, info, intervention):
    assert same_bits(Steering(sae=sae, intervention=intervention)(x, info), x)


def test_the_input_is_not_written_to(sae, x, info):
    before = x.clone()
    Steering(sae=sae, intervention=Clamp(features=[0], dose=9.0))(x, info)
    assert same_bits(x, before)


def test_tokens_that_the_masks_leave_out_keep_their_bits(sae, x, info):
    clamp = Clamp(features=[2], dose=7.0)
    for options, touched in [
        ({}, [1, 2, 3, 4]),
        ({"include_special": True}, [0, 1, 2, 3, 4]),
        ({"genes": [10]}, [1, 3]),
        ({"cells": {1}}, [3, 4]),
        ({"positions": [1]}, [1, 4]),
        ({"genes": [10, 11], "cells": [0]}, [1, 2]),
        ({"genes": [0], "include_special": True}, [0]),
    ]:
        steered = Steering(sae=sae, intervention=clamp, **options)(x, info)
        assert [t for t in range(5) if not same_bits(steered[t], x[t])] == touched


@pytest.mark.parametrize("mode", ["delta", "replace"])
@pytest.mark.parametrize(
    "intervention",
    [
        Ablate(features=range(0, 64, 2)),
        Clamp(features=[3, 9], dose=2.0, unit=torch.linspace(0.1, 1, 64)),
        Add(features=[3, 9], dose=2.0),
        Scale(features=range(64), factor=0.5),
        Toward(features=range(64), mean_code=torch.linspace(0, 1, 64), amount=0.3),
    ],
)
def test_steering_equals_the_difference_of_two_decodings(trained, mode, intervention):
    x, info = many_tokens()
    codes = trained.encode(x).to_dense()
    chosen = torch.tensor(intervention.features)
    changed = codes.clone()
    changed[:, chosen] += intervention.change(codes[:, chosen], info)
    base = x if mode == "delta" else codes @ trained.W_dec + trained.b_dec
    expected = torch.where(info.is_special.unsqueeze(1), x, base + (changed - codes) @ trained.W_dec)
    steered = Steering(sae=trained, intervention=intervention, mode=mode)(x, info)
    torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-5)


def test_replace_without_a_change_is_the_reconstruction(trained):
    x, info = many_tokens()
    steered = Steering(sae=trained, intervention=Add(features=[0], dose=0.0), mode="replace")(x, info)
    expected = torch.where(info.is_special.unsqueeze(1), x, trained(x))
    torch.testing.assert_close(steered, expected)
    assert not torch.equal(steered, x)


def test_steering_one_cell_changes_no_other(trained):
    x, info = many_tokens()
    steered = Steering(sae=trained, intervention=Add(features=[3], dose=2.0), cells=[4])(x, info)
    other = info.cell != 4
    assert same_bits(steered[other], x[other])
    assert not torch.equal(steered[~other], x[~other])


def test_a_cells_result_does_not_depend_on_the_cells_beside_it(trained):
    x, info = many_tokens()
    steering = Steering(sae=trained, intervention=Scale(features=range(64), factor=0.0))
    together = steering(x, info)
    for cell in range(6):
        own = info.cell == cell
        alone = steering(x[own], info.take(own.nonzero().squeeze(1)))
        torch.testing.assert_close(together[own], alone, rtol=1e-6, atol=1e-6)


def test_steering_in_parts_equals_steering_at_once(trained, monkeypatch):
    x, info = many_tokens()
    steering = Steering(sae=trained, intervention=Scale(features=range(64), factor=0.0))
    whole = steering(x, info)
    monkeypatch.setattr(module, "MAX_DENSE", 64 * 9)
    torch.testing.assert_close(steering(x, info), whole, rtol=1e-6, atol=1e-6)


def test_a_direction_is_followed_by_the_length_of_the_step_that_it_replaces(trained):
    x, info = many_tokens()
    intervention = Scale(features=range(64), factor=0.0)
    direction = torch.nn.functional.normalize(torch.arange(16.0), dim=0)
    real = Steering(sae=trained, intervention=intervention)(x, info) - x
    null = Steering(sae=trained, intervention=intervention, direction=direction)(x, info) - x
    torch.testing.assert_close(null.norm(dim=1), real.norm(dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(null, null.norm(dim=1, keepdim=True) * direction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["delta", "replace"])
def test_half_precision_activations_stay_so(sae, x, info, mode):
    steered = Steering(sae=sae, intervention=Clamp(features=[2], dose=7.0), mode=mode)(x.half(), info)
    assert steered.dtype == torch.float16
    assert steered[3, 2] == 7.0


def test_no_token_is_steered_to_no_token(sae, x, info):
    nothing = info.take(torch.arange(0))
    assert Steering(sae=sae, intervention=Ablate(features=[0]))(x[:0], nothing).shape == (0, 4)


def test_a_feature_out_of_range_is_refused_before_any_run(sae):
    with pytest.raises(ConfigError, match="feature 8"):
        Steering(sae=sae, intervention=Ablate(features=[8]))


def test_masks_that_select_nothing_are_refused(sae, info):
    ablate = Ablate(features=[0])
    for options in ({"genes": []}, {"cells": []}, {"positions": []}):
        with pytest.raises(ConfigError, match=rf"{next(iter(options))} = \[\]"):
            Steering(sae=sae, intervention=ablate, **options)
    with pytest.raises(ConfigError, match=r"genes = \[99\], cells = all"):
        Steering(sae=sae, intervention=ablate, genes=[99]).check(info)
    Steering(sae=sae, intervention=ablate, genes=[10]).check(info)


def test_a_direction_of_another_width_is_refused(sae):
    with pytest.raises(ConfigError, match=r"direction .*\(5,\).*\(4,\)"):
        Steering(sae=sae, intervention=Ablate(features=[0]), direction=torch.ones(5))
