from __future__ import annotations

import re

import pytest
import torch

from sae_core.errors import ConfigError
from sae_core.scfm import TokenInfo
from sae_core.steering import Ablate, Add, Clamp, GroupMeans, Scale, Shift, Toward

Z = torch.tensor([[0.0, 2.0], [4.0, 1.0]])
INFO = TokenInfo(
    gene_id=torch.tensor([10, 11]),
    cell=torch.tensor([0, 1]),
    position=torch.tensor([0, 0]),
    is_special=torch.zeros(2, dtype=torch.bool),
    is_masked_gene=torch.zeros(2, dtype=torch.bool),
)
UNIT = torch.tensor([9.0, 10.0, 9.0, 100.0])  # of features 0 to 3; the chosen ones are 1 and 3


@pytest.mark.parametrize(
    ("intervention", "steered"),
    [
        (Ablate(features=[1, 3]), [[0, 0], [0, 0]]),
        (Clamp(features=[1, 3], dose=3.0), [[3, 3], [3, 3]]),
        (Clamp(features=[1, 3], dose=0.5, unit=UNIT), [[5, 50], [5, 50]]),
        (Add(features=[1, 3], dose=-1.0), [[-1, 1], [3, 0]]),
        (Add(features=[1, 3], dose=0.5, unit=UNIT), [[5, 52], [9, 51]]),
        (Scale(features=[1, 3], factor=3.0), [[0, 6], [12, 3]]),
        (Toward(features=[1, 3], mean_code=UNIT), [[10, 100], [10, 100]]),
        (Toward(features=[1, 3], mean_code=UNIT, amount=0.5), [[5, 51], [7, 50.5]]),
    ],
)
def test_steered_values_are_those_worked_out_by_hand(intervention, steered):
    torch.testing.assert_close(Z + intervention.change(Z, INFO), torch.tensor(steered, dtype=torch.float32))


@pytest.mark.parametrize(
    "intervention",
    [
        Add(features=[1, 3], dose=0.0),
        Add(features=[1, 3], dose=0.0, unit=UNIT),
        Scale(features=[1, 3], factor=1.0),
        Toward(features=[1, 3], mean_code=UNIT, amount=0.0),
    ],
)
def test_an_intervention_of_no_size_changes_by_exactly_zero(intervention):
    z = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    assert not intervention.change(z, INFO).any()


def test_clamp_at_dose_zero_equals_ablate():
    assert torch.equal(
        Clamp(features=[1, 3], dose=0.0, unit=UNIT).change(Z, INFO), Ablate(features=[1, 3]).change(Z, INFO)
    )


def test_features_are_kept_ascending_and_once_so_that_their_order_cannot_matter():
    assert Ablate(features=[3, 1, 3]).features == (1, 3)
    shuffled = Clamp(features=[3, 1], dose=0.5, unit=UNIT)
    assert torch.equal(shuffled.change(Z, INFO), Clamp(features=[1, 3], dose=0.5, unit=UNIT).change(Z, INFO))


def test_no_feature_or_a_negative_one_is_refused():
    for features in ([], [-1, 2]):
        with pytest.raises(ConfigError, match=f"features = {re.escape(str(features))}"):
            Ablate(features=features)


def test_a_dose_or_a_unit_that_is_not_finite_is_refused():
    with pytest.raises(ConfigError, match="dose = nan"):
        Add(features=[1], dose=float("nan"))
    with pytest.raises(ConfigError, match=r"unit = .*inf"):
        Add(features=[1], dose=1.0, unit=torch.tensor([1.0, float("inf")]))


def test_a_feature_out_of_range_and_a_vector_of_another_width_are_refused():
    with pytest.raises(ConfigError, match=r"feature 8.*0 to 7.*`scsae features`"):
        Ablate(features=[1, 8]).check(8)
    with pytest.raises(ConfigError, match=r"unit .*\(4,\).*\(8,\)"):
        Clamp(features=[1], dose=1.0, unit=UNIT).check(8)
    with pytest.raises(ConfigError, match=r"mean_code .*\(4,\)"):
        Toward(features=[1], mean_code=UNIT).check(8)
    Clamp(features=[1, 3], dose=1.0, unit=UNIT).check(4)


BY_GENE = GroupMeans(
    group=torch.tensor([0, 1]), gene_id=torch.tensor([10, 99]), values=torch.tensor([[1.0, 2.0], [8.0, 8.0]])
)
GROUPS = torch.tensor([0, 1])


def test_group_means_move_the_tokens_that_have_a_row_and_no_other():
    toward = Toward(features=[1, 3], mean_code=BY_GENE, amount=0.5, group_of_cell=GROUPS)
    assert (Z + toward.change(Z, INFO)).tolist() == [[0.5, 2.0], [4.0, 1.0]]
    shift = Shift(features=[1, 3], difference=BY_GENE, amount=2.0, group_of_cell=GROUPS)
    assert (Z + shift.change(Z, INFO)).tolist() == [[2.0, 6.0], [4.0, 1.0]]


def test_an_amount_for_each_feature_is_that_of_the_chosen_ones():
    amount = torch.tensor([7.0, 0.5, 7.0, 0.0])
    shift = Shift(features=[1, 3], difference=BY_GENE, amount=amount, group_of_cell=GROUPS)
    assert shift.change(Z, INFO).tolist() == [[0.5, 0.0], [0.0, 0.0]]
    toward = Toward(features=[1, 3], mean_code=UNIT, amount=amount)
    assert (Z + toward.change(Z, INFO)).tolist() == [[5.0, 2.0], [7.0, 1.0]]
    with pytest.raises(ConfigError, match=r"amount .*\(4,\).*\(8,\)"):
        shift.check(8)


def test_group_means_that_do_not_fit_the_features_or_have_no_groups_are_refused():
    for features in ([1], [3, 1], [1, 3, 3]):
        with pytest.raises(ConfigError, match=rf"columns for features {re.escape(str(features))}"):
            Shift(features=features, difference=BY_GENE, group_of_cell=GROUPS)
    with pytest.raises(ConfigError, match="group_of_cell"):
        Toward(features=[1, 3], mean_code=BY_GENE)
    with pytest.raises(ConfigError, match="amount = nan"):
        Shift(features=[1, 3], difference=BY_GENE, amount=float("nan"), group_of_cell=GROUPS)
