"""One threshold per feature and label, chosen on `select` cells and applied to other cells: F1 and Matthews'
correlation (MCC).

The rule is (code > t); t runs over zero and every value seen, the one with the largest |MCC| wins (the larger t among
equals). MCC keeps its sign. Where it is negative on `select` the rule is turned round (code <= t predicts the label),
so a "not a T cell" feature gets the F1 of the rule one would use. Codes are non-negative; of a signed baseline only
the positive side is searched.
Cost: values x labels after one sort: 50k cells, 4096 features (1.6 million values), 40 labels 3.6 s on one core.
"""

from typing import NamedTuple

import numpy as np
from scipy import sparse

from feature_store.associations.inputs import Bools, Floats, Sparse

_CHUNK = 8_000_000


class ThresholdRule(NamedTuple):
    """threshold [n_features n_labels] and `inverted` where (code <= threshold) predicts the label."""

    threshold: Floats
    inverted: Bools


class Scores(NamedTuple):
    """F1 of the rule and signed MCC of (code > threshold), each [n_features n_labels]."""

    f1: Floats
    mcc: Floats


def choose_thresholds(codes: Sparse, indicator: Sparse) -> ThresholdRule:
    """The threshold of largest |MCC| per feature and label; codes CSR [n_cells n_features], indicator CSR one-hot,
    every cell known.
    """
    positive = _positive_columns(codes)
    n_cells, n_features = positive.shape
    label = indicator.toarray()
    n_label = label.sum(axis=0)
    threshold = np.zeros((n_features, label.shape[1]))
    best = np.zeros_like(threshold)
    for start, stop in _column_chunks(positive, label.shape[1]):
        block = positive[:, start:stop]
        size = np.diff(block.indptr)
        feature = np.repeat(np.arange(stop - start), size)
        order = np.lexsort((-block.data, feature))
        value = block.data[order].astype(np.float64)
        first = np.repeat(block.indptr[:-1], size)
        running = np.cumsum(label[block.indices[order]], axis=0)
        before = np.where(first[:, None] > 0, running[np.maximum(first - 1, 0)], 0.0)
        n_fires = (np.arange(value.size) - first + 1.0)[:, None]
        mcc = matthews(n_cells, n_label[None, :], n_fires, running - before)
        last = np.r_[feature[1:] != feature[:-1], True][: value.size]
        below = np.where(last, 0.0, np.r_[value[1:], 0.0][: value.size])
        mcc[(value == below)] = 0.0
        _take_best(mcc, below, feature, size, threshold[start:stop], best[start:stop])
    return ThresholdRule(threshold, best < 0)


def apply_thresholds(codes: Sparse, indicator: Sparse, rule: ThresholdRule) -> Scores:
    """F1 and MCC of a rule on any cells; codes CSR [n_cells n_features], indicator CSR one-hot [n_cells n_labels]."""
    positive = _positive_columns(codes)
    n_cells = positive.shape[0]
    label = indicator.toarray()
    n_label = label.sum(axis=0)[None, :]
    n_fires, n_both = np.zeros_like(rule.threshold), np.zeros_like(rule.threshold)
    for start, stop in _column_chunks(positive, label.shape[1]):
        block = positive[:, start:stop]
        feature = np.repeat(np.arange(start, stop), np.diff(block.indptr))
        fires = (block.data[:, None].astype(np.float64) > rule.threshold[feature]).astype(np.float64)
        rows = sparse.csr_array(
            (np.ones(feature.size), np.arange(feature.size), block.indptr), (stop - start, feature.size)
        )
        n_fires[start:stop] = rows @ fires
        n_both[start:stop] = rows @ (fires * label[block.indices])
    mcc = matthews(n_cells, n_label, n_fires, n_both)
    predicted = np.where(rule.inverted, n_cells - n_fires, n_fires)
    hit = np.where(rule.inverted, n_label - n_both, n_both)
    f1 = np.divide(2 * hit, predicted + n_label, out=np.zeros_like(hit), where=predicted + n_label > 0)
    return Scores(f1, mcc)


def matthews(n: int, n_label: Floats, n_predicted: Floats, n_both: Floats) -> Floats:
    """MCC of 2 x 2 tables with n cells, 0 where a margin is empty (Matthews 1975, doi:10.1016/0005-2795(75)90109-9)."""
    spread = n_label * (n - n_label) * n_predicted * (n - n_predicted)
    scale = np.sqrt(np.where(spread > 0, spread, 1.0))
    return np.where(spread > 0, (n * n_both - n_label * n_predicted) / scale, 0.0)


def _take_best(mcc: Floats, below: Floats, feature: Sparse, size: Sparse, threshold: Floats, best: Floats) -> None:
    """Write, for each feature of a chunk and each label, the candidate of largest |MCC| into views of the results."""
    starts = np.r_[0, np.cumsum(size)[:-1]][size > 0]
    alive = np.flatnonzero(size > 0)
    if alive.size == 0:
        return
    largest = np.maximum.reduceat(np.abs(mcc), starts, axis=0)
    reached = np.abs(mcc) == np.repeat(largest, size[alive], axis=0)
    position = np.where(reached, np.arange(mcc.shape[0])[:, None], mcc.shape[0])
    chosen = np.minimum.reduceat(position, starts, axis=0)
    threshold[alive] = below[chosen]
    best[alive] = np.take_along_axis(mcc, chosen, axis=0)


def _positive_columns(codes: Sparse) -> Sparse:
    """CSC of the positive values."""
    out = sparse.csc_array(codes, copy=True)
    if (out.data <= 0).any():
        out.data[out.data < 0] = 0
        out.eliminate_zeros()
    return out


def _column_chunks(matrix: Sparse, n_labels: int) -> list[tuple[int, int]]:
    """Ranges of columns whose stored values x labels stay below _CHUNK (at least one column each)."""
    chunks, start = [], 0
    limit = max(_CHUNK // max(n_labels, 1), 1)
    while start < matrix.shape[1]:
        stop = int(np.searchsorted(matrix.indptr, matrix.indptr[start] + limit, side="right")) - 1
        stop = min(max(stop, start + 1), matrix.shape[1])
        chunks.append((start, stop))
        start = stop
    return chunks
