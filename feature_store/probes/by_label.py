"""Probes of all labels of a kind from one representation: sparse logistic regressions, one for each label.

For a label against all other cells with a label of the kind, features enter in the order of a lasso on `train` cells
(`logistic`). The first k of them are refitted on `train` cells with each ridge penalty of RIDGES; the one with the
smallest log loss on `select` cells, summed over the labels, is taken for all labels, so that their
logits can be compared. Cells of a label are told by the threshold of largest balanced accuracy on
`select` cells. Scores are of `test` cells.

Over all labels a cell is given the label with the largest logit; macro-F1 and balanced accuracy are of these. Cells
whose label has too few cells for a probe are left out of everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import polars as pl
from scipy import sparse

from feature_store.associations.inputs import Bools, Floats, Ints, Sparse
from feature_store.associations.moments import column_moments
from feature_store.probes.logistic import Fit, entry_order, fit_ridge, log_loss
from feature_store.probes.scores import (
    Score,
    auroc,
    balanced_accuracy,
    best_threshold,
    jackknife,
    macro_f1,
    macro_recall,
)

LEAST_CELLS = 5
"""Least number of cells of a label, and of others, in each split."""
RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)
LEAST_FIRED = 3
"""Least number of `train` cells in which a feature is not 0."""
SPLITS = ("train", "select", "test")


@dataclass(frozen=True, kw_only=True)
class ProbedCells:
    """Cells with the features of one representation and labels of one kind.

    Attributes:
        features: sparse [n_cells n_features].
        label: index of each cell's label in `names` [n_cells].
        names: of the labels.
        split: "train", "select" or "test" of each cell [n_cells].
        unit: donor of each cell, or another replicate unit [n_cells]; None where there is none.
    """

    features: Sparse
    label: Ints
    names: Sequence[str]
    split: np.ndarray
    unit: Ints | None = None

    def labels(self) -> list[int]:
        """The labels that can be probed, if they are two at least: those with LEAST_CELLS cells in each split."""
        counts = [np.bincount(self.label[self.split == name], minlength=len(self.names)) for name in SPLITS]
        enough = np.flatnonzero(np.min(counts, axis=0) >= LEAST_CELLS).tolist()
        return enough if len(enough) > 1 else []


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What was found for the labels of a kind.

    Attributes:
        features: label (index), k, rank (1 is the first feature that enters), column, weight (in logits per standard
            deviation of the feature on `train` cells), gain (test AUROC of the first `rank` features less that of those
            before it).
        scores: label (index; null for all together), k, n_features (k, or fewer where the path ends before), auroc,
            balanced_accuracy and macro_f1 with their intervals, ridge, n (test cells of the label), n_cells, n_units.
    """

    features: pl.DataFrame
    scores: pl.DataFrame


def probe(cells: ProbedCells, ks: Sequence[int]) -> Probed:
    """Probe every label that has enough cells, with each number of features of `ks`."""
    ks, labels = sorted(set(ks)), cells.labels()
    taken = np.isin(cells.label, labels)
    masks = {name: taken & (cells.split == name) for name in SPLITS}
    columns, own = _scaled(sparse.csc_array(cells.features), masks)
    made = [
        _LabelFits.of(own, {name: cells.label[mask] == label for name, mask in masks.items()}, ks[-1])
        for label in labels
    ]
    ridges = _ridges(made, ks[-1])
    chosen: list[tuple[Any, ...]] = []
    rows: list[dict[str, Any]] = []
    units = _units(cells, masks["test"])
    logits = {}
    for label, of_label in zip(labels, made, strict=True):
        is_label = cells.label[masks["test"]] == label
        eta = [of_label.logits(own["test"], k, ridge) for k, ridge in enumerate(ridges)]
        area = [auroc(one, is_label) for one in eta]
        edges = [
            best_threshold(of_label.logits(own["select"], k, ridges[k]), cells.label[masks["select"]] == label)
            for k in ks
        ]
        logits[label] = eta
        for k, edge in zip(ks, edges, strict=True):
            n_features = min(k, len(of_label.order))
            weights = of_label.fit(k, ridges[k]).weight.tolist()
            chosen += [
                (label, k, rank + 1, int(columns[of_label.order[rank]]), weight, area[rank + 1] - area[rank])
                for rank, weight in enumerate(weights)
            ]
            found = _scores_of_label(eta[k], edge, is_label, units)
            rows.append({"label": label, "k": k, "n_features": n_features, "ridge": float(ridges[k]), **found})
    for k in ks if labels else []:
        together = np.array([logits[label][k] for label in labels])
        n_features = max(row["n_features"] for row in rows if row["k"] == k)
        found = _scores_of_all(together, labels, cells.label[masks["test"]], units)
        rows.append({"label": None, "k": k, "n_features": n_features, "ridge": float(ridges[k]), **found})
    return Probed(
        features=pl.DataFrame(chosen, schema=_FEATURES, orient="row"),
        scores=pl.DataFrame(rows, schema=_SCORES).with_columns(pl.col(pl.Float64).fill_nan(None)),
    )


_FEATURES = {
    "label": pl.Int64(),
    "k": pl.Int64(),
    "rank": pl.Int64(),
    "column": pl.Int64(),
    "weight": pl.Float64(),
    "gain": pl.Float64(),
}
_KINDS = ("auroc", "balanced_accuracy", "macro_f1")
_SCORES = {
    "label": pl.Int64(),
    "k": pl.Int64(),
    "n_features": pl.Int64(),
    **{f"{kind}{end}": pl.Float64() for kind in _KINDS for end in ("", "_low", "_high")},
    "ridge": pl.Float64(),
    "n": pl.Int64(),
    "n_cells": pl.Int64(),
    "n_units": pl.Int64(),
}


def _scaled(features: Sparse, masks: dict[str, Bools]) -> tuple[Ints, dict[str, Sparse]]:
    """The columns of the features that vary among `train` cells, and by split these features of its cells, as CSC, over
    their standard deviation among `train` cells.
    """
    own = {name: sparse.csc_array(features[mask]) for name, mask in masks.items()}
    mean, variance = column_moments(own["train"])
    columns = np.flatnonzero((np.diff(own["train"].indptr) >= LEAST_FIRED) & (variance > 1e-12 * mean**2))
    scale = sparse.diags_array(1 / np.sqrt(variance[columns]))
    return columns, {name: sparse.csc_array(rows_of[:, columns] @ scale) for name, rows_of in own.items()}


@dataclass(frozen=True, kw_only=True)
class _LabelFits:
    """The features of a label in their order, and the refits of the first 0, 1, ... of them.

    `fits` by number of features and ridge penalty, each with its log loss on `select` cells.
    """

    order: Ints
    fits: Mapping[tuple[int, float], tuple[Fit, float]]

    @classmethod
    def of(cls, features: Mapping[str, Sparse], is_label: Mapping[str, Bools], most: int) -> Self:
        order = entry_order(features["train"], is_label["train"], most)
        train, select = (features[name][:, order].toarray().astype(np.float64) for name in ("train", "select"))
        fits = {}
        for k in range(len(order) + 1):
            fit = None
            for ridge in RIDGES:
                fit = fit_ridge(train[:, :k], is_label["train"], ridge, fit)
                fits[k, ridge] = fit, log_loss(fit.predict(select[:, :k]), is_label["select"])
        return cls(order=order, fits=fits)

    def fit(self, k: int, ridge: float) -> Fit:
        """The refit of the first k features, or of all where there are fewer."""
        return self.fits[min(k, len(self.order)), ridge][0]

    def loss(self, k: int, ridge: float) -> float:
        """Its log loss on `select` cells."""
        return self.fits[min(k, len(self.order)), ridge][1]

    def logits(self, features: Sparse, k: int, ridge: float) -> Floats:
        """The logits [n_cells] of features [n_cells n_features]."""
        return self.fit(k, ridge).predict(features[:, self.order[:k]].toarray().astype(np.float64))


def _ridges(made: Sequence[_LabelFits], most: int) -> list[float]:
    """For each number of features up to `most`, the ridge penalty of the smallest log loss over all labels."""
    return [
        min(RIDGES, key=lambda ridge, k=k: sum(one.loss(k, ridge) for one in made))  # type: ignore[misc]
        for k in range(most + 1)
    ]


def _units(cells: ProbedCells, mask: Bools) -> Ints:
    return np.zeros(int(mask.sum()), dtype=np.int64) if cells.unit is None else cells.unit[mask]


def _scores_of_label(eta: Floats, edge: float, label: Bools, units: Ints) -> dict[str, Any]:
    area = jackknife(lambda mask: auroc(eta[mask], label[mask]), units)
    accuracy = jackknife(lambda mask: balanced_accuracy(eta[mask] > edge, label[mask]), units)
    return {
        **_row("auroc", area),
        **_row("balanced_accuracy", accuracy),
        "n": int(label.sum()),
        "n_cells": len(label),
        "n_units": area.n_units,
    }


def _scores_of_all(logits: Floats, labels: Sequence[int], actual: Ints, units: Ints) -> dict[str, Any]:
    """Scores over all labels, from the logits [n_labels n_cells] of each cell."""
    predicted = np.array(labels)[logits.argmax(axis=0)]

    def mean_auroc(mask: Bools) -> float:
        areas = [auroc(eta[mask], actual[mask] == label) for eta, label in zip(logits, labels, strict=True)]
        return float(np.nanmean(areas)) if np.isfinite(areas).any() else np.nan

    f1 = jackknife(lambda mask: macro_f1(predicted[mask], actual[mask]), units)
    return {
        **_row("auroc", jackknife(mean_auroc, units)),
        **_row("balanced_accuracy", jackknife(lambda mask: macro_recall(predicted[mask], actual[mask]), units)),
        **_row("macro_f1", f1),
        "n": len(actual),
        "n_cells": len(actual),
        "n_units": f1.n_units,
    }


def _row(kind: str, score: Score) -> dict[str, float]:
    return {kind: score.value, f"{kind}_low": score.low, f"{kind}_high": score.high}
