"""The excess over baselines: chosen on `select` cells, read off `test` cells, paired by donor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import ttest_1samp
from sklearn.metrics import roc_auc_score

from feature_store.associations.comparison import Representation, compare, describe, summarise
from feature_store.storage import schemas

LABEL = {"feature_id": 0, "label_kind": "cell_type", "label": "B", "split": "select", "auroc": 0.9, "p": 0.01}
GENE = {"feature_id": 0, "gene": "G", "split": "select", "pearson": 0.5, "p": 0.01, "q": 0.02}
CELLS = pl.DataFrame({"cell_idx": [0, 1], "split": "test", "cell_type": ["B", "T"], "donor": None, "batch": None})


def table(name: str, rows: list[dict[str, Any]], **more: Any) -> pl.LazyFrame:
    """Rows as the table of that name; columns that are left out are null."""
    columns = {**schemas.schema(name).columns, **more}
    full = [{column: row.get(column) for column in columns} for row in rows]
    return pl.DataFrame(full, schema=columns).lazy()


def representation(
    name: str,
    labels: list[dict[str, Any]] | None = None,
    genes: list[dict[str, Any]] | None = None,
    sets: list[dict[str, Any]] | None = None,
    *,
    features: pl.DataFrame | None = None,
    codes: pl.DataFrame | None = None,
    cells: pl.DataFrame = CELLS,
    **figures: float,
) -> Representation:
    frames = {
        "feature_label": table("feature_label", labels or []).with_columns(
            rank_biserial=2 * pl.col("auroc") - 1, q=pl.coalesce("q", "p")
        ),
        "feature_gene": table("feature_gene", genes or [], split=pl.String()),
        "feature_geneset": table("feature_geneset", sets or [], split=pl.String()),
        "codes": table("codes", []) if codes is None else codes.lazy(),
        "features": (pl.DataFrame({"class": [], "dead": []}) if features is None else features).lazy(),
        "cells": cells.lazy(),
    }
    return Representation(name=name, run=f"run-{name}", tables=frames, figures=figures)


def both_splits(base: dict[str, Any], select: dict[str, Any], test: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**base, **select}, {**base, **select, **test, "split": "test"}]


def found(table: pl.DataFrame, name: str, target: str = "B") -> dict[str, Any]:
    (row,) = table.filter((pl.col("representation") == name) & (pl.col("target") == target)).iter_rows(named=True)
    return row


def test_a_label_gets_the_feature_of_the_smallest_p_then_the_largest_auroc_on_select_cells():
    rows = [
        *both_splits(LABEL, {"feature_id": 0, "auroc": 0.99, "p": 0.02}, {"auroc": 1.0}),
        *both_splits(LABEL, {"feature_id": 1, "auroc": 0.80, "p": 0.01}, {"auroc": 0.6, "f1": 0.4}),
        *both_splits(LABEL, {"feature_id": 2, "auroc": 0.85, "p": 0.01}, {"auroc": 0.7, "f1": 0.5}),
        *both_splits(LABEL, {"feature_id": 3, "auroc": 0.05, "p": 0.00}, {"auroc": 0.9}),
    ]
    row = found(compare(representation("sae", rows), []), "sae")
    assert (row["feature_id"], row["select"], row["test"], row["f1"]) == (2, 0.85, 0.7, 0.5)
    assert row["rank_biserial"] == pytest.approx(0.4)


def test_a_feature_that_falls_below_chance_on_test_cells_counts_as_it_is():
    rows = both_splits(LABEL, {"auroc": 0.9}, {"auroc": 0.3})
    assert found(compare(representation("sae", rows), []), "sae")["test"] == 0.3


def test_a_gene_gets_the_largest_correlation_on_select_cells_and_a_changed_sign_counts_against_it():
    rows = [
        *both_splits(GENE, {"feature_id": 0, "pearson": 0.4}, {"pearson": 0.9}),
        *both_splits(GENE, {"feature_id": 1, "pearson": -0.6}, {"pearson": -0.5}),
        *both_splits(GENE, {"feature_id": 2, "gene": "H", "pearson": -0.6}, {"pearson": 0.2}),
    ]
    table = compare(representation("sae", genes=rows), [])
    assert (found(table, "sae", "G")["feature_id"], found(table, "sae", "G")["test"]) == (1, 0.5)
    assert (found(table, "sae", "H")["feature_id"], found(table, "sae", "H")["test"]) == (None, pytest.approx(-0.2))


@pytest.mark.parametrize(("q", "named"), [(0.05, 0), (0.051, None)])
def test_the_best_feature_of_a_target_is_named_only_where_it_is_significant_on_test_cells(q, named):
    rows = both_splits({**LABEL, "feature_id": 0}, {"auroc": 0.9, "q": 0.001}, {"auroc": 0.8, "q": q})
    row = found(compare(representation("sae", rows), []), "sae")
    assert (row["feature_id"], row["test"]) == (named, 0.8)


def test_identity_is_f1_of_firing_at_the_genes_tokens():
    precise = {"feature_id": 0, "identity_precision": 1.0, "identity_recall": 0.1}
    broad = {"feature_id": 1, "identity_precision": 0.5, "identity_recall": 0.6}
    never = {"feature_id": 2, "identity_precision": 0.0, "identity_recall": 0.0}
    rows = [row for one in (precise, broad, never) for row in both_splits({**GENE, "pearson": None}, one, {})]
    (row,) = compare(representation("sae", genes=rows), []).iter_rows(named=True)
    assert (row["statistic"], row["feature_id"], row["p"]) == ("identity_f1", 1, None)
    assert row["select"] == row["test"] == pytest.approx(0.6 / 1.1)


def test_the_best_baseline_is_chosen_on_select_cells_and_the_excess_is_read_off_test_cells():
    sae = representation("sae", both_splits(LABEL, {"auroc": 0.9}, {"auroc": 0.85}))
    lucky = representation("lucky", both_splits(LABEL, {"auroc": 0.7}, {"auroc": 0.95}))
    good = representation("good", both_splits(LABEL, {"auroc": 0.8}, {"auroc": 0.75}))
    table = compare(sae, [lucky, good])
    assert table["representation"].to_list() == ["sae", "good", "lucky"]
    assert [found(table, name)["best"] for name in ("sae", "good", "lucky")] == [False, True, False]
    assert found(table, "good")["excess"] == pytest.approx(0.1)
    assert found(table, "lucky")["excess"] == pytest.approx(-0.1)
    assert found(table, "sae")["excess"] is None


def test_a_target_that_only_one_of_them_has_gives_no_excess():
    only_mine = representation("sae", both_splits(LABEL, {"label": "A"}, {}))
    only_theirs = representation("pca", both_splits(LABEL, {"label": "B"}, {}))
    table = compare(only_mine, [only_theirs])
    assert table["excess"].null_count() == 2
    assert not table["best"].any()
    assert summarise(table).is_empty()


def planted(n_donors: int, *, seed: int = 0, kind: str = "cell_type") -> tuple[list[Representation], pl.DataFrame]:
    """An SAE and a baseline of one feature each over the same test cells, the SAE's the better one."""
    rng = np.random.default_rng(seed)
    n = 60 * n_donors
    label = rng.integers(0, 2, n)
    cells = pl.DataFrame(
        {
            "cell_idx": np.arange(10, 10 + n),
            "split": "test",
            "cell_type": np.where(rng.random(n) < 0.5, "B", "T") if kind == "batch" else np.where(label, "B", "T"),
            "donor": [f"d{i % n_donors}" for i in range(n)],
            "batch": np.where(label, "B", "other"),
        }
    )
    representations = []
    for name, gap in (("sae", 1.5), ("pca", 0.5)):
        value = np.maximum(rng.normal(size=n) + gap * label, 0)
        codes = pl.DataFrame({"cell_idx": cells["cell_idx"], "feature_id": 3, "value": value}).filter(
            pl.col("value") > 0
        )
        codes = codes.cast({"feature_id": pl.Int32})
        rows = both_splits({**LABEL, "label_kind": kind, "feature_id": 3}, {}, {})
        representations.append(representation(name, rows, codes=codes, cells=cells))
        cells = cells.with_columns(pl.Series(name, value))
    return representations, cells


def differences(cells: pl.DataFrame) -> list[float]:
    """AUROC of the SAE minus that of PCA, donor by donor."""
    out = []
    for _, own in cells.group_by("donor", maintain_order=True):
        is_label = (own["cell_type"] == "B").to_numpy()
        out.append(roc_auc_score(is_label, own["sae"]) - roc_auc_score(is_label, own["pca"]))
    return out


def test_the_interval_is_students_over_donors_of_paired_differences_of_auroc():
    (sae, pca), cells = planted(5)
    row = found(compare(sae, [pca]), "pca")
    expected = ttest_1samp(differences(cells), 0).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    assert row["n_units"] == 5
    assert row["n_better"] == sum(d > 0 for d in differences(cells))


def test_two_donors_say_where_the_sae_is_better_and_have_no_interval():
    (sae, pca), cells = planted(2)
    row = found(compare(sae, [pca]), "pca")
    assert (row["n_units"], row["low"], row["high"]) == (2, None, None)
    assert row["n_better"] == sum(d > 0 for d in differences(cells))


def test_a_donor_with_few_cells_of_a_side_is_left_out():
    (sae, pca), cells = planted(4)
    kept = cells.filter((pl.col("donor") != "d0") | (pl.col("cell_type") == "T") | (pl.col("cell_idx") < 30))
    assert 0 < kept.filter(donor="d0", cell_type="B").height < 5
    sae = replace(sae, tables={**sae.tables, "cells": kept.lazy()})
    assert found(compare(sae, [pca]), "pca")["n_units"] == 3


def test_batches_are_compared_within_cell_types():
    (sae, pca), cells = planted(3, kind="batch")

    def area(own: pl.DataFrame, name: str) -> float:
        wins = pairs = 0.0
        for _, part in own.group_by("cell_type"):
            here, there = (part.filter((pl.col("batch") == "B") == side)[name].to_numpy() for side in (True, False))
            wins += (here[:, None] > there).sum() + 0.5 * (here[:, None] == there).sum()
            pairs += here.size * there.size
        return wins / pairs

    expected = [area(own, "sae") - area(own, "pca") for _, own in cells.group_by("donor")]
    row = found(compare(sae, [pca]), "pca")
    interval = ttest_1samp(expected, 0).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))


def test_without_donors_and_batches_there_are_no_units():
    (sae, pca), cells = planted(3)
    bare = cells.with_columns(donor=pl.lit(None, pl.String), batch=pl.lit(None, pl.String)).lazy()
    sae, pca = (replace(one, tables={**one.tables, "cells": bare}) for one in (sae, pca))
    assert found(compare(sae, [pca]), "pca")["n_units"] is None


def test_the_summary_is_the_mean_over_targets_with_students_interval():
    sae, pca = (
        [row for i, x in enumerate(areas) for row in both_splits({**LABEL, "label": f"L{i}"}, {}, {"auroc": x})]
        for areas in ([0.9, 0.8, 0.7, 0.95], [0.7, 0.75, 0.72, 0.8])
    )
    (row,) = summarise(compare(representation("sae", sae), [representation("pca", pca)])).iter_rows(named=True)
    excess = [0.2, 0.05, -0.02, 0.15]
    expected = ttest_1samp(excess, 0).confidence_interval(0.95)
    assert (row["n"], row["share_better"], row["most_often"]) == (4, 0.75, "pca")
    assert (row["reference"], row["best_baseline"]) == pytest.approx((0.8375, 0.7425))
    assert (row["mean_excess"], row["low"], row["high"]) == pytest.approx((0.095, expected.low, expected.high))


def test_features_are_counted_that_are_strong_and_significant_on_test_cells():
    strong = {"auroc": 0.8, "q": 0.05}
    rows = [
        {**LABEL, "feature_id": 0, "split": "test", **strong},
        {**LABEL, "feature_id": 0, "split": "test", **strong, "label": "T", "auroc": 0.1},
        {**LABEL, "feature_id": 1, "split": "test", **strong, "auroc": 0.2},
        {**LABEL, "feature_id": 2, "split": "test", **strong, "auroc": 0.75},
        {**LABEL, "feature_id": 3, "split": "test", **strong, "q": 0.06},
        {**LABEL, "feature_id": 4, **strong},
        {**LABEL, "feature_id": 5, "split": "test", **strong, "label_kind": "batch"},
    ]
    hit = {"collection": "c", "gene_set": "s", "split": "test", "overlap": 2, "q": 0.01}
    sets = [{**hit, "feature_id": 0}, {**hit, "feature_id": 1, "q": 0.2}, {**hit, "feature_id": 2, "overlap": 0}]
    features = pl.DataFrame(
        {"class": ["gene-identity", "gene-identity", "cell-context", "dead"], "dead": [False, False, False, True]}
    )
    one = representation("sae", rows, sets=sets, features=features, l0=16.0, fvu=0.1)
    (row,) = describe([one]).iter_rows(named=True)
    assert (row["n_label"], row["n_batch"], row["n_gene_set"], row["n_features"], row["n_dead"]) == (2, 1, 1, 4, 1)
    assert (row["class_gene_identity"], row["class_cell_context"], row["class_mixed"], row["class_dead"]) == (
        2,
        1,
        0,
        1,
    )
    assert (row["run"], row["l0"], row["fvu"], row["recovery"]) == ("run-sae", 16.0, 0.1, None)


def test_tables_without_rows_give_a_comparison_without_rows():
    table = compare(representation("sae"), [representation("pca")])
    assert table.is_empty()
    assert summarise(table).is_empty()
