"""Fused encoding: the same bytes as encoding stored activations, and cells that no activation was ever stored of."""

import anndata
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from feature_store.activations import ActivationReader
from feature_store.cells import read_cells
from feature_store.codes import CodesRun, load_cell_codes
from feature_store.query.store import FeatureStore
from feature_store.storage import commit
from feature_store.storage.layout import CODES_TABLES, Layout
from pipelines import encode as stage
from pipelines import forward
from pipelines.associate import associate, associate_all
from pipelines.config import AssociateOptions, EncodeOptions, TrainOptions
from pipelines.encode import FreshActivations, FusedJob, encode, in_pieces
from pipelines.errors import UsageError
from pipelines.extract import extract, forward_job
from pipelines.inputs import load_inputs
from pipelines.train import train
from sae_core.sae import load_sae
from sae_core.scfm import load_model


def hashes(folder):
    """Sha256 of every part of a codes run, by table."""
    return {table: [m.sha256 for m in commit.Run.open(folder / table).manifest().shards] for table in CODES_TABLES}


@pytest.mark.parametrize("level", ["cell", "token"])
def test_fused_codes_are_byte_for_byte_those_of_the_stored_activations(own_store, without_actors, level):
    stored = encode(EncodeOptions(level=level), own_store)
    fused = encode(EncodeOptions(level=level, fused=True, shard_cells=16), own_store)
    assert fused.run != stored.run
    assert hashes(fused.path) == hashes(stored.path)


def test_fused_codes_round_as_the_activations_were_stored(chain, tmp_path, without_actors, train_options):
    half = chain.extract.model_copy(update={"dtype": "f16", "tokens_per_cell": 9})
    extract(half, tmp_path)
    train(train_options, tmp_path)
    stored = encode(EncodeOptions(), tmp_path)
    fused = encode(EncodeOptions(fused=True, shard_cells=16, tokens_per_cell=9), tmp_path)
    assert hashes(fused.path) == hashes(stored.path)


def test_pieces_of_a_fused_shard_are_the_row_groups_of_the_stored_one(chain, monkeypatch):
    run = commit.Run.open(Layout(chain.store).latest("activations").path)
    reader = ActivationReader(run)
    whole = [reader.read(group.shard, group.group) for group in reader.row_groups if group.shard == 2]
    monkeypatch.setattr(stage, "ROW_GROUP_ROWS", 100)
    monkeypatch.setattr(forward, "BLOCK_TOKENS", 70)
    job = FusedJob(
        forward=forward_job(chain.extract, load_inputs(chain.extract)),
        site="layer.1",
        dtype="f32",
    )
    pieces = list(in_pieces(FreshActivations(job).blocks(np.arange(32, 48))))
    assert [len(piece.cell_idx) for piece in pieces[:-1]] == [100] * (len(pieces) - 1)
    assert 0 < len(pieces[-1].cell_idx) <= 100
    for name in ("cell_idx", "token_pos", "gene_id"):
        joined = np.concatenate([getattr(piece, name) for piece in pieces])
        np.testing.assert_array_equal(joined, np.concatenate([getattr(block, name) for block in whole]))
    np.testing.assert_allclose(
        np.concatenate([piece.act for piece in pieces]), np.concatenate([block.act for block in whole]), atol=1e-5
    )


def test_an_sae_of_a_token_sample_encodes_all_tokens_when_fused(chain, tmp_path, without_actors, tiny_cells):
    extract(chain.extract.model_copy(update={"tokens_per_cell": 3}), tmp_path)
    train(TrainOptions(n_features=48, k=4, n_steps=30, batch_size=64, num_workers=0), tmp_path)
    fused = encode(EncodeOptions(fused=True), tmp_path)
    found = load_cell_codes(CodesRun.open(fused.path), np.arange(72)).toarray()
    model, sae = load_model(chain.extract.model), load_sae(Layout(tmp_path).latest("saes").path)
    rows = tiny_cells.X.tocsr()
    tokens = model.tokenize(rows.indptr, rows.indices, rows.data, model.match_genes(list(tiny_cells.var_names)), seed=0)
    dense = sae.encode(model.activations(tokens, ["layer.1"]).popitem()[1]).to_dense().numpy()
    wanted = np.zeros_like(found)
    np.maximum.at(wanted, tokens.cell_of_token()[~tokens.is_special], dense[~tokens.is_special])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_damaged_shard_of_a_fused_run_alone_is_made_again(own_store, without_actors):
    options = EncodeOptions(fused=True, shard_cells=16)
    before = encode(options, own_store)
    kept = hashes(before.path)
    part = commit.Run.open(before.path / "by_cell").part(3)
    part.write_bytes(part.read_bytes()[:-20])
    again = encode(options, own_store)
    assert (again.done, again.reused) == (1, 4)
    assert hashes(again.path) == kept


def test_another_data_set_is_encoded_and_associated_without_any_stored_activation(
    own_store, without_actors, tiny_cells, tmp_path
):
    other = tiny_cells[::-1].copy()
    other.obs["person"] = other.obs.pop("donor").to_numpy()
    other.write_h5ad(tmp_path / "other.h5ad")
    n_runs = len(Layout(own_store).runs("activations"))
    done = encode(EncodeOptions(data=(tmp_path / "other.h5ad",), donor="person", cell_type="type"), own_store)
    assert len(Layout(own_store).runs("activations")) == n_runs
    mine = load_cell_codes(CodesRun.open(done.path), np.arange(72)).toarray()
    theirs = load_cell_codes(CodesRun.open(encode(EncodeOptions(), own_store).path), np.arange(72)).toarray()
    np.testing.assert_allclose(mine, theirs[::-1], rtol=1e-4, atol=1e-5)
    associate(AssociateOptions(codes=done.run), own_store)
    labels = FeatureStore.open(own_store).sql("SELECT DISTINCT label FROM feature_label WHERE label_kind = 'cell_type'")
    assert set(labels["label"]) == {"A", "B"}
    cells = commit.read_table(Layout(own_store).cells_dir(done.facts["dataset"]))
    assert cells.filter(pl.col("donor").is_null()).is_empty()


def splits_of_donors(folder):
    return dict(read_cells(folder).select("donor", "split").unique().iter_rows())


def test_the_training_file_without_its_donors_keeps_the_split_of_every_cell(own_store, without_actors, chain):
    layout = Layout(own_store)
    (own,) = layout.runs("cells")
    done = encode(EncodeOptions(data=chain.extract.data, cell_type="type"), own_store)
    assert done.facts["dataset"] != own.run
    again = read_cells(layout.cells_dir(done.facts["dataset"]))
    assert again["split"].to_list() == read_cells(own.path)["split"].to_list()
    assert again["donor"].null_count() == again.height
    assert "72 cells keep the split" in done.facts["splits"]


def test_a_donor_keeps_its_split_in_other_data_and_the_same_file_is_the_same_data_set(
    own_store, without_actors, tiny_cells, tmp_path, chain
):
    layout = Layout(own_store)
    (own,) = layout.runs("cells")
    mine = splits_of_donors(own.path)
    other = tiny_cells[tiny_cells.obs["donor"].isin(["D0", "D1", "D2", "D3"])].copy()
    other.obs["person"] = other.obs.pop("donor").astype(str).replace({"D3": "new"}).to_numpy()
    other.write_h5ad(tmp_path / "other.h5ad")
    done = encode(EncodeOptions(data=(tmp_path / "other.h5ad",), donor="person"), own_store)
    theirs = splits_of_donors(layout.cells_dir(done.facts["dataset"]))
    assert {name: theirs[name] for name in ("D0", "D1", "D2")} == {name: mine[name] for name in ("D0", "D1", "D2")}
    assert theirs["new"] == mine["D3"], "it has the cells of D3"
    assert "keep the split" in done.facts["splits"]
    same = chain.extract.model_dump(include={"data", "donor", "batch", "cell_type"})
    assert encode(EncodeOptions(**same), own_store).facts["dataset"] == own.run


def test_cell_vectors_are_stored_trained_on_and_encoded_as_one_token_a_cell(chain, tmp_path, without_actors):
    taken = extract(chain.extract.model_copy(update={"readout": "mean"}), tmp_path)[0]
    assert taken.facts["tokens"] == 72
    train(TrainOptions(n_features=32, k=4, n_steps=30, batch_size=16, num_workers=0), tmp_path)
    stored = encode(EncodeOptions(), tmp_path)
    fused = encode(EncodeOptions(fused=True, shard_cells=16), tmp_path)
    assert hashes(fused.path) == hashes(stored.path)
    associate(AssociateOptions(codes=stored.run), tmp_path)
    genes = FeatureStore.open(tmp_path).sql("SELECT max(identity_recall) AS recall FROM feature_gene")
    assert not genes["recall"].item(), "a whole cell identifies no gene"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tokens_per_cell": 4}, r"tokens_per_cell .*give fused"),
        ({"donor": "who"}, r"donor .*give data"),
        ({"split_by": "cell"}, r"split_by .*give data"),
        ({"data": "d.h5ad", "split_by": "batch"}, r"split_by was 'batch'.*--batch COLUMN"),
        ({"data": "d.h5ad", "split_by": "cell", "split": "fold"}, r"split was 'fold'.*split_by was 'cell'"),
    ],
)
def test_options_that_nothing_would_follow_are_refused(given, words):
    from pipelines.config import check

    with pytest.raises(UsageError, match=words):
        check(EncodeOptions, given, "scsae encode")


def test_empty_droplets_are_counted_aloud_and_change_no_statistic(own_store, tmp_path, without_actors, tiny_cells):
    cells = tiny_cells.copy()
    # other cells than those of the SAE, whose splits are kept
    cells.X = cells.X[:, ::-1].copy()
    cells.obs_names = [f"new{i}" for i in range(cells.n_obs)]
    cells.obs["dealt"] = ["train", "select", "test"] * (cells.n_obs // 3)
    droplets = cells[cells.obs["type"] == "A"].copy()
    droplets.X = droplets.X * 0
    droplets.obs_names = [f"droplet{i}" for i in range(droplets.n_obs)]
    tables = {}
    for name, adata in (("cells", cells), ("both", anndata.concat([cells, droplets], merge="same"))):
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        options = AssociateOptions(data=tmp_path / f"{name}.h5ad", cell_type="type", split="dealt")
        encoded, associated = associate_all(options, own_store)
        said = "CELLS WITHOUT TOKENS"
        for result in (encoded, associated):
            assert (said in result.facts) == (name == "both")
        tables[name] = [commit.read_table(associated.path / table) for table in ("features", "feature_label")]
    assert associated.facts[said].startswith(f"{droplets.n_obs} of {cells.n_obs + droplets.n_obs}, ")
    for mine, wanted in zip(tables["both"], tables["cells"], strict=True):
        assert_frame_equal(mine, wanted)
    store = FeatureStore.open(own_store, associations=associated.run)
    assert store.panel_cells().select(pl.len()).collect().item() == cells.n_obs
    assert store.frame("cells").select(pl.len()).collect().item() == cells.n_obs + droplets.n_obs
