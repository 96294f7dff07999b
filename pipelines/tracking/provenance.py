"""The provenance of a registered version: tags that are written at registration, and facts that are read from them.

The chain is version -> SAE run -> activations run -> data set (digests of its files) and foundation model (digest), and
the code. Each run is recorded with the hash of its manifest, and so of all its bytes. The tags remain if the store is
lost; whether a run still exists unchanged is read from the store.
"""

import importlib.metadata
import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pipelines
from feature_store.cells import load_source_location, short_names
from feature_store.errors import IntegrityError, StoreError
from feature_store.storage import commit
from feature_store.storage.addresses import data_path
from feature_store.storage.layout import Layout
from feature_store.storage.plans import CellsPlan, SAEPlan, as_json
from pipelines.inputs import load_model_location, no_model
from pipelines.tracking.registry import DATASET_TAG, ModelVersion
from pipelines.tracking.runs import RUN_TAG

GIT_S = 10
IMPORTED_TAG = "scsae.imported"
"""The tag with what an SAE was imported from, as JSON."""
WHERE_TAG = "scsae.dataset_where"
"""The tag with the condition by which the cells of the data set were taken, if there was one."""


@cache
def code_tags() -> dict[str, str]:
    """The version of the package, and the commit if it runs from its git checkout ("+" for one with changes)."""
    tags = {"scsae.version": importlib.metadata.version("scsae")}
    root = Path(pipelines.__file__).resolve().parents[1]
    # careful: an installed package may lie in the checkout of another project, whose commit is unrelated
    if _git(root, "rev-parse", "--show-toplevel") == str(root) and (head := _git(root, "rev-parse", "HEAD")):
        tags["scsae.commit"] = head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    return tags


def _git(root: Path, *command: str) -> str | None:
    """The output of a git command in a folder; None without git or without a repository."""
    try:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def origin_tags(layout: Layout, run: commit.Run) -> dict[str, str]:
    """The tags of a version of the SAE in `run`: the names and hashes of all its inputs."""
    plan = SAEPlan.of(run)
    activations = commit.Run.open(layout.activations_dir(plan.activations))
    tags = {
        RUN_TAG: run.path.name,
        "scsae.manifest_sha256": run.manifest().sha,
        "scsae.activations": plan.activations,
        "scsae.activations_manifest_sha256": activations.manifest().sha,
        DATASET_TAG: plan.dataset,
        "scsae.model": plan.model,
        "scsae.model_digest": plan.model_digest,
        "scsae.site": plan.site,
        **code_tags(),
    }
    if plan.imported is not None:
        tags[IMPORTED_TAG] = json.dumps(as_json(plan.imported))
    try:
        cells = commit.Run.open(layout.cells_dir(plan.dataset))
        tags["scsae.dataset_manifest_sha256"] = cells.manifest().sha
        if (where := CellsPlan.of(cells).where) is not None:
            tags[WHERE_TAG] = where
    except StoreError as error:
        # careful: a trained SAE is registered even if its cell table is gone or damaged, and the reason is kept
        tags["scsae.dataset_manifest_missing"] = f"{type(error).__name__}: {error}"
    if source := data_files(layout, plan.dataset):
        tags["scsae.data_files"] = json.dumps(source)
    return tags


def data_files(layout: Layout, dataset: str) -> dict[str, str]:
    """The sha256 of each file of a data set, by the file's name; empty if the store no longer has them."""
    try:
        where = load_source_location(layout, dataset)
    except IntegrityError:
        return {}
    paths, digests = (value if isinstance(value, list) else [value] for value in (where["path"], where["digest"]))
    return dict(zip(short_names([data_path(path) for path in paths]), digests, strict=True))


def origin_of(layout: Layout, version: ModelVersion) -> dict[str, dict[str, Any]]:
    """The facts about a version in groups: the version, its SAE, activations, data set, model and code."""
    tags = version.tags
    digests = json.loads(tags.get("scsae.data_files", "{}")) or data_files(layout, tags.get(DATASET_TAG, ""))
    sae, activations, dataset = (tags.get(name, "") for name in (RUN_TAG, "scsae.activations", DATASET_TAG))
    return {
        "version": {
            "name": version.name,
            "version": version.version,
            "aliases": ", ".join(version.aliases) or None,
            "model_id": version.model_id,
            "mlflow_run": version.mlflow_run,
        },
        "sae": {
            "run": sae,
            "manifest_sha256": tags.get("scsae.manifest_sha256"),
            "state": _state(layout.saes_dir(sae), tags.get("scsae.manifest_sha256")),
            "site": tags.get("scsae.site"),
            "imported": tags.get(IMPORTED_TAG),
            "findings": tags.get("scsae.findings"),
        },
        "activations": {
            "run": activations,
            "manifest_sha256": tags.get("scsae.activations_manifest_sha256"),
            "state": _state(layout.activations_dir(activations), tags.get("scsae.activations_manifest_sha256")),
        },
        "data set": {
            "id": dataset,
            "manifest_sha256": tags.get("scsae.dataset_manifest_sha256"),
            "manifest_missing": tags.get("scsae.dataset_manifest_missing"),
            "state": _state(layout.cells_dir(dataset), tags.get("scsae.dataset_manifest_sha256")),
            "where": tags.get(WHERE_TAG),
            **{f"sha256 of {name}": digest for name, digest in digests.items()},
        },
        "model": {
            "name": tags.get("scsae.model"),
            "digest": tags.get("scsae.model_digest"),
            "place": _place(layout, activations),
        },
        "code": {"version": tags.get("scsae.version"), "commit": tags.get("scsae.commit")},
        "figures": {
            **version.metrics,
            **{name: f"not measured: {reason}" for name, reason in version.missing.items()},
        },
    }


def _state(folder: Path, sha: str | None) -> str:
    """A text that says whether the store holds the registered run unchanged, by its manifest."""
    try:
        now = commit.Run.open(folder).manifest().sha
    except StoreError as error:
        return f"not in this store ({type(error).__name__})"
    if sha is None:
        return "in this store"
    return "in this store, unchanged" if now == sha else f"changed: its manifest is now {now}"


def _place(layout: Layout, activations: str) -> str | None:
    try:
        run = commit.Run.open(layout.activations_dir(activations))
        return no_model(run) or load_model_location(run).model
    except (StoreError, FileNotFoundError):
        return None
