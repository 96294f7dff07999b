"""A data file that was moved: the message names what to type, and it works; other files are refused."""

import shlex
import shutil
from functools import partial

import anndata
import pytest
from typer.testing import CliRunner

from feature_store.cells import source_location, write_source_location
from feature_store.storage.layout import Layout
from pipelines.associate import associate, associate_all
from pipelines.baseline import baseline
from pipelines.cli import app
from pipelines.config import (
    AssociateOptions,
    BaselineOptions,
    EncodeOptions,
    SteerOptions,
)
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.inputs import load_recorded_source
from pipelines.steering.run import steer
from pipelines.train import train_all


@pytest.fixture
def moved(own_store, tiny_data, tmp_path):
    """The store, and the new path of its data file, of which it knows the old one."""
    layout = Layout(own_store)
    (dataset,) = (folder.name for folder in (own_store / "cells").iterdir())
    old, new = tmp_path / "old.h5ad", tmp_path / "renamed data.h5ad"
    shutil.copy(tiny_data, new)
    write_source_location(layout, dataset, source_location(layout, dataset)._replace(paths=(str(old),)))
    # the expression is read again
    shutil.rmtree(layout.cells_dir(dataset) / "expression")
    shutil.rmtree(layout.root / "associations")
    return layout, dataset, old, new


@pytest.mark.parametrize("command", ["associate", "encode --fused"])
def test_the_command_in_the_message_works(moved, without_actors, command):
    layout, dataset, old, new = moved

    def run(line):
        return CliRunner().invoke(app, shlex.split(line.replace("NEWPATH", shlex.quote(str(new)))))

    error = run(f"{command} --store {layout.root}").exception
    assert isinstance(error, UsageError)
    assert str(old) in str(error)
    done = run(str(error).rpartition(": scsae ")[2])
    assert done.exit_code == 0, done.exception
    assert source_location(layout, dataset).paths == (str(new),)
    assert [folder.name for folder in (layout.root / "cells").iterdir()] == [dataset]
    associate(AssociateOptions(), layout.root)


def test_every_stage_that_reads_the_data_again_takes_its_new_place(
    moved, without_actors, monkeypatch, tiny_cells, train_options
):
    layout, dataset, _, new = moved
    where = source_location(layout, dataset)
    for stage in ("train", "steer", "baseline"):
        with pytest.raises(UsageError, match=f"scsae {stage} --data NEWPATH"):
            load_recorded_source(layout, dataset, stage=stage)
    associate_all(AssociateOptions(data=new, codes=layout.latest("codes").run), layout.root)
    calls = {
        "train": lambda data: train_all(train_options.model_copy(update={"data": (data,)}), layout.root),
        "steer": lambda data: steer(SteerOptions(data=data, target="A"), layout.root),
        "baseline": lambda data: baseline(BaselineOptions(data=data, kind=("random",)), layout.root),
    }
    other = new.with_name("other.h5ad")
    changed = tiny_cells.copy()
    changed.X = changed.X * 2
    changed.write_h5ad(other)
    for stage, call in calls.items():
        write_source_location(layout, dataset, where)
        with pytest.raises(UsageError, match=r"other\.h5ad, which is not the data set .*scsae encode --data"):
            call(other)
        assert source_location(layout, dataset) == where, stage
        with monkeypatch.context() as patch:
            # the work itself is tested elsewhere
            patch.setattr("pipelines.steering.run.SteeringRun", stop)
            patch.setattr("pipelines.baseline._stages", stop)
            patch.setattr("pipelines.train.create_sae_run", stop)
            with pytest.raises(StopHere):
                call(new)
        assert source_location(layout, dataset).paths == (str(new),)


@pytest.mark.parametrize("stage", ["effects", "inputs"])
def test_a_stage_that_runs_the_model_again_names_itself_and_writes_nothing(moved, without_actors, stage):
    layout, dataset, _, new = moved
    where = source_location(layout, dataset)
    associate_all(AssociateOptions(data=new, codes=layout.latest("codes").run), layout.root)
    write_source_location(layout, dataset, where)
    run = partial(CliRunner().invoke, app)
    error = run([stage, "--store", str(layout.root)]).exception
    assert isinstance(error, UsageError)
    assert str(error).endswith(f": scsae {stage} --data NEWPATH --store {layout.root}")
    assert not layout.kind_dir(stage).exists()


class StopHere(Exception):
    """Raised in the place of the work."""


def stop(*_):
    raise StopHere


def test_the_files_of_the_saes_own_data_are_that_data_set_and_no_other(moved, without_actors):
    layout, dataset, _, new = moved
    before = sorted(folder.name for folder in (layout.root / "codes").iterdir())
    result = encode(EncodeOptions(data=new), layout.root)
    assert result.facts["dataset"] == dataset
    assert sorted(folder.name for folder in (layout.root / "codes").iterdir()) == before
    fused = encode(EncodeOptions(data=new, tokens_per_cell=4), layout.root)
    assert fused.facts["dataset"] == dataset
    assert fused.run not in before


def test_files_of_a_data_set_may_be_named_in_any_order(moved, tiny_cells, tmp_path):
    from feature_store.cells import open_source, save_source_location, write_cells
    from pipelines.moved_data import record_if_same

    layout = moved[0]
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    for path, cells in zip(paths, (tiny_cells[:40], tiny_cells[40:]), strict=True):
        anndata.AnnData(cells.X, obs=cells.obs, var=cells.var).write_h5ad(path)
    with open_source(paths) as source:
        write_cells(layout, source, dataset="both")
        save_source_location(layout, "both", source)
    new = [path.rename(path.with_name(f"new-{path.name}")) for path in paths]
    assert record_if_same(layout, "both", new[::-1])
    assert source_location(layout, "both").paths == tuple(map(str, new))
    assert not record_if_same(layout, "both", new[:1])
