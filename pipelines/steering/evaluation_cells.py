"""The cells that conditions are evaluated on, and the value of a metric on them with its values in subsamples.

A `MetricValue` is one metric of one group of cells. Its `sampled` values come from the same subsamples for every
condition, so that the interval of an effect is that of paired differences. A subsample leaves out a fifth of the cells
of each donor, cell type and label, and repeats no cell; the spread is scaled to that of samples (the delete-d
jackknife, Shao & Wu 1989, doi:10.1214/aos/1176347263). A bootstrap would draw cells twice, at a distance of 0 from each
other, so its interval of a distance would lie above the distance. Neighbours are not searched again in a subsample.
Distances are those of weighted means, one product per type: 500 subsamples of 5,000 cells of 256 numbers take .2 s.

In simulations the 95 % intervals held the truth in 98 % of cases. If noise is as large as the distance, they held it in
92 % (distances), 98 % (the share that remains) and 100 % (corrected distances). Energy distances have no interval,
because their pairs would take minutes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.steering.metrics import type_preservation
from pipelines.steering.metrics.intervals import UNKNOWN, Bools, Floats, Interval, blocks, percentiles

ALL = "all"
"""The group of all cells together."""
N_SAMPLES = 500
"""Number of subsamples behind an interval."""
Strings = npt.NDArray[np.str_]


class MetricValue(NamedTuple):
    """One metric of one group of cells under one condition."""

    metric: str
    group: str
    value: float | None
    n_cells: int
    sampled: Floats | None = None
    """Its values in subsamples of the cells [n_samples]; None if it is not sampled."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationCells:
    """The cells that conditions are evaluated on, in the order of their embeddings.

    Attributes:
        unsteered: their unsteered embeddings [n_cells width].
        label: their labels of the kind that is steered [n_cells].
        cell_type: their types [n_cells]; one type for all if none is known.
        donor: their donors [n_cells], "" if unknown, in which case cells count as independent.
        train: the unsteered embeddings of `train` cells [n_train width], which classifiers are fitted on.
        train_label: the labels of the `train` cells [n_train].
        train_type: the types of the `train` cells [n_train].
        seed: the seed of the subsamples.
        n_samples: the number of subsamples.
    """

    unsteered: Floats
    label: Strings
    cell_type: Strings
    donor: Strings
    train: Floats
    train_label: Strings
    train_type: Strings
    seed: int = 0
    n_samples: int = N_SAMPLES

    @cached_property
    def kept(self) -> npt.NDArray[np.float32]:
        """1 for the cells that a subsample keeps [n_samples n_cells]; it keeps 4 of 5 of each donor, type and label."""
        rng = np.random.default_rng(self.seed)
        kept = np.ones((self.n_samples, len(self.label)), dtype=np.float32)
        block = blocks(len(self.label), self.donor, self.cell_type, self.label)
        for code in np.unique(block):
            own = np.flatnonzero(block == code)
            n_out = max(1, round(len(own) / 5)) if len(own) > 1 else 0
            order = rng.random((self.n_samples, len(own))).argsort(axis=1)
            kept[:, own] = order >= n_out
        return kept

    def interval(self, effect: float | None, steered: MetricValue, unsteered: MetricValue) -> Interval:
        """The 95 % interval of an effect, from the spread over subsamples, scaled to that of samples."""
        if effect is None or steered.sampled is None or unsteered.sampled is None:
            return UNKNOWN
        n_kept, n_cells = float(self.kept[0].sum()), len(self.label)
        spread = steered.sampled - unsteered.sampled
        spread = spread[np.isfinite(spread)]
        if not len(spread) or n_kept == n_cells:
            return UNKNOWN
        low, high = percentiles((spread - spread.mean()) * np.sqrt(n_kept / (n_cells - n_kept)))
        return UNKNOWN if low is None or high is None else Interval(effect + low, effect + high)

    def mean(self, metric: str, values: Floats, cells: Bools | None = None, group: str = ALL) -> MetricValue:
        """The mean of values as a metric; there is one value for each of `cells` (None: all cells)."""
        own = np.ones(len(self.label), dtype=bool) if cells is None else cells
        if not own.any():
            return MetricValue(metric, group, None, 0)
        kept = self.kept[:, own]
        sampled = (kept @ np.asarray(values, dtype=np.float64)) / kept.sum(1)
        return MetricValue(metric, group, float(np.mean(values)), int(own.sum()), sampled)

    def macro_f1(self, metric: str, truth: Strings, predicted: Strings, cells: Bools, group: str = ALL) -> MetricValue:
        """The macro-F1 over the labels in `truth` [n_own] of `cells`, as a metric."""
        if not cells.any():
            return MetricValue(metric, group, None, 0)
        kept, scores = self.kept[:, cells], []
        for name in np.unique(truth):
            true, said = truth == name, predicted == name
            hit, both = kept @ (true & said).astype(float), kept @ (true.astype(float) + said.astype(float))
            scores.append(2 * hit / np.maximum(both, 1))
        value = type_preservation.macro_f1(truth, predicted)
        return MetricValue(metric, group, value, int(cells.sum()), np.mean(scores, axis=0))
