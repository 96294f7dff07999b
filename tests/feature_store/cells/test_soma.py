"""SOMA experiments: the cells of a condition, the layer of counts, columns of every kind, and what may be wrong."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import cell_files
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import soma_files
from scipy import sparse

from feature_store.cells import cellxgene_columns, open_source, write_cells
from feature_store.cells.soma_arrays import open_soma
from feature_store.errors import InputError
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import CellsPlan

if TYPE_CHECKING:
    from pathlib import Path

    import anndata

    from feature_store.cells import Source

pytest.importorskip("tiledbsoma", reason="tiledbsoma is not installed: pip install 'scsae[soma]'")

LUNG = "tissue == 'lung' and is_primary_data == True"
"""72 cells are lung and blood by turns, and every sixth, a lung, is not primary data."""
IN_LUNG = [i for i in range(72) if i % 2 == 0 and i % 6 > 0]


@pytest.fixture
def cells(tiny_cells: anndata.AnnData) -> anndata.AnnData:
    """The tiny cells with columns of every kind."""
    adata = tiny_cells.copy()
    adata.obs["type"] = pd.Categorical(adata.obs["type"])
    adata.obs["plate"] = pd.Categorical(np.arange(72) % 3 + 7)
    adata.obs["part"] = pd.Categorical([None if i == 5 else "ab"[i % 2] for i in range(72)])
    adata.obs["age"] = [np.nan if i == 3 else i / 2 for i in range(72)]
    adata.obs["smoker"] = np.arange(72) % 4 == 0
    adata.obs["n_umi"] = np.arange(72, dtype=np.int32)
    return adata


@pytest.fixture
def census(tiny_cells: anndata.AnnData, tmp_path: Path) -> Path:
    return soma_files.census(tiny_cells, tmp_path)


def dense(source: Source, start: int = 0, stop: int | None = None) -> np.ndarray:
    stop = source.n_cells if stop is None else stop
    rows = source.read_rows(start, stop)
    return sparse.csr_array((rows.data, rows.indices, rows.indptr), shape=(stop - start, source.n_genes)).toarray()


def test_a_condition_takes_the_cells_that_fulfil_it_in_their_order(census: Path, tiny_cells: anndata.AnnData) -> None:
    counts = tiny_cells.X.toarray()
    with open_source(census, where=LUNG) as source, open_source(census) as every:
        assert (source.n_cells, source.matrix, source.value_kind) == (24, "raw", "counts")
        assert source.filtered == ("24 of 72 cells",)
        assert (dense(source) == counts[IN_LUNG]).all()
        assert (dense(source, 5, 9) == counts[IN_LUNG[5:9]]).all()
        rows = source.read_cells(np.array([0, 20], dtype=np.int64))
        assert (sparse.csr_array(rows[::-1], shape=(2, 30)).toarray() == counts[[IN_LUNG[0], IN_LUNG[20]]]).all()
        assert source.obs().equals(every.obs()[IN_LUNG])
        assert source.obs(3, 4, ["donor_id"])["donor_id"].to_list() == [tiny_cells.obs["donor"].iloc[IN_LUNG[3]]]
        # the name of a cell of the Census is its soma_joinid, which is no annotation
        assert source.obs_names().to_list() == [str(100 + 3 * i) for i in IN_LUNG]
        assert "soma_joinid" not in source.obs_schema
        with pytest.raises(InputError, match=r"obsm/scvi .* is not read.*--vectors"):
            source.obsm("scvi")
        assert (every.filtered, (dense(every) == counts).all()) == (("",), True)


def test_blocks_and_steps_of_a_read_change_nothing(
    census: Path, tiny_cells: anndata.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.cells.soma_arrays.BLOCK_CELLS", 5)
    monkeypatch.setattr("feature_store.cells.soma_arrays.BUFFER_BYTES", 512)
    with open_source(census, where=LUNG) as source:
        assert (dense(source) == tiny_cells.X.toarray()[IN_LUNG]).all()
        assert source.obs(columns=["cell_type"])["cell_type"].to_list() == tiny_cells.obs["type"].iloc[IN_LUNG].tolist()


def test_columns_are_those_of_the_same_cells_in_an_h5ad(cells: anndata.AnnData, tmp_path: Path) -> None:
    path = cell_files.soma(cells, tmp_path)
    with open_source(path) as source, open_source(cell_files.h5ad(cells, tmp_path)) as csr:
        assert source.obs().equals(csr.obs())
        assert source.obs_schema == csr.obs_schema
        assert source.obs_schema["plate"] == pl.String
    with open_source(path, where="plate == 8 and smoker == False") as source:
        assert source.obs_names().to_list() == [f"cell{i}" for i in range(72) if i % 3 == 1 and i % 4]


def test_obs_that_is_indexed_by_names_and_has_gaps_is_read(tiny_cells: anndata.AnnData, tmp_path: Path) -> None:
    counts = sparse.coo_matrix(tiny_cells.X)
    ids = np.random.default_rng(0).permutation(72)
    obs = pd.DataFrame({"obs_id": tiny_cells.obs_names, "soma_joinid": ids, "type": list(tiny_cells.obs["type"])})
    var = pd.DataFrame({"soma_joinid": np.arange(30), "var_id": list(tiny_cells.var_names)})
    raw = sparse.coo_matrix((counts.data, (ids[counts.row], counts.col)), shape=(72, 30))
    kept = obs[~obs["soma_joinid"].between(10, 19)]
    path = soma_files.experiment(tmp_path / "experiment", kept, var, {"raw": raw}, index="obs_id")
    order = kept.sort_values("soma_joinid")
    for where, wanted in (
        (None, order),
        ("type == 'A' or type == 'B'", order),
        ("type == 'B'", order[order.type == "B"]),
    ):
        with open_source(path, where=where) as source:
            assert source.obs_names(3, 20).to_list() == wanted["obs_id"].tolist()[3:20]
            assert source.obs()["type"].to_list() == wanted["type"].tolist()
            assert (dense(source) == tiny_cells[wanted["obs_id"].tolist()].X.toarray()).all()


def test_the_census_needs_no_options(census: Path, tiny_cells: anndata.AnnData) -> None:
    with open_source(census, where=LUNG) as source:
        found = cellxgene_columns(source)
        assert found is not None
        assert (found.donor, found.cell_type, found.batch, found.labels) == ("donor_id", None, None, ("disease",))
        assert found.n_secondary == 0
        assert source.gene_symbols == list(tiny_cells.var_names)
        assert source.ensembl_ids is not None
        assert source.ensembl_ids[:2] == ["ENSG00000000000", "ENSG00000000001"]


def test_the_mark_of_the_schema_is_found_in_uns(cells: anndata.AnnData, tmp_path: Path) -> None:
    cells.uns = {"schema_version": "5.2.0"}
    cells.var["feature_is_filtered"] = np.arange(30) < 2
    with open_source(cell_files.soma(cells, tmp_path)) as source:
        assert source.cellxgene == (("5.2.0", 2),)


BAD_CONDITIONS = {
    "tissu == 'lung'": "tissu does not exist.*the columns are .*tissue",
    "tissue = 'lung'": "Could not parse",
    "": "Could not parse",
    "tissue == 'lung' and": "Could not parse",
    "tissue == 'heart'": "no cell of .* is as --where says",
}


@pytest.mark.parametrize("where", BAD_CONDITIONS)
def test_a_condition_that_cannot_be_read_or_fits_no_cell_is_one_error(where: str, census: Path) -> None:
    with pytest.raises(InputError, match=BAD_CONDITIONS[where]) as error:
        open_source(census, where=where)
    assert "\n" not in str(error.value)
    assert "--where" in str(error.value)


def test_the_condition_is_part_of_what_the_data_set_is(census: Path, tmp_path: Path) -> None:
    with open_source(census, where=LUNG) as source, open_source(census) as every:
        assert source.digests == every.digests
        assert source.digest not in (every.digest, *every.digests)
        layout = Layout(tmp_path / "store")
        names = [write_cells(layout, one, donor="donor_id") for one in (source, every)]
        plans = [CellsPlan.of(commit.Run.open(layout.cells_dir(name))) for name in names]
    assert [plan.where for plan in plans] == [LUNG, None]
    assert names[0] != names[1]
    shutil.copytree(census, tmp_path / "copy")
    with open_source(tmp_path / "copy", where=LUNG) as copy:
        assert copy.digest == source.digest
    next((tmp_path / "copy" / "obs").rglob("a0.tdb")).unlink()
    with pytest.raises(InputError, match=r"obs column 'assay' of .*copy cannot be read \(.*copy it again"):
        _ = open_source(tmp_path / "copy").obs(columns=["assay"])


def test_counts_are_found_in_another_layer_and_normalised_values_have_to_be_named(
    tiny_cells: anndata.AnnData, tmp_path: Path
) -> None:
    path = cell_files.soma(tiny_cells, tmp_path, layer="data")
    with open_source(path) as source:
        assert source.matrix == "data"
        assert source.choices[0].reason == "counts of 30 genes"
    normalised = soma_files.census(tiny_cells, tmp_path)
    with open_source(normalised) as source:
        assert source.choices[0].passed_over == {
            "normalized": "non-negative, not integers, below 20: log-normalised",
        }
    with open_source(normalised, matrix="RNA/normalized") as source:
        assert (source.matrix, source.value_kind) == ("normalized", "lognorm")
    with pytest.raises(InputError, match=r"'norm'.*normalized, raw"):
        open_source(normalised, matrix="norm")


def test_an_experiment_without_counts_is_refused_with_what_its_layers_hold(
    tiny_cells: anndata.AnnData, tmp_path: Path
) -> None:
    logged = tiny_cells.copy()
    logged.X = tiny_cells.X.multiply(1e4 / tiny_cells.X.sum(axis=1)).tocsr().log1p().astype(np.float32)
    # the raw of an AnnData becomes a measurement of its own
    path = cell_files.soma(logged, tmp_path, layer="data", raw=tiny_cells)
    with pytest.raises(InputError, match=r"no X layer .* RNA .*data: .*log-normalised.* raw/data; .*--matrix data"):
        open_source(path)
    with open_source(path, matrix="raw/data") as source:
        assert (source.matrix, source.value_kind) == ("raw/data", "counts")
        assert source.ignored == (("the measurements RNA",),)
        assert (dense(source) == tiny_cells.X.toarray()).all()


def test_several_measurements_have_to_be_named(tiny_cells: anndata.AnnData, tmp_path: Path) -> None:
    path = soma_files.census(tiny_cells, tmp_path, measurements=("gex", "adt"))
    with pytest.raises(
        InputError, match=r"2 measurements, and none is called RNA: adt, gex; .*--matrix adt/normalized"
    ):
        open_source(path)
    with open_source(path, matrix="gex/raw") as source:
        assert (source.matrix, source.n_cells) == ("gex/raw", 72)


def test_values_of_genes_that_var_lacks_and_missing_rows_are_named(tiny_cells: anndata.AnnData, tmp_path: Path) -> None:
    counts = sparse.coo_matrix(tiny_cells.X)
    obs = pd.DataFrame({"soma_joinid": np.arange(72), "obs_id": list(tiny_cells.obs_names)})
    var = pd.DataFrame({"soma_joinid": np.arange(30), "var_id": list(tiny_cells.var_names)})
    fewer = soma_files.experiment(tmp_path / "fewer", obs, var[:29], {"raw": counts})
    with pytest.raises(InputError, match=r"the layer raw of .*fewer has a value at the soma_joinid 29 of a gene"):
        open_source(fewer, matrix="raw")
    short = sparse.coo_matrix(tiny_cells.X[:60])
    with pytest.raises(InputError, match=r"has 60 rows, but obs has the soma_joinid 71"):
        open_source(soma_files.experiment(tmp_path / "short", obs, var, {"raw": short}), matrix="raw")
    unnamed = soma_files.experiment(tmp_path / "unnamed", obs, var.rename(columns={"var_id": "x"}), {"raw": counts})
    with pytest.raises(InputError, match="no names of genes"):
        open_source(unnamed)


def test_other_soma_objects_name_the_experiment(census: Path, tmp_path: Path) -> None:
    import tiledbsoma

    with pytest.raises(InputError, match=r"is a SOMADataFrame, .*give .*census$"):
        open_source(census / "obs")
    with tiledbsoma.Collection.create(str(tmp_path / "soma")) as root:
        inner = root.add_new_collection("census_data")
        inner.add_new_collection("homo_sapiens", tiledbsoma.Experiment)
    shutil.copytree(census, tmp_path / "soma" / "census_data" / "homo_sapiens", dirs_exist_ok=True)
    with pytest.raises(InputError, match=r"is a SOMACollection, .*census_data/homo_sapiens"):
        open_source(tmp_path / "soma")
    with pytest.raises(InputError, match=r"is a folder .*it holds census"):
        open_source(tmp_path)


@pytest.mark.parametrize("lost", ["__group", "obs/__schema", "ms/RNA/X/raw/__fragments", "ms/RNA/var"])
def test_a_folder_that_was_copied_in_part_is_one_error(lost: str, census: Path) -> None:
    if (census / lost).is_dir():
        shutil.rmtree(census / lost)
    else:
        (census / lost).unlink()
    with pytest.raises(InputError, match="census") as error:
        dense(open_source(census))
    assert "\n" not in str(error.value)


def test_tiledb_keeps_to_the_threads_and_the_memory_of_the_process(census: Path) -> None:
    n = pa.cpu_count()
    pa.set_cpu_count(1)
    try:
        with open_soma(census) as opened:
            config = opened.context.tiledb_config
    finally:
        pa.set_cpu_count(n)
    assert [str(config[f"sm.{kind}_concurrency_level"]) for kind in ("compute", "io")] == ["1", "1"]
    assert int(config["sm.mem.total_budget"]) == 1 << 31
