"""The results of a steering run on `test` cells, and the roles that the conditions of a run have."""

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from feature_store.errors import InputError
from feature_store.query.metrics import HEADLINES
from feature_store.storage.commit import Run
from feature_store.storage.obs_columns import shown_name
from feature_store.storage.plans import SteeringResultsPlan

if TYPE_CHECKING:
    from feature_store.query.store import FeatureStore

ALL = "all"
"""The group of a value over all cells, and the target of a run that mixes all labels."""


class Role(StrEnum):
    """The role of a condition of a steering run: the column `role` of `steering` and `steering_variants`."""

    UNSTEERED = "unsteered"
    """The model without a change."""
    GRID = "grid"
    """The intervention at one number of features and one dose."""
    REPLACE = "replace"
    """The intervention at the chosen point, on the reconstruction instead of the activations."""
    RECONSTRUCTION = "reconstruction"
    """The reconstruction instead of the activations, without an intervention."""
    NULL = "null"
    BASELINE = "baseline"
    """A method that uses the labels and no features."""
    BASELINE_DOSE = "baseline_dose"
    """A baseline at another dose than 1."""
    FLOOR = "floor"
    """The distance that sampling noise alone leaves."""
    TREND = "trend"
    """A statistic along the doses or the numbers of features, and not a condition."""


class SteeringResults(NamedTuple):
    """A steering run: its id, its plan, and the rows of the table `steering` about its `test` cells."""

    run: str
    plan: SteeringResultsPlan
    rows: pl.DataFrame


def steering_results(store: "FeatureStore", run: str | None) -> SteeringResults:
    """The results of the run whose id is or begins with `run`; None takes the newest run.

    Values that could not be measured, because cells were too few, are left out. Raises InputError for an id that names
    no run, or more than one.
    """
    table = store.frame("steering").collect()
    runs = list(store.lineage.steering)
    chosen = [known for known in runs if known.startswith(run or "")]
    if not chosen or (run is not None and len(chosen) > 1):
        raise InputError(f"{run!r} names {len(chosen) or 'none'} of the steering runs {', '.join(runs)}")
    rows = table.filter(pl.col("run") == chosen[0])
    # careful: the table holds the columns of all runs, and an older run has no value in some
    rows = rows.drop(name for name in ("split", "group", "role", "chosen") if _is_empty(rows, name))
    if "split" in rows.columns:
        rows = rows.filter(pl.col("split") == "test")
    if "value" in rows.columns:
        rows = rows.filter(pl.col("value").is_not_null())
    return SteeringResults(chosen[0], _plan_of(store, chosen[0]), rows)


def of_role(rows: pl.DataFrame, *roles: Role) -> pl.DataFrame:
    """The rows with one of these roles; no rows if the run is so old that it has no roles."""
    if "role" not in rows.columns:
        return rows.clear()
    return rows.filter(pl.col("role").is_in([role.value for role in roles]))


def of_all_cells(rows: pl.DataFrame, metric: str) -> pl.DataFrame:
    """The rows of a metric over all cells, without those of single groups."""
    found = rows.filter(pl.col("metric") == metric)
    return found.filter(pl.col("group") == ALL) if "group" in found.columns else found


def headline_of(results: SteeringResults) -> str | None:
    """The headline metric of the run, the first of `HEADLINES` that was measured; None if none was."""
    return next((name for name in HEADLINES if name in results.rows["metric"]), None)


def at_chosen_point(results: SteeringResults, metric: str) -> dict[str, Any] | None:
    """The row of a metric, over all cells, at the point that was chosen on `select` cells; None if there is none."""
    rows = of_role(of_all_cells(results.rows, metric), Role.GRID)
    rows = rows.filter("chosen") if "chosen" in rows.columns else rows.clear()
    return rows.row(0, named=True) if rows.height else None


def p_column(null: str) -> str:
    """The name of the column that holds the p of every condition against a null."""
    return f"p_{null.replace(' ', '_')}"


def title_of(results: SteeringResults, shown: Callable[[str], str] = str) -> str:
    """A title that says what a run did; `shown` shortens or escapes each name."""
    plan = results.plan
    point = results.rows.filter(pl.col("chosen")) if "chosen" in results.rows.columns else results.rows.clear()
    n = point["n_features"][0] if point.height else len(plan.features)
    counted = f"{n} feature{'' if n == 1 else 's'} of "
    toward = f" toward {shown(plan.toward)}" if plan.toward else ""
    return (
        f"Steering {counted}{shown(shown_name(plan.kind).replace('_', ' '))} {shown(plan.target)}{toward}, test cells"
    )


def _is_empty(rows: pl.DataFrame, name: str) -> bool:
    return name in rows.columns and rows[name].null_count() == rows.height


def _plan_of(store: "FeatureStore", run: str) -> SteeringResultsPlan:
    return SteeringResultsPlan.of(Run.open(store.layout.steering_dir(run) / "results"))
