"""Data and model together: which gene is which token, and where several files of one data set lie."""

import json
import re
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest

from feature_store.activations import ActivationReader
from feature_store.cells import load_source_location, open_source, save_source_location, write_cells
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from pipelines.config import DataOptions, EncodeOptions, check
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.extract import extract
from pipelines.inputs import load_inputs, load_recorded_source, matrix_facts, token_of_gene
from pipelines.inspection import inspect_data
from pipelines.runtime import progress
from sae_core.errors import VocabularyError
from sae_core.scfm import load_model


@pytest.fixture
def table_of(tmp_path):
    """Names of genes -> the table of their symbols and tokens under the mini model."""

    def make(names):
        counts = np.ones((4, len(names)), dtype=np.float32)
        file = tmp_path / "cells.h5ad"
        obs = pd.DataFrame(index=[f"c{i}" for i in range(4)])
        anndata.AnnData(X=counts, obs=obs, var=pd.DataFrame(index=names)).write_h5ad(file)
        return token_of_gene(load_inputs(DataOptions(data=file)))

    return make


def test_genes_named_by_ensembl_id_get_the_models_symbols(table_of):
    table = table_of(["ENSG00000105369.12", "ENSG00000156738", "ENSG00000999999"])
    vocabulary = load_model("mini").vocabulary
    assert table["symbol"].to_list() == ["CD79A", "MS4A1", "ENSG00000999999"]
    assert table["gene_id"].to_list() == [vocabulary.id_of("CD79A"), vocabulary.id_of("MS4A1"), None]


def test_genes_named_by_symbol_keep_their_names(table_of):
    table = table_of(["CD79A", "not a gene"])
    assert table["symbol"].to_list() == ["CD79A", "not a gene"]
    assert table["gene_id"].is_null().to_list() == [False, True]


@pytest.fixture
def two_files(tmp_path, tiny_cells):
    """The tiny cells in two files: the first 40 with all genes but the last, the others with all but the first."""
    paths = tmp_path / "first.h5ad", tmp_path / "second.h5ad"
    for path, part in zip(paths, (tiny_cells[:40, :-1], tiny_cells[40:, 1:]), strict=True):
        part.copy().write_h5ad(path)
    return paths


def test_data_is_one_path_or_several(two_files):
    for data, wanted in (
        (two_files[0], two_files[:1]),
        (str(two_files[0]), two_files[:1]),
        ([str(path) for path in two_files], two_files),
    ):
        assert check(DataOptions, {"data": data}, "a recipe").data == wanted
    with pytest.raises(UsageError, match=r"a recipe: data was \(\)|a recipe: data was \[\]"):
        check(DataOptions, {"data": []}, "a recipe")
    with pytest.raises(UsageError, match="a recipe: data was 3"):
        check(DataOptions, {"data": 3}, "a recipe")


def test_the_probe_of_several_files_looks_into_each(two_files, tiny_model):
    inputs = load_inputs(DataOptions(data=two_files, model=str(tiny_model)))
    assert (inputs.source.n_cells, inputs.source.n_genes, inputs.source.n_genes_in_all) == (72, 30, 28)
    assert len(inputs.coverage.genes_per_cell) == 72
    assert inputs.match.n_matched == 28


@pytest.fixture
def remembered(two_files, tmp_path):
    """Both files as data sets of a store: the first alone, and both."""
    layout = Layout(tmp_path / "store")
    for name, paths in (("one", two_files[0]), ("both", two_files)):
        with open_source(paths) as source:
            write_cells(layout, source, dataset=name)
            save_source_location(layout, name, source)
    return layout


def test_the_files_of_a_data_set_are_found_again_in_their_order(remembered, two_files):
    assert load_recorded_source(remembered, "one").paths == two_files[:1]
    both = load_recorded_source(remembered, "both")
    assert both.paths == two_files
    assert both.digest == open_source(two_files).digest
    noted = load_source_location(remembered, "one")
    source = open_source(two_files[0])
    assert noted == {
        "path": str(two_files[0]),
        "matrix": "X",
        "where": None,
        "digest": source.digest,
        "state": [list(source.states[0])],
        "version": [""],
        "obs": [],
    }


def test_the_file_that_changed_is_named(remembered, two_files, tiny_cells):
    tiny_cells[40:, 2:].copy().write_h5ad(two_files[1])
    with pytest.raises(UsageError, match=r"second\.h5ad changed since its extraction .*scsae extract"):
        load_recorded_source(remembered, "both")
    assert load_recorded_source(remembered, "one").n_cells == 40
    two_files[1].unlink()
    with pytest.raises(UsageError, match=r"second\.h5ad is not there.*--data NEWPATH"):
        load_recorded_source(remembered, "both")


def test_activations_of_two_files_are_those_of_the_model_on_each(
    two_files, tiny_model, tmp_path, without_actors, extract_options
):
    """The last gene of one file and the first two are unknown to the model or absent, and change nothing."""
    options = extract_options.model_copy(update={"data": two_files, "shard_cells": 16})
    both = stored(extract(options, tmp_path / "both")[0].path)
    for path, start, stop in ((two_files[0], 0, 40), (two_files[1], 40, 72)):
        alone = stored(extract(options.model_copy(update={"data": (path,)}), tmp_path / path.stem)[0].path)
        own = (both["cell_idx"] >= start) & (both["cell_idx"] < stop)
        np.testing.assert_array_equal(both["cell_idx"][own] - start, alone["cell_idx"])
        np.testing.assert_array_equal(both["gene_id"][own], alone["gene_id"])
        np.testing.assert_allclose(both["act"][own], alone["act"], atol=1e-5)


def stored(folder):
    """Every row of an activations run, by column."""
    reader = ActivationReader(commit.Run.open(folder))
    blocks = [reader.read(group.shard, group.group) for group in reader.row_groups]
    names = {"cell_idx": lambda b: b.cell_idx, "gene_id": lambda b: b.gene_id, "act": lambda b: b.act_f32()}
    return {name: np.concatenate([read(block) for block in blocks]) for name, read in names.items()}


def test_one_file_given_alone_or_in_a_list_is_the_same_run(two_files, tmp_path, without_actors, extract_options):
    runs = [
        extract(check(type(extract_options), {**extract_options.model_dump(), "data": data}, "x"), tmp_path / name)[0]
        for name, data in (("alone", two_files[0]), ("listed", [two_files[0]]))
    ]
    assert runs[0].run == runs[1].run
    assert commit.Run.open(runs[0].path).manifest() == commit.Run.open(runs[1].path).manifest()


def test_inspect_says_what_several_files_have_in_common(two_files, tiny_model):
    facts = inspect_data(DataOptions(data=two_files, model=str(tiny_model)))
    assert facts["data"] == f"{two_files[0]}, {two_files[1]}"
    assert (facts["cells"], facts["genes"]) == (72, "30, 28 of them in every file")
    assert facts["obs columns"] == "file, type, donor, batch"


def test_only_what_takes_long_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SHOW_AFTER_S", 60.0)
    with progress.delayed_progress_bar("hash", 3, "MB") as report:
        report(3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SHOW_AFTER_S", 0.0)
    with progress.delayed_progress_bar("hash", 3, "MB") as report:
        report(3)
    assert capsys.readouterr().err.startswith("hash         3/3 MB")


def test_the_matrices_and_features_that_were_passed_over_are_told_with_the_reason(tmp_path, tiny_cells):
    adata = tiny_cells.copy()
    adata.layers["umi"] = adata.X.copy()
    adata.X = adata.X.log1p()
    adata.var["feature_types"] = ["Gene Expression"] * (adata.n_vars - 2) + ["Antibody Capture"] * 2
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)
    with open_source(path) as source:
        facts = matrix_facts(source)
    assert facts["matrix"] == "layers/umi (counts)"
    assert facts["why this matrix"] == f"counts of {adata.n_vars - 2} genes"
    assert facts["passed over"] == f"X (log-normalised of {adata.n_vars - 2} genes)"
    assert facts["features left out"] == "2 Antibody Capture"


def test_inspect_says_what_is_particular_about_a_checkpoint(tiny_data, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "tuned")
    args = json.loads((folder / "args.json").read_text())
    tuned = {"n_bins": None, "include_zero_gene": True, "n_hvg": 1200}
    (folder / "args.json").write_text(json.dumps(args | tuned))
    facts = inspect_data(DataOptions(data=(tiny_data,), model=str(folder)))
    for told in ("n_bins null: 51", "n_hvg 1200", "nonzero genes alone", "input_genes"):
        assert told in facts["checkpoint"]


@pytest.fixture
def mouse_like(tmp_path, tiny_cells):
    """The tiny cells with symbols in lower case, of which two are the model's."""
    adata = tiny_cells.copy()
    adata.var_names = [name if i in (5, 25) else name.lower() for i, name in enumerate(adata.var_names)]
    path = tmp_path / "mouse.h5ad"
    adata.write_h5ad(path)
    return path


def test_data_of_which_few_counts_match_are_refused_unless_told(
    mouse_like, tmp_path, without_actors, extract_options, tiny_cells
):
    known = tiny_cells.X[:, [5, 25]].sum() / tiny_cells.X.sum()
    store = tmp_path / "store"
    options = extract_options.model_copy(update={"data": (mouse_like,)})
    with pytest.raises(UsageError, match=r"species.*`scsae inspect`.*--min-matched-share") as error:
        extract(options, store)
    assert f"{known:.1%}" in str(error.value)
    assert not store.exists()
    facts = inspect_data(DataOptions(data=mouse_like, model=options.model))
    assert facts["REFUSED BY EXTRACT"] == str(error.value).replace("see `scsae inspect`, or ", "")
    share = float(re.search(r"--min-matched-share (\S+)$", str(error.value))[1])
    (result,) = extract(options.model_copy(update={"min_matched_share": share}), store)
    assert result.facts["tokens"] == (tiny_cells.X[:, [5, 25]] > 0).sum()
    assert "FEW GENES MATCHED" in result.facts
    n_empty = int((tiny_cells.X[:, [5, 25]].sum(axis=1) == 0).sum())
    assert result.facts["CELLS WITHOUT TOKENS"].startswith(f"{n_empty} of {tiny_cells.n_obs} ")


def test_extract_says_what_annotations_lack_and_counts_no_donor_where_none_is_known(
    tmp_path, tiny_cells, extract_options, without_actors
):
    adata = tiny_cells.copy()
    adata.obs["one"] = "same"
    adata.obs.loc[adata.obs_names[:7], "donor"] = None
    adata.obs.loc[adata.obs_names[:5], "type"] = None
    adata.obs_names = ["twice" if i in (1, 4) else name for i, name in enumerate(adata.obs_names)]
    path, n = tmp_path / "lacking.h5ad", adata.n_obs
    adata.write_h5ad(path)
    options = extract_options.model_copy(
        update={"data": (path,), "donor": "donor", "cell_type": "type", "label": ("one",)}
    )
    (found,) = extract(options, tmp_path / "store")
    assert found.facts["cells without a value"] == f"of {n} cells, 7 have no donor, 5 have no cell_type"
    assert found.facts["labels with one value"].startswith("one: ")
    assert found.facts["cell ids that are not unique"] == "those of 2 cells; look these up by --cell-idx"
    assert found.facts["splits"].endswith("7 cells without a donor in train, where cells go that may be of any donor")
    (whole,) = extract(extract_options, tmp_path / "store")
    assert not any("cells without a value" in name or "cell ids" in name for name in whole.facts)


def test_data_with_genes_as_rows_are_told_to_be_turned(tmp_path, tiny_model, tiny_cells):
    options = DataOptions(data=tmp_path / "turned.h5ad", model=str(tiny_model))
    tiny_cells.T.write_h5ad(options.data[0])
    with pytest.raises(UsageError, match=rf"rows of \S+ are genes \({tiny_cells.var_names[0]}, .*`adata.T`"):
        inspect_data(options)
    other = tiny_cells.copy()
    other.var_names = [f"other {i}" for i in range(other.n_vars)]
    other.write_h5ad(options.data[0])
    with pytest.raises(VocabularyError, match="none of the"):
        inspect_data(options)


def test_other_data_of_which_few_counts_match_are_not_encoded(mouse_like, own_store, without_actors):
    with pytest.raises(UsageError, match="--min-matched-share"):
        encode(EncodeOptions(data=mouse_like), own_store)


def test_data_that_match_are_not_said_to_be_refused(tiny_data, tiny_model):
    assert "REFUSED BY EXTRACT" not in inspect_data(DataOptions(data=tiny_data, model=str(tiny_model)))
