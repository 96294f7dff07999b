"""Which run a command takes when none is named: the newest, but never a control; which runs a FeatureStore reads.

A control is what results are held against: a baseline in the form of an SAE, or a model with random weights. Its run
says so in its plan, under `control`; what is made of it (codes, associations, an SAE trained on activations of a random
model) is one as well, which is found by following the plans upwards. Two or three small files are read for a run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_store.errors import NotFoundError
from feature_store.storage.filesystem import read_bytes, read_sealed
from feature_store.storage.layout import PLAN, Layout, RunInfo

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


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The runs that a FeatureStore reads; None where the store has none yet."""

    dataset: str | None
    codes: str | None
    associations: str | None
    steering: tuple[str, ...]
    sae: str | None = None
    matches: tuple[str, ...] = ()
    comparison: str | None = None


def lineage_of(
    layout: Layout, *, associations: str | None = None, codes: str | None = None, dataset: str | None = None
) -> Lineage:
    """The runs to read: those named (ids, or their beginnings), and what belongs to them, the newest where several do.

    Associations bring the codes that they are of, codes the data set that they are of. NotFoundError for an unknown run
    and for runs that do not belong together.
    """
    _check_dataset(layout, dataset)
    chosen_codes = None
    if codes is not None:
        chosen_codes = _named(layout, "codes", codes)
        _refuse_others(chosen_codes, {"dataset": dataset})
    of = {"codes": _run_of(chosen_codes), "dataset": dataset}
    if associations is None:
        chosen = _newest(layout, "associations", of)
    else:
        chosen = _named(layout, "associations", associations)
        _refuse_others(chosen, of)
    if chosen_codes is None:
        named = _plan_of(chosen).get("codes")
        chosen_codes = _newest(layout, "codes", of) if named is None else _named(layout, "codes", named)
    plan = {**_plan_of(chosen_codes), **_plan_of(chosen)}
    cells = [info.run for info in layout.runs("cells") if info.complete]
    dataset = dataset or plan.get("dataset")
    _check_dataset(layout, dataset)
    return Lineage(
        dataset=dataset or next(iter(cells), None),
        codes=_run_of(chosen_codes),
        associations=_run_of(chosen),
        steering=_steering(layout, plan.get("sae")),
        sae=plan.get("sae"),
        matches=_matches(layout, plan.get("sae")),
        comparison=_comparison(layout, chosen.run) if chosen else None,
    )


def plans_of(layout: Layout, lineage: Lineage) -> dict[str, dict[str, Any]]:
    """The plans of what is read and of what it was made of, by kind, activations first; deleted runs have none."""
    plans = {
        kind: _plan(layout.run_dir(kind, run) / _PLAN_OF[kind])
        for kind, run in (("codes", lineage.codes), ("associations", lineage.associations))
        if run is not None
    }
    if lineage.sae is not None:
        plans["saes"] = _plan(layout.saes_dir(lineage.sae) / PLAN)
        if "activations" in plans["saes"]:
            plans["activations"] = _plan(layout.activations_dir(plans["saes"]["activations"]) / PLAN)
    return {kind: plans[kind] for kind in _PLAN_OF if plans.get(kind)}


def _named(layout: Layout, kind: str, run: str) -> RunInfo:
    complete = [info for info in layout.runs(kind) if info.complete]
    exact = [info for info in complete if info.run == run]
    matches = exact or [info for info in complete if info.run.startswith(run)]
    if len(matches) != 1:
        known = ", ".join(info.run for info in complete) or "none"
        raise NotFoundError(
            f"{run!r} names {len(matches) or 'none'} of the complete {kind} runs in {layout.root}: {known}"
        )
    return matches[0]


def _newest(layout: Layout, kind: str, of: Mapping[str, str | None]) -> RunInfo | None:
    """The newest complete run made of what is named in `of`; a control where there is no other."""
    controls = []
    for info in layout.runs(kind):
        if info.complete and not _differences(info, of):
            if control_of(layout, kind, info.run) is None:
                return info
            controls.append(info)
    # a store of nothing but controls is there to be asked about them
    return controls[0] if controls else None


def _differences(info: RunInfo, of: Mapping[str, str | None]) -> list[str]:
    plan = _plan_of(info) if any(of.values()) else {}
    return [
        f"{key} {plan[key]!r}, not of {value!r}"
        for key, value in of.items()
        if value is not None and key in plan and plan[key] != value
    ]


def _refuse_others(info: RunInfo, of: Mapping[str, str | None]) -> None:
    if differences := _differences(info, of):
        raise NotFoundError(f"{info.kind} {info.run!r} are of {' and of '.join(differences)}; name one of them alone")


def _check_dataset(layout: Layout, dataset: str | None) -> None:
    known = [info.run for info in layout.runs("cells") if info.complete]
    if dataset is not None and dataset not in known:
        raise NotFoundError(f"no data set {dataset!r} in {layout.root}; there are {', '.join(known) or 'none'}")


def _steering(layout: Layout, sae: str | None) -> tuple[str, ...]:
    """The complete steering runs of an SAE, newest first; `sae` None: all. A plan that names no SAE is of any."""
    complete = [info.run for info in layout.runs("steering") if info.complete]
    if sae is None:
        return tuple(complete)
    plans = {run: _plan(layout.steering_dir(run) / "results" / PLAN) for run in complete}
    return tuple(run for run in complete if plans[run].get("sae", sae) == sae)


def _matches(layout: Layout, sae: str | None) -> tuple[str, ...]:
    """The newest complete match of each pair of SAEs and method; `sae` None: of all pairs, else of those with it."""
    newest: dict[tuple[str, ...], str] = {}
    for info in layout.runs("matches"):
        if info.complete:
            plan = read_sealed(info.path / "feature_match" / PLAN)
            if sae is None or sae in plan["saes"]:
                newest.setdefault((*plan["saes"], plan["method"]), info.run)
    return tuple(newest.values())


def _comparison(layout: Layout, associations: str) -> str | None:
    """The newest complete comparison of these associations with their baselines."""
    for info in layout.runs("comparisons"):
        if info.complete and read_sealed(info.path / "comparison" / PLAN)["associations"] == associations:
            return info.run
    return None


def _run_of(info: RunInfo | None) -> str | None:
    return None if info is None else info.run


def _plan_of(info: RunInfo | None) -> dict[str, Any]:
    return {} if info is None else read_sealed(info.path / _PLAN_OF[info.kind])
