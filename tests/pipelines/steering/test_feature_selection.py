"""Choice of features, samples and shuffled labels, against hand numbers and planted features."""

import dataclasses

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from pipelines.errors import UsageError
from pipelines.steering.feature_selection import rank_features, score_features, shuffle_labels
from pipelines.steering.labels import CellLabels
from pipelines.steering.plan import InterventionType, SteeringTask, Task
from pipelines.steering.token_sample import sample_cells

MOVE = SteeringTask(type=Task.MOVE, kind="condition", target="stim", toward="ctrl", intervention=InterventionType.SHIFT)
MIX = SteeringTask(type=Task.MIX, kind="batch", target="all", toward=None, intervention=InterventionType.ABLATE)


def labels(label, cell_type, donor, split="select"):
    n = len(label)
    columns = {"label": label, "cell_type": cell_type, "donor": donor, "split": [split] * n}
    return CellLabels(**{name: np.array(values, dtype=object) for name, values in columns.items()})


@pytest.fixture
def paired():
    """8 donors-and-types of 6 stimulated and 6 control cells each; 5 features of noise around their type's mean."""
    rng = np.random.default_rng(0)
    rows = [(c, t, d) for d in "PQRS" for t in "AB" for c in ("stim", "ctrl") for _ in range(6)]
    found = labels(*zip(*rows, strict=True))
    codes = rng.gamma(2.0, 1.0, (len(rows), 5)) + 3.0 * (found.cell_type == "A")[:, None] * np.array([1, 0, 0, 0, 0])
    return found, codes


def test_the_score_of_a_move_is_the_mean_over_donors_and_types_of_the_difference(paired):
    known, codes = paired
    codes[:, 2] += 4.0 * (known.label == "stim")
    found = score_features(sparse.csr_array(codes), known, MOVE)
    differences = []
    for donor in "PQRS":
        for kind in "AB":
            own = (known.donor == donor) & (known.cell_type == kind)
            differences.append(
                codes[own & (known.label == "stim")].mean(0) - codes[own & (known.label == "ctrl")].mean(0)
            )
    np.testing.assert_allclose(found.score, np.mean(differences, axis=0))
    np.testing.assert_array_equal(found.n_agree, (np.sign(differences) == np.sign(found.score)).sum(0))
    assert found.n_units == 8
    assert rank_features(found, MOVE, np.ones(5, bool))[0] == 2
    assert 2 not in rank_features(found, MOVE, np.array([True, True, False, True, True]))


def test_composition_of_types_is_no_displacement(paired):
    known, _ = paired
    exact = np.where((known.cell_type == "A")[:, None], 5.0, 1.0) * np.ones((1, 5))
    kept = np.r_[np.flatnonzero(known.label == "stim"), np.flatnonzero((known.label == "ctrl") & (known.donor == "P"))]
    few = np.r_[kept, np.flatnonzero((known.label == "ctrl") & (known.cell_type == "A"))]
    found = score_features(sparse.csr_array(exact[few]), known.at(few), MOVE)
    np.testing.assert_allclose(found.score, 0.0, atol=1e-12)


def test_donors_of_one_condition_each_are_averaged_inside_types():
    rows = [("stim", "A", "P")] * 5 + [("stim", "A", "Q")] * 20 + [("ctrl", "A", "R")] * 6
    known = labels(*zip(*rows, strict=True))
    codes = np.array([[1.0]] * 5 + [[3.0]] * 20 + [[0.5]] * 6)
    found = score_features(sparse.csr_array(codes), known, MOVE)
    assert (found.score.item(), found.n_units) == (pytest.approx((1.0 + 3.0) / 2 - 0.5), 1)


def test_the_score_of_a_mix_is_the_variance_between_batches_less_that_of_sampling():
    rng = np.random.default_rng(1)
    rows = [(f"b{b}", t, "") for b in range(3) for t in "AB" for _ in range(40)]
    known = labels(*zip(*rows, strict=True))
    codes = rng.normal(5.0, 1.0, (len(rows), 3))
    codes[:, 1] += np.array([{"b0": 0.0, "b1": 1.0, "b2": 2.0}[name] for name in known.label])
    codes[:, 2] += 9.0 * (known.cell_type == "A")
    found = score_features(sparse.csr_array(codes), known, MIX)
    by_hand = []
    for kind in "AB":
        groups = [codes[(known.cell_type == kind) & (known.label == f"b{b}")] for b in range(3)]
        means, noise = [g.mean(0) for g in groups], [g.var(0, ddof=1) / len(g) for g in groups]
        by_hand.append(np.var(means, axis=0, ddof=1) - np.mean(noise, axis=0))
    np.testing.assert_allclose(found.score, np.mean(by_hand, axis=0))
    assert found.score[1] == pytest.approx(1.0, abs=0.3)
    assert np.abs(found.score[[0, 2]]).max() < 0.05
    assert rank_features(found, MIX, np.ones(3, bool))[0] == 1


def test_cells_without_a_comparison_are_refused_with_what_there_is(paired):
    known, codes = paired
    own = known.label == "stim"
    with pytest.raises(UsageError, match=r"\{'stim': 48\}.*--feature"):
        score_features(sparse.csr_array(codes[own]), known.at(own), MOVE)
    single = labels(["b0"] * 6, ["A"] * 6, [""] * 6)
    with pytest.raises(UsageError, match=r"batch .*\{'b0': 6\}.*--feature"):
        score_features(sparse.csr_array(codes[:6]), single, MIX)


def test_shuffled_labels_keep_the_counts_of_each_donor_and_type(paired):
    known, _ = paired
    drawn = shuffle_labels(known, MOVE, np.random.default_rng(0))
    assert (drawn.label != known.label).any()
    for donor in "PQRS":
        for kind in "AB":
            own = (known.donor == donor) & (known.cell_type == kind)
            assert sorted(drawn.label[own]) == sorted(known.label[own])


def test_where_donors_carry_one_label_whole_donors_exchange_theirs():
    donors = ["P"] * 3 + ["Q"] * 4 + ["R"] * 5 + ["S"] * 6
    known = labels(["stim"] * 7 + ["ctrl"] * 11, ["A"] * 18, donors)
    seen = set()
    for seed in range(20):
        drawn = shuffle_labels(known, MOVE, np.random.default_rng(seed))
        carried = {donor: set(drawn.label[known.donor == donor]) for donor in "PQRS"}
        assert all(len(own) == 1 for own in carried.values())
        assert sorted(name for own in carried.values() for name in own) == ["ctrl", "ctrl", "stim", "stim"]
        seen.add(tuple(sorted((donor, *own) for donor, own in carried.items())))
    assert len(seen) > 2


def test_shuffled_batches_stay_in_their_type_and_split():
    rows = [(f"b{i % 3}", "AB"[i % 2], "") for i in range(60)]
    known = dataclasses.replace(
        labels(*zip(*rows, strict=True)), split=np.array(["train", "select"] * 30, dtype=object)
    )
    drawn = shuffle_labels(known, MIX, np.random.default_rng(0))
    assert (drawn.label != known.label).any()
    for split in ("train", "select"):
        for kind in "AB":
            own = (known.split == split) & (known.cell_type == kind)
            assert sorted(drawn.label[own]) == sorted(known.label[own])


@pytest.fixture
def cells():
    kinds = ["A"] * 80 + ["B"] * 15 + ["C"] * 5
    return pl.DataFrame({"cell_idx": np.arange(100) * 3, "cell_type": kinds})


def test_a_sample_keeps_shares_or_takes_equal_numbers(cells):
    kind = dict(cells.select("cell_idx", "cell_type").iter_rows())

    def counts(**how):
        drawn = sample_cells(cells, most=20, seed=1, strata=["cell_type"], **how)
        assert (np.diff(drawn) > 0).all()
        names = [kind[cell] for cell in drawn.tolist()]
        return {name: names.count(name) for name in "ABC"}

    assert counts() == {"A": 16, "B": 3, "C": 1}
    equal = counts(equal=True)
    assert equal["C"] == 5
    assert abs(equal["A"] - equal["B"]) <= 1


def test_a_sample_is_a_function_of_seed_and_cells(cells):
    first, again, other = (sample_cells(cells, most=20, seed=seed, strata=["cell_type"]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()
    np.testing.assert_array_equal(sample_cells(cells, most=100, seed=0, strata=[]), cells["cell_idx"].to_numpy())
    shuffled_rows = cells.sample(fraction=1.0, shuffle=True, seed=3)
    np.testing.assert_array_equal(sample_cells(shuffled_rows, most=20, seed=0, strata=["cell_type"]), first)
