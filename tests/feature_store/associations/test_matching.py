from __future__ import annotations

import math
import os
import shutil

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from scipy import sparse, stats
from toy_plans import toy_table

from feature_store import FeatureStore
from feature_store.associations import Labels, matching
from feature_store.associations.matching import match_codes, match_directions, summarise
from feature_store.errors import InputError, IntegrityError
from feature_store.query.runs import resolve_any_run
from feature_store.storage import commit, commits, schemas
from feature_store.storage.layout import ASSOCIATION_TABLES
from feature_store.storage.plans import AssociationsPlan, MatchPlan

N_A, N_B, D = 40, 50, 16


@pytest.fixture
def rng() -> np.random.Generator:
    """Of another seed than the null's directions, which would else be the directions of the tests."""
    return np.random.default_rng(2026)


@pytest.fixture
def rows(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(N_A, D)), rng.normal(size=(N_B, D)) * rng.uniform(0.1, 9, (N_B, 1))


def codes_of(rng: np.random.Generator, n_cells: int, n_features: int, density: float) -> np.ndarray:
    return rng.exponential(size=(n_cells, n_features)) * (rng.random((n_cells, n_features)) < density)


def pair(a: np.ndarray, b: np.ndarray) -> tuple[sparse.csr_array, sparse.csr_array]:
    return sparse.csr_array(a), sparse.csr_array(b)


def check_against(similarity: np.ndarray, matched: matching.Matches) -> None:
    """Nearest, second, rank and mutuality by brute force from all similarities [n_a n_b]."""
    for frame, own in ((matched.of_a, similarity), (matched.of_b, similarity.T)):
        assert frame["feature_id"].to_list() == list(range(len(own)))
        nearest = own.argmax(axis=1)
        assert frame["other_feature_id"].to_list() == nearest.tolist()
        ordered = np.sort(own, axis=1)
        np.testing.assert_allclose(frame["similarity"], ordered[:, -1], atol=1e-12)
        np.testing.assert_allclose(frame["runner_up"], ordered[:, -2], atol=1e-12)
        rank = [1 + int((own[:, j] > own[f, j]).sum()) for f, j in enumerate(nearest)]
        assert frame["rank"].to_list() == rank
        assert frame["mutual"].to_list() == [own[:, j].argmax() == f for f, j in enumerate(nearest)]


def test_matches_of_directions_are_those_of_all_cosines(rows, monkeypatch):
    a, b = rows
    cosines = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    whole = match_directions(a, b)
    check_against(cosines, whole)
    monkeypatch.setattr(matching, "_BLOCK_VALUES", 7 * N_B)
    for one, other in zip(whole, match_directions(a, b), strict=True):
        assert_frame_equal(one, other)


def test_a_permutation_of_the_rows_is_found_whatever_their_lengths(rng, rows):
    a, _ = rows
    order = rng.permutation(N_A)
    of_a, of_b = match_directions(a, 3 * a[order])
    assert of_b["other_feature_id"].to_list() == order.tolist()
    assert of_a["other_feature_id"].to_list() == np.argsort(order).tolist()
    for frame in (of_a, of_b):
        assert frame["mutual"].all()
        assert (frame["rank"] == 1).all()
        np.testing.assert_allclose(frame["similarity"], 1.0)
        assert (frame["p"] < 0.002).all()


def test_noise_lowers_the_cosine_and_leaves_the_match(rng):
    a = rng.normal(size=(200, 64))
    of_a, _ = match_directions(a, a + rng.normal(size=a.shape))
    assert (of_a["other_feature_id"] == of_a["feature_id"]).mean() > 0.99
    assert of_a["similarity"].median() == pytest.approx(1 / math.sqrt(2), abs=0.02)


def test_the_opposite_direction_is_another_feature():
    of_a, _ = match_directions(np.eye(3), -np.eye(3))
    assert (of_a["similarity"] == 0).all()


def test_directions_without_counterpart_stay_at_their_null(rng):
    of_a, of_b = match_directions(rng.normal(size=(800, 32)), rng.normal(size=(600, 32)))
    for frame in (of_a, of_b):
        # the null's own 95 % quantile is of 1,000 draws
        error = math.sqrt(0.05 * 0.95 * (1 / frame.height + 1 / 1000))
        assert (frame["p"] <= 0.05).mean() == pytest.approx(0.05, abs=3.5 * error)
        assert frame["similarity"].median() == pytest.approx(frame["null_median"][0], abs=0.01)
        assert frame["null_95"].n_unique() == 1


def test_directions_of_few_dimensions_are_held_against_a_null_of_those_dimensions(rng):
    few = rng.normal(size=(4, 64)) + 0.01 * rng.normal(size=(4, 64))
    a, b = (rng.normal(size=(500, 4)) @ few + 1.0 for _ in range(2))
    of_a, _ = match_directions(a, b)
    assert of_a["random_median"][0] < 0.6 < 0.95 < of_a["null_median"][0]
    assert of_a["similarity"].median() == pytest.approx(of_a["null_median"][0], abs=0.01)
    assert (of_a["p"] <= 0.05).mean() < 0.15


def test_dead_features_take_no_part_and_have_no_match(rows):
    a, _ = rows
    dead_a, dead_b = np.arange(N_A) == 3, np.arange(N_A) == 5
    matched = match_directions(a, a, dead=(dead_a, dead_b))
    for frame, dead, lost in zip(matched, (dead_a, dead_b), (5, 3), strict=True):
        assert frame["dead"].to_list() == dead.tolist()
        nothing = frame.filter("dead").row(0, named=True)
        assert nothing["mutual"] is False
        assert {nothing[name] for name in ("other_feature_id", "similarity", "rank", "p", "null_95")} == {None}
        orphan = frame.row(lost, named=True)
        assert orphan["other_feature_id"] not in (lost, None)
        assert orphan["similarity"] < 0.99
        assert not orphan["mutual"]
        assert frame.filter(~pl.col("dead") & (pl.col("feature_id") != lost))["similarity"].min() > 0.999


@pytest.mark.parametrize("density", [0.02, 0.4])
def test_pearson_is_numpys_chosen_on_select_and_reported_on_test(rng, density):
    select_a, test_a = codes_of(rng, 900, N_A, density), codes_of(rng, 700, N_A, density)
    select_b, test_b = (np.hstack([codes[:, ::-1], codes[:, :10]]) for codes in (select_a, test_a))
    select_b = select_b + 0.3 * codes_of(rng, 900, N_A + 10, density / 2)
    test_b = test_b + 0.3 * codes_of(rng, 700, N_A + 10, density / 2)
    matched = match_codes(pair(select_a, select_b), pair(test_a, test_b), n_null=19)
    check_against(np.corrcoef(select_a.T, select_b.T)[:N_A, N_A:], matched)
    on_test = np.corrcoef(test_a.T, test_b.T)[:N_A, N_A:]
    np.testing.assert_allclose(
        matched.of_a["similarity_test"], on_test[np.arange(N_A), matched.of_a["other_feature_id"].to_numpy()]
    )
    np.testing.assert_allclose(
        matched.of_b["similarity_test"], on_test[matched.of_b["other_feature_id"].to_numpy(), np.arange(N_A + 10)]
    )
    assert set(matched.of_a["method"]) == {"pearson/1"}


@pytest.mark.parametrize("density", [0.03, 0.5])
def test_spearman_is_scipys_with_zeros_as_one_tie(rng, density):
    a, b = codes_of(rng, 400, 12, density), codes_of(rng, 400, 15, density)
    test_a, test_b = codes_of(rng, 300, 12, density), codes_of(rng, 300, 15, density)
    matched = match_codes(pair(a, b), pair(test_a, test_b), correlation="spearman", n_null=19)
    check_against(stats.spearmanr(a, b).statistic[:12, 12:], matched)
    on_test = stats.spearmanr(test_a, test_b).statistic[:12, 12:]
    chosen = matched.of_a["other_feature_id"].to_numpy()
    np.testing.assert_allclose(matched.of_a["similarity_test"], on_test[np.arange(12), chosen], atol=1e-12)


def test_the_best_of_many_on_select_is_not_flattered_on_test(rng):
    draw = (codes_of(rng, 60, 200, 0.5) for _ in range(4))
    of_a, of_b = match_codes(pair(next(draw), next(draw)), pair(next(draw), next(draw)))
    for frame in (of_a, of_b):
        assert frame["similarity"].median() > 0.3
        assert frame["similarity_test"].median() == pytest.approx(0, abs=0.05)
        assert (frame["p"] <= 0.05).mean() == pytest.approx(0.05, abs=0.06)
        assert summarise(frame)["stable"] == 0


def test_p_is_at_most_five_percent_exactly_where_the_similarity_exceeds_null_95(rng):
    a = codes_of(rng, 80, 60, 0.5)
    b = 0.4 * a + codes_of(rng, 80, 60, 0.5)
    for matched in (match_codes(pair(a, b), pair(a, b), n_null=n_null) for n_null in (19, 39, 50, 99)):
        for frame in matched:
            assert 0 < (frame["p"] <= 0.05).sum() < 60
            assert (frame["p"] <= 0.05).equals(frame["similarity"] > frame["null_95"])
            assert (frame["null_median"] < frame["null_95"]).all()


def test_what_two_codes_share_between_donors_alone_does_not_pass_for_a_match(rng):
    donor = np.repeat(np.arange(6), 20)
    units = Labels.from_values("donor", donor.tolist())
    blocked, naive = [], []
    for _ in range(12):
        level = rng.exponential(3.0, size=(6, 20))
        codes = pair(*(level[donor] + rng.exponential(size=(120, 20)) for _ in range(2)))
        for shares, within in ((blocked, units), (naive, None)):
            of_a, _ = match_codes(codes, codes, units=within, n_null=19)
            assert of_a["similarity"].median() > 0.7
            shares.append((of_a["p"] <= 0.05).mean())
    assert np.mean(blocked) < 0.05 + 3 * np.std(blocked) / math.sqrt(12)
    assert np.mean(naive) > 0.9


def test_features_that_do_not_vary_on_select_have_no_match_and_on_test_no_figure(rng):
    a, b = codes_of(rng, 50, 4, 0.6), codes_of(rng, 50, 4, 0.6)
    a[:, 1] = 0.7
    test_a, test_b = codes_of(rng, 50, 4, 0.6), codes_of(rng, 50, 4, 0.6)
    test_a[:, 2] = 0
    of_a, of_b = match_codes(pair(a, b), pair(test_a, test_b), n_null=19)
    assert of_a["other_feature_id"].is_null().to_list() == [False, True, False, False]
    assert not of_a["dead"].any()
    assert of_a["similarity_test"].is_null().to_list() == [False, True, True, False]
    assert 1 not in of_b["other_feature_id"].to_list()


def test_the_same_seed_gives_the_same_null_and_another_another(rng):
    codes = pair(codes_of(rng, 50, 6, 0.5), codes_of(rng, 50, 6, 0.5))
    one, same, other = (match_codes(codes, codes, n_null=19, seed=seed).of_a for seed in (0, 0, 1))
    assert_frame_equal(one, same)
    assert not one["null_95"].equals(other["null_95"])


def test_a_side_of_one_feature_has_no_runner_up():
    of_a, of_b = match_directions(np.eye(3), np.eye(3)[:1])
    assert of_a["runner_up"].is_null().all()
    assert of_b["runner_up"].to_list() == [0.0]
    assert of_a["mutual"].to_list() == [True, False, False]


def test_a_summary_is_over_what_was_compared():
    frame = pl.DataFrame(
        {
            "other_feature_id": [4, 5, None, 6, 6],
            "similarity": [0.9, 0.8, None, 0.95, 0.2],
            "similarity_test": [0.8, 0.6, None, None, 0.1],
            "null_median": [0.1, 0.3, None, 0.3, 0.3],
            "random_median": 0.1,
            "mutual": [True, True, False, True, False],
            "p": [0.01, 0.05, None, 0.01, 0.5],
        }
    )
    assert summarise(frame) == {
        "compared": 4, "similarity": pytest.approx(0.85), "similarity_test": 0.6, "null": pytest.approx(0.3),
        "random": 0.1,
        "mutual": 0.75, "beyond null": 0.75, "stable": 0.25,
    }  # fmt: skip
    of_directions = frame.with_columns(similarity_test=pl.lit(None, dtype=pl.Float64))
    assert summarise(of_directions)["stable"] == 0.75
    assert summarise(frame.filter(pl.col("p").is_null()))["compared"] == 0


def stored_match(layout, run, first, second, *, method="cosine", similarity=0.5):
    """A matches run of three features of each side, made by hand."""
    of_a, of_b = match_directions(np.eye(3), np.eye(3))
    sides = ((of_a, first, second), (of_b, second, first))
    frames = [frame.with_columns(sae=pl.lit(sae), other=pl.lit(other)) for frame, sae, other in sides]
    table = schemas.conform("feature_match", pl.concat(frames)).with_columns(similarity=pl.lit(similarity))
    plan = toy_table(MatchPlan, saes=(first, second), method=method, codes=(str(similarity), None))
    commit.write_table(layout.matches_dir(run) / "feature_match", table, plan)
    return table


def test_the_store_reads_the_newest_match_of_each_pair_and_method(small_store):
    layout = small_store.layout
    assert "feature_match" not in FeatureStore.open(layout.root).tables()
    for age, (run, pair, method) in enumerate(
        [
            ("a", ("5ae", "y"), "cosine"),
            ("b", ("5ae", "z"), "cosine"),
            ("c", ("5ae", "y"), "pearson"),
            ("d", ("5ae", "y"), "cosine"),
        ]
    ):
        stored_match(layout, run, *pair, method=method, similarity=age / 10)
        os.utime(layout.matches_dir(run) / "feature_match" / "MANIFEST.json", (1_000_000 - age, 1_000_000 - age))
    commit.Run.create(layout.matches_dir("e") / "feature_match", {"n_shards": 2, "saes": ["x", "y"]})
    store = FeatureStore.open(layout.root)
    assert store.lineage.matches == ("d", "c", "b")
    assert store.frame("feature_match").collect()["similarity"].unique().sort().to_list() == [0.1, 0.2, 0.3]


def test_the_store_shows_the_matches_of_the_sae_that_its_associations_are_of(small_store):
    layout = small_store.layout
    for run, pair in (("a", "xy"), ("b", "zx"), ("c", "yz")):
        stored_match(layout, run, *pair)
    shutil.rmtree(layout.associations_dir("a550c"))
    with pytest.raises(IntegrityError, match="scsae forget associations/a550c"):
        FeatureStore.open(layout.root)
    commits.forget(layout, resolve_any_run(layout, "a550c"))
    assert "feature_match" not in FeatureStore.open(layout.root).tables()
    for name in ASSOCIATION_TABLES:
        plan = toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="x")
        commit.write_table(layout.associations_dir("a55") / name, schemas.empty(name), plan)
    store = FeatureStore.open(layout.root)
    found = store.sql("SELECT sae, other, feature_id FROM feature_match ORDER BY other, feature_id")
    assert found.rows() == [("x", other, feature) for other in "yz" for feature in range(3)]


def test_a_table_of_matches_is_read_as_it_was_written(small_store):
    table = stored_match(small_store.layout, "a", "5ae", "y").filter(sae="5ae")
    read = FeatureStore.open(small_store.layout.root).frame("feature_match").collect()
    assert_frame_equal(read, table)


EYE = np.eye(4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: match_directions(EYE, np.eye(3)), r"\(4, 4\) and \(3, 3\); .*same width"),
        (lambda: match_directions(EYE, 0 * EYE), "row 0 of the second directions has length 0.0"),
        (lambda: match_directions(EYE * np.nan, EYE), "row 0 of the first directions has length nan"),
        (lambda: match_directions(EYE, EYE, dead=(np.ones(4, bool), None)), "0 and 4 features are left to compare"),
        (lambda: match_directions(EYE, EYE, dead=(None, np.ones(3, bool))), r"for \(3,\), there are \(4,\)"),
        (lambda: match_codes(pair(EYE, EYE[:3]), pair(EYE, EYE)), "4 and 3 select cells; matching needs the same"),
        (lambda: match_codes(pair(EYE, EYE), pair(EYE[:2], EYE)), "2 and 4 test cells; matching needs the same"),
        (lambda: match_codes(pair(EYE, EYE), pair(EYE[:, :2], EYE)), "other features"),
        (lambda: match_codes(pair(EYE[:2], EYE[:2]), pair(EYE, EYE)), "2 select cells"),
        (lambda: match_codes(pair(EYE, EYE), pair(EYE, EYE), n_null=18), "n_null was 18; .* at least 19"),
        (
            lambda: match_codes(pair(EYE, EYE), pair(EYE, EYE), units=Labels.from_values("donor", ["a"] * 3)),
            "units of 3",
        ),
    ],
)
def test_what_cannot_be_matched_is_refused_with_what_was_given(call, words):
    with pytest.raises(InputError, match=words):
        call()
