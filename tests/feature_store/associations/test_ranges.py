"""A feature's rows are the same, to the bit, whatever other features are in the call."""

from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from feature_store.associations import (
    AssociationConfig,
    ClassConfig,
    Labels,
    Strata,
    TokenStatistics,
    adjusted_mutual_information,
    associate_batch,
    associate_labels,
    blocked_rank_test,
    classify,
    over_representation,
    rank_enrichment,
)

BOUNDS = (0, 1, 2, 9, 30, 42)


@pytest.fixture(scope="module")
def ranges():
    return list(pairwise(BOUNDS))


def masks(planted):
    split = np.array(planted.split)
    return {name: split == name for name in ("select", "test")}


@pytest.mark.parametrize("units", ["donor", "none"])
def test_label_rows_of_ranges_are_those_of_all_features(planted, ranges, units):
    units = planted.donor if units == "donor" else None
    disease = Labels.from_values("disease", np.where(planted.donor.codes % 2, "ill", "well"))
    for labels in (planted.cell_type, disease):
        whole = associate_labels(planted.codes, labels, masks(planted), units).table
        parts = [
            associate_labels(planted.codes[:, a:b], labels, masks(planted), units, first_feature=a).table
            for a, b in ranges
        ]
        keys = ["feature_id", "label", "split"]
        assert pl.concat(parts).sort(keys).equals(whole.sort(keys))


def test_batch_rows_of_ranges_are_those_of_all_features(planted, ranges):
    everything = {"select": np.ones(planted.batch.n_cells, dtype=bool)}
    of_donors = Labels.from_values("batch", planted.donor.codes % 3)
    for batch, units in ((planted.batch, None), (of_donors, planted.donor)):
        arguments = (batch, everything, planted.cell_type)
        whole = associate_batch(planted.codes, *arguments, units=units).table
        parts = [associate_batch(planted.codes[:, a:b], *arguments, units=units, first_feature=a) for a, b in ranges]
        assert pl.concat([part.table for part in parts]).equals(whole)
        assert whole["p_donor"].null_count() == (whole.height if units is None else 0)


@pytest.mark.parametrize("n_donors", [8, 40])
def test_class_rows_of_ranges_are_those_of_all_features(planted, ranges, n_donors):
    donor = Labels.from_values("donor", np.arange(planted.donor.n_cells) * n_donors // planted.donor.n_cells)
    arguments = {"contexts": [planted.cell_type], "batch": donor, "units": donor, "config": ClassConfig(n_bootstrap=7)}

    def rows(a, b):
        tokens = TokenStatistics(fired=planted.tokens.fired[a:b], gene_tokens=planted.tokens.gene_tokens)
        dead = np.array([m == "dead" for m in planted.meaning[a:b]])
        return classify(planted.codes[:, a:b], tokens=tokens, dead=dead, first_feature=a, **arguments)

    assert pl.concat([rows(a, b) for a, b in ranges]).equals(rows(0, len(planted.meaning)))


def test_gene_set_rows_of_ranges_are_those_of_all_features(ranges, rng):
    score = rng.normal(size=(BOUNDS[-1], 90))
    chosen, members = score > 1.2, sparse.csr_array((rng.random((90, 7)) < 0.2).astype(float))
    n_cells = np.where(rng.random(90) < 0.9, rng.integers(1, 500, 90), 0).astype(float)
    detected = n_cells > 0
    over, ranks = over_representation(chosen, members, detected, n_cells), rank_enrichment(score, members, detected)
    for a, b in ranges:
        for mine, whole in zip(over_representation(chosen[a:b], members, detected, n_cells), over, strict=True):
            np.testing.assert_array_equal(mine, whole[a:b])
        for mine, whole in zip(rank_enrichment(score[a:b], members, detected), ranks, strict=True):
            np.testing.assert_array_equal(mine, whole[a:b])


def test_tests_over_many_strata_do_not_depend_on_the_columns_beside(rng):
    codes = sparse.csr_array(np.where(rng.random((600, 40)) < 0.4, rng.gamma(1, 1, (600, 40)), 0))
    strata = Strata(codes=rng.integers(0, 70, 600), n_strata=70)
    label = sparse.csr_array(np.eye(3)[rng.integers(0, 3, 600)])
    whole = blocked_rank_test(codes, label, strata)
    for a, b in ((0, 1), (1, 6), (6, 40)):
        for mine, all_of_them in zip(blocked_rank_test(codes[:, a:b], label, strata), whole, strict=True):
            np.testing.assert_array_equal(mine, all_of_them[a:b])


def test_ami_of_a_pair_does_not_depend_on_the_pairs_beside(rng):
    n_label, n_predicted = rng.integers(0, 3000, (2, 60)).astype(float)
    both = np.floor(np.minimum(n_label, n_predicted) * rng.random(60))
    whole = adjusted_mutual_information(3000, n_label, n_predicted, np.maximum(both, n_label + n_predicted - 3000))
    for i in range(60):
        one = slice(i, i + 1)
        mine = adjusted_mutual_information(
            3000, n_label[one], n_predicted[one], np.maximum(both, n_label + n_predicted - 3000)[one]
        )
        assert mine[0] == whole[i]


def test_cells_without_tokens_change_no_statistic(planted, tables_of):
    n = 150

    def labels_of(labels):
        # the empty droplets carry a type, a donor and a batch
        return Labels.from_values(labels.kind, [labels.names[i] for i in labels.codes] + [labels.names[0]] * n)

    config = AssociationConfig(classes=ClassConfig(n_bootstrap=5))
    cells = {"genes": planted.genes, "units": planted.donor, "labels": [planted.cell_type, planted.batch]}
    tokens = dict.fromkeys(("train", "select", "test"), planted.tokens)
    wanted = tables_of({**cells, "split": planted.split}, planted.codes, planted.expression, config, tokens=tokens)
    more = {
        "genes": planted.genes,
        "units": labels_of(planted.donor),
        "labels": [labels_of(planted.cell_type), labels_of(planted.batch)],
        "split": [*planted.split, *[None] * n],
    }
    empty = [sparse.csr_array((n, matrix.shape[1])) for matrix in (planted.codes, planted.expression)]
    codes, expression = (
        sparse.csr_array(sparse.vstack([matrix, rows]))
        for matrix, rows in zip((planted.codes, planted.expression), empty, strict=True)
    )
    found = tables_of(more, codes, expression, config, tokens=tokens)
    assert wanted["features"]["class"].n_unique() > 2
    for name, table in wanted.items():
        assert found[name].equals(table), name
