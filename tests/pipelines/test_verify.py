"""Damage to any file of a run: named by `scsae verify`, repaired by running the stage again."""

import hashlib

import pytest

from feature_store.errors import BusyError, IntegrityError
from feature_store.storage import commit
from feature_store.storage.layout import ASSOCIATION_TABLES, Layout, tables_of
from pipelines.associate import associate
from pipelines.config import AssociateOptions, EncodeOptions
from pipelines.encode import encode
from pipelines.extract import extract
from pipelines.train import train
from pipelines.verify import verify_run


@pytest.fixture
def again(chain):
    """Runs the stage that made a kind of run, as before."""
    return {
        "activations": lambda store: extract(chain.extract, store)[0],
        "saes": lambda store: train(chain.train, store),
        "codes": lambda store: encode(EncodeOptions(), store),
        "associations": lambda store: associate(AssociateOptions(), store),
    }


def hashes(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "done"),
    # associations are computed together, so a damaged one costs all
    [("activations", 0), ("saes", 0), ("codes", 0), ("associations", len(ASSOCIATION_TABLES))],
)
def test_damaged_plans_and_manifests_are_named_and_repaired_by_running_the_stage_again(
    own_store, again, capsys, kind, done
):
    info = Layout(own_store).latest(kind)
    before = hashes(info.path)
    damaged = [table / name for table in tables_of(info) for name in ("plan.json", "MANIFEST.json")]
    for path in damaged[::2]:
        flip(path)
    assert verify_run(info.run, own_store) == 1
    said = capsys.readouterr().err
    assert all(f"{path} was damaged" in said for path in damaged[::2])
    for path in damaged[1::2]:
        flip(path)
    assert again[kind](own_store).done == done
    assert verify_run(info.run, own_store) == 0
    assert hashes(info.path) == before


def test_a_stage_says_which_file_of_its_parent_is_damaged_and_what_to_type(own_store, again):
    manifest = Layout(own_store).latest("activations").path / "MANIFEST.json"
    flip(manifest)
    with pytest.raises(IntegrityError, match=r"MANIFEST\.json of .*activations.*damaged; .*run its stage again"):
        again["saes"](own_store)


def test_a_missing_plan_is_a_problem_and_no_traceback(own_store, capsys):
    info = Layout(own_store).latest("codes")
    (info.path / "by_cell" / "plan.json").unlink()
    assert verify_run(info.run, own_store) == 1
    assert "by_cell was damaged: it has no plan.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "driven", "table"),
    [("activations", ".", "."), ("saes", ".", "."), ("codes", "by_cell", "by_cell"), ("associations", ".", "features")],
)
def test_a_stage_leaves_a_run_that_is_being_driven_and_needs_no_driver_for_a_finished_one(
    own_store, again, kind, driven, table
):
    info = Layout(own_store).latest(kind)
    part = commit.Run.open(info.path / table).part(0)
    with commit.exclusive(info.path / driven):
        assert again[kind](own_store).done == 0
        part.unlink()
        with pytest.raises(BusyError, match=info.run):
            again[kind](own_store)
    assert not part.exists()
