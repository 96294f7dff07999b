"""The tables of the study of combinations, of a drug and of regulators, from planted figures."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy import stats

from feature_store.query.probes import PERMUTED, SAE


@pytest.fixture
def scores() -> pl.DataFrame:
    """Macro-F1 of four folds; the SAE is .1 above genes with one feature, and permuted labels tell nothing."""
    rows = [
        {"representation": name, "label_kind": "cell_type", "label": None, "k": k, "fold": fold, "macro_f1": value}
        for name, start in (("genes", 0.5), (SAE, 0.6), (PERMUTED, 0.1))
        for k in (1, 2, 5, 10)
        for fold, value in enumerate(start + 0.02 * np.log2(k) * (name != PERMUTED) + np.array([0, 0.01, 0.02, 0.03]))
    ]
    return pl.DataFrame(rows)


def test_figures_are_means_of_the_folds_with_their_interval(scores):
    from combinations import by_representation, differences, interval, needed, verdict

    low, high = stats.t.interval(0.95, 3, loc=0.615, scale=stats.sem([0.6, 0.61, 0.62, 0.63]))
    assert interval([0.6, 0.61, 0.62, 0.63]) == f"0.615 ± {(high - low) / 2:.3f}"
    table = by_representation(scores, "cell_type", "macro_f1")
    assert table["representation"].to_list() == [SAE, "genes", PERMUTED]
    assert table["1"][0].startswith("0.615 ± ")
    less = differences(scores, "cell_type", "macro_f1")
    assert less["SAE less"].to_list() == ["genes"]
    assert less["1"][0] == "0.100 ± 0.000"
    assert verdict(scores, "cell_type", "macro_f1") == "- The SAE against genes: above it with 1, 2, 5, 10."
    few = needed(scores, "cell_type", "macro_f1")
    assert few.row(0) == ("genes", *["more than 10"] * 3)


def test_labels_are_listed_with_signs(scores):
    from combinations import labels

    one = {"label_kind": "cell_type", "label": "B", "representation": SAE, "k": 5, "fold": 0}
    own = scores.with_columns(pl.col("label").cast(pl.String)).clear()
    own = pl.concat([own, pl.DataFrame([{**one, "auroc": 0.9, "balanced_accuracy": 0.8}])], how="diagonal_relaxed")
    features = pl.DataFrame(
        [
            {**one, "rank": 1, "feature_id": 7, "name": "CD79A MS4A1 CD79B PAX5", "weight": 2.0},
            {**one, "rank": 2, "feature_id": 3, "name": None, "weight": -1.0},
        ]
    )
    assert labels(own, features, "cell_type")["features in their order"].to_list() == [
        "+ 7 (CD79A MS4A1 CD79B), - 3 (no genes)"
    ]


def test_permuted_regulators_keep_the_size_of_their_lists_and_the_strata_of_their_genes(tmp_path, monkeypatch):
    import regulators

    strata = pl.DataFrame({"symbol": [f"G{i}" for i in range(40)], "stratum": np.arange(40) % 4})
    monkeypatch.setattr(regulators, "strata_of_genes", lambda _: strata)
    gmt = tmp_path / "sets.gmt"
    gmt.write_text("TF1\tabout\tG0\tG1\tG5\tELSEWHERE\nTF2\tabout\tG2\tG3\n")
    files = regulators.write_sets(gmt, None, tmp_path)
    assert len(files) == 1 + regulators.N_PERMUTED
    stratum = dict(strata.iter_rows())
    differ = 0
    for file in files[1:]:
        for line, original in zip(file.read_text().splitlines(), gmt.read_text().splitlines(), strict=True):
            genes, before = line.split("\t")[2:], original.split("\t")[2:]
            assert [stratum.get(gene) for gene in genes] == [stratum.get(gene) for gene in before]
            assert len(set(genes)) == len(genes)
            differ += genes != before
    assert differ > len(files)


def test_the_excess_of_the_sae_is_said_beside_that_of_the_others():
    from regulators import verdict

    rows = pl.DataFrame({"representation": ["SAE", "pca"], "excess, share of features": [0.07, 0.2]})
    assert "7.0 % of the SAE's features" in verdict(rows)
    assert "More of the features of pca do." in verdict(rows)
    assert "Of no other representation more do." in verdict(rows.with_columns(pl.Series(rows.columns[1], [0.3, 0.2])))


def test_the_folds_of_the_drug_leave_each_patient_out_once(tmp_path):
    import anndata
    import pandas as pd
    from drug import PATIENTS, with_folds

    obs = pd.DataFrame({"patient_id": np.repeat(PATIENTS, 3)}, index=[f"c{i}" for i in range(15)])
    anndata.AnnData(X=np.ones((15, 2), dtype=np.float32), obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    made = anndata.read_h5ad(with_folds(tmp_path / "cells.h5ad", tmp_path / "data" / "folds.h5ad")).obs
    for fold, patient in enumerate(PATIENTS):
        tested = made[f"fold{fold}"] == "test"
        assert set(made["patient_id"][tested]) == {patient}
        assert made[f"fold{fold}"].value_counts().to_dict() == {"train": 9, "select": 3, "test": 3}
