from itertools import combinations

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from feature_store.associations import Labels, Strata, as_csr, associate_labels, blocked_rank_test
from feature_store.associations.familywise import (
    Replicates,
    _permuted,
    family_wise,
    merge_minima,
    minima_table,
    smallest_p,
)
from feature_store.associations.rank_tests import RankTest
from feature_store.errors import InputError


def one_hot(label, n):
    return sparse.csr_array(np.eye(n)[label])


@pytest.fixture
def uneven(rng):
    """Sparse and dense features, some rare, and labels of three sizes; the last label is left untested."""
    density = np.repeat([0.9, 0.3, 0.03, 0.01], 6)
    codes = np.where(rng.random((200, 24)) < density, rng.gamma(1, 1, (200, 24)), 0)
    label = rng.choice(4, 200, p=[0.6, 0.3, 0.05, 0.05])
    return as_csr(codes, "codes"), one_hot(label, 4)[:, :3], Strata(codes=rng.integers(0, 3, 200), n_strata=3)


def test_smallest_p_is_that_of_testing_the_permuted_labels_one_by_one(uneven):
    codes, indicator, strata = uneven
    test = RankTest.blocked(codes, indicator, strata)
    smallest = smallest_p(test, 25, np.random.default_rng(5))
    drawn = next(_permuted(test, 25, 25, np.random.default_rng(5)))
    for i in range(25):
        permuted = drawn[:, 4 * i : 4 * i + 3]
        np.testing.assert_allclose(smallest[i], blocked_rank_test(codes, permuted, strata)[1].min(axis=0), rtol=1e-9)


def test_smallest_p_does_not_depend_on_the_chunks(uneven, monkeypatch):
    test = RankTest.blocked(*uneven)
    whole = smallest_p(test, 30, np.random.default_rng(5))
    monkeypatch.setattr("feature_store.associations.familywise._CHUNK_VALUES", 1000)
    np.testing.assert_array_equal(smallest_p(test, 30, np.random.default_rng(5)), whole)


def test_labels_are_permuted_inside_blocks_only(uneven):
    codes, indicator, strata = uneven
    test = RankTest.blocked(codes, indicator, strata)
    expected = (strata.indicator() @ indicator).toarray()
    drawn = next(_permuted(test, 10, 10, np.random.default_rng(0)))
    for i in range(10):
        permuted = drawn[:, 4 * i : 4 * i + 3]
        np.testing.assert_array_equal((strata.indicator() @ permuted).toarray(), expected)
        assert (permuted != indicator).nnz > 0


def test_whole_donors_are_permuted_where_the_label_is_theirs(rng):
    donor = np.repeat(np.arange(6), 15)
    codes = as_csr(rng.gamma(1, 1, (90, 4)) * (rng.random((90, 4)) < 0.5), "codes")
    units, ill = Strata(codes=donor, n_strata=6), np.array([0, 1, 1, 0, 0, 0])
    test = RankTest.by_unit(codes, one_hot(ill[donor], 2), units)
    smallest = smallest_p(test, 2_000, np.random.default_rng(1))[:, 1]
    every = [
        RankTest.by_unit(codes, one_hot(np.isin(donor, pair).astype(int), 2), units).result()[1][:, 1].min()
        for pair in combinations(range(6), 2)
    ]
    values, count = np.unique(every, return_counts=True)
    assert set(smallest) <= set(values)
    share = [(smallest == value).mean() for value in values]
    np.testing.assert_allclose(share, count / 15, atol=0.04)


def test_ranges_of_features_merge_into_the_minima_of_all_features(planted):
    masks = {name: np.array(planted.split) == name for name in ("select", "test")}
    disease = Labels.from_values("disease", np.where(planted.donor.codes % 2, "ill", "well"))
    for labels in (planted.cell_type, disease):
        arguments = (labels, masks, planted.donor)
        whole = associate_labels(planted.codes, *arguments).minima
        parts = [
            associate_labels(planted.codes[:, a:b], *arguments, first_feature=a).minima
            for a, b in ((0, 1), (1, 20), (20, 42))
        ]
        keys = ["label_kind", "label", "split", "replicate"]
        assert merge_minima(parts).equals(whole.sort(keys))


def test_p_max_counts_the_replicates_that_did_as_well():
    minima = minima_table(np.array([[0.01, 0.5], [0.2, 0.5], [0.04, 0.5]]), "kind", ["a", "b"], "test")
    table = pl.DataFrame(
        {
            "label_kind": "kind",
            "label": ["a", "b", "a", "a", "c"],
            "split": "test",
            "p": [0.005, 0.4, 0.04 - 1e-16, 0.3, 0.1],
        }
    )
    assert family_wise(table, minima)["p_max"].to_list() == [1 / 4, 1 / 4, 3 / 4, 1.0, None]


def test_without_permutations_there_is_no_p_max(planted):
    masks = {"select": np.ones(planted.donor.n_cells, bool)}
    rows = associate_labels(planted.codes, planted.cell_type, masks, planted.donor, replicates=Replicates(n=0))
    assert rows.minima.height == 0
    assert family_wise(rows.table, merge_minima([rows.minima]))["p_max"].null_count() == rows.table.height
    with pytest.raises(InputError, match="n=-1"):
        Replicates(n=-1)


def test_p_max_finds_what_was_planted_and_rises_with_p(planted):
    masks = {"select": np.ones(planted.donor.n_cells, bool)}
    rows = associate_labels(planted.codes, planted.cell_type, masks, planted.donor)
    table = family_wise(rows.table, merge_minima([rows.minima])).sort("p")
    for (label,), part in table.partition_by("label", as_dict=True).items():
        assert (part["p_max"].diff().drop_nulls() >= 0).all()
        mine = [f for f, m in enumerate(planted.meaning) if "type" in m and "ABC"[planted.target[f]] == label]
        assert (part.filter(pl.col("feature_id").is_in(mine))["p_max"] == 1 / 101).all()
        noise = [f for f, m in enumerate(planted.meaning) if m == "noise"]
        assert (part.filter(pl.col("feature_id").is_in(noise))["p_max"] > 0.05).all()
