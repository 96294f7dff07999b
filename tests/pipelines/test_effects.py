"""`scsae effects`: its tables against single forwards and scipy, its resumption, and what it refuses."""

from __future__ import annotations

import shutil

import numpy as np
import polars as pl
import pytest
from interrupted_stages import assert_same_bytes, resumed
from scipy.stats import false_discovery_control

from feature_store import FeatureStore
from feature_store.cells import read_panel_cells
from feature_store.codes import CodesRun, load_cell_codes
from feature_store.storage import commit
from feature_store.storage.layout import EFFECT_TABLES, Layout
from pipelines.config import EffectsOptions
from pipelines.effects import cells as effect_cells
from pipelines.effects import effects
from pipelines.effects.chain import paths_of
from pipelines.effects.request import EffectsRequest
from pipelines.effects.shards import features_a_shard
from pipelines.errors import UsageError
from pipelines.steering.context import SteeringContext
from sae_core.errors import ConfigError
from sae_core.scfm import ScGPT
from sae_core.steering import Ablate, SteeredModel, Steering

pytestmark = pytest.mark.usefixtures("module_without_actors")

CELLS, N_FEATURES = 12, 20


@pytest.fixture(scope="module")
def options(chain) -> EffectsOptions:
    """The densest features, which are the most work, in several shards."""
    layout = Layout(chain.store)
    features = commit.read_table(layout.associations_dir(layout.latest("associations").run) / "features")
    dense = features.sort("density", descending=True)["feature_id"].head(N_FEATURES)
    return EffectsOptions(feature=tuple(dense.to_list()), cells=CELLS, n_nulls=4)


@pytest.fixture(scope="module")
def whole(chain, options, tmp_path_factory):
    """A store with the effects of some features."""
    store = shutil.copytree(chain.store, tmp_path_factory.mktemp("effects") / "store")
    return store, effects(options, store)


def table(result, name="feature_effect"):
    return commit.read_table(result.path / name)


def test_the_effect_is_the_mean_over_cells_of_single_steered_forwards(whole, options):
    store, result = whole
    found = table(result).filter(intervention="ablate")
    feature = int(found["feature_id"].mode()[0])
    layout = Layout(store)
    request = EffectsRequest.of(options, layout)
    context = SteeringContext(paths_of(request.chain, "effects", num_gpus=0))
    codes = CodesRun.open(layout.codes_dir(request.chain.associations.codes))
    cells = read_panel_cells(layout.cells_dir(request.chain.associations.dataset)).filter(split="test")
    index = cells["cell_idx"].sort().to_numpy()
    fires = index[load_cell_codes(codes, index)[:, [feature]].toarray()[:, 0] > 0]
    assert len(fires) <= CELLS  # all of them are taken
    changes: dict[int, list[float]] = {}
    for block in context.blocks(fires):
        for i in range(len(block.cells)):
            running = SteeredModel(context.model, block.tokens.cells(i, i + 1), context.sae, context.site, is_part=True)
            before = running.masked_gene_prediction(None)
            steering = Steering(sae=context.sae, intervention=Ablate(features=[feature]))
            after = running.masked_gene_prediction(steering)
            if (after.prediction == before.prediction).all():
                continue
            for gene, change in zip(
                before.gene_id.tolist(), (after.prediction - before.prediction).tolist(), strict=True
            ):
                changes.setdefault(gene, []).append(change)
    symbols = {context.model.vocabulary.tokens[gene]: values for gene, values in changes.items()}
    own = found.filter(feature_id=feature)
    assert own.height > 3
    for gene, effect, n_cells in own.select("gene", "effect", "n_cells").iter_rows():
        assert n_cells == len(symbols[gene])
        assert effect == pytest.approx(np.mean(symbols[gene]), abs=1e-4)


def test_q_is_over_all_pairs_and_p_is_the_larger_of_the_two_nulls(whole):
    found = table(whole[1])
    np.testing.assert_allclose(found["q"], false_discovery_control(found["p"]), rtol=1e-12)
    assert found.select((pl.col("p") == pl.max_horizontal("p_random", "p_mixture")).all()).item()
    assert set(found["null"]) <= {"random", "mixture"}
    assert set(found["split"]) == {"test"}
    assert found["n_cells"].min() >= effect_cells.MIN_CELLS
    z = (found["effect"] - found["null_mean"]) / found["null_sd"]
    np.testing.assert_allclose(found["z"].fill_null(0), z.fill_nan(0), rtol=1e-6, atol=1e-9)


def test_every_feature_has_a_line_that_sums_up_its_genes(whole):
    found, summary = table(whole[1]), table(whole[1], "feature_effect_summary")
    counted = found.group_by("feature_id", "intervention").agg(
        n_genes=pl.len().cast(pl.Int64),
        significant=(pl.col("q") <= 0.05).sum().cast(pl.Int64),
        strength=(pl.col("effect") ** 2).mean().sqrt(),
    )
    both = summary.join(counted, on=["feature_id", "intervention"])
    assert both.height == summary.height == counted.height
    assert (both["n_genes"] == both["n_genes_right"]).all()
    assert (both["n_up"] + both["n_down"] == both["significant"]).all()
    np.testing.assert_allclose(both["strength"], both["strength_right"], rtol=1e-5)


def test_a_second_call_makes_nothing_and_sql_reads_the_tables(whole, options):
    store, first = whole
    again = effects(options, store)
    assert (again.done, again.run) == (0, first.run)
    opened = FeatureStore.open(store)
    rows = opened.sql("SELECT feature_id, gene, effect, q FROM feature_effect ORDER BY p LIMIT 3")
    assert rows.height == 3
    assert opened.sql("SELECT count(*) AS n FROM feature_effect_summary").item() > 0


@pytest.mark.slow
def test_a_run_that_was_interrupted_resumes_to_the_same_bytes(whole, chain, options, tmp_path):
    store = shutil.copytree(chain.store, tmp_path / "store")
    assert_same_bytes(resumed(lambda: effects(options, store)), whole[1], EFFECT_TABLES)


def test_named_features_get_more_nulls_and_other_seeds_are_other_runs(chain, whole):
    layout = Layout(chain.store)
    measured = EffectsRequest.of(EffectsOptions(), layout).measured
    one = EffectsRequest.of(EffectsOptions(feature=measured[:1]), layout)
    assert one.n_nulls == 100
    assert EffectsRequest.of(EffectsOptions(feature=measured[:1], n_nulls=5), layout).n_nulls == 5
    ids = {
        EffectsRequest.of(EffectsOptions(seed=seed, cells=cells), layout).plan.id for seed in (0, 1) for cells in (4, 5)
    }
    assert len(ids) == 4


def test_unknown_features_are_refused_and_nothing_is_written(chain):
    layout = Layout(chain.store)
    with pytest.raises(UsageError, match="--feature was 99999; this SAE has features 0 to"):
        effects(EffectsOptions(feature=99999), chain.store)
    dead = commit.read_table(layout.associations_dir(layout.latest("associations").run) / "features").filter("dead")
    if dead.height:
        with pytest.raises(UsageError, match="never fires"):
            effects(EffectsOptions(feature=int(dead["feature_id"][0])), chain.store)
    assert not layout.kind_dir("effects").exists()


def test_a_model_without_a_head_is_refused_and_nothing_is_written(chain, options, monkeypatch):
    def lacks(self, *_):
        raise self._lacks_head("the decoder")

    monkeypatch.setattr(ScGPT, "predict_masked", lacks)
    with pytest.raises(ConfigError, match=r"no weights of the decoder.*no masked-gene prediction"):
        effects(options, chain.store)
    assert not Layout(chain.store).kind_dir("effects").exists()


@pytest.mark.parametrize(("n_features", "size"), [(1, 1), (16, 1), (17, 2), (100, 7), (128, 8), (10_000, 8)])
def test_few_features_are_spread_over_actors_and_many_share_the_reading_of_cells(n_features, size):
    assert features_a_shard(n_features) == size
