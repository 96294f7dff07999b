"""Extraction: what is stored equals what the model computes, whatever the shards, and a killed run loses nothing."""

import os

import numpy as np
import pytest
from stored_bytes import hashes_of

from feature_store.activations import ActivationReader
from feature_store.cells import read_cells
from feature_store.errors import BusyError, InputError
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from pipelines.associate import associate
from pipelines.config import AssociateOptions, EncodeOptions
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.extract import Extractor, Workload, extract, forward_job
from pipelines.inputs import load_inputs
from pipelines.train import train
from sae_core.errors import ConfigError
from sae_core.scfm import load_model


def stored(run):
    """Keys and activations of a run, in its order."""
    reader = ActivationReader(commit.Run.open(run))
    blocks = [reader.read(group.shard, group.group) for group in reader.row_groups]
    keys = [np.concatenate([getattr(b, name) for b in blocks]) for name in ("cell_idx", "token_pos", "gene_id")]
    return *keys, np.concatenate([b.act_f32() for b in blocks])


def expected(options, source, site="layer.1"):
    """Gene tokens of all cells and their activations, straight from the model."""
    model = load_model(options.model)
    rows = source.X.tocsr()
    tokens = model.tokenize(rows.indptr, rows.indices, rows.data, model.match_genes(list(source.var_names)), seed=0)
    act = next(iter(model.activations(tokens, [site]).values())).numpy()
    genes = ~tokens.is_special
    return tokens.cell_of_token()[genes], tokens.gene_id[genes], act[genes]


def test_stored_activations_are_those_of_the_model_on_every_gene_token(chain, tiny_cells):
    run = Layout(chain.store).latest("activations").path
    cell_idx, token_pos, gene_id, act = stored(run)
    cells, genes, wanted = expected(chain.extract, tiny_cells)
    np.testing.assert_array_equal(cell_idx, cells)
    np.testing.assert_array_equal(gene_id, genes)
    np.testing.assert_allclose(act, wanted, atol=1e-5)
    assert (token_pos >= 1).all()


def test_shard_size_changes_the_files_and_not_the_activations(chain, without_actors, tmp_path):
    other = extract(chain.extract.model_copy(update={"shard_cells": 7}), tmp_path)[0]
    assert commit.Run.open(other.path).n_shards == 11
    for mine, theirs in zip(stored(other.path), stored(Layout(chain.store).latest("activations").path), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_splits_of_a_column_are_those_of_the_cells_and_stay_with_the_same_file(
    chain, without_actors, tiny_cells, train_options, tmp_path
):
    folds = {"D0": "test", "D1": "select"}
    cells = tiny_cells.copy()
    cells.obs["fold"] = [folds.get(donor, "train") for donor in cells.obs["donor"]]
    cells.write_h5ad(tmp_path / "folds.h5ad")
    options = chain.extract.model_copy(update={"data": (tmp_path / "folds.h5ad",), "split": "fold"})
    layout = Layout(tmp_path / "store")
    extracted = extract(options, layout.root)[0]
    found = read_cells(layout.cells_dir(extracted.facts["dataset"]))
    assert found["split"].to_list() == found["fold"].to_list()
    # without the column, what the SAE knows of the donors decides
    train(train_options, layout.root)
    encoded = encode(EncodeOptions(data=options.data, donor="donor"), layout.root)
    assert read_cells(layout.cells_dir(encoded.facts["dataset"]))["split"].to_list() == found["fold"].to_list()


def test_running_again_does_nothing_and_finds_the_same_run(ray_local, chain):
    before = commit.Run.open(Layout(chain.store).latest("activations").path).manifest()
    again = extract(chain.extract, chain.store)[0]
    assert (again.done, again.reused) == (0, 5)
    assert commit.Run.open(again.path).manifest() == before


def test_actors_write_the_bytes_of_one_process_in_every_stage(ray_local, chain, tmp_path):
    extract(chain.extract.model_copy(update={"num_actors": 2}), tmp_path)
    train(chain.train, tmp_path)
    encode(EncodeOptions(num_actors=2), tmp_path)
    associate(AssociateOptions(num_actors=2), tmp_path)
    here, there = Layout(chain.store), Layout(tmp_path)
    for kind in ("activations", "saes", "codes", "associations"):
        one, other = here.latest(kind), there.latest(kind)
        assert one.run == other.run
        assert hashes_of(one.path) == hashes_of(other.path)


def test_several_sites_come_from_one_call_as_one_run_each(chain, without_actors, tiny_cells, tmp_path):
    results = extract(chain.extract.model_copy(update={"layer": ("0", "attention.2", "embedding")}), tmp_path)
    assert [result.facts["site"] for result in results] == ["layer.0", "attention.2", "embedding"]
    for result in results:
        *_, wanted = expected(chain.extract, tiny_cells, site=result.facts["site"])
        np.testing.assert_allclose(stored(result.path)[-1], wanted, atol=1e-5)


def test_a_token_sample_is_a_subset_that_does_not_depend_on_the_shards(chain, without_actors, tmp_path):
    sampled = chain.extract.model_copy(update={"tokens_per_cell": 4})
    one = stored(extract(sampled, tmp_path / "a")[0].path)
    two = stored(extract(sampled.model_copy(update={"shard_cells": 5}), tmp_path / "b")[0].path)
    everything = set(
        zip(*(column.tolist() for column in stored(Layout(chain.store).latest("activations").path)[:2]), strict=True)
    )
    for mine, theirs in zip(one[:3], two[:3], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert np.bincount(one[0]).max() == 4
    assert set(zip(one[0].tolist(), one[1].tolist(), strict=True)) < everything


def test_half_precision_stores_the_rounded_values(chain, without_actors, tmp_path):
    exact = stored(Layout(chain.store).latest("activations").path)[-1]
    half = extract(chain.extract.model_copy(update={"dtype": "f16"}), tmp_path)[0]
    np.testing.assert_allclose(stored(half.path)[-1], exact, rtol=1e-3, atol=1e-3)
    assert (
        commit.Run.open(half.path).manifest().bytes
        < commit.Run.open(Layout(chain.store).latest("activations").path).manifest().bytes
    )


def test_an_actor_leaves_a_committed_shard_alone(chain, ray_local):
    run = commit.Run.open(Layout(chain.store).latest("activations").path)
    work = Workload(
        forward=forward_job(chain.extract, load_inputs(chain.extract)),
        sites=("layer.1",),
        folders=(str(run.path),),
        dtype="f32",
        shard_cells=16,
        n_cells=72,
        sample=None,
    )
    before = run.part(0).stat().st_mtime_ns
    assert Extractor(work).shard(0) == {"cells": 16, "tokens": 0, "bytes": 0, "tokenless": 0, "halvings": 0}
    assert run.part(0).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"layer": ()}, UsageError, "no --layer was given; tiny has layers 0 to 2"),
        ({"layer": ("3",)}, UsageError, "--layer was '3'; tiny has layers 0 to 2"),
        ({"layer": ("second",)}, ConfigError, "names no site"),
        ({"donor": "doner"}, InputError, "'donor'"),
        ({"matrix": "layers/counts"}, InputError, "--matrix was 'layers/counts'"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(chain, tmp_path, change, error, words):
    store = tmp_path / "store"
    with pytest.raises(error, match=words):
        extract(chain.extract.model_copy(update=change), store)
    assert not store.exists()


def test_a_second_driver_of_the_same_run_leaves_and_says_who_is_at_work(chain, tmp_path, without_actors):
    run = commit.Run.open(Layout(chain.store).latest("activations").path)
    theirs = commit.Run.create(Layout(tmp_path).activations_dir(run.path.name), run.plan)
    with theirs.exclusive(), pytest.raises(BusyError, match=f"process {os.getpid()}"):
        extract(chain.extract, tmp_path)
    assert not list(theirs.path.glob("part-*"))
    assert extract(chain.extract, tmp_path)[0].done == 5
    assert commit.Run.open(theirs.path).manifest() == run.manifest()
