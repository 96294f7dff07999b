"""Mean codes and their differences, against loops over tokens."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from pipelines.steering.group_means import PRIOR_TOKENS, code_group_means, group_of_cells, mean_differences
from pipelines.steering.labels import CellLabels
from pipelines.steering.plan import InterventionType, SteeringTask, Task
from pipelines.steering.token_sample import TokenSample

N_CELLS, N_GENES, FEATURES = 60, 4, (5, 1)


def task(name, intervention="shift"):
    target, toward = ("stim", "ctrl") if name == "move" else ("all", None)
    return SteeringTask(
        type=Task(name),
        kind="condition",
        target=target,
        toward=toward,
        intervention=InterventionType(intervention),
    )


@pytest.fixture(scope="module")
def labels():
    rng = np.random.default_rng(2)
    columns = {
        "label": rng.choice(["stim", "ctrl"], N_CELLS),
        "cell_type": rng.choice(["A", "B"], N_CELLS),
        "donor": rng.choice(["P", "Q"], N_CELLS),
        "split": rng.choice(["train", "select"], N_CELLS),
    }
    return CellLabels(**{name: values.astype(object) for name, values in columns.items()})


@pytest.fixture(scope="module")
def sample():
    rng = np.random.default_rng(3)
    n_tokens = rng.integers(0, 6, N_CELLS)
    cell = np.repeat(np.arange(N_CELLS), n_tokens)
    codes = rng.gamma(1.0, 1.0, (len(cell), 8)) * (rng.random((len(cell), 8)) < 0.4)
    return TokenSample(
        cell_idx=np.arange(N_CELLS),
        n_tokens=n_tokens,
        mean=rng.normal(size=(N_CELLS, 3)).astype(np.float32),
        cell=cell,
        gene_id=rng.integers(10, 10 + N_GENES, len(cell)),
        codes=sparse.csc_array(codes.astype(np.float32)),
    )


def side_means(sample, labels, usable):
    """n and mean of the features by (label, type, gene), by a loop over tokens."""
    values = {}
    dense = sample.codes.toarray()[:, list(FEATURES)].astype(float)
    for token, cell in enumerate(sample.cell.tolist()):
        if usable[cell]:
            key = (labels.label[cell], labels.cell_type[cell], int(sample.gene_id[token]))
            values.setdefault(key, []).append(dense[token])
    return {key: (len(own), np.mean(own, axis=0)) for key, own in values.items()}


def by_hand(sample, labels, usable, name):
    """Differences by (group, gene): of the type, and over types weighted by tokens."""
    means = side_means(sample, labels, usable)
    rows = {}
    for kind in "AB":
        for gene in range(10, 10 + N_GENES):
            sides = {label: means.get((label, kind, gene)) for label in ("stim", "ctrl")}
            if None in sides.values():
                continue
            (n_stim, stim), (n_ctrl, ctrl) = sides["stim"], sides["ctrl"]
            if name == "move":
                rows["", kind, gene] = (min(n_stim, n_ctrl), ctrl - stim)
            else:
                rows["stim", kind, gene] = (n_stim, (stim + ctrl) / 2 - stim)
                rows["ctrl", kind, gene] = (n_ctrl, (stim + ctrl) / 2 - ctrl)
    coarse = {}
    for side, _, gene in rows:
        own = [rows[key] for key in rows if (key[0], key[2]) == (side, gene)]
        coarse[side, gene] = sum(n * d for n, d in own) / sum(n for n, _ in own)
    fine = {
        key: n / (n + PRIOR_TOKENS) * d + PRIOR_TOKENS / (n + PRIOR_TOKENS) * coarse[key[0], key[2]]
        for key, (n, d) in rows.items()
    }
    return fine, coarse


@pytest.mark.parametrize("name", ["move", "mix"])
@pytest.mark.parametrize("splits", [("train",), ("train", "select")])
def test_differences_by_type_and_gene_are_shrunk_toward_the_mean_over_types(sample, labels, name, splits):
    usable = np.isin(labels.split.astype(str), splits)
    fine, coarse = by_hand(sample, labels, usable, name)
    table = code_group_means(sample, labels, task(name), FEATURES, by="both", cells=usable)
    found = dict(zip(zip(table.group, table.gene_id.tolist(), strict=True), table.values, strict=True))
    wanted = {(kind if not side else f"{side} | {kind}", gene): d for (side, kind, gene), d in fine.items()}
    assert list(found) == sorted(wanted)
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6)
    table = code_group_means(sample, labels, task(name), FEATURES, by="gene", cells=usable)
    found = dict(zip(zip(table.group, table.gene_id.tolist(), strict=True), table.values, strict=True))
    assert list(found) == sorted(coarse)
    for key, value in coarse.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6)


def test_toward_is_the_difference_and_where_it_starts_from(sample, labels):
    usable = np.ones(N_CELLS, dtype=bool)
    means = side_means(sample, labels, usable)
    table = code_group_means(sample, labels, task("move", "toward"), FEATURES, by="none", cells=usable)
    assert (table.group.tolist(), table.gene_id) == ([""], None)
    table = code_group_means(sample, labels, task("move", "toward"), FEATURES, by="gene", cells=usable)
    n, to = {}, {}
    for gene in table.gene_id.tolist():
        for kind in "AB":
            if ("stim", kind, gene) in means and ("ctrl", kind, gene) in means:
                own = min(means["stim", kind, gene][0], means["ctrl", kind, gene][0])
                n[gene] = n.get(gene, 0) + own
                to[gene] = to.get(gene, 0) + own * means["ctrl", kind, gene][1]
    np.testing.assert_allclose(table.values, [to[gene] / n[gene] for gene in table.gene_id.tolist()], rtol=1e-5)


def test_cells_of_other_splits_do_not_matter(sample, labels):
    usable = labels.split == "train"
    first = code_group_means(sample, labels, task("move"), FEATURES, by="both", cells=usable)
    other = labels.label.copy()
    other[~usable] = "stim"
    again = code_group_means(
        sample, CellLabels(**{**vars(labels), "label": other}), task("move"), FEATURES, by="both", cells=usable
    )
    np.testing.assert_array_equal(first.values, again.values)
    np.testing.assert_array_equal(first.gene_id, again.gene_id)


def test_the_mean_difference_vector_has_a_row_a_group_and_cells_as_units(sample, labels):
    usable = np.ones(N_CELLS, dtype=bool)
    table = mean_differences(sample, labels, task("move", "ablate"), by="none", cells=usable)
    assert (table.group.tolist(), table.gene_id, table.values.shape) == ([""], None, (1, 3))
    total, weight = np.zeros(3), 0
    for kind in "AB":
        own = (labels.cell_type == kind) & (sample.n_tokens > 0)
        stim, ctrl = (own & (labels.label == label) for label in ("stim", "ctrl"))
        n = min(stim.sum(), ctrl.sum())
        total += n * (sample.mean[ctrl].astype(float).mean(0) - sample.mean[stim].astype(float).mean(0))
        weight += n
    np.testing.assert_allclose(table.values[0], total / weight, rtol=1e-5)


def test_groups_are_types_for_a_move_and_batches_for_a_mix(labels):
    assert set(group_of_cells(labels, task("move"), "both")) == {"A", "B"}
    assert set(group_of_cells(labels, task("move"), "gene")) == {""}
    assert set(group_of_cells(labels, task("mix"), "gene")) == {"stim", "ctrl"}
    assert set(group_of_cells(labels, task("mix"), "both")) == {f"{b} | {t}" for b in ("stim", "ctrl") for t in "AB"}


@pytest.mark.parametrize("name", ["move", "mix"])
@pytest.mark.parametrize("intervention", ["shift", "toward"])
def test_by_other_types_a_type_gets_the_mean_over_the_others_even_if_it_has_no_cells(
    sample, labels, name, intervention
):
    """C has cells of one side alone, and D none at all: both get the mean over A and B, which get one another's."""
    kinds = labels.cell_type.copy()
    kinds[(labels.label == "stim") & (np.arange(N_CELLS) % 5 == 0)] = "C"
    labels = CellLabels(**{**vars(labels), "cell_type": kinds})
    table = code_group_means(
        sample, labels, task(name, intervention), FEATURES, by="other_types", cells=np.ones(N_CELLS, bool), types=["D"]
    )
    dense = sample.codes.toarray()[:, list(FEATURES)].astype(float)
    n, mean = {}, {}
    for side, kind in ((side, kind) for side in ("stim", "ctrl") for kind in "AB"):
        own = np.isin(sample.cell, np.flatnonzero((labels.label == side) & (kinds == kind)))
        n[side, kind], mean[side, kind] = own.sum(), dense[own].mean(0)

    def row(side, kind):
        if name == "mix":
            return (mean["stim", kind] + mean["ctrl", kind]) / 2 - (0 if intervention == "toward" else mean[side, kind])
        return mean["ctrl", kind] - (0 if intervention == "toward" else mean["stim", kind])

    def weight(side, kind):
        return n[side, kind] if name == "mix" else min(n["stim", kind], n["ctrl", kind])

    others = {"A": "B", "B": "A", "C": "AB", "D": "AB"}
    wanted = {
        kind if name == "move" else f"{side} | {kind}": np.average(
            [row(side, other) for other in others[kind]],
            axis=0,
            weights=[weight(side, other) for other in others[kind]],
        )
        for kind in others
        for side in (("stim",) if name == "move" else ("stim", "ctrl"))
    }
    assert table.gene_id is None
    assert table.group.tolist() == sorted(wanted)
    np.testing.assert_allclose(table.values, [wanted[group] for group in table.group], rtol=1e-5)


def test_by_other_types_neither_codes_nor_activations_of_a_type_change_its_own_row(sample, labels):
    usable = np.ones(N_CELLS, dtype=bool)
    rng = np.random.default_rng(4)
    own = labels.cell_type == "A"
    codes = sample.codes.toarray()
    codes[own[sample.cell]] += rng.gamma(1.0, 1.0, codes.shape)[own[sample.cell]].astype(np.float32)
    mean = sample.mean + own[:, None] * rng.normal(size=sample.mean.shape).astype(np.float32)
    changed = replace(sample, codes=sparse.csc_array(codes), mean=mean)
    options = {"by": "other_types", "cells": usable}
    for before, after in (
        [code_group_means(one, labels, task("move"), FEATURES, **options) for one in (sample, changed)],
        [mean_differences(one, labels, task("move"), **options) for one in (sample, changed)],
    ):
        assert before.group.tolist() == ["A", "B"]
        np.testing.assert_array_equal(before.values[0], after.values[0])
        assert (before.values[1] != after.values[1]).any()


def test_by_other_types_one_type_alone_has_no_row(sample, labels):
    labels = CellLabels(**{**vars(labels), "cell_type": np.full(N_CELLS, "A", dtype=object)})
    options = {"by": "other_types", "cells": np.ones(N_CELLS, bool)}
    assert len(code_group_means(sample, labels, task("move"), FEATURES, **options).group) == 0
    assert len(mean_differences(sample, labels, task("move"), **options).group) == 0
