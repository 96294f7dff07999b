"""The statistics of the findings against sklearn and hand numbers, and the folds; the findings are in tests/e2e."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest
from findings_study.cells import FOLDS, StudyFiles, fold_splits, shared_genes
from findings_study.measures import holds_on_test, label_of_smallest_q, n_pairs, permuted, separation
from findings_study.page import markdown
from findings_study.runs import both_conditions, cell_type_recipe, detector_recipe, protocol_recipe
from scipy import sparse
from sklearn.metrics import roc_auc_score

from feature_store.associations import Labels


@pytest.fixture
def drawn():
    """200 cells of two types: a column that follows the positive cells inside types, and one that follows the type."""
    rng = np.random.default_rng(1)
    types = rng.integers(0, 2, 200)
    positive = rng.random(200) < np.where(types, 0.8, 0.2)
    own = np.maximum(rng.standard_normal(200) + positive - 3 * types, 0)
    columns = sparse.csr_array(np.stack([own, types.astype(float)], axis=1))
    return columns, positive, Labels.from_values("type", types.tolist()), types


def test_separation_is_the_mean_of_the_aurocs_of_the_strata_weighted_by_their_pairs(drawn):
    columns, positive, within, types = drawn
    cells = np.arange(200) % 3 > 0
    dense = columns.toarray()
    weight, area = np.zeros(2), np.zeros((2, 2))
    for one in (0, 1):
        here = cells & (types == one)
        weight[one] = positive[here].sum() * (~positive[here]).sum()
        area[one] = [roc_auc_score(positive[here], dense[here, j]) for j in (0, 1)]
    np.testing.assert_allclose(separation(columns, positive, cells, within), weight @ area / weight.sum())
    assert n_pairs(positive, cells, within) == weight.sum()


def test_a_column_that_follows_the_type_separates_nothing_inside_types(drawn):
    columns, positive, within, _ = drawn
    everywhere = np.ones(200, dtype=bool)
    assert separation(columns, positive, everywhere)[1] > 0.7
    assert separation(columns, positive, everywhere, within)[1] == 0.5


def test_permutations_keep_to_their_blocks_and_centre_on_one_half(drawn):
    columns, positive, within, _ = drawn
    everywhere = np.ones(200, dtype=bool)
    null = permuted(columns[:, [0]], positive, everywhere, within, within)
    assert abs(null.mean() - 0.5) < 0.01
    assert null.max() < separation(columns, positive, everywhere, within)[0]
    by_cell = Labels.from_values("cell", list(range(200)))
    fixed = permuted(columns[:, [0]], positive, everywhere, within, by_cell)
    np.testing.assert_allclose(fixed, separation(columns, positive, everywhere, within)[0])


def test_what_is_chosen_on_select_holds_on_the_same_side_of_test_alone():
    rows = [
        ("A", "select", 0.02, 0.001),
        ("A", "test", None, 0.2),
        ("B", "select", 0.01, 0.01),
        ("B", "test", None, 0.03),
    ]
    tests = pl.DataFrame(
        [{"feature_id": i, "label": name, "split": split, "q": q, "p": p} for i in (0, 1) for name, split, q, p in rows]
    )
    table = label_of_smallest_q(tests).with_columns(select=pl.Series([0.8, 0.8]), test=pl.Series([0.7, 0.3]))
    assert table.select("feature_id", "label", "q", "p_test").rows() == [(0, "B", 0.01, 0.03), (1, "B", 0.01, 0.03)]
    assert holds_on_test(table).tolist() == [True, False]


def test_every_donor_is_tested_once_and_no_fold_leaves_a_split_empty():
    donors = [donor for pair in FOLDS for donor in pair]
    tested = [{d for d, s in zip(donors, fold_splits(donors, fold), strict=True) if s == "test"} for fold in range(4)]
    assert sorted(d for pair in tested for d in pair) == sorted(donors)
    assert all(set(fold_splits(donors, fold)) == {"train", "select", "test"} for fold in range(4))


def test_shared_genes_are_those_that_a_cell_of_every_batch_has():
    counts = sparse.csr_matrix(np.array([[1, 0, 2], [0, 1, 0], [3, 0, 1], [1, 0, 4]], dtype=np.float32))
    obs = pd.DataFrame({"batch": ["a", "a", "b", "b"]}, index=list("wxyz"))
    shared = shared_genes(anndata.AnnData(X=counts, obs=obs, var=pd.DataFrame(index=["G0", "G1", "G2"])))
    assert list(shared.var_names) == ["G0", "G2"]
    assert shared.obs["n_genes"].tolist() == [2.0, 0.0, 2.0, 2.0]
    assert set(shared.obs["split"]) == {"train", "select", "test"}


def test_a_frame_becomes_a_markdown_table():
    frame = pl.DataFrame({"feature": [3], "test AUROC": [0.98765], "test q": [1e-9], "gene": [None]})
    assert markdown(frame).splitlines() == [
        "| feature | test AUROC | test q | gene |",
        "| --- | --- | --- | --- |",
        "| 3 | 0.988 | 1.0e-09 | - |",
    ]


def test_the_page_in_docs_has_every_line_that_the_study_writes(lines_not_written):
    assert lines_not_written("findings") == []


def test_the_recipes_name_options_that_exist():
    files = StudyFiles(*map(Path, ("kang.h5ad", "kang_control.h5ad", "mixology.h5ad")))
    recipes = [cell_type_recipe(files), detector_recipe(files, 0), protocol_recipe(files)]
    assert all(recipe.extract and recipe.train and recipe.encode for recipe in recipes)
    assert both_conditions(files, "3f2a91").sae == "3f2a91"
