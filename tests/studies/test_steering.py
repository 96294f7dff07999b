"""The cells of the steering recipes, who is held out, and what the page says of its figures."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest
from scipy import sparse
from steering_study import cells as made
from steering_study import page
from steering_study.cells import CTCL_FOLDS, SHARES, ctcl_splits, split_inside, variable_genes
from steering_study.page import sections_of, verdict_of_mix, verdict_of_move, write_page
from steering_study.runs import ctcl_mix_recipe, ctcl_recipe, kang_recipe, kinds_recipe, mixology_recipe

from pipelines.steering.plan import Null


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


@pytest.mark.slow
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


def results(metric: str, **values: float) -> list[dict[str, object]]:
    """Rows of one metric by condition; `chosen` is what the search chose."""
    return [
        {
            "split": "test",
            "condition": name,
            "role": "null" if name in list(Null) else name if name == "unsteered" else "grid",
            "metric": metric,
            "group": "all",
            "chosen": name == "chosen",
            "value": value,
        }
        for name, value in ((key.replace("_", " "), value) for key, value in values.items())
    ]


@pytest.mark.parametrize(("left", "said"), [(0.3, "**less than a third**"), (0.4, "**not less than a third**")])
def test_a_move_is_held_to_a_third_and_to_the_best_null_of_each_sae(left, said):
    frames = [
        pl.DataFrame(results("remaining", chosen=left - 0.1, random_features=0.9, shuffled_labels=0.8)),
        pl.DataFrame(results("remaining", chosen=left + 0.1, random_features=0.9, shuffled_labels=0.2)),
    ]
    text = verdict_of_move(frames)
    assert said in text
    assert f"{left:.2f} of the distance remains (by SAE: {left - 0.1:.2f}, {left + 0.1:.2f})" in text
    assert "for\n1 of 2 SAEs; the nearest null, shuffled labels, leaves 0.50" in text


def test_a_mix_is_held_to_the_best_null_and_to_what_it_costs():
    kept = results("label_conservation", unsteered=0.8, chosen=0.76)
    mixed = [
        results("batch_mixing", unsteered=0.5, chosen=0.7, random_features=0.6, shuffled_labels=0.55),
        results("batch_mixing", unsteered=0.5, chosen=0.6, random_features=0.5, shuffled_labels=0.65),
    ]
    text = verdict_of_mix([pl.DataFrame(own + kept) for own in mixed])
    assert "rises by +0.150 (the best null: +0.125), more than under every null for 1 of 2 SAEs" in " ".join(
        text.split()
    )
    assert "`label_conservation` loses 5.0 %, **beyond** the 2 % allowed" in text
    assert "scib" not in text


def test_running_one_experiment_leaves_the_sections_of_the_others(tmp_path, monkeypatch, pytestconfig):
    written = (pytestconfig.rootpath / "docs" / "steering.md").read_text()
    (tmp_path / "steering.md").write_text(written)
    assert write_page(tmp_path, {}).read_text() == written
    title, _ = page.TITLES["ctcl"]
    monkeypatch.setattr(page, "move_section", lambda *_: f"\n## {title}\n\nnew\n")
    again = write_page(tmp_path, {"ctcl": []}).read_text()
    assert sections_of(again)[title] == f"\n## {title}\n\nnew\n"
    assert {name: text for name, text in sections_of(again).items() if name != title} == {
        name: text for name, text in sections_of(written).items() if name != title
    }


def test_the_page_in_docs_has_every_line_that_the_study_writes(lines_not_written):
    assert lines_not_written("steering") == []


def test_the_recipes_name_options_that_exist():
    recipes = [made_of(Path("cells.h5ad"), 0) for made_of in (kang_recipe, mixology_recipe, ctcl_recipe)]
    assert [len(recipe.steer) for recipe in recipes] == [2, 2, 1]
    for mixed in (mixology_recipe, ctcl_mix_recipe):
        (steering,) = kinds_recipe(mixed(Path("cells.h5ad"), 0), 0).steer
        assert (steering.target, steering.intervention) == ("all", None)
