"""The study of variable genes: features are chosen on `select` and reported on `test` cells; arms differ in genes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from variable_genes import ARMS, best_features, by_line, page, recipe


def labels() -> pl.DataFrame:
    """AUROCs of 4 features on two lines; the best on test is not the best on select."""
    rng = np.random.default_rng(0)
    rows = [
        {"feature_id": feature, "label_kind": kind, "label": line, "split": split, "auroc": rng.random()}
        for feature in range(4)
        for kind, line in (("cell_type", "A549"), ("cell_type", "H838"), ("batch", "A549"))
        for split in ("select", "test")
    ]
    return pl.DataFrame(rows)


def test_features_are_chosen_on_select_cells_and_their_test_auroc_is_shown():
    rows = {(r["label_kind"], r["label"], r["split"], r["feature_id"]): r["auroc"] for r in labels().to_dicts()}
    found = best_features(labels(), 2)
    assert found["line"].to_list() == ["A549", "A549", "H838", "H838"]
    assert found["place"].to_list() == [1, 2, 1, 2]
    for line in ("A549", "H838"):
        select = [rows["cell_type", line, "select", feature] for feature in range(4)]
        wanted = np.argsort(select)[::-1][:2].tolist()
        own = found.filter(line=line)
        assert own["feature"].to_list() == wanted
        assert own["test"].to_list() == [rows["cell_type", line, "test", feature] for feature in wanted]


def test_the_page_has_a_row_for_each_arm_and_the_range_of_the_seeds():
    one = pl.DataFrame({"line": ["A"], "place": [1], "feature": [3], "select": [0.9], "test": [0.8]})
    seeds = [one.with_columns(test=pl.lit(test), arm=pl.lit("x"), seed=seed) for seed, test in enumerate((0.8, 0.6))]
    table = by_line(pl.concat(seeds))
    assert table.rows() == [("x", "0.7 (0.6 to 0.8)")]
    assert "| x | 0.7 (0.6 to 0.8) |" in page(pl.concat(seeds))


def test_arms_differ_in_their_genes_and_encoded_tokens_alone():
    recipes = [recipe(Path("cells.h5ad"), arm, seed=2) for arm in ARMS.values()]
    assert [one.extract.genes for one in recipes] == ["hvg:1199", None, None]
    assert [one.encode.tokens_per_cell for one in recipes] == [None, None, 300]
    assert len({one.train for one in recipes}) == 1
    assert len({one.extract.model_copy(update={"genes": None}) for one in recipes}) == 1
