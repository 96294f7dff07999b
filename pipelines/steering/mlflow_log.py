"""Log a steering evaluation to MLflow: one run, with parameters, figures, tables and plots, attached to its SAE.

Only the chosen variant, the nulls and the baselines become metrics, each of all cells together: an evaluation of a grid
has thousands of rows, which are in the tables attached. The chosen one is called `chosen` whatever was done, so that
evaluations can be compared; what was done is among the parameters. Plots come last, and one that cannot be drawn is
said on stderr and left out: it can be drawn from the store at any time.
"""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from feature_store.query.steering import ALL, Role
from feature_store.storage.layout import Layout
from feature_store.storage.plans import SteeringPlan
from pipelines.config import SteerOptions
from pipelines.runtime.progress import stderr_console
from pipelines.tracking import Tracking
from pipelines.tracking.provenance import code_tags
from pipelines.tracking.registry import DATASET_TAG, KIND_TAG, QUESTION_TAG, SAE_TAG

MODEL_TAG = "scsae.model_id"
Plots = Mapping[str, Callable[[Path], object]]
"""What draws each plot, by name, into the file that it is given."""
BESIDE = tuple(role.value for role in Role if role not in (Role.GRID, Role.TREND))
"""Roles that are logged beside what was chosen."""
NAMED_OPTIONS = ("readout", "cells", "gene", "max_cells")
"""Options that change which cells are measured and how: named in the task where they are not the default."""
UNCERTAINTY = ("effect", "low", "high")


def log_evaluation(
    layout: Layout,
    folder: Path,
    plan: SteeringPlan,
    tables: Mapping[str, pl.DataFrame],
    plots: Callable[[], Plots],
) -> str:
    """Log the evaluation in `folder` unless it is logged, whole, with the SAE's model; return the MLflow run id.

    Args:
        layout: the store.
        folder: the steering run; its name is what a repeated stage finds the log by.
        plan: what determines the run.
        tables: by name; `results` gives the metrics. Lists become JSON, any other table csv.
        plots: gives what draws each plot into the PNG whose path it is given; called only if they are to be logged.

    Raises:
        StoreWriteError, RunFailedError: the tracking store cannot be written or does not answer; run the stage again.
    """
    tracking = Tracking(layout)
    with tracking.exclusive():
        version = tracking.of_run(plan.sae)
        model_id = version.model_id if version else None
        for logged in tracking.logged(folder.name):
            if logged.info.status == "FINISHED" and logged.data.tags.get(MODEL_TAG) == model_id:
                return str(logged.info.run_id)
        tags = {
            KIND_TAG: "steering",
            SAE_TAG: plan.sae,
            DATASET_TAG: plan.dataset,
            QUESTION_TAG: task_in_words(plan),
            "scsae.associations": plan.associations,
            "scsae.site": plan.site,
            **({MODEL_TAG: model_id} if model_id else {}),
            **code_tags(),
        }
        params = flat({**plan.to_json(), "chosen": chosen_point(tables["results"])})
        with tracking.run(folder.name, params=params, tags=tags) as mlflow_run:
            tracking.log_metrics(mlflow_run, metrics_of(tables["results"]), model_id=model_id)
            # not beside the run, where a kill would leave it
            with tempfile.TemporaryDirectory() as scratch:
                made = Path(scratch)
                tracking.log_files(mlflow_run, [_write(frame, made / name) for name, frame in tables.items()])
                tracking.log_files(mlflow_run, _drawn(plots, made, folder.name), folder="plots")
    return mlflow_run


def task_in_words(plan: SteeringPlan) -> str:
    """The task in words, such as "stim -> ctrl" or "mix batch", with the options that are not the default."""
    if plan.toward is not None:
        words = f"{plan.target} -> {plan.toward}"
    elif plan.target == ALL:
        words = f"mix {plan.kind}"
    else:
        words = f"{plan.intervention} {plan.kind} {plan.target}"
    fields = SteerOptions.model_fields
    usual = {key: fields[key].get_default(call_default_factory=True) for key in NAMED_OPTIONS if key in fields}
    for key in NAMED_OPTIONS:
        value = getattr(plan, key)
        if value not in (None, [], ()) and value != usual.get(key):
            words += f", {key} {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
    return words


def chosen_point(results: pl.DataFrame) -> dict[str, Any]:
    """Number of features and dose of the chosen variant; nothing where none was chosen."""
    chosen = results.filter(_is_chosen()).select("n_features", "dose").unique()
    return chosen.row(0, named=True) if chosen.height == 1 else {}


def _is_chosen() -> pl.Expr:
    return pl.col("chosen") & ~pl.col("role").is_in(BESIDE)


def metrics_of(results: pl.DataFrame) -> dict[str, float]:
    """`split/condition/metric` of all cells together: of the chosen variant with its uncertainty, nulls, baselines.

    A null or baseline with several points of a grid is logged at the chosen one.
    """
    of_all = results.filter(pl.col("group") == "all")
    chosen = of_all.filter(_is_chosen())
    beside = of_all.filter(pl.col("role").is_in(BESIDE))
    at = chosen.select("n_features", "dose").unique()
    beside = beside.with_columns(
        here=pl.struct("n_features", "dose").is_in(at.select(pl.struct("n_features", "dose")).to_series().implode())
    ).sort("here", maintain_order=True)
    metrics: dict[str, float | None] = {}
    for row in beside.iter_rows(named=True):
        metrics[f"{row['split']}/{row['condition']}/{row['metric']}"] = row["value"]
    further = [*UNCERTAINTY, *(name for name in results.columns if name.startswith("p_"))]
    for row in chosen.iter_rows(named=True):
        key = f"{row['split']}/chosen/{row['metric']}"
        metrics[key] = row["value"]
        metrics |= {f"{key}/{name}": row[name] for name in further}
    return {clean(key): float(value) for key, value in metrics.items() if value is not None}


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names; lists as JSON."""
    found: dict[str, str] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        else:
            found[clean(name)] = json.dumps(value) if isinstance(value, list | tuple) else str(value)
    return found


def clean(name: str) -> str:
    """A name with those characters alone that MLflow takes, and at most 250 of them."""
    return re.sub(r"[^\w\-. /:]", "", name)[:250]


def _write(frame: pl.DataFrame, path: Path) -> Path:
    nested = any(dtype.is_nested() for dtype in frame.schema.values())
    target = path.with_suffix(".json" if nested else ".csv")
    if nested:
        frame.write_json(target)
    else:
        frame.write_csv(target)
    return target


def _drawn(plots: Callable[[], Plots], folder: Path, run: str) -> list[Path]:
    """Files of the plots that could be drawn; what could not is said once, with the reason of each."""
    drawn, failed = [], []
    drawings: Plots = {}
    try:
        drawings = plots()
    except Exception as error:  # noqa: BLE001  a picture must not cost the log
        failed.append(f"none could be begun: {error!r}")
    for name, draw in drawings.items():
        file = folder / f"{name}.png"
        try:
            draw(file)
        except Exception as error:  # noqa: BLE001
            failed.append(f"{name}: {error!r}")
        else:
            drawn.append(file)
    if failed:
        text = f"warning: steering/{run} is logged without some of its plots ({'; '.join(failed)}); draw them with "
        text += f"`scsae plot steering-all --steering {run} --save plots`"
        stderr_console().print(text, style="yellow", markup=False, soft_wrap=True)
    return drawn
