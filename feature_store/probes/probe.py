"""Probes of all labels of a kind from one representation: sparse logistic regressions, one for each label.

For a label against all other cells with a label of the kind, features enter in the order of a lasso on `train` cells
(`logistic`). The first k of them are refitted on `train` cells with each ridge penalty of RIDGES; the one with the
smallest log loss on `select` cells is taken. Cells of a label are told by the threshold of largest balanced accuracy on
`select` cells. Scores are of `test` cells.

Over all labels a cell is given the label with the largest logit; macro-F1 and balanced accuracy are of these. Cells
whose label has too few cells for a probe are left out of everything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy import sparse

from feature_store.associations.inputs import Bools, Floats, Ints, Sparse
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
    ks = sorted(set(ks))
    labels = cells.labels()
    taken = np.isin(cells.label, labels)
    masks = {name: taken & (cells.split == name) for name in SPLITS}
    columns, own = _scaled(sparse.csc_array(cells.features), masks)
    chosen: list[tuple[Any, ...]] = []
    rows: list[dict[str, Any]] = []
    logits: dict[tuple[int, int], Floats] = {}
    for label in labels:
        of_label = {name: cells.label[mask] == label for name, mask in masks.items()}
        order = entry_order(own["train"], of_label["train"], ks[-1])
        dense = {name: rows_of[:, order].toarray().astype(np.float64) for name, rows_of in own.items()}
        fits = list(_fits(dense, of_label, len(order)))
        eta = [fit.predict(dense["test"][:, :k]) for k, (fit, _) in enumerate(fits)]
        area = [auroc(one, of_label["test"]) for one in eta]
        for k in ks:
            n_features = min(k, len(order))
            fit, ridge = fits[n_features]
            logits[label, k] = eta[n_features]
            chosen += [
                (
                    label,
                    k,
                    rank,
                    int(columns[order[rank - 1]]),
                    float(fit.weight[rank - 1]),
                    area[rank] - area[rank - 1],
                )
                for rank in range(1, n_features + 1)
            ]
            edge = best_threshold(fit.predict(dense["select"][:, :n_features]), of_label["select"])
            rows.append(
                {"label": label, "k": k, "n_features": n_features, "ridge": ridge}
                | _scores_of_label(eta[n_features], edge, of_label["test"], _units(cells, masks["test"]))
            )
    rows += [
        {"label": None, "k": k}
        | _scores_of_all(np.array([logits[label, k] for label in labels]), labels, cells, masks["test"], rows, k)
        for k in (ks if labels else [])
    ]
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
    train, n = own["train"].astype(np.float64), max(int(masks["train"].sum()), 1)
    square = np.asarray(train.multiply(train).sum(axis=0)).ravel() / n
    variance = square - (np.asarray(train.sum(axis=0)).ravel() / n) ** 2
    columns = np.flatnonzero((np.diff(train.indptr) >= LEAST_FIRED) & (variance > 1e-12 * square))
    scale = sparse.diags_array(1 / np.sqrt(variance[columns]))
    return columns, {name: sparse.csc_array(rows_of[:, columns] @ scale) for name, rows_of in own.items()}


def _fits(dense: dict[str, Floats], of_label: dict[str, Bools], n_features: int) -> Iterator[tuple[Fit, float]]:
    """The refits with the first 0, 1, ..., n_features features, and the ridge penalty of each."""
    for k in range(n_features + 1):
        best: tuple[float, Fit, float] | None = None
        fit = None
        for ridge in RIDGES:
            fit = fit_ridge(dense["train"][:, :k], of_label["train"], ridge, fit)
            loss = log_loss(fit.predict(dense["select"][:, :k]), of_label["select"])
            if best is None or loss < best[0]:
                best = loss, fit, ridge
        assert best is not None
        yield best[1], best[2]


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


def _scores_of_all(
    logits: Floats, labels: Sequence[int], cells: ProbedCells, test: Bools, rows: Sequence[dict[str, Any]], k: int
) -> dict[str, Any]:
    predicted, actual, units = np.array(labels)[logits.argmax(axis=0)], cells.label[test], _units(cells, test)
    f1 = jackknife(lambda mask: macro_f1(predicted[mask], actual[mask]), units)
    recall = jackknife(lambda mask: macro_recall(predicted[mask], actual[mask]), units)

    def mean_auroc(mask: Bools) -> float:
        areas = [auroc(eta[mask], actual[mask] == label) for eta, label in zip(logits, labels, strict=True)]
        return float(np.nanmean(areas)) if np.isfinite(areas).any() else np.nan

    own = [row for row in rows if row["k"] == k]
    return {
        "n_features": max(row["n_features"] for row in own),
        **_row("auroc", jackknife(mean_auroc, units)),
        **_row("balanced_accuracy", recall),
        **_row("macro_f1", f1),
        "n": len(actual),
        "n_cells": len(actual),
        "n_units": f1.n_units,
    }


def _row(kind: str, score: Score) -> dict[str, float]:
    return {kind: score.value, f"{kind}_low": score.low, f"{kind}_high": score.high}
