from __future__ import annotations

import pytest
import torch

from sae_core.errors import ConfigError
from sae_core.scfm import TokenInfo
from sae_core.steering import GroupMeans


def tokens_of(gene_id: list[int], cell: list[int]) -> TokenInfo:
    none = torch.zeros(len(cell), dtype=torch.bool)
    return TokenInfo(
        gene_id=torch.tensor(gene_id),
        cell=torch.tensor(cell),
        position=torch.arange(len(cell)),
        is_special=none,
        is_masked_gene=none,
    )


def table(rows: dict[tuple[int, int], float], columns: int = 2) -> GroupMeans:
    group, gene = (torch.tensor(ids) for ids in zip(*rows, strict=True))
    return GroupMeans(group=group, gene_id=gene, values=torch.tensor([*rows.values()])[:, None].expand(-1, columns))


def test_a_token_gets_the_row_of_its_cells_group_and_its_gene_and_is_known_to_lack_one():
    group_means = table({(0, 3): 1.0, (0, 7): 2.0, (2, 3): 3.0})
    info = tokens_of([3, 7, 7, 3, 8, 10_000], [0, 0, 1, 1, 0, 1])
    values, known = group_means.lookup(torch.tensor([0, 2]), info)
    assert values[:, 0].tolist() == [1.0, 2.0, 0.0, 3.0, 0.0, 0.0]
    assert known.tolist() == [True, True, False, True, False, False]


def test_the_row_is_that_of_a_dictionary_for_random_tables():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randperm(5 * 40, generator=generator)[:90].sort().values
    values = torch.randn(90, 3, generator=generator)
    group_means = GroupMeans(group=keys // 40, gene_id=keys % 40, values=values)
    cell, gene = (torch.randint(n, (500,), generator=generator) for n in (12, 45))
    groups = torch.randint(7, (12,), generator=generator)
    found, known = group_means.lookup(groups, tokens_of(gene.tolist(), cell.tolist()))
    rows = {(int(k) // 40, int(k) % 40): value for k, value in zip(keys, values, strict=True)}
    for token in range(500):
        row = rows.get((int(groups[cell[token]]), int(gene[token])))
        assert bool(known[token]) == (row is not None)
        assert torch.equal(found[token], torch.zeros(3) if row is None else row)


def test_a_table_by_group_alone_holds_for_every_gene():
    group_means = GroupMeans(group=torch.tensor([1, 4]), values=torch.tensor([[1.0], [2.0]]))
    values, known = group_means.lookup(torch.tensor([4, 0, 1]), tokens_of([9, 8, 7, 6], [0, 0, 1, 2]))
    assert values[:, 0].tolist() == [2.0, 2.0, 0.0, 1.0]
    assert known.tolist() == [True, True, False, True]


def test_rows_that_are_unsorted_double_missing_or_not_finite_are_refused():
    with pytest.raises(ConfigError, match=r"\(group, gene_id\)"):
        table({(0, 7): 1.0, (0, 3): 1.0})
    with pytest.raises(ConfigError, match=r"\(group, gene_id\)"):
        GroupMeans(group=torch.tensor([1, 1]), gene_id=torch.tensor([2, 2]), values=torch.ones(2, 1))
    with pytest.raises(ConfigError, match=r"\[0, 0\] rows"):
        GroupMeans(group=torch.zeros(0, dtype=torch.int64), values=torch.ones(0, 1))
    with pytest.raises(ConfigError, match="negative"):
        GroupMeans(group=torch.tensor([-1]), values=torch.ones(1, 1))
    with pytest.raises(ConfigError, match="values"):
        GroupMeans(group=torch.tensor([0]), values=torch.tensor([[torch.nan]]))


def test_groups_of_too_few_cells_are_refused():
    with pytest.raises(ConfigError, match=r"group_of_cell has 1 .*cell 3\b"):
        table({(0, 3): 1.0}).lookup(torch.tensor([0]), tokens_of([3, 3], [0, 3]))
