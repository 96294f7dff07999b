from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from toy_plans import toy_plan, toy_table

from feature_store import FeatureStore
from feature_store.errors import IntegrityError, NotFoundError, QueryError
from feature_store.query.tables import MADE_BY, Tables
from feature_store.storage import commit, schemas
from feature_store.storage.layout import ASSOCIATION_TABLES, Layout
from feature_store.storage.plans import AssociationsPlan, SAEPlan, SteeringResultsPlan

if TYPE_CHECKING:
    from pathlib import Path

HISTORY = [{"step": 50.0, "loss": 0.5, "n_dead": 3.0}, {"step": 100.0, "loss": 0.25, "n_dead": 1.0, "aux": 0.1}]
UMAP = pl.DataFrame({"feature_id": [0, 1], "x": [0.5, 1.5], "y": [2.0, 3.0]})
NEIGHBOURS = pl.DataFrame({"feature_id": [0, 1], "rank": 1, "other_feature_id": [1, 0], "cosine": 0.25})


def commit_sae(folder: Path, history: list[dict[str, float]]) -> None:
    files = {"history.json": history, "summary.json": {"test_fvu": 0.125}}
    run = commit.Run.create(
        folder,
        toy_plan(SAEPlan, activations="ac7", model="mini", site="layer.2", sae={"k": 4}).table(
            "sae", n_shards=2, files=list(files)
        ),
    )
    for shard, text in enumerate(map(json.dumps, files.values())):
        run.commit_shard(shard, lambda path, text=text: path.write_text(text), start=shard, stop=shard + 1)
    run.finalize()


@pytest.fixture
def layout(small_store: Any) -> Layout:
    """The small store, its associations of the SAE `5ae`."""
    found: Layout = small_store.layout
    for table in ASSOCIATION_TABLES:
        folder = found.associations_dir("a550c") / table
        frame = commit.read_table(folder)
        shutil.rmtree(folder)
        commit.write_table(folder, frame, toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="5ae"))
    return found


def test_the_tables_of_an_sae_are_there_once_they_are_made(layout: Layout) -> None:
    commit_sae(layout.saes_dir("5ae"), HISTORY)
    before = FeatureStore.open(layout.root)
    assert "training" in before.tables()
    for table in ("feature_umap", "feature_neighbour", "steering_map"):
        with pytest.raises(QueryError, match=f"'{table}'.*`scsae serve --store {layout.root}`"):
            before.frame(table)
    folder = layout.feature_map_dir("5ae")
    commit.write_table(folder / "umap", schemas.conform("feature_umap", UMAP), {})
    commit.write_table(folder / "neighbours", schemas.conform("feature_neighbour", NEIGHBOURS), {})
    places = pl.DataFrame({"variant": [0], "cell_idx": [3], "pc1": 0.5, "pc2": 0.5, "x": 0.5, "y": 0.5})
    commit.write_table(
        layout.steering_dir("57ee4") / "map",
        schemas.conform("steering_map", places),
        toy_table(SteeringResultsPlan, sae="5ae"),
    )
    store = FeatureStore.open(layout.root)
    found = store.sql(
        "SELECT n.other_feature_id, m.x, f.density FROM feature_neighbour n JOIN feature_umap m USING (feature_id) "
        "JOIN features f USING (feature_id) WHERE n.feature_id = 1"
    )
    assert found.rows() == [(0, 1.5, store.frame("features").collect()["density"][1])]
    assert store.sql("SELECT run, cell_idx FROM steering_map").rows() == [("57ee4", 3)]
    assert commit.verify(folder / "umap") == []
    assert set(store.provenance()["manifests"]) == set(store.tables())


def test_training_is_what_was_noted_by_step(layout: Layout) -> None:
    commit_sae(layout.saes_dir("5ae"), HISTORY)
    found = FeatureStore.open(layout.root).sql("SELECT step, loss, aux FROM training ORDER BY step DESC")
    assert found.rows() == [(100, 0.25, 0.1), (50, 0.5, None)]


def test_what_was_fitted_without_steps_has_no_rows_of_training(layout: Layout) -> None:
    commit_sae(layout.saes_dir("5ae"), [])
    assert FeatureStore.open(layout.root).sql("SELECT step FROM training").is_empty()


def test_facts_of_the_sae_are_its_plan_and_its_figures(layout: Layout) -> None:
    with pytest.raises(NotFoundError, match=f"5ae.*`scsae train --store {layout.root}`"):
        FeatureStore.open(layout.root).sae_facts()
    commit_sae(layout.saes_dir("5ae"), HISTORY)
    facts = FeatureStore.open(layout.root).sae_facts()
    asked = ("run", "model", "site", "sae", "summary")
    assert [facts[key] for key in asked] == ["5ae", "mini", "layer.2", {"k": 4}, {"test_fvu": 0.125}]


def test_facts_of_another_sae_of_the_store_can_be_asked_for(layout: Layout) -> None:
    commit_sae(layout.saes_dir("07he5"), HISTORY)
    store = FeatureStore.open(layout.root)
    assert store.sae_facts("07he5")["run"] == "07he5"
    with pytest.raises(NotFoundError, match=r"de1e7ed.*`scsae train"):
        store.sae_facts("de1e7ed")
    (layout.saes_dir("07he5") / "summary.json").unlink()
    with pytest.raises(IntegrityError, match=r"summary\.json"):
        store.sae_facts("07he5")


def test_an_sae_that_lost_a_file_is_named_as_damaged(layout: Layout) -> None:
    commit_sae(layout.saes_dir("5ae"), HISTORY)
    store = FeatureStore.open(layout.root)
    (layout.saes_dir("5ae") / "history.json").unlink()
    with pytest.raises(IntegrityError, match=r"history\.json"):
        store.sql("SELECT * FROM training")


def test_every_table_of_the_store_names_its_command(small_store: Any) -> None:
    store = FeatureStore.open(small_store.layout.root)
    assert set(store.tables()) <= set(MADE_BY)
    assert store.made_by("steering") == f"scsae steer --store {small_store.layout.root}"
    with pytest.raises(QueryError, match=r"'feature'.*'features'"):
        store.made_by("feature")


def test_a_frame_is_made_once(small_store: Any) -> None:
    store = FeatureStore.open(small_store.layout.root)
    tables = Tables(store.layout, store.lineage)
    assert tables.frame("features") is tables.frame("features")
