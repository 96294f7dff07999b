"""Which run a command takes when none is named: the newest, but never a control.

A control is what results are held against: a baseline in the form of an SAE, or a model with random weights. Its run
says so in its plan, under `control`; what is made of it (codes, associations, an SAE trained on activations of a random
model) is one as well, which is found by following the plans upwards. Two or three small files are read for a run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from feature_store.errors import NotFoundError
from feature_store.files import read_bytes
from feature_store.layout import PLAN, Layout, RunInfo

_PLAN_OF: Mapping[str, str] = {
    "activations": PLAN,
    "saes": PLAN,
    "codes": f"by_cell/{PLAN}",
    "associations": f"features/{PLAN}",
}
_MADE_OF: Mapping[str, tuple[str, str]] = {
    "saes": ("activations", "activations"),
    "codes": ("sae", "saes"),
    "associations": ("sae", "saes"),
}
"""Kind of run: the key of its plan that names the run above it, and that run's kind."""


def control_of(layout: Layout, kind: str, run: str) -> str | None:
    """What control a run is or was made of ("pca", "random-model", ...); None for any other run."""
    plan = _plan(layout.run_dir(kind, run) / _PLAN_OF[kind]) if kind in _PLAN_OF else {}
    if "control" in plan:
        return str(plan["control"])
    key, above = _MADE_OF.get(kind, ("", ""))
    return control_of(layout, above, plan[key]) if key in plan else None


def newest_run(layout: Layout, kind: str) -> RunInfo:
    """The newest complete run of a kind that is no control.

    NotFoundError if there is none: the message names the command that makes one, or the controls, to be named.
    """
    controls = []
    for info in layout.runs(kind):
        if info.complete:
            control = control_of(layout, kind, info.run)
            if control is None:
                return info
            controls.append(f"{info.run} ({control})")
    if controls:
        raise NotFoundError(
            f"all complete {kind} runs in {layout.root} are controls, which are taken only where they are named: "
            f"{', '.join(controls)}"
        )
    return layout.latest(kind)


def _plan(path: Path) -> dict[str, Any]:
    """A plan, or nothing where its run was deleted."""
    try:
        plan: dict[str, Any] = json.loads(read_bytes(path))
    except (FileNotFoundError, ValueError):
        return {}
    return plan
