"""Whether a metric follows the dose of steering in every unit alike.

Page's L (1963, doi:10.1080/01621459.1963.10500843) takes a unit's values (a donor's cells of one type) over the doses
as ranks and asks whether they follow the order of the doses, one-sided in the direction the metric should go; units
are the replicates, so doses need not act linearly nor units start from the same value. Spearman's correlation of the
mean curve with the dose says how monotone the curve is, without a claim of significance.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from pipelines.errors import UsageError
from pipelines.steering.metrics.intervals import Floats

MIN_DOSES = 3
"""Doses of a curve, at least."""
MIN_UNITS = 2
"""Units of Page's test, at least."""


class DoseResponse(NamedTuple):
    """Page's test over units and Spearman's correlation of their mean curve; None where there is too little data."""

    p: float | None
    """One-sided p of Page's L; None for fewer than 3 doses or 2 units."""
    spearman: float | None
    """Of dose and mean curve, +1 where it rises with every dose; None for fewer than 3 doses or a flat curve."""
    n_units: int
    n_doses: int


def dose_response(doses: Sequence[float] | Floats, values: Floats, *, increasing: bool) -> DoseResponse:
    """Test whether values rise (or fall) with the dose.

    Args:
        doses: one per column, in any order, each once [n_doses].
        values: a metric per unit and dose [n_units n_doses]; a unit with a value that is not finite is left out. Equal
            values share their mean rank, which makes p larger rather than smaller.
        increasing: whether the metric should rise with the dose; False tests a fall.

    Raises:
        UsageError: values are not [n_units n_doses], or a dose is there twice.
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
