"""Log a steering evaluation to MLflow, as one run with parameters, metrics, tables and plots, attached to its SAE.

Only the chosen variant, the nulls and the baselines become metrics, each over all cells: the evaluation of a grid has
thousands of rows, which are in the attached tables. The chosen variant is always called `chosen`, so that evaluations
can be compared; its intervention is among the parameters. Plots come last. A plot that cannot be drawn is left out and
reported on stderr, because it can be drawn from the store at any time.
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
from feature_store.storage.obs_columns import shown_name
from feature_store.storage.plans import SteeringPlan
from pipelines.config import SteerOptions
from pipelines.runtime.progress import stderr_console
from pipelines.tracking import Tracking
from pipelines.tracking.provenance import code_tags
from pipelines.tracking.registry import DATASET_TAG, KIND_TAG, QUESTION_TAG, SAE_TAG

MODEL_TAG = "scsae.model_id"
Plots = Mapping[str, Callable[[Path], object]]
"""The function that draws each plot into a given file, by the name of the plot."""
BESIDE = tuple(role.value for role in Role if role not in (Role.GRID, Role.BASELINE_DOSE, Role.TREND))
"""The roles that are logged beside the chosen variant."""
NAMED_OPTIONS = ("readout", "cells", "gene", "max_cells")
"""Options that change which cells are measured and how; the task names them if they are not the default."""
UNCERTAINTY = ("effect", "low", "high")


def log_evaluation(
    layout: Layout,
    folder: Path,
    plan: SteeringPlan,
    tables: Mapping[str, pl.DataFrame],
    plots: Callable[[], Plots],
) -> str:
    """Log the evaluation in `folder` with the SAE's model, unless it is logged completely; return the MLflow run id.

    Args:
        layout: the layout of the store.
        folder: the folder of the steering run; a repeated stage finds the log by its name.
        plan: the plan of the run.
        tables: the tables by name; `results` gives the metrics. Tables with lists become JSON, all others csv.
        plots: returns the functions that draw each plot into a PNG of a given path; it is called only to log plots.

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
            # careful: a kill would leave files that lie in the folder of the run
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
        words = f"mix {shown_name(plan.kind)}"
    else:
        words = f"{plan.intervention} {shown_name(plan.kind)} {plan.target}"
    fields = SteerOptions.model_fields
    usual = {key: fields[key].get_default(call_default_factory=True) for key in NAMED_OPTIONS if key in fields}
    for key in NAMED_OPTIONS:
        value = getattr(plan, key)
        if value not in (None, [], ()) and value != usual.get(key):
            words += f", {key} {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
    return words


def chosen_point(results: pl.DataFrame) -> dict[str, Any]:
    """The number of features and the dose of the chosen variant; empty if none was chosen."""
    chosen = results.filter(_is_chosen()).select("n_features", "dose").unique()
    return chosen.row(0, named=True) if chosen.height == 1 else {}


def _is_chosen() -> pl.Expr:
    return pl.col("chosen") & ~pl.col("role").is_in(BESIDE)


def metrics_of(results: pl.DataFrame) -> dict[str, float]:
    """The metrics `split/condition/metric` over all cells of the chosen variant (with intervals), nulls and baselines.

    A null or baseline with several points of a grid is logged at the chosen point.
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
    """A nested mapping as one mapping with dotted names; lists become JSON."""
    found: dict[str, str] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        else:
            found[clean(name)] = json.dumps(value) if isinstance(value, list | tuple) else str(value)
    return found


def clean(name: str) -> str:
    """A name with only the characters that MLflow allows, and at most 250 of them."""
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
    """The files of the plots that could be drawn; one message gives the reason for each plot that could not."""
    drawn, failed = [], []
    drawings: Plots = {}
    try:
        drawings = plots()
    except Exception as error:  # noqa: BLE001  a plot must never fail the log
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
        stderr_console().print(text, style="yellow", soft_wrap=True)
    return drawn
