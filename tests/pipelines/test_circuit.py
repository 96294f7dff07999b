"""`scsae circuit`: its tables against single passes and scipy, its resumption, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from interrupted_stages import assert_same_bytes, resumed
from scipy.stats import false_discovery_control, hypergeom, permutation_test

from feature_store import FeatureStore
from feature_store.modules import module_gene_sets
from feature_store.storage import commit
from feature_store.storage.layout import CIRCUIT_TABLES, Layout
from pipelines.circuit import circuit
from pipelines.circuit.actors import across_donors
from pipelines.circuit.request import CircuitRequest
from pipelines.circuit.tables import EDGES_KEPT, Q, modules_frame
from pipelines.config import CircuitOptions
from pipelines.effects.cells import FeatureCells
from pipelines.effects.chain import paths_of
from pipelines.errors import UsageError
from pipelines.extract import extract
from pipelines.inputs import load_stored_sae
from pipelines.steering.context import SteeringContext
from pipelines.train import train
from sae_core.effects import LaterEffect
from sae_core.errors import ConfigError

pytestmark = pytest.mark.usefixtures("module_without_actors")
CELLS, N_FEATURES = 10, 20


@pytest.fixture(scope="module")
def two_layers(chain, tmp_path_factory):
    """A store with an SAE of layer 1, which has associations, and one of layer 2: the store and their ids."""
    store = shutil.copytree(chain.store, tmp_path_factory.mktemp("circuit") / "store")
    earlier = Layout(store).latest("saes").run
    extract(chain.extract.model_copy(update={"layer": ("2",)}), store)
    later = train(chain.train.model_copy(update={"seed": 3}), store).run
    return store, earlier, later


@pytest.fixture(scope="module")
def options(two_layers) -> CircuitOptions:
    """The densest features, which are the most work, in several shards."""
    store, earlier, later = two_layers
    layout = Layout(store)
    features = commit.read_table(layout.associations_dir(layout.latest("associations").run) / "features")
    dense = features.sort("density", descending=True)["feature_id"].head(N_FEATURES)
    return CircuitOptions(from_sae=earlier, to_sae=later, feature=tuple(dense.to_list()), cells=CELLS, n_nulls=4)


@pytest.fixture(scope="module")
def whole(two_layers, options):
    return circuit(options, two_layers[0])


def table(result, name="feature_edge"):
    return commit.read_table(result.path / name)


def test_the_effect_is_the_mean_over_cells_of_single_patched_passes(two_layers, options, whole):
    store, _, later_run = two_layers
    layout, edges = Layout(store), table(whole)
    feature = int(edges["from_feature_id"].mode()[0])
    request = CircuitRequest.of(options, layout)
    context = SteeringContext(paths_of(request.chain, "circuit", num_gpus=0))
    later = load_stored_sae(layout.saes_dir(later_run))
    chain = request.chain.associations
    drawn = FeatureCells(layout.codes_dir(chain.codes), layout.cells_dir(chain.dataset), n_cells=CELLS, seed=0)
    changes, bases = [], []
    for block in context.blocks(drawn.of(feature)):
        for i in range(len(block.cells)):
            tokens = block.tokens.cells(i, i + 1)
            genes = torch.from_numpy(~tokens.is_special)

            def ablated(x, info):
                z = context.sae.encode(x).to_dense()[:, feature] * ~info.is_special
                return x - z[:, None] * context.sae.W_dec[feature]

            def codes(patch, tokens=tokens, genes=genes):
                (x,) = context.model.activations(tokens, ["layer.2"], patches={"layer.1": patch}).values()
                return later.encode(x).to_dense()[genes].mean(0)

            base = codes(lambda x, _: x)
            if (moved := codes(ablated)).equal(base):
                continue
            changes.append(moved - base)
            bases.append(base)
    effect, base = torch.stack(changes).mean(0), torch.stack(bases).mean(0)
    own = edges.filter(from_feature_id=feature)
    assert own.height > 3
    for to, found, share, n in own.select("to_feature_id", "effect", "share", "n_cells").iter_rows():
        assert n == len(changes)
        assert found == pytest.approx(float(effect[to]), abs=2e-5)
        if share is not None:
            assert share == pytest.approx(float(effect[to] / base[to]), rel=1e-2, abs=1e-3)


def test_q_is_over_all_pairs_and_the_rows_are_those_of_smallest_p(whole):
    edges = table(whole)
    draws = commit.read_table(whole.path / "draws")
    assert edges.select((pl.col("p") == pl.max_horizontal("p_random", "p_mixture")).all()).item()
    assert set(edges["relation"]) <= {"excites", "inhibits"}
    assert edges.filter(relation="excites")["effect"].max() < 0
    assert edges.group_by("from_feature_id").len()["len"].max() <= max(EDGES_KEPT, draws["to_feature_id"].n_unique())
    if edges.height == draws.height:
        np.testing.assert_allclose(edges["q"], false_discovery_control(edges["p"]), rtol=1e-12)
    assert (edges["n_agree"] <= edges["n_donors"]).all()
    known = edges.drop_nulls("p_donor")
    assert known.select(pl.col("p_donor").is_between(0, 1).all()).item()


def test_a_second_call_makes_nothing_and_sql_reads_the_tables(two_layers, whole, options):
    store, earlier, later = two_layers
    again = circuit(options, store)
    assert (again.done, again.run) == (0, whole.run)
    opened = FeatureStore.open(store)
    rows = opened.sql("SELECT from_sae, to_sae, effect, q FROM feature_edge ORDER BY p LIMIT 3")
    assert set(rows["from_sae"]) == {earlier}
    assert set(rows["to_sae"]) == {later}
    for name in CIRCUIT_TABLES:
        assert opened.sql(f"SELECT count(*) AS n FROM {name}").item() >= 0


@pytest.mark.slow
def test_a_run_that_was_interrupted_resumes_to_the_same_bytes(two_layers, whole, options, tmp_path):
    store = shutil.copytree(two_layers[0], tmp_path / "store")
    shutil.rmtree(Layout(store).kind_dir("circuits"))
    shutil.rmtree(store / "commits")
    assert_same_bytes(resumed(lambda: circuit(options, store)), whole, CIRCUIT_TABLES)


def test_without_names_the_newest_associations_and_the_newest_later_sae_are_taken(two_layers, chain):
    store, earlier, later = two_layers
    request = CircuitRequest.of(CircuitOptions(), Layout(store))
    assert (request.chain.associations.sae, request.later) == (earlier, later)
    # a message about data that moved names it
    assert request.job("draws").paths.stage == "circuit"
    with pytest.raises(
        UsageError, match=r"no SAE of a later layer of tiny than layer\.1.*scsae extract DATA --layer N"
    ):
        CircuitRequest.of(CircuitOptions(), Layout(chain.store))


def test_saes_that_do_not_belong_together_are_refused_and_nothing_is_written(two_layers):
    store, earlier, later = two_layers
    layout = Layout(store)
    before = set(layout.kind_dir("circuits").iterdir()) if layout.kind_dir("circuits").exists() else set()
    with pytest.raises(ConfigError, match=r"'layer.1' does not come after 'layer.1'"):
        circuit(CircuitOptions(from_sae=earlier, to_sae=earlier), store)
    with pytest.raises(UsageError, match=r"--from-sae was .* has no associations; make them with `scsae encode --sae"):
        circuit(CircuitOptions(from_sae=later, to_sae=earlier), store)
    with pytest.raises(UsageError, match="--feature was 99999; this SAE has features 0 to"):
        circuit(CircuitOptions(from_sae=earlier, to_sae=later, feature=99999), store)
    after = set(layout.kind_dir("circuits").iterdir()) if layout.kind_dir("circuits").exists() else set()
    assert after == before


def test_donors_agree_and_their_p_is_that_of_flipped_signs():
    rng = np.random.default_rng(0)
    donors = rng.normal(0.5, 1, (6, 4)) * 1e-6
    own = LaterEffect(
        feature_id=np.arange(4),
        n_cells_fired=np.full(4, 6),
        base=np.ones(4),
        effect=np.stack([donors.mean(0)] * 3),
        of_donor=donors,
        n_cells=6,
    )
    n_donors, n_agree, p = across_donors(own)
    expected = permutation_test(
        (donors,), lambda x, axis: np.abs(x.mean(axis)), permutation_type="samples", axis=0, alternative="greater"
    )
    np.testing.assert_allclose(p, expected.pvalue)
    assert n_donors == 6
    assert n_agree.tolist() == (np.sign(donors) == np.sign(donors.mean(0))).sum(0).tolist()
    assert np.isnan(across_donors(replace(own, of_donor=donors[:1]))[2]).all()


def edges_of(pairs, q=0.01):
    return pl.DataFrame(
        [{"from_feature_id": a, "to_feature_id": b, "z": 5.0, "q": q} for a, b in pairs],
        schema={"from_feature_id": pl.Int32, "to_feature_id": pl.Int32, "z": pl.Float64, "q": pl.Float64},
    )


def test_modules_are_groups_that_hang_together():
    edges = pl.concat([edges_of([(0, 5), (0, 6), (1, 5), (1, 6), (2, 8), (3, 8), (7, 9)]), edges_of([(2, 5)], q=0.5)])
    found = modules_frame(edges, from_sae="a", to_sae="b")
    groups = [
        set(own.select("sae", "feature_id").iter_rows()) for _, own in found.group_by("module", maintain_order=True)
    ]
    assert groups == [{("a", 0), ("a", 1), ("b", 5), ("b", 6)}, {("a", 2), ("a", 3), ("b", 8)}]
    assert found.filter(sae="a", feature_id=0)["n_edges"].item() == 2
    assert modules_frame(edges.filter(pl.col("q") > Q), from_sae="a", to_sae="b").height == 0


def test_gene_sets_of_a_module_are_those_that_more_of_it_have_than_chance_gives():
    edges = edges_of([(0, 5), (0, 6), (1, 5), (1, 6), (2, 8), (3, 8)])
    modules = modules_frame(edges, from_sae="a", to_sae="b")
    rows = [("a", f, "set" if f < 2 else None) for f in range(20)] + [("b", 5, "set"), ("b", 6, "other")]
    of_features = pl.DataFrame(rows, schema=["sae", "feature_id", "gene_set"], orient="row").with_columns(
        pl.col("feature_id").cast(pl.Int32), collection=pl.when(pl.col("gene_set").is_not_null()).then(pl.lit("c"))
    )
    found = module_gene_sets(modules, of_features)
    p = hypergeom.sf([2, 0], 22, [3, 1], 4)
    np.testing.assert_allclose(found.sort("p")["p"], p)
    # the second module has no feature with a set, which makes two more tests
    np.testing.assert_allclose(found.sort("p")["q"], false_discovery_control([*p, 1.0, 1.0])[:2])
    assert found.sort("p").row(0, named=True)["gene_set"] == "set"
