"""The cells of the steering recipes: who is held out, and that nothing is chosen on them."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pipelines.recipes.steering import cells as made
from pipelines.recipes.steering.cells import CTCL_FOLDS, SHARES, ctcl_splits, split_inside, variable_genes


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    rates = rng.gamma(1.0, 3.0, 80)
    matrix = rng.poisson(rates, (60, 80)).astype(np.float32)
    obs = pd.DataFrame({"batch": np.repeat(["a", "b"], 30)}, index=[f"c{i}" for i in range(60)])
    return anndata.AnnData(sparse.csr_matrix(matrix), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(80)]))


def test_every_fold_of_the_skin_tests_a_patient_and_a_healthy_donor_that_no_other_split_has():
    donors = [donor for pair in CTCL_FOLDS for donor in pair]
    tested = []
    for fold in range(len(CTCL_FOLDS)):
        split = dict(zip(donors, ctcl_splits(donors, fold), strict=True))
        for name in ("train", "select", "test"):
            assert sorted(donor[:2] for donor in donors if split[donor] == name) == ["CT", "HC"]
        tested += [donor for donor in donors if split[donor] == "test"]
    assert sorted(tested) == sorted(donors)


def test_splits_keep_their_shares_inside_every_stratum_and_follow_the_seed():
    strata = ["a"] * 100 + ["b"] * 40
    first, again, other = (np.array(split_inside(strata, seed=seed)) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    for part, size in ((first[:100], 100), (first[100:], 40)):
        shares = [(part == name).sum() / size for name in ("train", "select", "test")]
        assert shares == pytest.approx(SHARES)


def test_genes_are_chosen_without_looking_at_held_out_cells(counts, monkeypatch):
    monkeypatch.setattr(made, "N_GENES", 20)
    chosen = np.arange(60) % 2 == 0
    before = variable_genes(counts, chosen, "batch")
    changed = counts.copy()
    matrix = changed.X.tolil()
    matrix[~chosen] = 0
    matrix[1, :] = 500
    changed.X = matrix.tocsr()
    assert before.sum() == 20
    assert (variable_genes(changed, chosen, "batch") == before).all()
