"""Controls, and what is made of them, are never taken unless they are named."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

from feature_store import FeatureStore
from feature_store.errors import NotFoundError
from feature_store.query.runs import control_of, newest_run
from feature_store.storage import commit
from feature_store.storage.layout import ASSOCIATION_TABLES, STATISTICS_TABLES, Layout

if TYPE_CHECKING:
    from pathlib import Path

FRAME = pl.DataFrame({"feature_id": pl.Series([0], dtype=pl.Int32)})
CHAIN = ("activations", "saes", "codes", "associations")
TABLES = {
    "activations": ("",),
    "saes": ("",),
    "codes": ("by_cell", "by_feature", *(f"stats/{name}" for name in STATISTICS_TABLES)),
    "associations": ASSOCIATION_TABLES,
}


def make(layout: Layout, kind: str, run: str, age: int, **plan: Any) -> None:
    """A complete run of `kind` as old as `age`."""
    for table in TABLES[kind]:
        commit.write_table(layout.run_dir(kind, run) / table, FRAME, {"table": table, "n_features": 1, **plan})
        os.utime(layout.run_dir(kind, run) / table / "MANIFEST.json", (1e9 - age, 1e9 - age))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """An ordinary chain, and younger ones of a baseline and of a random model."""
    found = Layout(tmp_path)
    make(found, "activations", "act", 9)
    make(found, "activations", "actr", 3, control="random-model")
    for name, age, activations, extra in (
        ("plain", 8, "act", {}),
        ("pca", 2, "act", {"control": "pca"}),
        ("model", 1, "actr", {}),
    ):
        make(found, "saes", name, age, activations=activations, **extra)
        make(found, "codes", name, age, sae=name, activations=activations)
        make(found, "associations", name, age, sae=name, codes=name)
    return found


@pytest.mark.parametrize("kind", CHAIN[1:])
def test_what_is_made_of_a_control_is_one_however_far_down(layout, kind):
    assert [control_of(layout, kind, run) for run in ("plain", "pca", "model")] == [None, "pca", "random-model"]


@pytest.mark.parametrize("kind", CHAIN)
def test_the_newest_run_is_never_a_control(layout, kind):
    assert newest_run(layout, kind).run == ("act" if kind == "activations" else "plain")
    assert layout.latest(kind).run in {"actr", "model"}


def test_an_ordinary_store_opens_at_its_own_runs_and_a_control_where_it_is_named(layout):
    assert FeatureStore.open(layout.root).lineage.associations == "plain"
    assert FeatureStore.open(layout.root).lineage.codes == "plain"
    assert FeatureStore.open(layout.root, associations="pca").lineage.codes == "pca"


def test_where_there_are_only_controls_they_are_named(tmp_path):
    layout = Layout(tmp_path)
    with pytest.raises(NotFoundError, match="make one with"):
        newest_run(layout, "saes")
    make(layout, "saes", "one", 1, control="ica")
    with pytest.raises(NotFoundError, match=r"controls, which are taken only where they are named: one \(ica\)"):
        newest_run(layout, "saes")


def test_a_run_whose_parents_were_deleted_is_an_ordinary_one(tmp_path):
    layout = Layout(tmp_path)
    make(layout, "codes", "orphan", 1, sae="gone")
    assert control_of(layout, "codes", "orphan") is None
    assert newest_run(layout, "codes").run == "orphan"


@pytest.mark.parametrize("kind", ["cells", "steering"])
def test_kinds_without_controls_have_none(tmp_path, kind):
    assert control_of(Layout(tmp_path), kind, "any") is None
