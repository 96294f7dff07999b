"""The rule for `champion`: a version replaces the champion if one metric, measured on `test` cells, is not worse.

The metric is the one given by `--metric`. Without it, it is the first of `COMPARED_BY` in the steering evaluation that
both versions have (of the same task and data set); without such an evaluation, the FVU of `test` tokens; and where
neither version has one, the FVU of `select` tokens, which calibrated the SAE. If one of the two versions lacks that
metric, the promotion is refused: no other metric takes its place unless `--metric` says so.

Test cells are for reporting. Each promotion is a choice on test cells, so after many promotions the champion's metric
is too good. No option overrides the rule; to have another champion, delete the alias in MLflow and give the reason
there.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from feature_store.query.metrics import COMPARED_BY, COMPARED_BY_TRAINING, Direction, metric_of
from feature_store.query.runs import newest_run_of
from feature_store.storage.layout import Layout
from pipelines.errors import UsageError
from pipelines.tracking.registry import CHAMPION, DATASET_TAG, Evaluation, ModelVersion, Tracking
from pipelines.tracking.runs import RUN_TAG


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric of a version; `evaluation` is None for one of its training."""

    value: float
    direction: Direction
    dataset: str
    evaluation: Evaluation | None = None


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """A promotion: the version, the champion that it replaced (None if there was none), and the metric."""

    version: ModelVersion
    over: int | None = None
    metric: str | None = None
    value: float | None = None
    value_of_champion: float | None = None
    note: str | None = None


def promote(tracking: Tracking, name: str, version: int, *, metric: str | None = None) -> Promotion:
    """Give `champion` to a version unless it is worse than the champion in one metric measured on `test` cells.

    Repeated promotions select on test cells, which makes the champion's metric too good.

    Args:
        tracking: the registry.
        name: the registered name.
        version: the candidate version.
        metric: a metric of a steering evaluation ("remaining"), one with its task and data set as `scsae models` names
            it, test_fvu or select_fvu; None chooses by the rule of this module.

    Raises:
        UsageError: the version or metric is unknown, one of the two versions lacks the metric, or the candidate is
            worse. Nothing is changed then.
    """
    with tracking.exclusive():
        candidate, champion = tracking.version(name, version), tracking.champion(name)
        mine = scores_of(tracking, candidate)
        if champion is None or champion.version == version:
            told = None if metric is None else _own(tracking, candidate, mine, metric)
            promoted = Promotion(
                version=candidate,
                metric=told,
                value=None if told is None else mine[told].value,
                note="it is the champion already" if champion else "there was no champion to compare it with",
            )
        else:
            promoted = _compared(tracking, candidate, mine, champion, metric)
        tracking.client.set_registered_model_alias(name, CHAMPION, str(version))
        return Promotion(**{**vars(promoted), "version": tracking.version(name, version)})


def scores_of(tracking: Tracking, version: ModelVersion) -> dict[str, Score]:
    """The metrics that can compare a version: the newest evaluation of each task, then those of its training."""
    scores: dict[str, Score] = {}
    for evaluation in tracking.evaluations(version.tags.get(RUN_TAG, "")):
        for name, value in evaluation.headlines.items():
            dose = evaluation.params.get("chosen.dose", "None")
            direction = metric_of(name).direction.under(
                evaluation.params.get("intervention"), None if dose == "None" else float(dose)
            )
            scores.setdefault(
                evaluation.label(name),
                Score(value=value, direction=direction, dataset=evaluation.dataset, evaluation=evaluation),
            )
    dataset = version.tags.get(DATASET_TAG, "")
    for name in COMPARED_BY_TRAINING:
        if (own := version.metrics.get(name)) is not None:
            scores[name] = Score(value=own, direction=metric_of(name).direction, dataset=dataset)
    return scores


def _compared(
    tracking: Tracking, candidate: ModelVersion, mine: Mapping[str, Score], champion: ModelVersion, asked: str | None
) -> Promotion:
    theirs = scores_of(tracking, champion)
    told, note = _chosen(tracking, candidate, mine, champion, theirs, asked)
    new, old = mine[told], theirs[told]
    if new.dataset != old.dataset:
        raise UsageError(
            f"{told} of {candidate.name} version {candidate.version} is of {new.dataset}, the champion's (version "
            f"{champion.version}) of {old.dataset}: they cannot be compared; evaluate both on one data set by `scsae "
            "associate --data FILE --sae SAE` and `scsae steer`"
        )
    if new.direction is not old.direction:
        raise UsageError(
            f"{told} cannot be compared: {new.direction} is better for {candidate.name} version {candidate.version}, "
            f"{old.direction} for the champion (version {champion.version}), because one of the edits strengthens the "
            "features and the other weakens them; give another --metric, or steer both with the same --dose"
        )
    if new.value < old.value if new.direction is Direction.HIGHER else new.value > old.value:
        raise UsageError(
            f"{candidate.name} version {candidate.version} has {told} {new.value:.6g}, the champion (version "
            f"{champion.version}) {old.value:.6g}; only a version that is at least as good "
            f"({new.direction} is better) can be promoted"
        )
    return Promotion(
        version=candidate,
        over=champion.version,
        metric=told,
        value=new.value,
        value_of_champion=old.value,
        note=note,
    )


def _chosen(
    tracking: Tracking,
    candidate: ModelVersion,
    mine: Mapping[str, Score],
    champion: ModelVersion,
    theirs: Mapping[str, Score],
    asked: str | None,
) -> tuple[str, str | None]:
    """The metric to compare, and a note about it. Raises UsageError if one of the two versions lacks it."""
    if asked is not None:
        found = [label for label in _matching({**theirs, **mine}, asked) if label in mine and label in theirs]
        if len(found) > 1:
            raise UsageError(f"--metric was {asked!r}, which is any of: {'; '.join(found)}; give one of them in full")
        if found:
            return found[0], None
        _own(tracking, candidate, mine, asked, like=theirs)
        _own(tracking, champion, theirs, asked, like=mine)
    either = {**theirs, **mine}
    own, other = ({(e.task, e.dataset): e for s in of.values() if (e := s.evaluation)} for of in (mine, theirs))
    tasks = {task: evaluation for task, evaluation in own.items() if task in other}
    if len(tasks) > 1:
        steering = [label for label in mine if label in theirs and mine[label].evaluation]
        raise UsageError(
            f"{candidate.name} versions {candidate.version} and {champion.version} were both evaluated on several "
            f"tasks; give --metric, one of: {'; '.join(steering)}"
        )
    if tasks:
        (evaluation,) = tasks.values()
        label, note = next(full for name in COMPARED_BY if (full := evaluation.label(name)) in either), None
    elif "test_fvu" in either:
        label, note = "test_fvu", "they have no steering evaluation in common"
    else:
        label, note = "select_fvu", "neither has a figure of test cells; select cells were used for choices"
    if not (label in mine and label in theirs):
        raise UsageError(_nothing_to_compare(tracking, label, candidate, mine, champion, theirs))
    return label, note


def _nothing_to_compare(
    tracking: Tracking,
    label: str,
    candidate: ModelVersion,
    mine: Mapping[str, Score],
    champion: ModelVersion,
    theirs: Mapping[str, Score],
) -> str:
    """The error message if one of two versions lacks the metric that is compared by default."""
    has = "; ".join(
        f"version {version.version} has {', '.join(scores) or 'none'}{_why_missing(version, label)}"
        for version, scores in ((candidate, mine), (champion, theirs))
    )
    lacking, other = (champion, mine) if label in mine else (candidate, theirs)
    common = [name for name in mine if name in theirs]
    choice = f"give --metric, one of: {'; '.join(common)}; or " if common else ""
    return (
        f"{candidate.name} versions {candidate.version} and {champion.version} (the champion) cannot be compared by "
        f"{label}: {has}; {choice}{_how_to_measure(tracking, lacking, label, other)}"
    )


def _why_missing(version: ModelVersion, label: str) -> str:
    reason = version.missing.get(label)
    return f" ({label} is missing: {reason})" if reason else ""


def _own(
    tracking: Tracking,
    version: ModelVersion,
    scores: Mapping[str, Score],
    asked: str,
    *,
    like: Mapping[str, Score] = {},
) -> str:
    """The full name of a metric. Raises UsageError, with the command that measures it, if the version lacks it."""
    found = _matching(scores, asked)
    if like and (wanted := _matching(like, asked)):
        found = [label for label in found if label in wanted]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"--metric was {asked!r}, which is any of: {'; '.join(found)}; give one of them in full")
    allowed = (*COMPARED_BY, *COMPARED_BY_TRAINING)
    if asked.partition(" (")[0] not in allowed:
        raise UsageError(
            f"--metric was {asked!r}; allowed: {', '.join(allowed)}, or one in full as `scsae models` names it"
        )
    raise UsageError(
        f"{version.name} version {version.version} has no {asked}{_why_missing(version, asked)}; "
        f"{_how_to_measure(tracking, version, asked, like)}"
    )


def _matching(scores: Mapping[str, Score], asked: str) -> list[str]:
    return [asked] if asked in scores else [label for label in scores if label.startswith(f"{asked} (")]


def _how_to_measure(tracking: Tracking, version: ModelVersion, asked: str, like: Mapping[str, Score]) -> str:
    """The command that measures a metric of a version; for steering, with the options of the version that has it."""
    store = tracking.layout.store_option
    if asked in COMPARED_BY_TRAINING:
        return f"measure it by training it again: `scsae train {store}` (one without test cells has no test_fvu)"
    known = next((score.evaluation for label in _matching(like, asked) if (score := like[label]).evaluation), None)
    params = known.params if known else {"kind": "KIND", "target": "TARGET"}
    options = " ".join(
        f"--{key} '{params[key]}'" for key in ("kind", "target", "toward") if params.get(key) not in (None, "None")
    )
    sae = version.tags.get(RUN_TAG, "")
    run = _associations_of(tracking.layout, sae, known.dataset if known else None)
    before = "" if run else f"scsae encode --sae {sae} {store} && scsae associate {store} && "
    return f"measure it by `{before}scsae steer {f'--associations {run} ' if run else ''}{options} {store}`"


def _associations_of(layout: Layout, sae: str, dataset: str | None) -> str | None:
    """The newest complete associations of an SAE, on a data set if one is given; None if there are none."""
    found = newest_run_of(layout, "associations", {"sae": sae, "dataset": dataset})
    return None if found is None else found.run
