"""Which runs are taken: never a control unless it is named, the newest by what the runs say, and nothing by damage."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from deleted_runs import delete_run
from toy_plans import toy_plan

from feature_store import FeatureStore
from feature_store.errors import IntegrityError, NotFoundError
from feature_store.query.runs import (
    RunChain,
    control_of,
    newest_run,
    newest_run_of,
    plans_of,
    resolve_any_run,
    resolve_run,
)
from feature_store.storage import commit
from feature_store.storage.hashing import sealed
from feature_store.storage.layout import ASSOCIATION_TABLES, CODES_TABLES, MANIFEST, PLAN, Layout
from feature_store.storage.plans import ActivationsPlan, AssociationsPlan, CellsPlan, CodesPlan, SAEPlan

if TYPE_CHECKING:
    from pathlib import Path

FRAME = pl.DataFrame({"feature_id": pl.Series([0], dtype=pl.Int32)})
CHAIN = ("activations", "saes", "codes", "associations")
RECORDS = {"activations": ActivationsPlan, "saes": SAEPlan, "codes": CodesPlan, "associations": AssociationsPlan}
TABLES = {
    "activations": ("",),
    "saes": ("",),
    "codes": CODES_TABLES,
    "associations": ASSOCIATION_TABLES,
}
PLAN_IN = {"activations": "", "saes": "", "codes": "by_cell", "associations": "features"}


def make(layout: Layout, kind: str, run: str, **plan: Any) -> None:
    """A complete run of `kind`, younger than those that are there."""
    for table in TABLES[kind]:
        commit.write_table(layout.run_dir(kind, run) / table, FRAME, toy_plan(RECORDS[kind], **plan).table(table))


def make_chain(layout: Layout, name: str, activations: str, control: str | None) -> None:
    make(layout, "saes", name, activations=activations, control_of=control)
    make(layout, "codes", name, sae=name, activations=activations, dataset="toy", control_of=control)
    make(layout, "associations", name, sae=name, codes=name, dataset="toy", control_of=control)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """An ordinary chain, and younger ones of a baseline and of a random model."""
    found = Layout(tmp_path / "store")
    commit.write_table(found.cells_dir("toy"), FRAME, toy_plan(CellsPlan).table("cells"))
    make(found, "activations", "act")
    make_chain(found, "plain", "act", None)
    make(found, "activations", "actr", control_of="random-model")
    make_chain(found, "pca", "act", "pca")
    make_chain(found, "model", "actr", "random-model")
    return found


@pytest.mark.parametrize("kind", CHAIN[1:])
def test_what_is_made_of_a_control_is_one_however_far_down(layout, kind):
    assert [control_of(layout, kind, run) for run in ("plain", "pca", "model")] == [None, "pca", "random-model"]


@pytest.mark.parametrize("kind", CHAIN)
def test_the_newest_run_is_never_a_control(layout, kind):
    assert newest_run(layout, kind).run == ("act" if kind == "activations" else "plain")
    assert layout.latest(kind).run in {"actr", "model"}


@pytest.mark.parametrize("kind", CHAIN[1:])
def test_a_control_stays_one_when_the_activations_that_it_was_made_of_are_deleted(layout, kind):
    shutil.rmtree(layout.activations_dir("actr"))
    assert control_of(layout, kind, "model") == "random-model"
    assert newest_run(layout, kind).run == "plain"
    assert FeatureStore.open(layout.root).lineage.sae == "plain"


def test_an_ordinary_store_opens_at_its_own_runs_and_a_control_where_it_is_named(layout):
    assert FeatureStore.open(layout.root).lineage.associations == "plain"
    assert FeatureStore.open(layout.root).lineage.codes == "plain"
    assert FeatureStore.open(layout.root, associations="pca").lineage.codes == "pca"


def test_where_there_are_only_controls_they_are_named(tmp_path):
    layout = Layout(tmp_path)
    with pytest.raises(NotFoundError, match="scsae train"):
        newest_run(layout, "saes")
    make(layout, "saes", "one", control_of="ica")
    with pytest.raises(NotFoundError, match=r"one \(ica\)"):
        newest_run(layout, "saes")
    assert newest_run_of(layout, "saes", {}).run == "one"


@pytest.mark.parametrize("kind", CHAIN)
@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_there_is_no_default_where_the_plan_of_a_run_is_damaged_or_missing(layout, kind, damage):
    run = {"activations": "actr"}.get(kind, "model")
    file = layout.run_dir(kind, run) / PLAN_IN[kind] / PLAN
    if damage == "missing":
        file.unlink()
    else:
        file.write_text(file.read_text().replace("random-model", "random-mode1"))
    with pytest.raises(IntegrityError, match=f"{kind}/{run}.*scsae verify {run}"):
        newest_run(layout, kind)
    with pytest.raises((IntegrityError, NotFoundError)):
        control_of(layout, kind, run)
    named = {"activations": "act"}.get(kind, "plain")
    assert resolve_run(layout, kind, named, option="--it").run == named


@pytest.mark.parametrize("kind", CHAIN)
def test_the_newest_run_is_told_by_what_is_inside_the_runs(layout, kind, tmp_path):
    before = newest_run(layout, kind).run
    copy = Layout(tmp_path / "copy")
    shutil.copytree(layout.root, copy.root, copy_function=shutil.copyfile)
    for file in layout.root.rglob("*"):
        os.utime(file, (1e9, 1e9))
    os.utime(layout.run_dir(kind, "actr" if kind == "activations" else "pca"), (2e9, 2e9))
    for store in (layout, copy):
        assert newest_run(store, kind).run == before
        assert [info.run for info in store.runs(kind)] == [info.run for info in layout.runs(kind)]


def test_a_run_is_newer_than_all_that_are_there_whatever_the_clock_says(layout, monkeypatch):
    from datetime import UTC, datetime

    import feature_store.storage.layout as module

    class SlowClock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2020, 1, 1, tzinfo=UTC)

    monkeypatch.setattr(module, "datetime", SlowClock)
    make(layout, "saes", "late", activations="act")
    assert newest_run(layout, "saes").run == "late"
    assert [info.run for info in layout.runs("saes")] == ["late", "model", "pca", "plain"]


def test_there_is_no_default_where_a_manifest_has_lost_its_time(layout):
    file = layout.saes_dir("model") / MANIFEST
    file.write_text(file.read_text().replace('"created"', '"creaTed"'))
    with pytest.raises(IntegrityError, match=r"MANIFEST.json of .*saes/model"):
        newest_run(layout, "saes")


def test_a_damaged_manifest_that_is_written_anew_keeps_its_time(layout):
    folder = layout.saes_dir("plain")
    before = commit.Run.open(folder).manifest()
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace(before.plan_sha, before.plan_sha[::-1]))
    assert commit.Run.open(folder).finalize() == before
    assert newest_run(layout, "saes").run == "plain"


def test_runs_of_another_version_of_their_stage_are_passed_over_and_named_where_there_is_no_other(layout):
    folder = layout.saes_dir("later")
    commit.write_table(folder, FRAME, {**toy_plan(SAEPlan).table("sae"), "version": 1})
    assert newest_run(layout, "saes").run == "plain"
    for run in ("plain", "pca", "model"):
        delete_run(layout.saes_dir(run))
    with pytest.raises(NotFoundError, match=r"later.*scsae train"):
        newest_run(layout, "saes")
    with pytest.raises(NotFoundError, match=r"later.*scsae train"):
        newest_run_of(layout, "saes", {})


def test_runs_of_another_version_are_no_reason_to_refuse_where_this_version_has_made_runs_of_other_parents(layout):
    commit.write_table(layout.saes_dir("later"), FRAME, {**toy_plan(SAEPlan).table("sae"), "version": 1})
    assert newest_run_of(layout, "saes", {"activations": "none of these"}) is None


def test_runs_of_an_older_format_of_the_store_are_passed_over(layout):
    folder = layout.saes_dir("old")
    shutil.copytree(layout.saes_dir("model"), folder)
    (folder / PLAN).write_text(sealed({"format_version": 1, "n_shards": 1}))
    assert newest_run(layout, "saes").run == "plain"


@pytest.mark.parametrize(("named", "found"), [("pl", "plain"), ("pca", "pca"), ("model", "model")])
def test_an_id_or_its_beginning_names_a_run_and_a_control_may_be_named(layout, named, found):
    assert resolve_run(layout, "saes", named, option="--sae").run == found


@pytest.mark.parametrize("named", ["", "p", "zz"])
def test_an_id_that_names_none_or_several_is_refused_with_the_option_and_the_runs(layout, named):
    with pytest.raises(NotFoundError, match=rf"--sae was '{named}'.*model, pca, plain"):
        resolve_run(layout, "saes", named, option="--sae")
    with pytest.raises(NotFoundError, match="saes/plain"):
        resolve_any_run(layout, named)


def test_an_id_is_looked_for_among_all_kinds_where_no_kind_is_meant(layout):
    assert resolve_any_run(layout, "actr").kind == "activations"


def test_the_chain_above_associations_has_every_plan(layout):
    chain = RunChain.of(layout, "model")
    assert (chain.associations.codes, chain.codes.sae, chain.sae.activations) == ("model", "model", "actr")
    assert chain.activations.control_of == "random-model"
    assert chain.activations_run.path == layout.activations_dir("actr")


def test_provenance_leaves_out_runs_that_were_deleted_and_says_why_a_plan_cannot_be_read(layout):
    lineage = FeatureStore.open(layout.root).lineage
    assert list(plans_of(layout, lineage)) == list(CHAIN)
    shutil.rmtree(layout.activations_dir("act"))
    (layout.saes_dir("plain") / PLAN).write_text("{")
    plans = plans_of(layout, lineage)
    assert list(plans) == ["saes", "codes", "associations"]
    assert str(layout.saes_dir("plain") / PLAN) in plans["saes"]["unreadable"]
