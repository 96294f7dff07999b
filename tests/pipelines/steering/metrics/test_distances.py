from itertools import pairwise, product

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from pipelines.errors import UsageError
from pipelines.steering.metrics.distances import (
    KINDS,
    SCHEMA,
    corrected_distance,
    distance_table,
    energy_distance,
    floor,
    mean_distance,
    squared_distance,
)


@pytest.fixture
def clouds():
    rng = np.random.default_rng(0)
    return rng.normal(0, 1, (40, 5)), rng.normal(0.7, 1.5, (25, 5))


@pytest.fixture
def cells():
    """Unsteered and half-way steered cells of two types, two donors, 15 cells of each combination, and a rare type."""
    rng = np.random.default_rng(1)
    kind, donor, state = (np.array(c) for c in zip(*list(product("AB", "xy", "sc")) * 15, strict=True))
    embedding = rng.normal(size=(len(kind), 4)) + 3.0 * (kind == "B")[:, None]
    embedding[state == "s", 0] += 6.0
    kind = kind.astype(object)
    kind[:3] = "rare"
    steered = embedding.copy()
    steered[state == "s", 0] -= 3.0
    return embedding, steered, state == "s", state == "c", kind, donor


def loop_energy(a, b, without_same):
    """2 E|a - b| - E|a - a'| - E|b - b'|, pair by pair."""

    def mean(x, y, skip):
        return np.mean(
            [np.linalg.norm(p - q) for i, p in enumerate(x) for j, q in enumerate(y) if not (skip and i == j)]
        )

    return 2 * mean(a, b, without_same) - mean(a, a, True) - mean(b, b, True)


def test_mean_distance_is_that_of_the_means():
    assert mean_distance(np.array([[0.0, 0], [2, 0]]), np.array([[1.0, 3], [1, 5]])) == 4.0


def test_squared_distance_is_unbiased_where_the_plain_one_is_not():
    rng = np.random.default_rng(0)
    drawn = [(rng.normal(0, 1, (8, 3)), rng.normal(0.5, 2, (5, 3))) for _ in range(4000)]
    unbiased, plain = (
        np.mean([f(a, b) for a, b in drawn]) for f in (squared_distance, lambda a, b: mean_distance(a, b) ** 2)
    )
    assert unbiased == pytest.approx(0.75, abs=0.1)
    assert plain == pytest.approx(0.75 + 3 / 8 + 12 / 5, abs=0.1)


def test_noise_of_paired_cells_is_that_of_their_movements(clouds):
    a, _ = clouds
    moved = a + np.array([1.0, 0, 0, 0, 0])
    assert corrected_distance(moved, a, paired=True) == pytest.approx(1.0)
    assert squared_distance(a, moved) == pytest.approx(1 - 2 * a.var(0, ddof=1).sum() / 40)


def test_corrected_distance_of_equal_means_is_zero_not_nan(clouds):
    assert corrected_distance(clouds[0], clouds[0]) == 0.0


def test_energy_distance_equals_the_loop_over_pairs(clouds, monkeypatch):
    monkeypatch.setattr("pipelines.steering.metrics.distances._BLOCK", 7)
    a, b = clouds
    assert energy_distance(a, b) ** 2 == pytest.approx(loop_energy(a, b, False), rel=1e-10)
    assert energy_distance(a[:25], b, paired=True) ** 2 == pytest.approx(loop_energy(a[:25], b, True), rel=1e-10)


def test_energy_distance_in_one_dimension_agrees_with_scipy(clouds):
    a, b = clouds[0][:, :1], clouds[1][:, :1] + 1
    biased = stats.energy_distance(a.ravel(), b.ravel()) ** 2
    own = sum(cdist(c, c).sum() * (1 / len(c) / (len(c) - 1) - 1 / len(c) ** 2) for c in (a, b))
    assert energy_distance(a, b) ** 2 == pytest.approx(biased - own)


def test_energy_distance_keeps_its_digits_far_from_the_origin(clouds):
    a, b = clouds
    assert energy_distance(a + 1e5, b + 1e5) == pytest.approx(energy_distance(a, b), rel=1e-6)


def test_energy_distance_sees_a_spread_that_means_do_not():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (300, 3)), rng.normal(0, 3, (300, 3))
    assert energy_distance(a, b) > 0.5
    assert energy_distance(a[:150], a[150:]) < 0.2


def test_a_capped_energy_distance_is_seeded_and_near_the_whole():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(600, 3)), rng.normal(1.0, 1, (600, 3))
    capped = energy_distance(a, b, max_cells=200, seed=4)
    assert capped == energy_distance(a, b, max_cells=200, seed=4)
    assert capped != energy_distance(a, b, max_cells=200, seed=5)
    assert capped == pytest.approx(energy_distance(a, b), rel=0.15)


def test_paired_cells_stay_paired_under_a_cap():
    a = np.random.default_rng(0).normal(size=(300, 3))
    assert energy_distance(a, a, paired=True, max_cells=50) < 1e-6


def test_floor_is_the_distance_of_samples_of_one_population():
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(200, 10))
    expected = np.mean([mean_distance(rng.normal(size=(30, 10)), rng.normal(size=(50, 10))) for _ in range(300)])
    assert floor(cells, 30, 50, kind="mean", n_splits=40) == pytest.approx(expected, rel=0.1)
    assert floor(cells[:3], 30, 50, kind="mean") is None


def test_table_holds_the_distances_of_each_group_and_the_ratio_of_their_means(cells):
    unsteered, steered, target, toward, kind, _ = cells
    table = distance_table(unsteered, steered, target, toward, kind)
    assert dict(table.schema) == {name: table.schema[name] for name in SCHEMA}
    for name, measure in KINDS.items():
        rows = {row["group"]: row for row in table.filter(distance=name).iter_rows(named=True)}
        assert list(rows) == ["A", "B", "all"]
        a = rows["A"]
        own = kind == "A"
        assert a["target_toward"] == measure(unsteered[target & own], unsteered[toward & own])
        assert a["steered_toward"] == measure(steered[target & own], unsteered[toward & own])
        assert a["steered_target"] == pytest.approx(
            measure(steered[target & own], unsteered[target & own], paired=True)
        )
        assert (a["n_target"], a["n_toward"]) == ((target & own).sum(), (toward & own).sum())
        before, after = (np.mean([rows[g][c] for g in "AB"]) for c in ("target_toward", "steered_toward"))
        assert rows["all"]["remaining"] == pytest.approx(after / before)
        assert rows["all"]["left_out"] == ["rare"]
        assert a["left_out"] is None


def test_half_a_shift_leaves_half_the_distance(cells):
    table = distance_table(*cells[:5], kinds=("mean", "corrected"), n_splits=0)
    assert table.filter(group="all")["remaining"].to_list() == pytest.approx([0.5, 0.5], abs=0.06)
    assert table["floor"].is_null().all()


def test_all_weighs_groups_and_not_cells(cells):
    kind = cells[4]
    twice = np.concatenate([np.arange(len(kind)), np.flatnonzero(kind == "A")])
    once = distance_table(*cells[:5], kinds=("mean",)).filter(group="all")
    again = distance_table(*(own[twice] for own in cells[:5]), kinds=("mean",)).filter(group="all")
    assert again["remaining"][0] == pytest.approx(once["remaining"][0])


def test_donors_get_tables_of_their_own(cells):
    *args, donor = cells
    table = distance_table(*args, donor=donor, kinds=("mean",))
    assert table["donor"].unique().sort().to_list() == [None, "x", "y"]
    own = donor == "x"
    alone = distance_table(*(part[own] for part in args), kinds=("mean",))
    assert table.filter(donor="x").drop("donor").equals(alone.drop("donor"))


def test_unmoved_cells_keep_the_whole_distance(cells):
    unsteered, _, target, toward, kind, _ = cells
    table = distance_table(unsteered, unsteered, target, toward, kind)
    assert table["remaining"].to_list() == [1.0] * len(table)
    assert table["steered_target"].to_numpy() == pytest.approx(0.0, abs=1e-6)


def test_more_steering_leaves_less_by_every_kind(cells):
    unsteered, _, target, toward, kind, _ = cells
    remaining = []
    for dose in (0.0, 2.0, 4.0, 6.0):
        steered = unsteered - dose * target[:, None] * np.eye(4)[0]
        remaining.append(
            distance_table(unsteered, steered, target, toward, kind).filter(group="all")["remaining"].to_list()
        )
    assert all(np.all(np.array(later) < earlier) for earlier, later in pairwise(remaining))


def test_groups_that_are_all_too_small_give_nulls_and_their_names(cells):
    table = distance_table(*cells[:5], min_cells=1000, kinds=("mean",))
    assert table["remaining"].to_list() == [None]
    assert table["left_out"].to_list() == [["A", "B", "rare"]]


def test_bad_requests_name_what_is_wrong(cells):
    with pytest.raises(UsageError, match="'cosine'"):
        distance_table(*cells[:5], kinds=("cosine",))
    with pytest.raises(UsageError, match=r"\[119, 120\]"):
        distance_table(cells[0][:-1], *cells[1:5])
