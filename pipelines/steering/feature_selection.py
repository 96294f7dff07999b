"""The choice of the features that are edited: they are scored on `select` cells alone, and drawn again for every null.

edit    the features with the smallest p for the label (table feature_label).
move    the mean displacement. The code of a cell is the mean of its tokens' codes. A unit gives the difference of its
        means over `target` cells and over `toward` cells, and the score is the mean over units. A unit is a cell type
        of a donor with both labels, so that a difference of composition or of donors is not taken for the condition; if
        donors carry one label each, a unit is a cell type, with the means of donors averaged.
mix     the variance between batches inside a cell type minus the part that sampling of cells alone gives, as a mean
        over types: sum_b (m_b - m)^2 / (B - 1) - mean_b(s_b^2 / n_b).

Decoder rows are unit vectors, so both scores are in units of the activation: how far a feature moves it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from feature_store.query.suggestions import did_you_mean
from feature_store.storage import schemas
from feature_store.storage.obs_columns import column_of, find_column, shown_name
from pipelines.config import SteerOptions
from pipelines.errors import UsageError
from pipelines.steering.labels import CellLabels, Texts
from pipelines.steering.plan import SteeringTask, Task

MIN_CELLS = 5
"""Least number of cells of a unit on each side."""
Index = npt.NDArray[np.int64]


class FeatureScores(NamedTuple):
    """The score of each feature [n_features], the number of units, and the number that have the sign of the mean."""

    score: npt.NDArray[np.float64]
    n_units: int
    n_agree: npt.NDArray[np.int64]


def score_features(mean_codes: sparse.csr_array, labels: CellLabels, task: SteeringTask) -> FeatureScores:
    """The scores of all features from the mean codes [n_cells n_features] of these (select) cells.

    Raises:
        UsageError: no unit has enough cells on both sides, so there is nothing to compare.
    """
    values = _differences(mean_codes, labels, task) if task.type is Task.MOVE else _excess(mean_codes, labels)
    if not len(values):
        raise UsageError(_nothing_to_compare(labels, task))
    score = values.mean(0)
    return FeatureScores(score, len(values), (np.sign(values) == np.sign(score)).sum(0))


def rank_features(found: FeatureScores, task: SteeringTask, alive: npt.NDArray[np.bool_]) -> Index:
    """The ids of the features that fire, best first: by |score| for move, by score for mix, and ties by id."""
    key = np.abs(found.score) if task.type is Task.MOVE else found.score
    order = np.argsort(-key, kind="stable")
    return order[alive[order]]


def scores_frame(found: FeatureScores, order: Index, density: npt.NDArray[np.float64]) -> pl.DataFrame:
    """The table `scores`, the best feature first."""
    columns = {
        "feature_id": order,
        "score": found.score[order],
        "n_units": np.full(len(order), found.n_units),
        "n_agree": found.n_agree[order],
        "density": density[order],
        "rank": np.arange(1, len(order) + 1),
    }
    return schemas.conform("steering_scores", pl.DataFrame(columns))


def _differences(mean_codes: sparse.csr_array, labels: CellLabels, task: SteeringTask) -> npt.NDArray[np.float64]:
    """The mean of target cells minus the mean of toward cells, by unit [n_units n_features]."""
    sides = labels.label == task.target, labels.label == task.toward
    pairs = []
    for donor, kind in sorted(set(zip(labels.donor, labels.cell_type, strict=True))):
        own = (labels.donor == donor) & (labels.cell_type == kind)
        pairs.append(tuple([np.flatnonzero(own & side)] for side in sides))
    whole = [pair for pair in pairs if all(len(side[0]) >= MIN_CELLS for side in pair)]
    if not whole:
        whole = []
        for kind in sorted(set(labels.cell_type)):
            own = [side & (labels.cell_type == kind) for side in sides]
            if all(side.sum() >= MIN_CELLS for side in own):
                whole.append(tuple(_by_donor(side, labels.donor) for side in own))
    if not whole and all(side.any() for side in sides):
        whole = [tuple(_by_donor(side, labels.donor) for side in sides)]
    means = [[np.mean([_mean(mean_codes, cells) for cells in side], axis=0) for side in pair] for pair in whole]
    return np.array([target - toward for target, toward in means])


def _excess(mean_codes: sparse.csr_array, labels: CellLabels) -> npt.NDArray[np.float64]:
    """The variance between labels minus the part due to sampling, by type [n_types n_features]."""
    squares = mean_codes.multiply(mean_codes).tocsr()
    values = []
    for least in (MIN_CELLS, 2):
        for kind in sorted(set(labels.cell_type)):
            own = labels.cell_type == kind
            groups = [np.flatnonzero(own & (labels.label == label)) for label in sorted(set(labels.label) - {""})]
            groups = [cells for cells in groups if len(cells) >= least]
            if len(groups) < 2:
                continue
            means = np.array([_mean(mean_codes, cells) for cells in groups])
            n = np.array([len(cells) for cells in groups], dtype=np.float64)[:, None]
            variance = (np.array([_mean(squares, cells) for cells in groups]) - means**2) * n / (n - 1)
            values.append(means.var(0, ddof=1) - (variance / n).mean(0))
        if values:
            break
    return np.array(values)


def shuffle_labels(labels: CellLabels, task: SteeringTask, rng: np.random.Generator) -> CellLabels:
    """The same cells with shuffled labels, for a null.

    For mix, labels are permuted among the cells of a type within each split. For move, `target` and `toward` are
    permuted among the cells of a type of a donor; if donors carry one label each, whole donors exchange their labels
    within the split.
    """
    label = labels.label.copy()
    if task.type is Task.MIX:
        _permute_within(label, [labels.split, labels.cell_type], label != "", rng)
        return replace(labels, label=label)
    chosen = (label == task.target) | (label == task.toward)
    both = {
        key
        for key in set(zip(labels.donor[chosen], labels.cell_type[chosen], strict=True))
        if len(set(label[chosen & (labels.donor == key[0]) & (labels.cell_type == key[1])])) > 1
    }
    if both:
        _permute_within(label, [labels.split, labels.donor, labels.cell_type], chosen, rng)
        return replace(labels, label=label)
    for split in sorted(set(labels.split)):
        own = chosen & (labels.split == split)
        donors = sorted(set(labels.donor[own]))
        carried = [labels.label[own & (labels.donor == donor)][0] for donor in donors]
        for donor, other in zip(donors, rng.permutation(len(donors)), strict=True):
            label[own & (labels.donor == donor)] = carried[other]
    return replace(labels, label=label)


def _permute_within(
    label: Texts, strata: Sequence[Texts], chosen: npt.NDArray[np.bool_], rng: np.random.Generator
) -> None:
    keys = list(zip(*strata, strict=True))
    of_stratum: dict[tuple[str, ...], list[int]] = {}
    for i in np.flatnonzero(chosen).tolist():
        of_stratum.setdefault(keys[i], []).append(i)
    for key in sorted(of_stratum):
        at = np.array(of_stratum[key])
        label[at] = label[rng.permutation(at)]


def _by_donor(chosen: npt.NDArray[np.bool_], donor: Texts) -> list[Index]:
    return [np.flatnonzero(chosen & (donor == name)) for name in sorted(set(donor[chosen]))]


def _mean(mean_codes: sparse.csr_array, cells: Index) -> npt.NDArray[np.float64]:
    return np.asarray(mean_codes[cells].mean(axis=0)).ravel()


def _nothing_to_compare(labels: CellLabels, task: SteeringTask) -> str:
    kind = shown_name(task.kind)
    found = {str(name): int((labels.label == name).sum()) for name in sorted(set(labels.label) - {""})}
    if task.type is Task.MOVE:
        return (
            f"the select cells with tokens have {kind} {found}; features are chosen on them, so both "
            f"{task.target!r} and {task.toward!r} need cells; extract with another --split COLUMN, or give --feature"
        )
    return (
        f"no cell type has select cells of two {kind} labels ({found}), and features are chosen on them; extract "
        "so that each is in every split, with --batch COLUMN and --split-by cell or with --split COLUMN, or give "
        "--feature"
    )


def choose_features_of_label(
    labels: pl.DataFrame,
    features: pl.DataFrame,
    options: SteerOptions,
    *,
    kinds: list[str],
    where: Callable[[str, str], str] = lambda column, value: "",
) -> tuple[str, pl.DataFrame]:
    """Return the target of an edit and its features, ranked: those with the smallest p for it on `select` cells.

    The rank is by p and not by AUROC, because for a label with few cells some feature has a high AUROC by chance.

    Args:
        labels: the table feature_label.
        features: the table features.
        options: the options with kind and target (None takes the label of the kind with the best feature).
        kinds: the kinds of label that the data set has.
        where: says which associations were asked, and which others have a value in a column of feature_label.

    Raises:
        UsageError: the kind or target is unknown, or no feature has an AUROC above 0.5 for it.
    """
    kind = kind_named(options.kind, kinds, where)
    shown = shown_name(kind)
    known = labels.filter((pl.col("label_kind") == kind) & (pl.col("split") == "select"))
    names = known["label"].unique().sort().to_list()
    if options.target is not None and options.target not in names:
        raise UsageError(
            f"--target was {options.target!r}; {shown} among select cells is one of: {', '.join(names)}"
            f"{did_you_mean(options.target, names)}{where('label', options.target)}"
        )
    alive = features.filter(~pl.col("dead"))["feature_id"]
    better = known.filter(pl.col("feature_id").is_in(alive.implode()) & (pl.col("auroc") > 0.5)).sort("p", "feature_id")
    if options.target is None and not better.height:
        raise UsageError(
            f"no feature has an AUROC above 0.5 for any {shown} on select cells, so there is nothing to steer; "
            "give --feature"
        )
    target = str(options.target if options.target is not None else better["label"][0])
    own = better.filter(pl.col("label") == target)
    if not own.height:
        raise UsageError(f"no feature has an AUROC above 0.5 for {shown} {target!r} on select cells; give --feature")
    frame = own.join(features.select("feature_id", "density"), on="feature_id", how="left", maintain_order="left")
    own_scores = frame.select(
        "feature_id",
        "density",
        n_units="n_donors",
        score="rank_biserial",
        n_agree=pl.lit(None),
        rank=pl.int_range(1, pl.len() + 1),
    )
    return target, schemas.conform("steering_scores", own_scores)


def kind_named(name: str, kinds: Sequence[str], where: Callable[[str, str], str] = lambda column, value: "") -> str:
    """The kind of label, a column of the cell table, that a name means. UsageError if the data set has none.

    `where` is that of `choose_features_of_label`.
    """
    kind = find_column(name, kinds)
    if kind is None:
        raise UsageError(
            f"--kind was {name!r}; this data set has {', '.join(map(shown_name, kinds)) or 'no labels'}"
            f"{where('label_kind', column_of(name))}"
        )
    return kind
