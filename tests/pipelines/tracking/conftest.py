"""A registry with made-up versions and evaluations: no SAE is trained for them."""

import json
from dataclasses import dataclass

import polars as pl
import pytest
from toy_plans import toy_plan

from feature_store.storage.layout import Layout
from feature_store.storage.plans import SteeringPlan
from pipelines.config import SteerOptions
from pipelines.steering.mlflow_log import log_evaluation
from pipelines.tracking import ModelVersion, Tracking
from pipelines.tracking.registry import MISSING_TAG

PLAN = {
    "kind": "condition",
    "target": "stim",
    "toward": "ctrl",
    "intervention": "shift",
    "grid": ((20, 1.0), (50, 1.5)),
    "max_cells": SteerOptions.model_fields["max_cells"].default,
    "readout": "mean",
    "site": "layer.1",
    "config": {"seed": 3},
}


@dataclass(frozen=True, kw_only=True)
class Registry:
    """The tracking store of a test, and how things come into it."""

    tracking: Tracking
    artifact: object

    @property
    def layout(self) -> Layout:
        return self.tracking.layout

    def version(self, run: str, *, name: str, dataset: str = "data", missing=None, **metrics: float) -> ModelVersion:
        tags = {"scsae.run": run, "scsae.dataset": dataset, "scsae.activations": "acts"}
        if missing:
            tags[MISSING_TAG] = json.dumps(missing)
        with self.tracking.run(run, params={}, tags=tags):
            return self.tracking.register(self.artifact, name=name, d_model=2, n_features=3, metrics=metrics, tags=tags)

    def evaluation(self, run: str, sae: str, *, dataset: str = "data", plan=None, plots=None, **values: float) -> str:
        """Log an evaluation of made-up figures."""
        folder = self.layout.steering_dir(run)
        folder.mkdir(parents=True, exist_ok=True)
        given = {**PLAN, **(plan or {})}
        chosen = {"intervention": given["intervention"]}
        if (dose := given.pop("dose", None)) is not None:
            chosen["dose"] = dose
        of = toy_plan(SteeringPlan, **given, sae=sae, dataset=dataset)
        tables = {
            "results": results(chosen, **values),
            "variants": pl.DataFrame({"variant": [0], "features": [[1, 2]]}),
        }
        return log_evaluation(self.layout, folder, of, tables, lambda: plots or {})


def row(metric: str, value: float, **other) -> dict:
    return {
        "split": "test",
        "condition": "shift",
        "role": "grid",
        "intervention": "shift",
        "n_features": 20,
        "dose": 1.5,
        "metric": metric,
        "group": "all",
        "n_draws": 1,
        "n_cells": 40,
        "value": value,
        "effect": value - 1,
        "low": value - 0.1,
        "high": value + 0.1,
        "p_random_features": 0.05,
        "p_shuffled_labels": None,
        "chosen": True,
        **other,
    }


def results(chosen: dict, **values: float) -> pl.DataFrame:
    """Rows of every role, of several groups and splits, whose chosen ones have these values."""
    rows = []
    for metric, value in values.items():
        null = {"role": "null", "condition": "random features", "n_draws": 20}
        rows += [
            row(metric, value, **chosen),
            row(metric, 7.0, **chosen, group="B cells"),
            row(metric, 0.3, **chosen, split="select"),
            row(metric, 8.0, dose=1.0, chosen=False),
            row(metric, 1.0, role="unsteered", condition="unsteered", n_features=0, dose=0.0, chosen=False),
            row(metric, 0.9, **null),
            row(metric, 9.0, dose=1.0, chosen=False, **null),
            row(metric, 0.4, role="baseline", condition="Harmony", n_features=0, dose=None, chosen=False),
        ]
    return pl.DataFrame(rows, schema_overrides={"p_shuffled_labels": pl.Float64})


@pytest.fixture(scope="session")
def registry(tmp_path_factory) -> Registry:
    """One store, as a fresh database takes seconds to make; each test takes its own names."""
    root = tmp_path_factory.mktemp("registry")
    artifact = root / "sae"
    artifact.mkdir()
    (artifact / "config.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return Registry(tracking=Tracking(Layout(root / "store")), artifact=artifact)
