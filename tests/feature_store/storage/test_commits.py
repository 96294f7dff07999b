"""The list of commits: what was committed and is gone is an error, and can be made again or forgotten."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from stored_bytes import hashes_of
from toy_plans import toy_plan

from feature_store.errors import IncompleteRunError, IntegrityError, NotFoundError
from feature_store.query.runs import newest_run, resolve_any_run, resolve_run
from feature_store.storage import commit, commits
from feature_store.storage.layout import COMMITS, MANIFEST, PLAN, Layout, committed_tables, entry_of
from feature_store.storage.plans import SAEPlan

if TYPE_CHECKING:
    from pathlib import Path

FRAME = pl.DataFrame({"feature_id": pl.Series([0], dtype=pl.Int32)})


def make(layout: Layout, run: str, **plan: Any) -> commit.Manifest:
    return commit.write_table(layout.saes_dir(run), FRAME, toy_plan(SAEPlan, **plan).table("sae"))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A store with three SAEs, `new` the newest."""
    found = Layout(tmp_path / "store")
    for run in ("old", "mid", "new"):
        make(found, run, model=run)
    return found


def gone(layout: Layout, run: str, how: str) -> None:
    folder = layout.saes_dir(run)
    {
        "folder": lambda: shutil.rmtree(folder),
        "manifest": (folder / MANIFEST).unlink,
        "manifest and plan": lambda: [(folder / name).unlink() for name in (MANIFEST, PLAN)],
    }[how]()


HOW = ["folder", "manifest", "manifest and plan"]


def test_a_table_is_listed_when_its_manifest_is_made(layout):
    assert committed_tables(layout.root) == {("saes", "old"), ("saes", "mid"), ("saes", "new")}
    commit.write_table(layout.codes_dir("c") / "stats" / "gene", FRAME, {})
    assert ("codes", "c", "stats", "gene") in committed_tables(layout.root)
    commit.write_table(layout.root / "elsewhere", FRAME, {})
    assert len(committed_tables(layout.root)) == 4, "a folder that is in no kind of run has no place on the list"


@pytest.mark.parametrize("how", HOW)
def test_what_was_committed_and_is_gone_is_an_error_that_names_what_to_type(layout, how):
    gone(layout, "new", how)
    what = rf"saes/new was committed and is gone.*`scsae train .*`scsae forget saes/new --store {layout.root}`"
    for ask in (
        lambda: newest_run(layout, "saes"),
        lambda: resolve_run(layout, "saes", None, option="--sae"),
        lambda: resolve_run(layout, "saes", "new", option="--sae"),
        lambda: layout.latest("saes"),
    ):
        with pytest.raises(IntegrityError, match=what):
            ask()
    if how != "manifest":
        with pytest.raises(IntegrityError, match=what):
            commit.Run.open(layout.saes_dir("new"))
    else:
        with pytest.raises(IntegrityError, match=what):
            commit.Run.open(layout.saes_dir("new")).manifest()
    assert resolve_run(layout, "saes", "mid", option="--sae").run == "mid", "runs that are named still open"


@pytest.mark.parametrize("how", HOW)
def test_making_it_again_gives_the_same_run_at_its_place_in_the_order(layout, how):
    before = hashes_of(layout.root)
    order = [info.run for info in layout.runs("saes")]
    text = (layout.saes_dir("mid") / MANIFEST).read_text()
    gone(layout, "mid", how)
    make(layout, "mid", model="mid")
    assert hashes_of(layout.root) == before
    assert [info.run for info in layout.runs("saes")] == order
    assert (layout.saes_dir("mid") / MANIFEST).read_text() == text, "with the time at which it was first made"
    assert newest_run(layout, "saes").run == "new"


@pytest.mark.parametrize("how", HOW)
def test_a_run_that_is_forgotten_is_an_absence(layout, how):
    gone(layout, "new", how)
    assert commits.forget(layout, resolve_any_run(layout, "new")) == ["saes/new"]
    assert newest_run(layout, "saes").run == "mid"
    assert ("saes", "new") not in committed_tables(layout.root)
    if how == "folder":
        with pytest.raises(NotFoundError, match="new"):
            resolve_any_run(layout, "new")


def test_a_run_that_is_there_cannot_be_forgotten(layout):
    with pytest.raises(NotFoundError, match=r"nothing of saes/new is gone.*delete .*saes/new first"):
        commits.forget(layout, resolve_any_run(layout, "new"))
    assert newest_run(layout, "saes").run == "new"


def test_a_writer_that_died_before_the_list_leaves_a_run_that_counts_and_the_next_manifest_lists_it(layout):
    for run in ("old", "new"):
        entry = entry_of(layout.saes_dir(run))
        assert entry is not None
        entry.unlink()
    assert newest_run(layout, "saes").run == "new"
    assert any(MANIFEST not in problem for problem in commit.verify(layout.saes_dir("new")))
    make(layout, "new", model="new")
    assert committed_tables(layout.root) == {("saes", "mid"), ("saes", "new")}, "the same command lists its own run"
    commit.write_table(layout.activations_dir("act"), FRAME, {})
    assert committed_tables(layout.root) == {*(("saes", run) for run in ("old", "mid", "new")), ("activations", "act")}
    assert commit.verify(layout.saes_dir("new")) == []


def test_a_store_without_the_list_opens_as_before(layout):
    shutil.rmtree(layout.root / COMMITS)
    assert newest_run(layout, "saes").run == "new"
    shutil.rmtree(layout.saes_dir("new"))
    assert newest_run(layout, "saes").run == "mid"


def test_a_run_that_was_interrupted_is_no_loss(layout):
    run = commit.Run.create(layout.saes_dir("half"), toy_plan(SAEPlan).table("sae"))
    with pytest.raises(IncompleteRunError, match="resume"):
        run.manifest()
    assert newest_run(layout, "saes").run == "new"


@pytest.mark.parametrize("damage", ["flip", "garbage", "empty"])
def test_a_damaged_file_of_the_list_changes_no_default_is_named_and_is_mended(layout, damage):
    entry = entry_of(layout.saes_dir("mid"))
    assert entry is not None
    text = entry.read_text()
    entry.write_text({"flip": text.replace("saes", "saez"), "garbage": "{", "empty": ""}[damage])
    assert newest_run(layout, "saes").run == "new"
    assert any(str(entry) in problem for problem in commit.verify(layout.saes_dir("mid")))
    make(layout, "mid", model="mid")
    assert entry.read_text() == text
    assert commit.verify(layout.saes_dir("mid")) == []


def test_the_time_of_a_manifest_counts_only_where_its_bytes_are_those_that_were_written(layout):
    file = layout.saes_dir("old") / MANIFEST
    year = file.read_text().partition('"created":"')[2][:4]
    file.write_text(file.read_text().replace(f'"created":"{year}', '"created":"2999'))
    with pytest.raises(IntegrityError, match="saes/old"):
        newest_run(layout, "saes")
