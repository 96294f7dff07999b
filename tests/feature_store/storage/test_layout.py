from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from toy_plans import toy_table

from feature_store.errors import InputError, NotFoundError
from feature_store.storage import commit
from feature_store.storage.hashing import canonical_json, run_id
from feature_store.storage.layout import ASSOCIATION_TABLES, KINDS, Layout, next_creation_time
from feature_store.storage.plans import AssociationsPlan

if TYPE_CHECKING:
    from pathlib import Path

import polars as pl

FRAME = pl.DataFrame({"a": [1, 2]})


def test_run_id_is_twelve_hex_digits_and_ignores_key_order_and_tuples() -> None:
    first, second = run_id({"a": 1, "b": (1, 2)}), run_id({"b": [1, 2], "a": 1})
    assert first == second
    assert len(first) == 12
    assert set(first) <= set("0123456789abcdef")


def test_run_id_changes_with_any_value() -> None:
    assert len({run_id({"seed": 0}), run_id({"seed": 1}), run_id({"seed": "0"}), run_id({"seed": None})}) == 4


@pytest.mark.parametrize("content", [{"a": float("nan")}, {"a": {1, 2}}, {"a": object()}])
def test_canonical_json_refuses_what_json_cannot_hold(content: dict[str, object]) -> None:
    with pytest.raises(InputError, match="JSON values"):
        canonical_json(content)


def test_every_kind_has_its_folder_below_the_root(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    made = [
        layout.cells_dir("x"),
        layout.activations_dir("x"),
        layout.saes_dir("x"),
        layout.codes_dir("x"),
        layout.associations_dir("x"),
        layout.steering_dir("x"),
        layout.effects_dir("x"),
        layout.circuits_dir("x"),
        layout.inputs_dir("x"),
        layout.probes_dir("x"),
        layout.modules_dir("x"),
        layout.matches_dir("x"),
        layout.comparisons_dir("x"),
    ]
    assert made == [tmp_path / kind / "x" for kind in KINDS]
    assert layout.mlflow_dir == tmp_path / "mlflow"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b"])
def test_a_run_name_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="bad name"):
        Layout(tmp_path).codes_dir(name)


def test_an_unknown_kind_is_refused_with_the_kinds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="activations"):
        Layout(tmp_path).runs("actvations")


def test_runs_are_listed_by_the_time_in_their_manifests_and_the_incomplete_ones_last(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for age, name in enumerate(["old", "new"]):
        commit.write_table(layout.activations_dir(name), FRAME, {"name": name})
        os.utime(layout.activations_dir(name) / "MANIFEST.json", (1_000_000 - age, 1_000_000 - age))
    commit.Run.create(layout.activations_dir("unfinished"), {"n_shards": 2})
    runs = layout.runs("activations")
    assert [(info.run, info.complete) for info in runs] == [("new", True), ("old", True), ("unfinished", False)]
    assert layout.latest("activations").run == "new"
    assert runs[0].created == commit.Run.open(runs[0].path).manifest().created
    assert runs[2].created is None


def test_a_run_of_several_tables_was_created_when_the_last_of_them_was(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for table in ASSOCIATION_TABLES:
        commit.write_table(layout.associations_dir("a") / table, FRAME, toy_table(AssociationsPlan))
    times = [commit.Run.open(layout.associations_dir("a") / table).manifest().created for table in ASSOCIATION_TABLES]
    assert layout.runs("associations")[0].created == max(times)


def test_a_folder_outside_a_store_is_created_now(tmp_path: Path) -> None:
    before = datetime.now(tz=UTC)
    assert before <= next_creation_time(tmp_path / "table") <= datetime.now(tz=UTC)


def test_latest_without_a_complete_run_names_the_incomplete_ones_and_the_command(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with pytest.raises(NotFoundError, match="scsae encode --store"):
        layout.latest("codes")
    commit.Run.create(layout.activations_dir("half"), {"n_shards": 2})
    with pytest.raises(NotFoundError, match=r"only incomplete ones \(half\)"):
        layout.latest("activations")


def test_associations_are_complete_only_with_all_their_tables(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for table in ASSOCIATION_TABLES:
        assert not any(info.complete for info in layout.runs("associations"))
        commit.write_table(layout.associations_dir("a") / table, FRAME, toy_table(AssociationsPlan))
    assert layout.latest("associations").run == "a"
