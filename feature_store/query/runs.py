"""The chain of runs: data set -> activations -> SAE -> codes -> associations -> steering, and which runs are taken.

Everybody asks here which run an id names (`resolve_run`), which run a command takes when none is named (`newest_run`),
what associations descend from (`RunChain`), and which runs a `FeatureStore` reads (`Lineage`).

A default is never a control: what results are held against, a baseline in the form of an SAE or a model with random
weights, and all that is made of them. Each plan says so itself (`plans.Plan.control_of`), so no parent is asked. Where
the plan of a candidate, or its manifest, is damaged or gone, there is no default: the error names the file, and what to
type (`scsae forget` where the run was deleted on purpose). Runs that are named still open. Runs that another version of
their stage made are passed over. Two small files are read for a run.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, TypeVar

from feature_store.errors import IntegrityError, NotFoundError, OutdatedRunError, StoreError
from feature_store.storage.commit import Run
from feature_store.storage.filesystem import REPAIR
from feature_store.storage.layout import KINDS, MANIFEST, MEASURED_TABLES, PLAN, Layout, RunInfo
from feature_store.storage.plans import (
    ActivationsPlan,
    AssociationsPlan,
    CellsPlan,
    CircuitPlan,
    CodesPlan,
    ComparisonPlan,
    EffectsPlan,
    InputsPlan,
    MatchPlan,
    ModulesPlan,
    Plan,
    ProbePlan,
    SAEPlan,
    SteeringPlan,
)

_TABLE_OF: Mapping[str, tuple[str, type[Plan]]] = {
    "cells": ("", CellsPlan),
    "activations": ("", ActivationsPlan),
    "saes": ("", SAEPlan),
    "codes": ("by_cell", CodesPlan),
    "associations": ("features", AssociationsPlan),
    "steering": ("results", SteeringPlan),
    "effects": ("feature_effect", EffectsPlan),
    "circuits": ("feature_edge", CircuitPlan),
    "inputs": ("feature_input", InputsPlan),
    "probes": ("feature_probe", ProbePlan),
    "modules": ("feature_module", ModulesPlan),
    "matches": ("feature_match", MatchPlan),
    "comparisons": ("comparison", ComparisonPlan),
}
"""Kind of run: the table whose plan.json is asked for the run's plan, and the record of that plan."""
_CAN_BE_CONTROL = (
    *(ActivationsPlan, SAEPlan, CodesPlan, AssociationsPlan, SteeringPlan, EffectsPlan, CircuitPlan, InputsPlan),
)


def resolve_run(layout: Layout, kind: str, run: str | None, *, option: str) -> RunInfo:
    """Return the complete run of `kind` that `run` names (an id, or its beginning), or the default where it is None.

    Args:
        layout: of the store.
        kind: kind of run, as its folder is named.
        run: what the user typed.
        option: the option that it was typed for, such as `--sae`.

    Raises:
        NotFoundError: it names none or several, or there is none to take; the message names the runs that there are,
            or the command that makes one.
        IntegrityError: the default cannot be told, because a plan or manifest is damaged.
    """
    if run is None:
        return newest_run(layout, kind)
    known = [info for info in layout.runs(kind) if info.complete or info.lost]
    if not known:
        # says how to make one
        layout.latest(kind)
    found = _one_named(known, run, option=option, where=f"complete {kind} runs in {layout.root}")
    layout.refuse_lost([found])
    return found


def resolve_any_run(layout: Layout, run: str) -> RunInfo:
    """Return the run of whatever kind, complete, incomplete or gone, that an id, its beginning or KIND/ID names.

    NotFoundError for none and for several.
    """
    every = [info for kind in KINDS for info in layout.runs(kind)]
    return _one_named(every, run, option="RUN", where=f"runs in {layout.root}", show_kind=True)


def newest_run(layout: Layout, kind: str, *, but: Collection[str] = ()) -> RunInfo:
    """Return the newest complete run of a kind that is no control, and none of `but` unless there is no other.

    Raises:
        NotFoundError: there is none; the message names the command that makes one, or the controls, to be named.
        IntegrityError: a plan or the time of a manifest is damaged, so that the default cannot be told.
    """
    found = _candidates(layout, kind, {})
    if found.others:
        return next((info for info in found.others if info.run not in but), found.others[0])
    if found.current:
        named = ", ".join(f"{info.run} ({control})" for info, control in found.current)
        raise NotFoundError(
            f"all complete {kind} runs in {layout.root} are controls, which are taken only where they are named: "
            f"{named}"
        )
    _raise_if_outdated(layout, kind, found)
    return layout.latest(kind)


def newest_run_of(layout: Layout, kind: str, of: Mapping[str, str | None]) -> RunInfo | None:
    """Return the newest complete run of a kind made of what is named in `of`, or a control where there is no other.

    None where there is none at all. `of`: ids by field of the plan, such as {"sae": ...}.

    Raises:
        NotFoundError: other versions of scsae made all of them; the message names the command that makes them anew.
        IntegrityError: as from `newest_run`.
    """
    found = _candidates(layout, kind, of)
    every = found.others or [info for info, _ in found.current]
    if not every:
        _raise_if_outdated(layout, kind, found)
    return every[0] if every else None


def plan_of(layout: Layout, kind: str, run: str) -> Plan:
    """Return the plan of a run. NotFoundError, IntegrityError, OutdatedRunError."""
    table, record = _TABLE_OF[kind]
    return record.of(Run.open(layout.run_dir(kind, run) / table))


def control_of(layout: Layout, kind: str, run: str) -> str | None:
    """Return what control a run is, or descends from ("pca", "random-model", ...); None for any other run.

    Raises:
        NotFoundError, IntegrityError, OutdatedRunError: the run's plan cannot be read.
    """
    return _control_in(plan_of(layout, kind, run))


@dataclass(frozen=True, kw_only=True)
class RunChain:
    """What an associations run descends from, up to the activations: ids and plans.

    Attributes:
        layout: of the store.
        run: id of the associations.
        associations, codes, sae, activations: the plans.
    """

    layout: Layout
    run: str
    associations: AssociationsPlan
    codes: CodesPlan
    sae: SAEPlan
    activations: ActivationsPlan

    @classmethod
    def of(cls, layout: Layout, associations: str) -> Self:
        """Read the chain above an associations run. NotFoundError, IntegrityError, OutdatedRunError."""
        own = AssociationsPlan.of(Run.open(layout.associations_dir(associations) / "features"))
        codes = CodesPlan.of(Run.open(layout.codes_dir(own.codes) / "by_cell"))
        sae = SAEPlan.of(Run.open(layout.saes_dir(own.sae)))
        activations = ActivationsPlan.of(Run.open(layout.activations_dir(sae.activations)))
        return cls(layout=layout, run=associations, associations=own, codes=codes, sae=sae, activations=activations)

    @property
    def cells(self) -> CellsPlan:
        """The plan of the cell table of the codes. NotFoundError, IntegrityError, OutdatedRunError."""
        return CellsPlan.of(Run.open(self.layout.cells_dir(self.codes.dataset)))

    @property
    def activations_run(self) -> Run:
        """The run of the activations."""
        return Run.open(self.layout.activations_dir(self.sae.activations))


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
    measured: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The runs of each kind of MEASURED_TABLES, newest first."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Kinds of run (steering, matches, comparisons, those of MEASURED_TABLES) of which it cannot be told what belongs
    to the SAE, and why: a plan or manifest is damaged or gone. Their tables cannot be read; the others can."""


def created_of(layout: Layout, lineage: Lineage) -> dict[str, str]:
    """When each run of the tables of a lineage was made, by kind and id ("steering dced458727a1"), the main one first.

    Runs of which it cannot be told, because a manifest is damaged, are left out.
    """
    main = [("associations", lineage.associations), ("codes", lineage.codes), ("cells", lineage.dataset)]
    several = [("steering", lineage.steering), *lineage.measured.items()]
    wanted = [(kind, run) for kind, run in main if run is not None]
    wanted += [(kind, run) for kind, runs in several for run in runs]
    known = {
        (kind, info.run): info.created
        for kind in dict.fromkeys(kind for kind, _ in wanted)
        for info in layout.runs(kind)
    }
    found = {f"{kind} {run}": known.get((kind, run)) for kind, run in wanted}
    return {name: created.isoformat(timespec="seconds") for name, created in found.items() if created is not None}


def lineage_of(
    layout: Layout, *, associations: str | None = None, codes: str | None = None, dataset: str | None = None
) -> Lineage:
    """Return the runs to read: those named (ids, or their beginnings), and what belongs to them, the newest of several.

    Associations bring the codes that they are of, codes the data set that they are of. Of a store that holds nothing
    but controls, the newest of these are read.

    Raises:
        NotFoundError: a run is not there, or runs do not belong together.
        IntegrityError: a plan or manifest that decides which runs these are is damaged, or a run is gone.
    """
    _check_dataset(layout, dataset)
    chosen_codes = None
    if codes is not None:
        chosen_codes = resolve_run(layout, "codes", codes, option="codes")
        _refuse_others(layout, chosen_codes, {"dataset": dataset})
    of = {"codes": None if chosen_codes is None else chosen_codes.run, "dataset": dataset}
    if associations is None:
        chosen = newest_run_of(layout, "associations", of)
    else:
        chosen = resolve_run(layout, "associations", associations, option="associations")
        _refuse_others(layout, chosen, of)
    if chosen_codes is None:
        if chosen is None:
            chosen_codes = newest_run_of(layout, "codes", of)
        else:
            made_of = AssociationsPlan.of(Run.open(chosen.path / "features")).codes
            chosen_codes = resolve_run(layout, "codes", made_of, option=f"the codes of associations {chosen.run}")
    plan: AssociationsPlan | CodesPlan | None = None
    if chosen is not None:
        plan = AssociationsPlan.of(Run.open(chosen.path / "features"))
    elif chosen_codes is not None:
        plan = CodesPlan.of(Run.open(chosen_codes.path / "by_cell"))
    dataset = dataset or (None if plan is None else plan.dataset)
    _check_dataset(layout, dataset)
    cells = layout.runs("cells")
    if dataset is None:
        layout.refuse_lost(cells)
        dataset = next((info.run for info in cells if info.complete), None)
    sae = None if plan is None else plan.sae
    unreadable: dict[str, str] = {}
    return Lineage(
        dataset=dataset,
        codes=None if chosen_codes is None else chosen_codes.run,
        associations=None if chosen is None else chosen.run,
        steering=_or_reason("steering", lambda: _steering(layout, sae), (), unreadable),
        sae=sae,
        matches=_or_reason("matches", lambda: _matches(layout, sae), (), unreadable),
        comparison=_or_reason("comparisons", lambda: _comparison(layout, chosen.run), None, unreadable)
        if chosen
        else None,
        measured={
            kind: _or_reason(kind, partial(_measured, layout, kind, sae), (), unreadable) for kind in MEASURED_TABLES
        },
        unreadable=unreadable,
    )


def plans_of(layout: Layout, lineage: Lineage) -> dict[str, dict[str, Any]]:
    """Return the plans of what is read and of what it was made of, by kind, activations first.

    A run that was deleted and forgotten has none; the plan of one that is damaged or gone is {"unreadable": why}.
    """
    sae = _content_or_reason(layout, "saes", lineage.sae)
    plans = {
        "activations": _content_or_reason(layout, "activations", (sae or {}).get("activations")),
        "saes": sae,
        "codes": _content_or_reason(layout, "codes", lineage.codes),
        "associations": _content_or_reason(layout, "associations", lineage.associations),
    }
    return {kind: plan for kind, plan in plans.items() if plan is not None}


@dataclass(frozen=True, kw_only=True)
class _Candidates:
    """Complete runs of a kind, newest first."""

    current: Sequence[tuple[RunInfo, str | None]]
    """Runs of this version, and of what control each is."""
    outdated: Sequence[RunInfo]
    """Runs of other versions, where there is none of this one, of whatever parents."""

    @property
    def others(self) -> list[RunInfo]:
        """The runs that are no controls."""
        return [info for info, control in self.current if control is None]


def _candidates(layout: Layout, kind: str, of: Mapping[str, str | None]) -> _Candidates:
    """The complete runs made of what is named in `of`. IntegrityError where one is gone, or a plan or time damaged."""
    every = layout.runs(kind)
    layout.refuse_lost(every)
    infos = [info for info in every if info.complete]
    plans = [(info, _plan_of_candidate(layout, info)) for info in infos]
    known = [(info, plan) for info, plan in plans if plan is not None]
    return _Candidates(
        current=[(info, _control_in(plan)) for info, plan in known if not _differences(plan, of)],
        outdated=[] if known else infos,
    )


def _raise_if_outdated(layout: Layout, kind: str, found: _Candidates) -> None:
    if found.outdated:
        raise NotFoundError(
            f"all complete {kind} runs in {layout.root} were made by other versions of scsae "
            f"({', '.join(info.run for info in found.outdated)}); make them anew with `{layout.command_for(kind)}`"
        )


def _plan_of_candidate(layout: Layout, info: RunInfo) -> Plan | None:
    """The plan of a complete run; None for one of another version. IntegrityError where it is damaged or missing."""
    try:
        plan = plan_of(layout, info.kind, info.run)
    except OutdatedRunError:
        return None
    except (IntegrityError, NotFoundError) as error:
        raise IntegrityError(
            f"which {info.kind} run is the default cannot be told: {error}; name the run that is meant, or repair "
            f"{info.kind}/{info.run} (`scsae verify {info.run}`) or delete {info.path}"
        ) from error
    if info.created is None:
        raise IntegrityError(
            f"which {info.kind} run is the newest cannot be told: a {MANIFEST} of {info.path} was damaged; name the "
            f"run that is meant, or {REPAIR}"
        )
    return plan


def _control_in(plan: Plan) -> str | None:
    """What control a plan says that its run is; None for the kinds of runs that are never taken as a default."""
    if isinstance(plan, _CAN_BE_CONTROL):
        return plan.control_of
    return None


def _one_named(runs: Sequence[RunInfo], run: str, *, option: str, where: str, show_kind: bool = False) -> RunInfo:
    """The one run that an id, or the beginning of one, names."""
    exact = [info for info in runs if run in (info.run, f"{info.kind}/{info.run}")]
    matches = exact or [info for info in runs if info.run.startswith(run)]
    if len(matches) != 1:
        known = ", ".join(f"{info.kind}/{info.run}" if show_kind else info.run for info in runs) or "none"
        raise NotFoundError(f"{option} was {run!r}, which names {len(matches) or 'none'} of the {where}: {known}")
    return matches[0]


def _differences(plan: Plan, of: Mapping[str, str | None]) -> list[str]:
    """In which of the parents named in `of` a plan differs."""
    return [
        f"{key} {getattr(plan, key)!r}, not of {value!r}"
        for key, value in of.items()
        if value is not None and hasattr(plan, key) and getattr(plan, key) != value
    ]


def _refuse_others(layout: Layout, info: RunInfo, of: Mapping[str, str | None]) -> None:
    if differences := _differences(plan_of(layout, info.kind, info.run), of):
        raise NotFoundError(f"{info.kind} {info.run!r} are of {' and of '.join(differences)}; name one of them alone")


def _check_dataset(layout: Layout, dataset: str | None) -> None:
    every = layout.runs("cells")
    layout.refuse_lost([info for info in every if info.run == dataset])
    known = [info.run for info in every if info.complete]
    if dataset is not None and dataset not in known:
        raise NotFoundError(f"no data set {dataset!r} in {layout.root}; there are {', '.join(known) or 'none'}")


T = TypeVar("T")


def _or_reason(kind: str, find: Callable[[], T], nothing: T, unreadable: dict[str, str]) -> T:
    """What `find` finds, or `nothing`, with the reason noted, where a run of the kind is damaged or gone."""
    try:
        return find()
    except IntegrityError as error:
        unreadable[kind] = str(error)
        return nothing


def _steering(layout: Layout, sae: str | None) -> tuple[str, ...]:
    """The complete steering runs of an SAE, newest first; `sae` None: all."""
    return tuple(info.run for info, _ in _candidates(layout, "steering", {"sae": sae}).current)


def _measured(layout: Layout, kind: str, sae: str | None) -> tuple[str, ...]:
    """The complete runs of a kind of MEASURED_TABLES of an SAE, newest first; `sae` None: all.

    A circuit is one of both SAEs that it joins.
    """
    ends = ("sae", "to_sae") if kind == "circuits" else ("sae",)
    found = {info.run: info for end in ends for info, _ in _candidates(layout, kind, {end: sae}).current}
    return tuple(sorted(found, key=lambda run: str(found[run].created), reverse=True))


def _matches(layout: Layout, sae: str | None) -> tuple[str, ...]:
    """The newest complete match of each pair of SAEs and method; `sae` None: of all pairs, else of those with it."""
    newest: dict[tuple[str, ...], str] = {}
    for info in _candidates(layout, "matches", {}).others:
        plan = MatchPlan.of(Run.open(info.path / "feature_match"))
        if sae is None or sae in plan.saes:
            newest.setdefault((*plan.saes, plan.method), info.run)
    return tuple(newest.values())


def _comparison(layout: Layout, associations: str) -> str | None:
    """The newest complete comparison of these associations with their baselines."""
    found = _candidates(layout, "comparisons", {"associations": associations}).others
    return found[0].run if found else None


def _content_or_reason(layout: Layout, kind: str, run: str | None) -> dict[str, Any] | None:
    if run is None:
        return None
    table, _ = _TABLE_OF[kind]
    path = layout.run_dir(kind, run) / table
    try:
        return Run.open(path).plan
    except NotFoundError:
        return None
    except StoreError as error:
        return {"unreadable": f"{path / PLAN}: {error}"}
