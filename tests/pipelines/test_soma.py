"""Stages on a SOMA experiment: the same activations, and a condition that later commands recall."""

import shutil

import cell_files
import pytest
import soma_files
from typer.testing import CliRunner

from feature_store.cells import read_cells, source_location
from feature_store.errors import InputError
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import CellsPlan
from pipelines.associate import associate
from pipelines.baseline import baseline
from pipelines.cli import app
from pipelines.config import AssociateOptions, BaselineOptions, EncodeOptions, ExtractOptions
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.extract import extract
from pipelines.inputs import data_problems, load_recorded_source
from pipelines.moved_data import record_new_place
from pipelines.train import train

pytest.importorskip("tiledbsoma", reason="tiledbsoma is not installed: pip install 'scsae[soma]'")
pytestmark = pytest.mark.usefixtures("module_without_actors")

LUNG = "tissue == 'lung' and is_primary_data == True"
IN_LUNG = [i for i in range(72) if i % 2 == 0 and i % 6 > 0]


@pytest.fixture(scope="module")
def census(tiny_cells, tmp_path_factory):
    return soma_files.census(tiny_cells, tmp_path_factory.mktemp("census"))


@pytest.fixture
def options(census, tiny_model):
    return ExtractOptions(data=census, model=str(tiny_model), layer=("1",), shard_cells=72, dtype="f32", where=LUNG)


def activations_of(result):
    return commit.read_table(result.path)


def test_activations_are_those_of_the_same_cells_in_csr(tiny_cells, extract_options, options, tmp_path):
    path = cell_files.soma(tiny_cells, tmp_path)
    (mine,) = extract(extract_options.model_copy(update={"data": (path,)}), tmp_path / "mine")
    (theirs,) = extract(extract_options, tmp_path / "theirs")
    assert activations_of(mine).equals(activations_of(theirs))
    tiny_cells[IN_LUNG].copy().write_h5ad(tmp_path / "lung.h5ad")
    of_files = options.model_copy(update={"data": (tmp_path / "lung.h5ad",), "where": None})
    (some,) = extract(of_files, tmp_path / "some")
    (taken,) = extract(options, tmp_path / "taken")
    assert activations_of(taken).equals(activations_of(some))


def test_the_command_line_takes_the_cells_of_a_condition_and_recalls_it(census, tiny_model, tmp_path):
    store, where = tmp_path / "store", ["--where", LUNG]
    line = ["extract", str(census), "--model", str(tiny_model), "--layer", "1", "--store", str(store)]
    done = CliRunner().invoke(app, [*line, *where])
    assert done.exit_code == 0, done.exception
    assert "24 of 72 cells" in done.stdout
    assert "that of the Census" in done.stdout
    layout = Layout(store)
    (dataset,) = [info.run for info in layout.runs("cells")]
    plan = CellsPlan.of(commit.Run.open(layout.cells_dir(dataset)))
    assert (plan.where, plan.donor, plan.labels) == (LUNG, "donor_id", ("disease",))
    assert read_cells(layout.cells_dir(dataset))["cell_id"].to_list() == [str(100 + 3 * i) for i in IN_LUNG]
    assert source_location(layout, dataset).where == LUNG
    with load_recorded_source(layout, dataset) as source:
        assert (source.where, source.n_cells) == (LUNG, 24)
    assert data_problems(layout, dataset) == []
    # the same again is the same run, and other cells are another data set
    assert CliRunner().invoke(app, [*line, *where]).exit_code == 0
    assert len(list(layout.runs("cells"))) == 1
    assert CliRunner().invoke(app, [*line, "--where", "tissue == 'blood'"]).exit_code == 0
    assert len(list(layout.runs("cells"))) == 2
    inspected = CliRunner().invoke(app, ["inspect", str(census), "--model", str(tiny_model), *where])
    assert inspected.exit_code == 0, inspected.exception
    assert "24 of 72 cells" in inspected.stdout
    assert "SOMA experiment, measurement RNA" in inspected.stdout


@pytest.mark.parametrize(
    ("where", "words"),
    [("tissue = 'lung'", "no condition on obs"), ("tissue == 'heart'", "no cell of"), ("tissu == 'lung'", "tissu ")],
)
def test_a_bad_condition_writes_nothing(options, tmp_path, where, words):
    with pytest.raises(InputError, match=words):
        extract(options.model_copy(update={"where": where}), tmp_path / "store")
    assert not (tmp_path / "store" / "cells").exists()


def test_other_formats_and_files_beside_take_no_condition(options, tiny_data, census, tmp_path):
    for data in ((tiny_data,), (census, tiny_data)):
        with pytest.raises(InputError, match=r"tiny\.h5ad is no SOMA experiment"):
            extract(options.model_copy(update={"data": data}), tmp_path / "store")
    assert not (tmp_path / "store" / "cells").exists()
    refused = CliRunner().invoke(app, ["encode", "--where", LUNG, "--store", str(tmp_path / "store")])
    assert "where apply to other data only" in str(refused.exception)


def test_an_experiment_without_counts_writes_nothing(census, options, tmp_path):
    path = shutil.copytree(census, tmp_path / "copy")
    import tiledbsoma

    with tiledbsoma.open(f"{path}/ms/RNA/X", "d") as x:
        del x["raw"]
    with pytest.raises(InputError, match=r"normalized: .*log-normalised.*--matrix normalized"):
        extract(options.model_copy(update={"data": (path,)}), tmp_path / "store")
    assert not (tmp_path / "store" / "cells").exists()


@pytest.mark.slow
def test_every_stage_reads_the_cells_of_the_condition(options, train_options, census, tiny_data, tmp_path):
    store = tmp_path / "store"
    layout = Layout(store)
    dataset = extract(options.model_copy(update={"donor": "none"}), store)[0].facts["dataset"]
    train(train_options, store)
    encode(EncodeOptions(fused=True), store)
    associate(AssociateOptions(), store)
    made = baseline(BaselineOptions(kind=("random-model",), fit_tokens=500), store)
    assert made[0].facts["dataset"] == dataset
    assert [info.run for info in layout.runs("cells")] == [dataset]
    moved = shutil.copytree(census, tmp_path / "moved")
    record_new_place(layout, dataset, [moved])
    assert source_location(layout, dataset)[:3] == ((str(moved),), "raw", LUNG)
    # other data have a condition of their own, or none
    other = encode(EncodeOptions(data=(census,), where="tissue == 'blood'", donor="none"), store)
    assert source_location(layout, other.facts["dataset"]).where == "tissue == 'blood'"
    assert CellsPlan.of(commit.Run.open(layout.cells_dir(other.facts["dataset"]))).where == "tissue == 'blood'"
    third = encode(EncodeOptions(data=(tiny_data,)), store)
    assert source_location(layout, third.facts["dataset"]).where is None
    # a column of one cell changes, and it is said before anything is read
    path = moved / "obs"
    shutil.rmtree(path)
    shutil.copytree(census / "ms" / "RNA" / "var", path)
    with pytest.raises((InputError, UsageError), match="moved"):
        load_recorded_source(layout, dataset)
