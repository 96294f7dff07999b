"""Probes find the features that were planted, with their signs, and nothing where nothing was planted."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from feature_store.probes import ProbedCells, probe

KS = (1, 2, 5)


def planted(seed=0, n=1200, n_features=60, *, signal=True) -> ProbedCells:
    """Three labels: A has feature 3 and 7, B has feature 11 and never feature 20, C is the rest; donors differ."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n)
    x = rng.exponential(1, (n, n_features)) * (rng.random((n, n_features)) < 0.2)
    if signal:
        x[:, 3] += (label == 0) * (rng.random(n) < 0.8) * 2
        x[:, 7] += (label == 0) * (rng.random(n) < 0.8) * 2
        x[:, 11] += (label == 1) * (rng.random(n) < 0.8) * 2
        x[:, 20] = (label != 1) * (rng.random(n) < 0.8) * 2
    unit = rng.integers(0, 9, n)
    split = np.array(["train", "select", "test"])[unit % 3]
    return ProbedCells(features=sparse.csr_array(x), label=label, names=("A", "B", "C"), split=split, unit=unit)


def test_the_planted_features_come_first_with_their_signs_and_gains():
    found = probe(planted(), KS)
    two = found.features.filter(k=2)
    assert {(row["label"], row["column"]) for row in two.iter_rows(named=True)} >= {(0, 3), (0, 7), (1, 11), (1, 20)}
    sign = {(row["label"], row["column"]): np.sign(row["weight"]) for row in two.iter_rows(named=True)}
    assert sign[0, 3] == sign[0, 7] == sign[1, 11] == 1
    assert sign[1, 20] == -1
    scores = found.scores
    for label in (0, 1):
        one, both = (scores.filter(pl.col("label") == label, k=k)["auroc"].item() for k in (1, 2))
        assert both > one + 0.03
        gains = found.features.filter(pl.col("label") == label, k=5).sort("rank")["gain"]
        assert gains[:2].sum() == pytest.approx(both - 0.5)
        assert (gains[2:].abs() < 0.03).all()
    row = scores.filter(pl.col("label") == 0, k=2).row(0, named=True)
    assert row["auroc_low"] < row["auroc"] < row["auroc_high"]
    assert row["n_units"] == 3
    every = scores.filter(pl.col("label").is_null()).sort("k")
    assert every["macro_f1"].is_sorted()
    assert every["macro_f1"][-1] > 0.8


def test_nothing_is_found_where_nothing_was_planted():
    found = pl.concat(probe(planted(seed, signal=False), KS).scores for seed in range(8))
    assert abs(found["auroc"].mean() - 0.5) < 0.02
    covers = found.filter(pl.col("label").is_not_null(), k=5)
    assert ((covers["auroc_low"] <= 0.5) & (covers["auroc_high"] >= 0.5)).mean() >= 0.85


def test_rare_labels_are_left_out_of_everything():
    cells = planted()
    label = np.where(np.arange(len(cells.label)) < 4, 3, cells.label)
    cells = ProbedCells(
        features=cells.features, label=label, names=(*cells.names, "rare"), split=cells.split, unit=cells.unit
    )
    assert cells.labels() == [0, 1, 2]
    found = probe(cells, (1,))
    assert found.scores["n_cells"].unique().to_list() == [((cells.split == "test") & (label < 3)).sum()]
    nothing = ProbedCells(
        features=cells.features, label=np.zeros(len(label), dtype=int), names=("A",), split=cells.split
    )
    assert probe(nothing, (1,)).scores.height == 0


def test_without_donors_there_is_no_interval():
    cells = planted()
    alone = ProbedCells(features=cells.features, label=cells.label, names=cells.names, split=cells.split)
    scores = probe(alone, (2,)).scores
    assert scores["auroc_low"].null_count() == scores.height
    assert (scores["n_units"] == 0).all()
