"""An AnnData in the place of a path: the same content is the same run, and the object stays as it was."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scsae
from feature_store.cells import open_source, source_location
from feature_store.errors import InputError
from feature_store.storage.layout import Layout
from pipelines.errors import UsageError
from pipelines.given_data import files_of

N = 72


@pytest.fixture
def cells(tiny_cells):
    """The tiny cells with a layer, a raw, an array and what no stage reads."""
    made = tiny_cells.copy()
    made.layers["log"] = made.X.copy()
    made.layers["log"].data = np.log1p(made.layers["log"].data)
    made.obsm["X_pca"] = np.arange(2.0 * made.n_obs).reshape(-1, 2)
    made.uns["colours"] = np.array(["#ffffff"])
    return made


@pytest.fixture
def file_name(tmp_path):
    """The name of the one file that an AnnData becomes."""

    def name(data, **options):
        (file,) = files_of(data, tmp_path / "data", **options)
        assert file.exists()
        return file.name

    return name


def kept(cells):
    """Everything of an object by which a change of it would show."""
    return (
        {name: str(dtype) for name, dtype in cells.obs.dtypes.items()},
        cells.obs.to_csv(),
        cells.X.toarray().tobytes(),
        [sorted(part) for part in (cells.layers, cells.obsm, cells.uns)],
        (cells.isbacked, cells.is_view, str(cells.filename)),
    )


def test_objects_views_and_backed_objects_of_one_content_are_one_file(cells, file_name, tmp_path):
    before = kept(cells)
    names = [file_name(cells), file_name(cells.copy()), file_name(cells[:])]
    assert len(set(names)) == 1
    assert kept(cells) == before
    cells.write_h5ad(tmp_path / "on_disk.h5ad", convert_strings_to_categoricals=False)
    backed = anndata.read_h5ad(tmp_path / "on_disk.h5ad", backed="r")
    assert file_name(backed) == names[0]
    assert backed.filename == tmp_path / "on_disk.h5ad"
    assert file_name(backed[10:20]) == file_name(cells[10:20]) != names[0]
    # what was changed in memory counts, and not what the file holds
    backed.obs["donor"] = "one"
    assert file_name(backed) != names[0]
    backed.file.close()


def test_what_no_stage_reads_changes_nothing_and_everything_else_does(cells, file_name):
    first = file_name(cells)
    cells.uns["more"], cells.varm["w"] = [1], np.ones((cells.n_vars, 2))
    cells.obsp["d"] = sp.eye(cells.n_obs, format="csr")
    assert file_name(cells) == first
    changed = [cells.copy() for _ in range(5)]
    changed[0].X[0, 0] += 1
    changed[1].obs["donor"] = "one"
    changed[2].var_names = [f"{name}x" for name in cells.var_names]
    changed[3].obsm["X_pca"][0, 0] = -1
    changed[4].layers["log"].data[0] += 1
    assert len({first, *map(file_name, changed)}) == 6
    # of the matrix that is named alone
    assert file_name(changed[4], matrix="X") == file_name(cells, matrix="X") != first
    assert file_name(changed[4], matrix="layers/log") != file_name(cells, matrix="layers/log")


def test_the_file_holds_the_matrix_that_was_named(cells, tmp_path):
    cells.raw = cells.copy()
    view = cells[5:40, 3:]
    (file,) = files_of(view, tmp_path, matrix="raw")
    read = anndata.read_h5ad(file)
    assert read.X is None
    assert (read.raw.X.toarray() == cells.X.toarray()[5:40]).all()
    assert list(read.layers) == []
    with pytest.raises(UsageError, match=r"'layers/lg'.*did you mean 'layers/log'.*X, layers/log, raw"):
        files_of(cells, tmp_path, matrix="layers/lg")


def test_dense_matrices_and_columns_of_any_type_are_read_as_they_were(cells, tmp_path):
    cells.X = cells.X.toarray()
    cells.obs["text"] = pd.array(["x", None] * (N // 2), dtype="string")
    cells.obs["number"] = pd.array([1, None] * (N // 2), dtype="Int64")
    cells.obs["category"] = pd.Categorical(["a", "b"] * (N // 2))
    with open_source(files_of(cells, tmp_path, matrix="X"), matrix="X") as source:
        obs = source.obs(0, 2, ["text", "number", "category"])
        rows = source.read_rows(0, N)
    assert obs.rows() == [("x", 1, "a"), (None, None, "b")]
    assert (sp.csr_array((rows.data, rows.indices, rows.indptr), shape=cells.shape).toarray() == cells.X).all()


def test_the_mark_of_cellxgene_stays(cells, tmp_path):
    cells.uns["schema_version"] = "5.1.0"
    (file,) = files_of(cells, tmp_path)
    assert set(anndata.read_h5ad(file).uns) == {"schema_version"}


def test_what_cannot_be_cells_is_one_sentence(cells, tmp_path):
    with pytest.raises(InputError, match="int; give the path"):
        files_of(3, tmp_path)
    with pytest.raises(InputError, match="empty list"):
        files_of([], tmp_path)
    cells.obs["mixed"] = [1, "a"] * (cells.n_obs // 2)
    with pytest.raises(InputError, match=r"what \.h5ad does not .*one type"):
        files_of(cells, tmp_path / "mixed")
    assert list((tmp_path / "mixed").iterdir()) == []


def test_every_stage_takes_an_anndata_and_finds_its_run_again(cells, tiny_model, tmp_path, without_actors, monkeypatch):
    monkeypatch.setattr("pipelines.train.register_sae", lambda *_, **__: "nowhere")
    store = tmp_path / "store"
    options = {"model": tiny_model, "layer": 1, "dtype": "f32", "cell_type": "type", "store": store}
    (first,) = scsae.extract(cells, donor="donor", **options)
    (again,) = scsae.extract(cells.copy(), donor="donor", **options)
    (other,) = scsae.extract(data=[cells[:60]], **options)
    assert (again.run, again.done) == (first.run, 0)
    assert other.run != first.run
    layout = Layout(store)
    place = source_location(layout, first.facts["dataset"]).paths
    assert [name.rpartition("/")[0] for name in place] == [str(store / "data")]
    (trained,) = scsae.train(
        activations=first.run, data=cells, n_features=48, k=4, n_steps=20, batch_size=128, num_workers=0, store=store
    )
    encoded = scsae.encode(sae=trained.run, data=cells[::2], store=store)
    assert encoded.facts["dataset"] not in (first.facts["dataset"], other.facts["dataset"])
    with pytest.raises(UsageError, match="not the data set"):
        scsae.train(activations=first.run, data=cells[:30], num_workers=0, store=store)


def test_nothing_is_written_where_an_option_is_wrong(cells, tmp_path):
    with pytest.raises(UsageError, match=r"'layr'.*'layer'"):
        scsae.extract(cells, layr=1, store=tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_an_anndata_is_inspected_without_a_store(cells, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = scsae.inspect(cells, model=tiny_model)
    assert facts["genes matched"] == "28 of 30 (93%)"
    assert facts["cells"] == 72
    assert "X_pca (2)" in facts["vectors in obsm"]
    assert list(tmp_path.iterdir()) == []
