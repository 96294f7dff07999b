"""The rule by which `champion` moves: one figure, measured on `test` cells, that must not be worse.

The figure is the one asked for, else the first headline of the steering evaluation that both versions have (the same
question, the same data set), else the FVU of `test` tokens, else that of `select` tokens, which calibrated the SAE.
Test cells are for reporting: each promotion by them is a choice, and after many of them the champion's figure flatters
it. Nothing forces a version through; whoever wants another one deletes the alias in MLflow and says so there.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from feature_store.errors import StoreError
from feature_store.storage.filesystem import read_sealed
from feature_store.storage.layout import PLAN, Layout
from pipelines.errors import UsageError
from pipelines.tracking.headline import FIT, HEADLINES
from pipelines.tracking.registry import CHAMPION, DATASET_TAG, Evaluation, ModelVersion, Tracking
from pipelines.tracking.runs import RUN_TAG


@dataclass(frozen=True, kw_only=True)
class Score:
    """A figure of a version; `evaluation` None for one of its training."""

    value: float
    higher_is_better: bool
    dataset: str
    evaluation: Evaluation | None = None


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What was promoted over what (None: there was no other champion), and by which figure."""

    version: ModelVersion
    over: int | None = None
    metric: str | None = None
    value: float | None = None
    value_of_champion: float | None = None
    note: str | None = None


def promote(tracking: Tracking, name: str, version: int, *, metric: str | None = None) -> Promotion:
    """Give `champion` to a version unless it is worse than the champion in one figure measured on `test` cells.

    Promoting by test cells again and again selects on them: the champion's figure is then too good.

    Args:
        tracking: the registry.
        name: registered name.
        version: the candidate.
        metric: a headline ("remaining"), one with its question and data set as `scsae models` names them, test_fvu or
            select_fvu; None chooses as the module says.

    Raises:
        UsageError: there is no such version or figure, one of the two versions lacks it, or the candidate is worse;
            nothing is changed.
    """
    with tracking.alone():
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
    """What a version can be compared by: the newest evaluation of each question, then the figures of its training."""
    scores: dict[str, Score] = {}
    for evaluation in tracking.evaluations(version.tags.get(RUN_TAG, "")):
        for name, value in evaluation.headlines.items():
            upwards = HEADLINES[name].is_higher_better(evaluation.params)
            scores.setdefault(
                evaluation.label(name),
                Score(value=value, higher_is_better=upwards, dataset=evaluation.dataset, evaluation=evaluation),
            )
    dataset = version.tags.get(DATASET_TAG, "")
    for name in FIT:
        if (fvu := version.metrics.get(name)) is not None:
            scores[name] = Score(value=fvu, higher_is_better=False, dataset=dataset)
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
    if new.value < old.value if new.higher_is_better else new.value > old.value:
        raise UsageError(
            f"{candidate.name} version {candidate.version} has {told} {new.value:.6g}, the champion (version "
            f"{champion.version}) {old.value:.6g}; only a version that is at least as good "
            f"({'higher' if new.higher_is_better else 'lower'} is better) can be promoted"
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
    """The figure to compare, and what is to be said about it."""
    if asked is not None:
        found = [label for label in _matching({**theirs, **mine}, asked) if label in mine and label in theirs]
        if len(found) > 1:
            raise UsageError(f"--metric was {asked!r}, which is any of: {'; '.join(found)}; give one of them in full")
        if found:
            return found[0], None
        _own(tracking, candidate, mine, asked, like=theirs)
        _own(tracking, champion, theirs, asked, like=mine)
    both = [label for label in mine if label in theirs]
    steering = [label for label in both if mine[label].evaluation is not None]
    questions = {(e.question, e.dataset) for label in steering if (e := mine[label].evaluation) is not None}
    if len(questions) > 1:
        raise UsageError(
            f"{candidate.name} versions {candidate.version} and {champion.version} were both evaluated on several "
            f"questions; give --metric, one of: {'; '.join(steering)}"
        )
    if steering:
        return steering[0], None
    if "test_fvu" in both:
        return "test_fvu", "they have no steering evaluation in common"
    if "select_fvu" in both:
        note = (
            "they have no figure of test cells in common; that of select cells is of cells that were used for choices"
        )
        return "select_fvu", note
    raise UsageError(
        f"{candidate.name} versions {candidate.version} and {champion.version} have no figure in common; "
        f"{_how_to_measure(tracking, candidate, 'test_fvu', theirs)}"
    )


def _own(
    tracking: Tracking,
    version: ModelVersion,
    scores: Mapping[str, Score],
    asked: str,
    *,
    like: Mapping[str, Score] = {},
) -> str:
    """The one figure of a version that is asked for; UsageError, with the command that measures it, if it lacks it."""
    found = _matching(scores, asked)
    if like and (wanted := _matching(like, asked)):
        found = [label for label in found if label in wanted]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"--metric was {asked!r}, which is any of: {'; '.join(found)}; give one of them in full")
    if asked.partition(" (")[0] not in {**HEADLINES, **FIT}:
        raise UsageError(
            f"--metric was {asked!r}; allowed: {', '.join([*HEADLINES, *FIT])}, or one in full as `scsae "
            "models` names it"
        )
    raise UsageError(
        f"{version.name} version {version.version} has no {asked}; {_how_to_measure(tracking, version, asked, like)}"
    )


def _matching(scores: Mapping[str, Score], asked: str) -> list[str]:
    return [asked] if asked in scores else [label for label in scores if label.startswith(f"{asked} (")]


def _how_to_measure(tracking: Tracking, version: ModelVersion, asked: str, like: Mapping[str, Score]) -> str:
    """The command that gives a version the figure; for steering, as the version that has it was measured."""
    store = f"--store {tracking.layout.root}"
    if asked in FIT:
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
    """The newest complete associations of an SAE, on a data set if one is given."""
    for info in layout.runs("associations"):
        try:
            plan = read_sealed(info.path / "features" / PLAN) if info.complete else {}
        except (StoreError, FileNotFoundError):
            continue
        if plan.get("sae") == sae and dataset in (None, plan["dataset"]):
            return info.run
    return None
