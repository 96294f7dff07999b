from __future__ import annotations

import pytest
import torch

from sae_core.errors import ConfigError
from sae_core.steering import Displace, GroupMeans

VECTORS = GroupMeans(group=torch.tensor([0, 1]), values=torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 0]]))


def test_each_token_is_moved_by_the_vector_of_its_group_and_others_keep_their_bits(x, info):
    moved = Displace(vectors=VECTORS, group_of_cell=torch.tensor([0, 1]), amount=0.5)(x, info)
    expected = x.clone()
    expected[[1, 2]] += torch.tensor([0.5, 0, 0, 1.0])
    assert torch.equal(moved.view(torch.int32), expected.view(torch.int32))


def test_vectors_by_gene_move_that_genes_tokens_and_masks_hold(x, info):
    vectors = GroupMeans(group=torch.tensor([0]), gene_id=torch.tensor([10]), values=torch.ones(1, 4))
    same = torch.tensor([0, 0])
    for options, touched in [({}, [1, 3]), ({"cells": [1]}, [3]), ({"positions": [1]}, [1])]:
        moved = Displace(vectors=vectors, group_of_cell=same, **options)(x, info)
        assert (moved != x).any(1).nonzero().squeeze(1).tolist() == touched


def test_an_amount_of_zero_is_the_identity_bit_for_bit_and_half_precision_stays(x, info):
    displace = Displace(vectors=VECTORS, group_of_cell=torch.tensor([0, 0]), amount=0.0)
    assert torch.equal(displace(x, info).view(torch.int32), x.view(torch.int32))
    assert displace(x.half(), info).dtype == torch.float16


def test_vectors_of_another_width_and_an_amount_that_is_not_finite_are_refused(x, info):
    wide = GroupMeans(group=torch.tensor([0]), values=torch.ones(1, 5))
    with pytest.raises(ConfigError, match=r"5 columns.* 4\b"):
        Displace(vectors=wide, group_of_cell=torch.tensor([0, 0]))(x, info)
    with pytest.raises(ConfigError, match="amount = inf"):
        Displace(vectors=VECTORS, group_of_cell=torch.tensor([0, 0]), amount=float("inf"))
