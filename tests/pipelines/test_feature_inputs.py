"""`scsae inputs`: its tables against single forwards and scipy, its resumption, and what it refuses."""

from __future__ import annotations

import shutil

import numpy as np
import polars as pl
import pytest
from interrupted_stages import assert_same_bytes, resumed
from scipy.stats import false_discovery_control, spearmanr

from feature_store import FeatureStore
from feature_store.cells import read_panel_cells
from feature_store.codes import CodesRun, load_cell_codes
from feature_store.storage import commit
from feature_store.storage.layout import INPUT_TABLES, Layout
from pipelines.config import InputsOptions
from pipelines.effects import cells as effect_cells
from pipelines.effects.chain import paths_of
from pipelines.errors import UsageError
from pipelines.feature_inputs import inputs
from pipelines.feature_inputs.request import InputsRequest
from pipelines.steering.context import SteeringContext
from sae_core.errors import ConfigError
from sae_core.scfm import ScGPT, Site, Tokens

pytestmark = pytest.mark.usefixtures("module_without_actors")
CELLS, GENES, N_FEATURES = 12, 6, 20
OWN, OTHER = "own token", "other tokens"


@pytest.fixture(scope="module")
def options(chain) -> InputsOptions:
    """The densest features, which are the most work, in several shards."""
    layout = Layout(chain.store)
    features = commit.read_table(layout.associations_dir(layout.latest("associations").run) / "features")
    dense = features.sort("density", descending=True)["feature_id"].head(N_FEATURES)
    return InputsOptions(feature=tuple(dense.to_list()), cells=CELLS, genes=GENES, n_nulls=2)


@pytest.fixture(scope="module")
def whole(chain, options, tmp_path_factory):
    """A store with the inputs of some features."""
    store = shutil.copytree(chain.store, tmp_path_factory.mktemp("inputs") / "store")
    return store, inputs(options, store)


def table(result, name="feature_input"):
    return commit.read_table(result.path / name)


def codes_of(context, tokens, feature):
    """The codes of a feature on the tokens of one cell, by a forward pass of its own."""
    x = context.model.activations(tokens, [context.site])[Site.parse(context.site)]
    return context.sae.encode(x).to_dense()[:, feature].double().numpy() * ~tokens.is_special


def without(tokens, row) -> Tokens:
    kept = np.delete(np.arange(tokens.n_tokens), row)
    return Tokens(
        offsets=np.array([0, len(kept)]),
        gene_id=tokens.gene_id[kept],
        value=tokens.value[kept],
        is_special=tokens.is_special[kept],
    )


def test_changes_are_means_over_cells_of_single_forwards_without_the_token(whole, options):
    store, result = whole
    found = table(result)
    feature = int(found["feature_id"].mode()[0])
    layout = Layout(store)
    request = InputsRequest.of(options, layout)
    context = SteeringContext(paths_of(request.chain, "inputs", num_gpus=0))
    codes = CodesRun.open(layout.codes_dir(request.chain.associations.codes))
    cells = read_panel_cells(layout.cells_dir(request.chain.associations.dataset)).filter(split="test")
    index = cells["cell_idx"].sort().to_numpy()
    fires = index[load_cell_codes(codes, index)[:, [feature]].toarray()[:, 0] > 0]
    assert len(fires) <= CELLS  # all of them are taken
    symbols = context.model.vocabulary.tokens
    changes: dict[str, list[tuple[float, float, float]]] = {}
    sums = []
    for block in context.blocks(fires):
        for i in range(len(block.cells)):
            tokens = block.tokens.cells(i, i + 1)
            before = codes_of(context, tokens, feature)
            if before.sum() == 0:
                continue
            sums.append(before.sum())
            for row in np.flatnonzero(~tokens.is_special):
                after = codes_of(context, without(tokens, row), feature)
                own, other = before[row], before.sum() - before[row] - after.sum()
                changes.setdefault(symbols[tokens.gene_id[row]], []).append((own, other, before.sum()))
    mine = found.filter(feature_id=feature)
    assert mine.height >= 4
    for gene, path, change, share, n_cells in mine.select("gene", "path", "change", "share", "n_cells").iter_rows():
        own, other, total = np.array(changes[gene]).T
        expected = own if path == OWN else other
        assert n_cells == len(expected)
        assert change == pytest.approx(expected.mean(), abs=1e-4)
        assert share == pytest.approx(expected.sum() / total.sum(), abs=1e-4)
    line = table(result, "feature_input_summary").row(by_predicate=pl.col("feature_id") == feature, named=True)
    assert line["n_cells"] == len(sums)
    for column, path in (("share_own", OWN), ("share_other", OTHER)):
        rows = mine.filter(path=path)
        assert line[column] == pytest.approx((rows["change"] * rows["n_cells"]).sum() / sum(sums), abs=1e-4)


def test_q_is_over_all_pairs_of_a_path_and_z_is_the_distance_of_the_share_from_the_null(whole):
    found = table(whole[1])
    assert found["path"].unique().sort().to_list() == [OTHER, OWN]
    for (_,), rows in found.group_by("path"):
        np.testing.assert_allclose(rows["q"], false_discovery_control(rows["p"]), rtol=1e-12)
    assert set(found["null"]) == {"genes"}
    assert set(found["split"]) == {"test"}
    assert found["n_cells"].min() >= effect_cells.MIN_CELLS
    z = (found["share"] - found["null_mean"]) / found["null_sd"]
    np.testing.assert_allclose(found["z"].fill_null(0), z.fill_nan(0), rtol=1e-6, atol=1e-9)
    assert (found.filter(path=OWN)["share"] >= 0).all()
    n_paths = found.group_by("feature_id", "gene").agg(pl.len(), pl.col("gradient").n_unique())
    assert (n_paths["len"] == 2).all()
    assert (n_paths["gradient"] == 1).all()


def test_every_feature_has_a_line_that_sums_up_its_genes(whole):
    found, summary = table(whole[1]), table(whole[1], "feature_input_summary")
    assert summary["feature_id"].to_list() == found["feature_id"].unique().sort().to_list()
    assert summary.height > 5
    for line in summary.iter_rows(named=True):
        mine = found.filter(feature_id=line["feature_id"])
        own, other = (mine.filter(path=path) for path in (OWN, OTHER))
        assert line["n_genes"] == own.height == other.height <= GENES
        assert line["n_nulls"] >= 2
        assert line["n_own"] == (own["q"] <= 0.05).sum()
        assert line["n_other"] == (other["q"] <= 0.05).sum()
        both = own.join(other, on="gene").with_columns(change=pl.col("change") + pl.col("change_right"))
        if line["gradient_spearman"] is not None:
            rank = spearmanr(both["gradient"], both["change"]).statistic
            assert line["gradient_spearman"] == pytest.approx(rank)
        chosen = both.filter((pl.col("q") <= 0.05) | (pl.col("q_right") <= 0.05), pl.col("change") > 0)
        assert line["top_gene"] == (None if chosen.is_empty() else chosen.sort("change")["gene"][-1])


def test_a_second_call_makes_nothing_and_sql_reads_the_tables(whole, options):
    store, first = whole
    again = inputs(options, store)
    assert (again.done, again.run) == (0, first.run)
    opened = FeatureStore.open(store)
    rows = opened.sql("SELECT feature_id, gene, path, share, q FROM feature_input ORDER BY p LIMIT 3")
    assert rows.height == 3
    assert opened.sql("SELECT count(*) AS n FROM feature_input_summary").item() > 0


@pytest.mark.slow
def test_a_run_that_was_interrupted_resumes_to_the_same_bytes(whole, chain, options, tmp_path):
    store = shutil.copytree(chain.store, tmp_path / "store")
    assert_same_bytes(resumed(lambda: inputs(options, store)), whole[1], INPUT_TABLES)


def test_named_features_get_more_null_genes_and_other_options_are_other_runs(chain):
    layout = Layout(chain.store)
    measured = InputsRequest.of(InputsOptions(), layout).measured
    assert InputsRequest.of(InputsOptions(feature=measured[:1]), layout).n_nulls == 25
    assert InputsRequest.of(InputsOptions(feature=measured[:20], genes=10), layout).n_nulls == 4
    assert InputsRequest.of(InputsOptions(feature=measured[:1], n_nulls=5), layout).n_nulls == 5
    ids = {
        InputsRequest.of(InputsOptions(seed=seed, cells=cells, genes=genes), layout).plan.id
        for seed in (0, 1)
        for cells in (4, 5)
        for genes in (3, 4)
    }
    assert len(ids) == 8


def test_unknown_features_are_refused_and_nothing_is_written(chain):
    layout = Layout(chain.store)
    with pytest.raises(UsageError, match="--feature was 99999; this SAE has features 0 to"):
        inputs(InputsOptions(feature=99999), chain.store)
    dead = commit.read_table(layout.associations_dir(layout.latest("associations").run) / "features").filter("dead")
    if dead.height:
        with pytest.raises(UsageError, match="never fires"):
            inputs(InputsOptions(feature=int(dead["feature_id"][0])), chain.store)
    assert not layout.kind_dir("inputs").exists()


def test_a_model_that_passes_no_gradient_is_refused_and_nothing_is_written(chain, options, monkeypatch):
    continued = ScGPT.continued
    monkeypatch.setattr(ScGPT, "continued", lambda *args, **named: continued(*args, **named).detach())
    with pytest.raises(ConfigError, match=r"passes no gradient from its embedding to layer\.1"):
        inputs(options, chain.store)
    assert not Layout(chain.store).kind_dir("inputs").exists()
