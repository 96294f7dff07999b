"""Registration: an SAE of the store becomes an MLflow run, with its curves and figures, and a version in the registry.

A trained SAE and an imported one are registered alike; the tags of an imported one say what it was imported from.
"""

import json
import shutil

from feature_store.storage import commit, filesystem
from feature_store.storage.layout import HISTORY, SUMMARY, Layout
from feature_store.storage.plans import SAEPlan, as_json
from pipelines.tracking.provenance import origin_tags
from pipelines.tracking.registry import MISSING_TAG, ModelVersion, Tracking, registered_name

MODEL_FILES = ("sae.safetensors", "config.json")


def register_sae(layout: Layout, run: commit.Run, *, name: str | None) -> str:
    """Log an SAE to MLflow and register it, once; return "NAME VERSION (alias)".

    `name` None: sae-MODEL-SITE, or for a control its kind in place of "sae".
    """
    tracking = Tracking(layout)
    with tracking.exclusive():
        found = tracking.of_run(run.path.name)
        if found is None:
            found = _logged(tracking, layout, run, name)
        elif tracking.find(run.path.name) is None:
            # the process died between the registration and the end of its MLflow run
            tracking.client.set_terminated(found.mlflow_run)
        found = tracking.settled(found)
    return f"{found.name} {found.version}" + "".join(f" ({alias})" for alias in found.aliases)


def _logged(tracking: Tracking, layout: Layout, run: commit.Run, name: str | None) -> ModelVersion:
    """Log an SAE with its curves and metrics, and register it."""
    plan, summary = SAEPlan.of(run), run.read_json(SUMMARY)
    metrics = {name: value for name, value in summary.items() if isinstance(value, int | float)}
    name = name or registered_name(f"{plan.control_of or 'sae'}-{plan.model}-{plan.site}")
    findings = ", ".join(found["kind"] for found in summary["findings"]) or "none"
    tags = {**origin_tags(layout, run), "scsae.findings": findings}
    if missing := summary.get("missing"):
        tags[MISSING_TAG] = json.dumps(missing)
    params = {**plan.sae, **plan.train}
    if plan.imported is not None:
        params |= {f"imported.{key}": value for key, value in as_json(plan.imported).items()}
    params |= {name: getattr(plan, name) for name in ("model", "site", "n_ranks", "recovery_cells")}
    with tracking.run(run.path.name, params=params, tags=tags) as mlflow_run:
        tracking.log_curves(mlflow_run, run.read_json(HISTORY))
        tracking.log_metrics(mlflow_run, metrics)
        with filesystem.local_folder(run.path) as folder, filesystem.scratch_folder(run.path) as made:
            # the checkpoints beside them are several times as large, and users of the model do not need them
            artifact = made / "sae"
            artifact.mkdir()
            for file in MODEL_FILES:
                shutil.copyfile(folder / file, artifact / file)
            return tracking.register(
                artifact,
                name=name,
                d_model=plan.d_model,
                n_features=plan.n_features,
                metrics=metrics,
                tags=tags,
            )
