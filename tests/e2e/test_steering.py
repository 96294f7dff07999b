"""The claims of docs/steering.md on real cells: an SAE of Kang et al., one of sc_mixology, fewer points and draws."""

import polars as pl
import pytest
from findings_study.measures import CellMatrices, separation
from steering_study.cells import kang_file, mixology_file
from steering_study.runs import kang_recipe, mixology_recipe, steering_runs

from feature_store import FeatureStore
from feature_store.storage import commit
from feature_store.storage.plans import SteeringPlan
from pipelines.steering.plan import Null

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def fewer(recipe, keep, **changes):
    """The recipe with one of its steering runs, changed."""
    changed = recipe.steer[keep].model_copy(update={"n_nulls": 3, "head": False, "scib": False, **changes})
    return recipe.model_copy(update={"steer": (changed,)})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("steering")


@pytest.fixture(scope="module")
def moved(ray_local, store, scsae_data):
    recipe = fewer(kang_recipe(kang_file(scsae_data, store / "data"), 0), 0, n_features=(5, 50), dose=(1.0,))
    return steering_runs(recipe, 0, store)[0]


@pytest.fixture(scope="module")
def mixed(ray_local, store, scsae_data):
    recipe = fewer(mixology_recipe(mixology_file(scsae_data, store / "data", 0), 0), 1, n_features=(100,), dose=(1.5,))
    return steering_runs(recipe, 0, store)[0]


def of_all(run, metric):
    rows = commit.read_table(run.path / "results").filter(split="test", group="all", metric=metric)
    chosen = rows.filter("chosen").row(0, named=True)
    return chosen, dict(rows.filter(pl.col("role") != "grid").select("condition", "value").iter_rows())


def test_stimulated_cells_of_other_donors_come_nearer_to_control_than_under_every_null(moved):
    chosen, others = of_all(moved, "remaining")
    assert chosen["value"] < 0.6
    assert chosen["high"] < -0.3
    assert chosen["value"] < min(others[name] for name in (*map(str, Null), "reconstruction")) - 0.2


def test_the_mean_difference_vector_does_at_least_as_well_as_the_features(moved):
    chosen, others = of_all(moved, "remaining")
    assert others["mean difference"] < chosen["value"]


def test_moved_cells_keep_their_type(moved):
    chosen, others = of_all(moved, "type_accuracy")
    assert chosen["value"] > others["unsteered"] - 0.05


def test_an_interferon_feature_is_among_the_first_five_and_holds_on_other_donors(moved):
    plan = SteeringPlan.of(commit.Run.open(moved.path / "results"))
    store = FeatureStore.open(moved.path.parent.parent, associations=plan.associations)
    matrices = CellMatrices.open(store)
    best = commit.read_table(moved.path / "scores").sort("rank")["feature_id"].head(5).to_list()
    stimulated, test = matrices.is_label("condition", "stim"), matrices.split("test")
    held = separation(matrices.codes[:, best], stimulated, test, matrices.strata("cell_type"))
    genes = dict(store.frame("features").select("feature_id", "top_genes").collect().iter_rows())
    found = [auroc for feature, auroc in zip(best, held, strict=True) if "ISG15" in genes[feature].split()[:5]]
    assert max(found) > 0.95


def test_batches_mix_better_than_under_every_null_and_by_centring(mixed):
    chosen, others = of_all(mixed, "batch_mixing")
    assert chosen["value"] > max(others[name] for name in (*map(str, Null), "reconstruction", "unsteered"))
    assert chosen["value"] > others["centring"]
