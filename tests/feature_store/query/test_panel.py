"""Queries over a store whose panel is 12 of 40 cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from token_codes import pooled

from feature_store import FeatureStore

if TYPE_CHECKING:
    from pathlib import Path

KEEP = 3
INSIDE, OUTSIDE = 5, 4


@pytest.fixture
def store(panel_store: Any) -> FeatureStore:
    return FeatureStore.open(panel_store.layout.root)


@pytest.fixture
def dense(panel_store: Any) -> np.ndarray:
    return pooled(panel_store.tokens, 40)


def test_the_panel_is_named_with_how_it_was_drawn(store: FeatureStore) -> None:
    panel = store.panel
    assert (panel.n_panel, panel.n_cells, panel.keep, panel.of_all_cells) == (12, 40, KEEP, False)
    assert panel.words == "panel of 12 of 40 cells"
    assert panel.drawn is not None
    assert (panel.drawn.seed, panel.drawn.strata) == (7, ("split", "donor"))


def test_a_panel_of_all_cells_says_nothing_of_a_draw(small_store: Any) -> None:
    panel = FeatureStore.open(small_store.layout.root).panel
    assert (panel.n_panel, panel.of_all_cells, panel.drawn) == (40, True, None)


def test_cells_of_the_panel_are_those_that_statistics_are_of(store: FeatureStore, panel_store: Any) -> None:
    assert (
        store.panel_cells().collect()["cell_idx"].to_list() == panel_store.cells.filter("panel")["cell_idx"].to_list()
    )


def test_the_features_of_a_cell_say_of_what_they_are_the_largest(store: FeatureStore, dense: np.ndarray) -> None:
    for cell, of in ((INSIDE, "all codes"), (OUTSIDE, f"{KEEP} largest codes")):
        largest = np.lexsort((np.arange(12), -dense[cell]))[: np.count_nonzero(dense[cell])]
        found = store.features_of(cell)
        assert len(largest) > KEEP
        assert found["feature_id"].to_list() == (largest if cell == INSIDE else largest[:KEEP]).tolist()
        assert found["of"].unique().to_list() == [of]


def test_a_store_whose_panel_is_all_cells_has_no_such_column(small_store: Any) -> None:
    assert "of" not in FeatureStore.open(small_store.layout.root).features_of(OUTSIDE).columns


def test_a_cell_outside_the_panel_has_no_row_in_codes_and_it_is_said_why(store: FeatureStore) -> None:
    query = f"SELECT * FROM codes WHERE cell_idx = {OUTSIDE}"
    assert store.sql(query).is_empty()
    assert "panel of 12 of 40 cells" in store.why_empty(query)
    assert "compact_codes" in store.why_empty(query)
    assert store.sql(f"SELECT * FROM compact_codes WHERE cell_idx = {OUTSIDE}").height == KEEP


def test_some_cells_come_with_their_columns_whether_or_not_all_were_read(store: FeatureStore, panel_store: Any) -> None:
    wanted = pl.Series([17, 6, 39])
    for _ in range(2):
        found = store.cells_at(wanted).sort("cell_idx")
        assert found.equals(panel_store.cells.filter(pl.col("cell_idx").is_in([6, 17, 39])))


def test_plots_name_the_panel_in_their_titles(store: FeatureStore, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from feature_store.plots import density_histogram, umap, violin

    places = np.random.default_rng(0).normal(size=(12, 2))
    (label,) = violin(store, 3, "cell_type", save=tmp_path / "violin.png")
    assert label.get_xlabel() == "cell code where it fires, test cells, panel of 12 of 40 cells"
    (map_of,) = umap(store, 3, split=None, coordinates=places, save=tmp_path / "umap.png")
    assert "of 12 cells, panel of 12 of 40 cells" in " ".join(map_of.get_title().split())
    features = density_histogram(store, save=tmp_path / "density.png")
    assert "panel of 12 of 40 cells" in " ".join(features.get_title().split())
