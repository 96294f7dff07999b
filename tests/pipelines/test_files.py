"""Stages on files that are no .h5ad in CSR: the same activations, all stages after them, and what is said of a file."""

import shutil

import anndata
import cell_files
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from typer.testing import CliRunner

from feature_store.cells import read_cells, source_location, write_source_location
from feature_store.errors import InputError
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from pipelines.associate import associate
from pipelines.baseline import baseline
from pipelines.cli import app
from pipelines.config import AssociateOptions, BaselineOptions, DataOptions, EncodeOptions
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.extract import extract
from pipelines.inputs import load_recorded_source
from pipelines.inspection import inspect_data
from pipelines.train import train

pytestmark = pytest.mark.usefixtures("module_without_actors")


@pytest.fixture(scope="module")
def cells(tiny_cells):
    """The tiny cells with ids of the genes, which 10x files need; the tiny model knows the symbols alone."""
    adata = tiny_cells.copy()
    adata.var["gene_ids"] = [f"id{i}" for i in range(adata.n_vars)]
    return adata


@pytest.fixture
def obs(cells, tmp_path):
    path = tmp_path / "obs.csv"
    cells.obs.to_csv(path)
    return path


def parts_of(run):
    return [part.read_bytes() for part in commit.Run.open(run).parts()]


def columns_of(run):
    frame = commit.read_table(run)
    return frame.drop([name for name in frame.columns if name == "dataset"])


@pytest.fixture(scope="module")
def calm(extract_options, module_without_actors, tmp_path_factory):
    """The activations of the tiny cells as an .h5ad in CSR."""
    return extract(extract_options, tmp_path_factory.mktemp("calm"))[0]


@pytest.mark.parametrize("how", ["mtx, 3, gz", "parquet"])
def test_activations_are_those_of_the_same_cells_in_csr(how, cells, obs, calm, extract_options, tmp_path):
    path = cell_files.FORMATS[how](cells, tmp_path)
    options = extract_options.model_copy(
        update={"data": (path,), "obs": (obs,) if "10x" in how or "mtx" in how else ()}
    )
    found = extract(options, tmp_path / "store")[0]
    mine, theirs = (commit.read_table(run.path) for run in (found, calm))
    assert mine.equals(theirs)


@pytest.mark.slow
def test_every_stage_reads_a_turned_matrix_and_turns_it_once(
    cells, obs, extract_options, train_options, tmp_path, capsys
):
    path = cell_files.mtx(cells, tmp_path)
    layout = Layout(tmp_path / "store")
    result = extract(extract_options.model_copy(update={"data": (path,), "obs": (obs,)}), layout.root)[0]
    said = capsys.readouterr().err
    assert said.count("turned once") == 1
    assert "MB" in said
    assert "72 of 72 cells" in result.facts["obs table"]
    assert "rows/" in result.facts["NOT STORED CELL BY CELL"]
    train(train_options, layout.root)
    encode(EncodeOptions(fused=True), layout.root)
    associate(AssociateOptions(), layout.root)
    assert "turned once" not in capsys.readouterr().err
    assert len(list((layout.root / "rows").iterdir())) == 1
    # parts that are gone are made again; a folder that was moved is found
    shutil.rmtree(layout.root / "rows")
    shutil.move(path, tmp_path / "moved")
    with pytest.raises(UsageError, match="--data NEWPATH"):
        load_recorded_source(layout, result.facts["dataset"])
    dataset = result.facts["dataset"]
    shutil.rmtree(layout.cells_dir(dataset) / "expression")
    shutil.rmtree(layout.root / "associations")
    associate(AssociateOptions(data=(tmp_path / "moved",)), layout.root)
    assert "turned once" in capsys.readouterr().err
    assert source_location(layout, dataset).paths == (str(tmp_path / "moved"),)


def test_a_collection_that_was_moved_is_found_again(cells, extract_options, tmp_path):
    path = cell_files.collection(cells, tmp_path)
    layout = Layout(tmp_path / "store")
    dataset = extract(extract_options.model_copy(update={"data": (path,)}), layout.root)[0].facts["dataset"]
    where = source_location(layout, dataset)
    assert len(where.paths) == 3
    write_source_location(layout, dataset, where._replace(paths=tuple(f"{one}-old" for one in where.paths)))
    from pipelines.moved_data import record_if_same

    assert record_if_same(layout, dataset, (path,))
    assert source_location(layout, dataset).paths == where.paths


def test_errors_after_opening_turn_nothing(cells, extract_options, tmp_path):
    path = cell_files.h5ad(cells, tmp_path, sparse.csc_matrix)
    for change, error in ({"donor": "nobody"}, InputError), ({"layer": ("9",)}, UsageError):
        with pytest.raises(error):
            extract(extract_options.model_copy(update={"data": (path,), **change}), tmp_path / "store")
        assert not (tmp_path / "store" / "rows").exists()


@pytest.mark.slow
def test_a_model_of_random_weights_runs_over_the_data_set_with_its_annotations_from_a_table(
    cells, obs, extract_options, train_options, tmp_path
):
    bare, store = cells.copy(), tmp_path / "store"
    bare.obs = bare.obs[[]]
    bare.write_h5ad(tmp_path / "bare.h5ad")
    options = extract_options.model_copy(update={"data": (tmp_path / "bare.h5ad",), "obs": (obs,)})
    first = extract(options, store)[0]
    train(train_options, store)
    encode(EncodeOptions(), store)
    associate(AssociateOptions(), store)
    made = baseline(BaselineOptions(kind=("random-model",), fit_tokens=500), store)
    assert [result.kind for result in made] == ["activations", "saes", "codes", "associations"]
    assert made[0].facts["dataset"] == first.facts["dataset"]
    assert [info.run for info in Layout(store).runs("cells")] == [first.facts["dataset"]]
    changed = bare[:, ::-1].copy()
    changed.write_h5ad(tmp_path / "bare.h5ad")
    shutil.rmtree(made[0].path)
    with pytest.raises(UsageError, match=r"bare\.h5ad.* changed"):
        baseline(BaselineOptions(kind=("random-model",), fit_tokens=500), store)


def test_inspect_says_what_a_file_is_and_what_was_not_read(cells, obs, tiny_model, tmp_path):
    antibodies = anndata.AnnData(
        sparse.csr_matrix(np.ones((cells.n_obs, 2), np.float32)), obs=cells.obs, var=pd.DataFrame(index=["CD4", "CD8"])
    )
    both = anndata.concat([cells, antibodies], axis=1, merge="first")
    both.var["gene_ids"] = [f"id{i}" for i in range(both.n_vars)]
    both.var["feature_types"] = [cell_files.GENES] * cells.n_vars + ["Antibody Capture"] * 2
    path = cell_files.mtx(both, tmp_path)
    facts = inspect_data(DataOptions(data=(path,), model=str(tiny_model), obs=(obs,)))
    assert facts["format"] == "10x matrix.mtx"
    assert facts["matrix"] == "matrix (counts)"
    assert facts["features left out"] == "2 Antibody Capture"
    assert "72 of 72 cells" in facts["obs table"]
    assert "donor" in facts["obs columns"]
    assert "MB" in facts["NOT STORED CELL BY CELL"]
    assert not (tmp_path / "rows").exists()
    lists = cell_files.gene_lists(cells, tmp_path)
    shutil.copy(obs, lists / "metadata" / "obs_metadata.csv")
    facts = inspect_data(DataOptions(data=(lists,), model=str(tiny_model)))
    assert "gene_metadata.parquet" in facts["format"]
    assert "--obs" in facts["not read"]


@pytest.mark.slow
def test_other_data_take_a_table_from_the_command_line(
    cells, obs, extract_options, train_options, tmp_path, tiny_model
):
    store = tmp_path / "store"
    extract(extract_options, store)
    train(train_options, store)
    path = cell_files.tenx_3(cells, tmp_path)
    line = ["encode", "--data", str(path), "--obs", str(obs), "--donor", "donor", "--store", str(store)]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.exception
    layout = Layout(store)
    (dataset,) = (folder.name for folder in (store / "cells").iterdir() if folder.name.startswith("filtered"))
    assert read_cells(layout.cells_dir(dataset))["donor"].to_list() == cells.obs["donor"].tolist()
    refused = CliRunner().invoke(app, ["encode", "--obs", str(obs), "--store", str(store)])
    assert "obs" in str(refused.exception)
    inspected = CliRunner().invoke(app, ["inspect", str(path), "--obs", str(obs), "--model", str(tiny_model)])
    assert inspected.exit_code == 0
    assert "72 of 72 cells" in inspected.stdout
