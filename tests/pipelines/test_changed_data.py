"""Data files are hashed once, and a file that changed is refused with what changed."""

import os
import shutil
import warnings

import anndata
import numpy as np
import pytest

from feature_store.cells import open_source, recorded_digests, save_source_location, source_location, write_cells
from feature_store.cells.file_digests import file_digest
from feature_store.storage.layout import Layout
from pipelines.config import EncodeOptions
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.extract import extract
from pipelines.inputs import load_recorded_source
from pipelines.moved_data import record_if_same
from pipelines.verify import verify_run


@pytest.fixture
def hashed(monkeypatch):
    """The files that are hashed, in order."""
    calls = []

    def digest(path, on_bytes):
        calls.append(path)
        return file_digest(path, on_bytes)

    monkeypatch.setattr("feature_store.cells.source.file_digest", digest)
    return calls


@pytest.fixture
def cells(tiny_cells):
    made = tiny_cells.copy()
    # careful: writing a file makes categories of text, to which no other value can be assigned
    made.obs = made.obs.astype(str)
    made.obs["fold"] = np.where(made.obs["donor"].isin(["D0", "D1"]), "test", "train")
    made.obs.loc[made.obs["donor"] == "D2", "fold"] = "select"
    made.obs["condition"] = np.where(np.arange(made.n_obs) % 3, "a", "b")
    made.obs["score"] = np.arange(made.n_obs) / 7
    made.obs["note"] = "x"
    return made


@pytest.fixture
def data(tmp_path, cells):
    path = tmp_path / "data.h5ad"
    cells.copy().write_h5ad(path)
    return path


@pytest.fixture
def stored(tmp_path, data):
    """A store with the data set "one"."""
    layout = Layout(tmp_path / "store")
    with open_source(data) as source:
        write_cells(
            layout,
            source,
            dataset="one",
            donor="donor",
            batch="batch",
            cell_type="type",
            labels=("condition", "score"),
            split_column="fold",
        )
        save_source_location(layout, "one", source)
    return layout


def test_a_file_is_hashed_by_the_first_extraction_and_not_again(
    tmp_path, tiny_data, extract_options, without_actors, hashed
):
    data, store = tmp_path / "data.h5ad", tmp_path / "store"
    shutil.copy(tiny_data, data)
    options = extract_options.model_copy(update={"data": (data,)})
    (first,) = extract(options, store)
    assert hashed == [data]
    (second,) = extract(options.model_copy(update={"layer": ("0",)}), store)
    # another data set of the same file
    (third,) = extract(options.model_copy(update={"batch": None}), store)
    assert first.facts["dataset"] == second.facts["dataset"] != third.facts["dataset"]
    for dataset in (first.facts["dataset"], third.facts["dataset"]):
        load_recorded_source(Layout(store), dataset).close()
    assert hashed == [data]


def test_encoding_hashes_no_file_that_an_extraction_has_hashed(own_store, tiny_data, without_actors, hashed):
    encode(EncodeOptions(fused=True), own_store)
    encode(EncodeOptions(data=tiny_data, donor="donor"), own_store)
    assert len(list((own_store / "cells").iterdir())) == 2
    assert hashed == []


def test_a_file_that_was_touched_is_hashed_once_more(stored, data, hashed):
    load_recorded_source(stored, "one").close()
    assert hashed == []
    os.utime(data)
    for _ in range(3):
        load_recorded_source(stored, "one").close()
    assert hashed == [data]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_zarr_folder_is_hashed_once(tmp_path, cells, hashed, zarr_format):
    path, layout = tmp_path / "data.zarr", Layout(tmp_path / "store")
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=zarr_format):
        # anndata warns about its own default, and zarr about strings, while they write
        warnings.simplefilter("ignore")
        cells.write_zarr(path)
    for _ in range(2):
        with open_source(path, known_digest=recorded_digests(layout)) as source:
            write_cells(layout, source, dataset="one")
            save_source_location(layout, "one", source)
    assert hashed == [path]
    load_recorded_source(layout, "one")
    chunk = next(file for file in sorted((path / "X").rglob("*")) if file.is_file() and not file.suffix)
    os.utime(chunk)
    load_recorded_source(layout, "one")
    assert hashed == [path, path]


def test_a_moved_file_is_hashed_at_its_new_place_once(stored, data, hashed):
    new = data.rename(data.with_name("new.h5ad"))
    assert record_if_same(stored, "one", [new])
    assert record_if_same(stored, "one", [new])
    load_recorded_source(stored, "one")
    assert hashed == [new]
    assert source_location(stored, "one").paths == (str(new),)


def test_other_content_with_the_size_and_time_of_the_old_is_hashed(stored, data, cells, hashed):
    before = data.stat()
    content = bytearray(data.read_bytes())
    content[content.index(b"condition")] ^= 1
    data.write_bytes(bytes(content))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert data.stat().st_size == before.st_size
    with pytest.raises(Exception, match=r"data\.h5ad"):
        load_recorded_source(stored, "one")


def test_verify_hashes_the_data_whatever_its_state(stored, data, cells, hashed, capsys, monkeypatch):
    assert verify_run("one", stored.root) == 0
    assert hashed == [data]
    state = source_location(stored, "one").states[0]
    cells.X = cells.X * 2
    cells.write_h5ad(data)
    # a file system without these times
    monkeypatch.setattr("feature_store.cells.source.file_state", lambda _path: state)
    load_recorded_source(stored, "one").close()
    capsys.readouterr()
    assert verify_run("one", stored.root) == 1
    assert "data.h5ad changed since its extraction" in capsys.readouterr().err
    data.unlink()
    assert verify_run("one", stored.root) == 0
    assert "data.h5ad: not there" in capsys.readouterr().err


def other_types(cells):
    cells.obs.loc[cells.obs_names[:12], "type"] = "C"


def other_donors_and_labels(cells):
    cells.obs.loc[cells.obs_names[:2], "donor"] = "D9"
    cells.obs.loc[cells.obs_names[:3], "condition"] = None


def other_folds(cells):
    cells.obs["fold"] = cells.obs["fold"].replace({"select": "test", "test": "select"})


def other_numbers(cells):
    cells.obs.loc[cells.obs_names[5], "score"] = -1.0


def other_notes(cells):
    cells.obs.loc[cells.obs_names[:4], "note"] = "y"


def no_batch(cells):
    del cells.obs["batch"]


def other_names(cells):
    cells.obs_names = [*cells.obs_names[:-2], "p", "q"]


def other_genes(cells):
    cells.var_names = ["NEW", *cells.var_names[1:]]


def other_values(cells):
    cells.X = cells.X * 2


def other_uns(cells):
    cells.uns["colours"] = np.arange(3)


CONSEQUENCE = "which would change the panel and every statistic"
CHANGES = {
    other_types: f"cell_type (obs column type) differs in 12 cells, {CONSEQUENCE}",
    other_donors_and_labels: "donor (obs column donor) differs in 2 cells; condition differs in 3 cells, "
    + CONSEQUENCE,
    other_folds: "split (obs column fold) differs in ",
    other_numbers: f"score differs in 1 cells, {CONSEQUENCE}",
    other_notes: "obs columns differ in up to 4 cells (note)",
    no_batch: f"batch (obs column batch) is no longer there, {CONSEQUENCE}",
    other_names: "the names of 2 cells differ",
    other_genes: "the names of 1 genes differ (NEW)",
    other_values: "values of the matrix",
    other_uns: "values of the matrix, or parts that are not read (obsm, uns)",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_error_says_what_changed_in_the_file(stored, data, cells, change):
    change(cells)
    cells.write_h5ad(data)
    with pytest.raises(UsageError, match=r"data\.h5ad changed since .*extract it again with `scsae extract`") as error:
        load_recorded_source(stored, "one")
    assert f": {CHANGES[change]}" in str(error.value)


@pytest.mark.parametrize(
    ("select", "words"),
    [
        (lambda cells: cells[:-5], "it has 67 cells and had 72"),
        (lambda cells: cells[:, 3:], "genes and had 30"),
        (lambda cells: cells[::-1], "its cells are in another order"),
        (lambda cells: cells[:, ::-1], "its genes are in another order"),
    ],
)
def test_cells_and_genes_that_are_gone_or_moved_are_counted(stored, data, cells, select, words):
    select(cells).copy().write_h5ad(data)
    with pytest.raises(UsageError, match="changed since") as error:
        load_recorded_source(stored, "one")
    assert words in str(error.value)
