"""A file in the schema of CELLxGENE needs no option, an option overrules it, and no other file is guessed at."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest

from feature_store.cells import open_source
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import CellsPlan
from pipelines.config import DataOptions, EncodeOptions, ExtractOptions, check
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.extract import extract
from pipelines.inspection import inspect_data
from pipelines.train import train

pytestmark = pytest.mark.usefixtures("module_without_actors")

REFERENCE = "https://github.com/chanzuckerberg/single-cell-curation/blob/main/schema/5.2.0/schema.md"


def in_schema(cells, **uns):
    """Cells as CELLxGENE publishes them: Ensembl ids, feature_name, log-normalised X, counts in raw."""
    counts, n = cells.X, cells.n_obs
    var = pd.DataFrame(
        {"feature_name": pd.Categorical(cells.var_names), "feature_biotype": pd.Categorical(["gene"] * cells.n_vars)},
        index=[f"ENSG{i:011d}" for i in range(cells.n_vars)],
    )
    obs = pd.DataFrame(
        {
            "donor_id": pd.Categorical(cells.obs["donor"]),
            "cell_type": pd.Categorical(cells.obs["type"]),
            "assay": pd.Categorical(["10x 3' v3"] * n),
            "disease": pd.Categorical(["normal", "influenza", "normal"] * (n // 3)),
            "tissue": pd.Categorical(["blood"] * n),
            "sex": pd.Categorical(["female", "male"] * (n // 2)),
            "is_primary_data": [i % 6 > 0 for i in range(n)],
        },
        index=cells.obs_names,
    )
    raw = anndata.AnnData(counts, obs=obs, var=var)
    adata = raw.copy()
    adata.X = counts.multiply(1e4 / counts.sum(axis=1)).tocsr().log1p().astype(np.float32)
    adata.raw = raw
    adata.var["feature_is_filtered"] = [i in (28, 29) for i in range(cells.n_vars)]
    adata.uns = {"schema_version": "5.2.0", "schema_reference": REFERENCE, "title": "tiny", **uns}
    return adata


@pytest.fixture(scope="module")
def published(tiny_cells, tmp_path_factory):
    file = tmp_path_factory.mktemp("published") / "published.h5ad"
    in_schema(tiny_cells).write_h5ad(file)
    return file


@pytest.fixture
def options(published, tiny_model):
    return ExtractOptions(data=published, model=str(tiny_model), layer=("1",), shard_cells=72, dtype="f32")


def columns(store, result):
    plan = CellsPlan.of(commit.Run.open(Layout(store).cells_dir(result.facts["dataset"])))
    return plan.donor, plan.cell_type, plan.batch, plan.labels


def test_columns_counts_and_symbols_are_taken_without_an_option_and_it_is_said_why(options, published, tmp_path):
    (result,) = extract(options, tmp_path)
    assert columns(tmp_path, result) == ("donor_id", "cell_type", None, ("disease",))
    assert result.facts["matrix"] == "raw (counts)"
    inspected = inspect_data(DataOptions(data=published, model=options.model))
    for facts in (result.facts, inspected):
        said = facts["CELLxGENE schema"]
        for words in ("5.2.0", "donor: donor_id (6 values)", "cell type: cell_type (2 values: A, B)"):
            assert words in said
        assert "batch: none (assay is 10x 3' v3 alone)" in said
        assert "labels: disease (2 values: influenza, normal)" in said
        assert facts["possible labels"] == "--label sex (2 values: female, male)"
        assert facts["not primary data"].startswith("12 of 72 cells")
        assert facts["feature_is_filtered"].startswith("2 genes, which X lacks and raw has")
    assert inspected["cells"] == 72
    with open_source(published) as source:
        assert source.gene_symbols[:2] == ["GENE0", "GENE1"]
        assert source.ensembl_ids[0] == "ENSG00000000000"


def test_options_overrule_the_schema_and_none_turns_a_column_off(options, tmp_path):
    given = {"donor": "none", "batch": "sex", "label": ("tissue", "sex")}
    (result,) = extract(options.model_copy(update=given), tmp_path)
    assert columns(tmp_path, result) == (None, "cell_type", "sex", ("tissue", "sex"))
    said = result.facts["CELLxGENE schema"]
    assert "donor: none (--donor)" in said
    assert "batch: sex (--batch)" in said
    off = {"donor": "none", "batch": "none", "cell_type": "none", "label": ("none",)}
    (bare,) = extract(options.model_copy(update=off), tmp_path)
    assert columns(tmp_path, bare) == (None, None, None, ())
    # what a later stage reads again is what was taken, not what the schema says
    assert extract(options, tmp_path, dataset=bare.facts["dataset"])[0].run == bare.run


def test_several_assays_are_batches(tiny_cells, options, tmp_path):
    cells = in_schema(tiny_cells)
    cells.obs["assay"] = tiny_cells.obs["batch"].to_numpy()
    cells.write_h5ad(tmp_path / "two.h5ad")
    (result,) = extract(options.model_copy(update={"data": (tmp_path / "two.h5ad",)}), tmp_path / "store")
    assert columns(tmp_path / "store", result)[2] == "assay"


@pytest.mark.slow
def test_other_data_in_the_schema_are_encoded_with_their_columns(options, train_options, tiny_cells, tmp_path):
    store = tmp_path / "store"
    extract(options, store)
    train(train_options.model_copy(update={"n_steps": 5, "recovery_cells": 0}), store)
    other = in_schema(tiny_cells[::-1].copy())
    other.obs_names = [f"other{i}" for i in range(other.n_obs)]
    other.write_h5ad(tmp_path / "other.h5ad")
    result = encode(EncodeOptions(data=tmp_path / "other.h5ad", cell_type="none"), store)
    assert columns(store, result) == ("donor_id", None, None, ("disease",))
    assert "cell type: none (--cell-type)" in result.facts["CELLxGENE schema"]


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": "of our own"},
        {"schema_version": None},
        {"schema_reference": "https://example.org/schema.md"},
        {"schema_version": ["5.2.0", "6.0.0"]},
    ],
)
def test_a_file_without_the_mark_is_not_guessed_at(tiny_cells, options, tmp_path, change):
    cells = in_schema(tiny_cells, **change)
    cells.uns = {name: value for name, value in cells.uns.items() if value is not None}
    cells.write_h5ad(tmp_path / "own.h5ad")
    (result,) = extract(options.model_copy(update={"data": (tmp_path / "own.h5ad",)}), tmp_path / "store")
    assert columns(tmp_path / "store", result) == (None, None, None, ())
    assert "CELLxGENE schema" not in result.facts


def test_the_version_alone_is_a_mark_only_with_the_columns_and_in_every_file(tiny_cells, options, tmp_path):
    cells = in_schema(tiny_cells[:36].copy())
    del cells.uns["schema_reference"]
    cells.write_h5ad(tmp_path / "old.h5ad")
    with open_source(tmp_path / "old.h5ad") as source:
        assert source.cellxgene[0].version == "5.2.0"
    plain = in_schema(tiny_cells[36:].copy())
    plain.uns = {}
    plain.write_h5ad(tmp_path / "plain.h5ad")
    lacking = cells.copy()
    del lacking.obs["donor_id"]
    lacking.write_h5ad(tmp_path / "lacking.h5ad")
    for files in (("old.h5ad", "plain.h5ad"), ("lacking.h5ad",)):
        data = tuple(tmp_path / name for name in files)
        (result,) = extract(options.model_copy(update={"data": data}), tmp_path / "store")
        assert columns(tmp_path / "store", result)[:3] == (None, None, None)


def test_the_mark_is_found_in_a_zarr_folder(tiny_cells, tmp_path):
    cells = in_schema(tiny_cells)
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=3):
        warnings.simplefilter("ignore")
        cells.write_zarr(tmp_path / "cells.zarr")
    with open_source(tmp_path / "cells.zarr") as source:
        assert source.cellxgene == ((("5.2.0", 2)),)


def test_none_beside_a_column_and_a_split_by_no_donor_are_refused():
    for values, words in (
        ({"label": ["none", "sex"]}, "label was"),
        ({"split_by": "donor", "donor": "none"}, "split_by was 'donor'"),
    ):
        with pytest.raises(UsageError, match=words):
            check(ExtractOptions, {"data": "x.h5ad", **values}, "scsae extract")


def test_none_is_no_column_of_a_file_without_the_schema_either(extract_options, tmp_path):
    given = {"donor": "none", "cell_type": "none"}
    (result,) = extract(extract_options.model_copy(update=given), tmp_path)
    assert columns(tmp_path, result) == (None, None, "batch", ())
