"""Tests of whether a metric follows the dose of steering in every unit.

Page's L (1963, doi:10.1080/01621459.1963.10500843) ranks the values of a unit (a donor's cells of one type) over the
doses and tests whether the ranks follow the order of the doses, one-sided in the intended direction of the metric.
Units are the replicates, so doses need not act linearly, and units need not start from the same value. Spearman's
correlation of the mean curve with the dose measures how monotone the curve is and is not a test.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from pipelines.errors import UsageError
from pipelines.steering.metrics.intervals import Floats

MIN_DOSES = 3
"""Least number of doses of a curve."""
MIN_UNITS = 2
"""Least number of units of Page's test."""


class DoseResponse(NamedTuple):
    """Page's test over units and Spearman's correlation of their mean curve; None if there are too few data."""

    p: float | None
    """One-sided p of Page's L; None for fewer than 3 doses or 2 units."""
    spearman: float | None
    """Correlation of dose and mean curve, +1 if it rises with every dose; None for under 3 doses or a flat curve."""
    n_units: int
    n_doses: int


def dose_response(doses: Sequence[float] | Floats, values: Floats, *, increasing: bool) -> DoseResponse:
    """Test whether values rise (or fall) with the dose.

    Args:
        doses: the dose of each column, in any order, each once [n_doses].
        values: the metric of each unit and dose [n_units n_doses]; a unit with a value that is not finite is left out.
            Equal values share their mean rank, which makes p larger rather than smaller.
        increasing: whether the metric should rise with the dose; False tests a fall.

    Raises:
        UsageError: values are not [n_units n_doses], or a dose occurs twice.
    """
    dose, table = np.asarray(doses, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(dose):
        raise UsageError(
            f"values are {list(table.shape)}; expected a row for each unit and {len(dose)} columns, one for each dose"
        )
    if len(np.unique(dose)) != len(dose):
        raise UsageError(
            f"doses were {dose.tolist()}, and each may be there once; average the values of equal doses first"
        )
    table = table[np.isfinite(table).all(1)][:, np.argsort(dose)]
    n_units = len(table)
    if len(dose) < MIN_DOSES or not n_units:
        return DoseResponse(None, None, n_units, len(dose))
    mean = table.mean(0)
    spearman = None if np.ptp(mean) == 0 else float(stats.spearmanr(np.sort(dose), mean).statistic)
    if n_units < MIN_UNITS:
        return DoseResponse(None, spearman, n_units, len(dose))
    test = stats.page_trend_test(table if increasing else -table)
    return DoseResponse(float(test.pvalue), spearman, n_units, len(dose))
