import numpy as np
import polars as pl
import pytest
from scipy import sparse
from scipy.stats import mannwhitneyu
from sklearn.metrics import adjusted_mutual_info_score, f1_score, matthews_corrcoef, roc_auc_score

from feature_store.associations import (
    Labels,
    Strata,
    ami_by_threshold,
    apply_thresholds,
    as_csr,
    associate_batch,
    associate_labels,
    auroc,
    choose_thresholds,
)
from feature_store.associations.mutual_information import THRESHOLDS, adjusted_mutual_information


def one_hot(label, n):
    return sparse.csr_array(np.eye(n)[label])


def masks(planted):
    split = np.array(planted.split)
    return {name: split == name for name in ("select", "test")}


def test_auroc_equals_sklearns_with_ties_zeros_and_negatives(messy):
    codes, label, _ = messy
    area = auroc(as_csr(codes, "codes"), one_hot(label, 4))
    for f in range(8):
        for c in range(4):
            assert area[f, c] == pytest.approx(roc_auc_score(label == c, codes[:, f]), abs=1e-12)


def test_auroc_equals_designs_zero_tie_formula_by_hand():
    # n 6, one code of .5 in the label and one of 2 outside; the zeros tie: U = 2*(.5 + ...) by counting pairs
    codes = np.array([[0.5], [0], [0], [2], [0], [0]])
    label = one_hot(np.array([1, 1, 0, 0, 0, 0]), 2)
    # pairs (label, rest): .5 beats three zeros, loses to 2 -> 3; 0 ties three zeros, loses to 2 -> 1.5
    assert auroc(as_csr(codes, "codes"), label)[0, 1] == pytest.approx(4.5 / 8)


def test_stratified_auroc_is_the_weighted_mean_over_strata(messy):
    codes, label, block = messy
    area = auroc(as_csr(codes, "codes"), one_hot(label, 4), Strata(codes=block, n_strata=3))
    for f in (0, 3, 6):
        u = pairs = 0.0
        for s in range(3):
            x, y = codes[(block == s) & (label == 2), f], codes[(block == s) & (label != 2), f]
            u, pairs = u + mannwhitneyu(x, y).statistic, pairs + x.size * y.size
        assert area[f, 2] == pytest.approx(u / pairs)


def test_thresholds_reach_the_largest_mcc_and_scores_equal_sklearns(messy):
    codes, label, _ = messy
    codes = np.abs(codes)
    csr, indicator = as_csr(codes, "codes"), one_hot(label, 4)
    rule = choose_thresholds(csr, indicator)
    scores = apply_thresholds(csr, indicator, rule)
    for f in range(8):
        for c in range(4):
            truth = label == c
            candidates = np.r_[0.0, np.unique(codes[:, f])[:-1]]
            best = max(abs(matthews_corrcoef(truth, codes[:, f] > t)) for t in candidates)
            fires = codes[:, f] > rule.threshold[f, c]
            predicted = ~fires if rule.inverted[f, c] else fires
            assert abs(scores.mcc[f, c]) == pytest.approx(best, abs=1e-12)
            assert scores.mcc[f, c] == pytest.approx(matthews_corrcoef(truth, fires), abs=1e-12)
            assert scores.f1[f, c] == pytest.approx(f1_score(truth, predicted, zero_division=0), abs=1e-12)


def test_thresholds_do_not_depend_on_the_chunks(messy, monkeypatch):
    codes, label, _ = messy
    whole = choose_thresholds(as_csr(codes, "codes"), one_hot(label, 4))
    monkeypatch.setattr("feature_store.associations.sorted_columns.CHUNK_VALUES", 100)
    parts = choose_thresholds(as_csr(codes, "codes"), one_hot(label, 4))
    np.testing.assert_array_equal(whole.threshold, parts.threshold)
    np.testing.assert_array_equal(whole.inverted, parts.inverted)


def test_ami_equals_sklearn_to_1e_9(rng):
    for n in (12, 300, 5000):
        label = rng.random((n, 6)) < rng.random(6)
        predicted = np.where(rng.random((n, 6)) < 0.6, label, rng.random((n, 6)) < 0.3)
        ami = adjusted_mutual_information(n, label.sum(axis=0), predicted.sum(axis=0), (label & predicted).sum(axis=0))
        expected = [adjusted_mutual_info_score(label[:, i], predicted[:, i]) for i in range(6)]
        np.testing.assert_allclose(ami, expected, atol=1e-9)


def test_ami_of_the_papers_thresholds_equals_the_per_feature_loop(messy):
    codes, label, _ = messy
    codes = np.abs(codes)
    maximum = codes.max(axis=0)
    ami = ami_by_threshold(as_csr(codes, "codes"), one_hot(label, 4), maximum)
    for f in (0, 1, 3, 6):
        for c in range(4):
            for i, t in enumerate(THRESHOLDS):
                expected = adjusted_mutual_info_score(label == c, codes[:, f] / maximum[f] > t)
                assert ami[i, f, c] == pytest.approx(expected, abs=1e-9)
    assert (ami[:, [4, 5]] == 0).all()


def test_ami_does_not_depend_on_the_chunks(rng, monkeypatch):
    counts = rng.integers(0, 400, (2, 50)).astype(float)
    both = np.floor(counts.min(axis=0) * 0.5)
    whole = adjusted_mutual_information(1000, counts[0], counts[1], both)
    monkeypatch.setattr("feature_store.associations.mutual_information._CHUNK", 500)
    np.testing.assert_allclose(adjusted_mutual_information(1000, counts[0], counts[1], both), whole, atol=1e-13)


def test_type_features_are_found_on_test_donors_with_the_right_sign(planted):
    table = associate_labels(planted.codes, planted.cell_type, masks(planted), planted.donor).table
    test = table.filter(pl.col("split") == "test")
    for f, (meaning, target) in enumerate(zip(planted.meaning, planted.target, strict=True)):
        if meaning in ("type", "not-type"):
            row = test.filter((pl.col("feature_id") == f) & (pl.col("label") == "ABC"[target])).row(0, named=True)
            assert row["p"] < 1e-4
            assert (row["rank_biserial"] > 0.4) == (meaning == "type")
            assert (row["rank_biserial"] < -0.4) == (meaning == "not-type")
            assert np.sign(row["mcc"]) == np.sign(row["rank_biserial"])
            assert row["f1"] > 0.6
            assert row["n_donors"] == 3
            assert row["method"] == "van-elteren/1 blocks=donor"


def test_the_mutual_information_of_no_cells_is_0():
    assert adjusted_mutual_information(0, np.zeros(3), np.zeros((2, 1)), np.zeros((2, 3))).tolist() == [[0.0] * 3] * 2


def test_thresholds_of_test_rows_come_from_select(planted):
    table = associate_labels(planted.codes, planted.cell_type, masks(planted), planted.donor).table
    pair = table.pivot(on="split", index=["feature_id", "label"], values="threshold")
    assert pair["select"].equals(pair["test"])


def test_a_kind_of_label_that_no_select_cell_has_is_measured_on_test_cells_alone(planted):
    values = np.array(planted.cell_type.names, dtype=object)[planted.cell_type.codes]
    values[masks(planted)["select"]] = None
    labels = Labels.from_values("cell_type", values)
    found = associate_labels(planted.codes, labels, masks(planted), planted.donor).table
    whole = associate_labels(planted.codes, planted.cell_type, masks(planted), planted.donor).table.filter(split="test")
    assert found["split"].unique().to_list() == ["test"]
    assert found["auroc"].equals(whole["auroc"])
    assert found.select("f1", "mcc", "ami", "threshold").null_count().row(0) == (found.height,) * 4


def test_cells_without_a_label_leave_its_tests(planted):
    values = np.array(planted.cell_type.names, dtype=object)[planted.cell_type.codes]
    values[::5] = None
    some = associate_labels(planted.codes, Labels.from_values("cell_type", values), masks(planted), planted.donor).table
    rows = np.array([v is not None for v in values]) & masks(planted)["test"]
    expected = roc_auc_score(values[rows] == "A", planted.codes[:, [0]].toarray()[rows, 0])
    row = some.filter((pl.col("feature_id") == 0) & (pl.col("label") == "A") & (pl.col("split") == "test"))
    assert row["n"].item() == rows.sum()
    assert row["auroc"].item() == pytest.approx(expected)


def test_without_units_the_method_says_that_nothing_is_blocked(planted):
    table = associate_labels(planted.codes, planted.cell_type, masks(planted), None).table
    assert table["method"].unique().to_list() == ["van-elteren/1 blocks=none"]
    assert table["n_donors"].null_count() == table.height


def test_a_label_constant_within_donors_is_tested_by_donor(planted):
    disease = Labels.from_values("disease", np.where(planted.donor.codes % 2, "ill", "well"))
    table = associate_labels(planted.codes, disease, masks(planted), planted.donor).table
    assert table["method"].unique().to_list() == ["unit-rank-permutation/1 units=donor"]
    # three donors a split, one or two of them ill: no p can be below one third
    assert table["p"].min() >= 1 / 3 - 1e-12


def test_a_type_that_fills_one_batch_is_no_batch_effect(planted):
    rows = {"select": np.ones(planted.codes.shape[0], bool)}
    pooled = associate_labels(planted.codes, planted.batch, rows, None).table
    within = associate_batch(planted.codes, planted.batch, rows, planted.cell_type).table
    for table, called in ((pooled, True), (within, False)):
        confounded = [f for f, meaning in enumerate(planted.meaning) if meaning == "confounded"]
        p = table.filter(pl.col("feature_id").is_in(confounded) & (pl.col("label") == "d0"))["p"].to_numpy()
        assert (p < 1e-4).all() if called else (p > 1e-3).all()
    real = [(f, t) for f, (m, t) in enumerate(zip(planted.meaning, planted.target, strict=True)) if m == "batch"]
    for f, t in real:
        row = within.filter((pl.col("feature_id") == f) & (pl.col("label") == f"d{t}")).row(0, named=True)
        assert row["p"] < 1e-4
        assert row["rank_biserial"] > 0.4
        assert row["method"] == "van-elteren/1 blocks=cell_type"


def test_a_batch_that_shares_no_type_with_others_cannot_be_compared():
    batch = Labels.from_values("batch", ["x"] * 10 + ["y"] * 10)
    cell_type = Labels.from_values("cell_type", ["A"] * 10 + ["B"] * 10)
    codes = as_csr(np.arange(20.0)[:, None], "codes")
    table = associate_batch(codes, batch, {"select": np.ones(20, bool)}, cell_type).table
    assert table["auroc"].null_count() == table.height
    assert (table["p"] == 1).all()
