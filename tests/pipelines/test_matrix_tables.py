"""The pass over a large matrix by actors: the tables of one process, resumed after a kill, and nothing left behind."""

import anndata
import numpy as np
import pytest

from feature_store.cells import open_source
from feature_store.cells.gene_table import matrix_tables
from feature_store.errors import InputError
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from pipelines import matrix_tables as stage
from pipelines.config import ActorOptions, EncodeOptions
from pipelines.encode import encode
from pipelines.extract import extract
from pipelines.matrix_tables import tables_by_actors


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("feature_store.cells.gene_table.ONE_SHARD_CELLS", 20)
    monkeypatch.setattr("feature_store.cells.gene_table.SHARD_CELLS", 10)


@pytest.fixture
def normalised(tmp_path, tiny_cells):
    """The tiny cells with logarithms, whose sums depend on the order of addition."""
    counts = tiny_cells.X.toarray()
    values = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 1e4).astype(np.float32)
    path = tmp_path / "normalised.h5ad"
    anndata.AnnData(values, obs=tiny_cells.obs, var=tiny_cells.var).write_h5ad(path)
    return path


@pytest.mark.ray
@pytest.mark.usefixtures("small_shards")
@pytest.mark.slow
def test_any_number_of_actors_makes_the_tables_of_one_process(ray_local, normalised, tmp_path):
    with open_source(normalised) as source:
        alone = matrix_tables(source)
        for n in (1, 2):
            layout = Layout(tmp_path / str(n))
            with tables_by_actors(layout, source, ActorOptions(num_actors=n)) as make:
                made = make(source)
                assert made.genes.equals(alone.genes)
                assert made.digests.equals(alone.digests)
                assert made.n_shards == 8
            assert list((tmp_path / str(n)).glob("matrices/*")) == []


@pytest.mark.ray
@pytest.mark.usefixtures("small_shards")
@pytest.mark.slow
def test_an_impossible_value_is_the_input_error_of_the_actor(ray_local, tmp_path):
    counts = np.random.default_rng(0).poisson(2.0, (20_000, 3)).astype(np.float32)
    counts[11_111, 1] = np.nan
    anndata.AnnData(counts).write_h5ad(tmp_path / "bad.h5ad")
    with open_source(tmp_path / "bad.h5ad") as source, pytest.raises(InputError, match=r"row 11111.*not finite"):
        with tables_by_actors(Layout(tmp_path / "store"), source, ActorOptions(num_actors=1)) as make:
            make(source)


@pytest.mark.usefixtures("small_shards")
def test_an_extraction_that_is_killed_in_the_pass_resumes_it(
    tmp_path, without_actors, extract_options, monkeypatch, shards_here
):
    calm = extract(extract_options, tmp_path / "calm")[0]
    done = []

    class Stop(Exception):
        pass

    class Counted(stage.MatrixReader):
        def shard(self, number):
            if len(done) == 3:
                raise Stop
            done.append(number)
            return super().shard(number)

    monkeypatch.setattr(stage, "MatrixReader", Counted)
    store = tmp_path / "killed"
    with pytest.raises(Stop):
        extract(extract_options, store)
    assert done == [0, 1, 2]
    assert not (store / "cells").exists()
    assert {folder.name for folder in (store / "matrices").glob("*/*")} == {"digests", "sums"}
    done.clear()
    monkeypatch.setattr(stage, "do_shards", lambda worker, work, shards, *_, **__: done.extend(shards))
    with pytest.raises(Exception, match="not committed"):
        extract(extract_options, store)
    assert done == [3, 4, 5, 6, 7]
    done[:] = [None] * 9
    monkeypatch.setattr(stage, "do_shards", shards_here)
    monkeypatch.setattr(stage, "MatrixReader", Counted.__base__)
    resumed = extract(extract_options, store)[0]
    assert resumed.run == calm.run
    assert list((store / "matrices").glob("*")) == []
    for folder in (Layout.cells_dir, Layout.genes_dir, Layout.digests_dir):
        of = [folder(Layout(tmp_path / name), calm.facts["dataset"]) for name in ("calm", "killed")]
        assert commit.Run.open(of[0]).manifest() == commit.Run.open(of[1]).manifest()


@pytest.mark.usefixtures("small_shards")
def test_what_was_left_by_a_process_that_was_killed_after_its_tables_is_removed(
    tmp_path, without_actors, extract_options, monkeypatch
):
    def die(_folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage.filesystem, "remove_folder", die)
        with pytest.raises(KeyboardInterrupt):
            extract(extract_options, tmp_path)
    assert list((tmp_path / "matrices").glob("*"))
    extract(extract_options, tmp_path)
    assert list((tmp_path / "matrices").glob("*")) == []


@pytest.mark.usefixtures("small_shards")
def test_cells_of_other_data_are_recognised_by_digests_that_were_made_before_their_splits(
    own_store, tmp_path, without_actors, tiny_cells
):
    other = tiny_cells[::-1].copy()
    other.obs = other.obs.drop(columns="donor")
    path = tmp_path / "other.h5ad"
    other.write_h5ad(path)
    result = encode(EncodeOptions(data=path), own_store)
    layout = Layout(own_store)
    (trained_on,) = (info.run for info in layout.runs("cells") if info.run != result.facts["dataset"])
    splits = [
        commit.read_table(layout.cells_dir(name), ["split"])["split"].to_list()
        for name in (trained_on, result.facts["dataset"])
    ]
    assert splits[0] == splits[1][::-1]
    assert commit.Run.open(layout.digests_dir(result.facts["dataset"])).n_shards == 8
    assert list((own_store / "matrices").glob("*")) == []
