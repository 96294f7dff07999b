"""Adjusted mutual information of two binary labellings from counts, for millions of pairs at once.

AMI = (MI - E[MI]) / ((H(label) + H(predicted)) / 2 - E[MI]), the expectation over the hypergeometric model (Vinh,
Epps & Bailey 2010, JMLR 11:2837). E[MI] depends on the margins alone, so it is summed once per distinct pair of
margins, over a window of 12 standard deviations about the mean count (the rest weighs less than 1e-15). Equals
sklearn's adjusted_mutual_info_score to 1e-9.
Cost: 50k cells x 4096 features x 40 labels x 5 thresholds 0.8 s on one core; sklearn takes 8 ms a pair, 2 hours.
"""

import numpy as np
from scipy import sparse
from scipy.special import gammaln, xlogy

from feature_store.associations.inputs import Floats, Sparse

THRESHOLDS = (0.0, 0.2, 0.4, 0.6, 0.8)
_WINDOW_SD = 12.0
_WIDTH_STEP = 64
_CHUNK = 4_000_000


def adjusted_mutual_information(n: int, n_label: Floats, n_predicted: Floats, n_both: Floats) -> Floats:
    """AMI (arithmetic mean of entropies) of 2 x 2 tables with n cells; the counts broadcast. 0 where a margin is
    constant.
    """
    label, predicted, both = np.broadcast_arrays(n_label, n_predicted, n_both)
    information = _mutual_information(n, label, predicted, both)
    key = label.ravel().astype(np.int64) * (n + 1) + predicted.ravel().astype(np.int64)
    pairs, where = np.unique(key, return_inverse=True)
    margins = [margin.astype(np.float64) for margin in np.divmod(pairs, n + 1)]
    expected = _expected_information(n, *margins)[where].reshape(label.shape)
    scale = (_entropy(n, label) + _entropy(n, predicted)) / 2 - expected
    split = (label > 0) & (label < n) & (predicted > 0) & (predicted < n)
    return np.where(split, (information - expected) / np.where(split, scale, 1.0), 0.0)


def ami_by_threshold(codes: Sparse, indicator: Sparse, maximum: Floats) -> Floats:
    """AMI [n_thresholds n_features n_labels] of (code / maximum > t) with each label, t in THRESHOLDS.

    codes: CSR [n_cells n_features]; indicator: CSR one-hot [n_cells n_labels], every cell known; maximum: the
    feature's scale [n_features], 0 for a dead feature. The definition is that of the field's present code (METHODS.md
    3), thresholds included.
    """
    n_cells = codes.shape[0]
    n_label: Floats = np.asarray(indicator.sum(axis=0), dtype=np.float64).ravel()
    column_max = maximum[codes.indices]
    out = np.empty((len(THRESHOLDS), codes.shape[1], indicator.shape[1]))
    for i, threshold in enumerate(THRESHOLDS):
        fires = sparse.csr_array(
            ((codes.data > threshold * column_max).astype(np.float64), codes.indices, codes.indptr), codes.shape
        )
        n_both = (fires.T @ indicator).toarray()
        n_fires: Floats = np.asarray(fires.sum(axis=0), dtype=np.float64).ravel()
        out[i] = adjusted_mutual_information(n_cells, n_label[None, :], n_fires[:, None], n_both)
    return out


def _entropy(n: int, count: Floats) -> Floats:
    share = count / n
    return np.asarray(-(xlogy(share, share) + xlogy(1 - share, 1 - share)), dtype=np.float64)


def _mutual_information(n: int, label: Floats, predicted: Floats, both: Floats) -> Floats:
    """MI in nats from sum n_ij log n_ij, which needs no division by empty margins."""
    cells = (both, label - both, predicted - both, n - label - predicted + both)
    margins = (label, n - label, predicted, n - predicted)
    total = np.sum([xlogy(c, c) for c in cells], axis=0) - np.sum([xlogy(m, m) for m in margins], axis=0) + xlogy(n, n)
    information: Floats = np.maximum(total / n, 0.0)
    return information


def _expected_information(n: int, label: Floats, predicted: Floats) -> Floats:
    """E[MI] for each pair of margins [n_pairs] under the hypergeometric distribution of the joint count."""
    low, high = np.maximum(0.0, label + predicted - n), np.minimum(label, predicted)
    mean = label * predicted / n
    sd = np.sqrt(mean * (1 - label / n) * (1 - predicted / n) * n / max(n - 1, 1))
    # at a small mean the tail is a Poisson one: the constant keeps it inside the window
    first = np.maximum(low, np.floor(mean - _WINDOW_SD * sd - 30))
    last = np.minimum(high, np.ceil(mean + _WINDOW_SD * sd + 30))
    # the rounding of a sum depends on its length, so the length may depend on the pair's own margins only
    width = -(-(last - first + 1).astype(np.int64) // _WIDTH_STEP) * _WIDTH_STEP
    expected = np.empty(label.size)
    order = np.argsort(width, kind="stable")
    start = 0
    while start < order.size:
        widest = int(width[order[start]])
        end = int(np.searchsorted(width, widest, side="right", sorter=order))
        stop = min(end, start + max(1, _CHUNK // widest))
        rows = order[start:stop]
        count = first[rows, None] + np.arange(widest, dtype=np.float64)
        inside = count <= last[rows, None]
        count = np.where(inside, count, last[rows, None])
        a, b = label[rows, None], predicted[rows, None]
        log_weight = -np.sum([gammaln(c + 1) for c in (count, a - count, b - count, n - a - b + count)], axis=0)
        weight = np.where(inside, np.exp(log_weight - log_weight.max(axis=1, keepdims=True)), 0.0)
        expected[rows] = (weight * _mutual_information(n, a, b, count)).sum(axis=1) / weight.sum(axis=1)
        start = stop
    return expected
