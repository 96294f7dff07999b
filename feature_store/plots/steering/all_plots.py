"""Every picture that a steering run has the tables for."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.errors import InputError
from feature_store.plots.canvas import image_file
from feature_store.plots.steering.by_type import steering_distances, type_rows
from feature_store.plots.steering.cell_map import embedded_cells, steering_map
from feature_store.plots.steering.effects import bar_rows, steering_bars
from feature_store.plots.steering.gene_predictions import gene_predictions, steering_head
from feature_store.plots.steering.grid import curve_rows, steering_curve, steering_pareto, trade_rows
from feature_store.query.steering import steering_results

if TYPE_CHECKING:
    from feature_store.plots.canvas import Save
    from feature_store.query.store import FeatureStore


def steering_all(
    store: "FeatureStore", run: str | None = None, *, save: "Save", show: bool | None = None
) -> list[Path]:
    """Draw every plot that a run has the tables for as PNG files into the folder `save`, and return their paths.

    It takes some 3 s for 2,000 cells. Raises InputError for an unknown run.
    """
    given = image_file(save)
    drawings = steering_drawings(store, run)
    made = {name: Path(given.path) / f"{name}.png" for name in drawings}
    for name, draw in drawings.items():
        draw(replace(given, path=made[name]), show=show)
    return list(made.values())


def steering_drawings(store: "FeatureStore", run: str | None = None) -> dict[str, Callable[..., object]]:
    """The plots that a run has the tables for, by name, as functions that draw into a file."""
    results = steering_results(store, run)
    known: dict[str, tuple[Any, Callable[[], object]]] = {
        "bars": (steering_bars, lambda: bar_rows(results)),
        "curve": (steering_curve, lambda: curve_rows(results)),
        "pareto": (steering_pareto, lambda: trade_rows(results)),
        "distances": (steering_distances, lambda: type_rows(results)),
        "map": (steering_map, lambda: embedded_cells(store, results)),
        "head": (steering_head, lambda: gene_predictions(store, results)),
    }
    drawings: dict[str, Callable[..., object]] = {}
    for name, (draw, select) in known.items():
        try:
            select()
        except InputError:
            # the run has no such table by design: a mix moves no cells, a single point is no curve
            continue
        drawings[name] = partial(_draw_into, draw, store, results.run)
    return drawings


def _draw_into(draw: Any, store: "FeatureStore", run: str, save: "Save", *, show: bool | None = None) -> object:
    return draw(store, run, save=save, show=show)
