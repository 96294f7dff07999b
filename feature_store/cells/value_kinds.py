"""Whether the values of a matrix are counts or log-normalised: told from sampled rows, checked on every row read."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from feature_store.cells.matrices import CSRRows, RowMatrix
from feature_store.errors import InputError

SAMPLE_BLOCKS = 16
SAMPLE_ROWS = 64
LOGNORM_MAX = 20.0
"""log1p of any count is below this (log1p(4.8e8) = 20); larger values are normalised but not logged."""
KINDS: Mapping[str, str] = {
    "counts": "non-negative integers",
    "lognorm": f"non-negative, not integers, below {LOGNORM_MAX:g}: log-normalised",
    "scaled": "has negative values: scaled or centred",
    "unlogged": f"not integers and above {LOGNORM_MAX:g}: normalised but not logged",
    "empty": "every sampled value is 0",
}
USABLE = ("counts", "lognorm")


def value_kind(matrix: RowMatrix, where: str) -> str:
    """The kind of the values of a matrix, one of `KINDS`, from up to 1,024 rows spread evenly over it. InputError for
    NaN or infinity.
    """
    n_rows = matrix.shape[0]
    starts = np.unique(np.linspace(0, max(n_rows - SAMPLE_ROWS, 0), SAMPLE_BLOCKS).astype(int))
    blocks = []
    for start in starts.tolist():
        rows = matrix.read(start, min(start + SAMPLE_ROWS, n_rows))
        refuse_rows(rows, ~np.isfinite(rows.data), start, where, "is not finite")
        blocks.append(rows.data)
    values = np.concatenate(blocks)
    if not values.any():
        return "empty"
    if values.min() < 0:
        return "scaled"
    if is_integer(values).all():
        return "counts"
    return "lognorm" if values.max() < LOGNORM_MAX else "unlogged"


def is_integer(values: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Whether each value is a whole number."""
    whole: npt.NDArray[np.bool_] = values == np.rint(values)
    return whole


def check_rows(rows: CSRRows, kind: str, start: int, where: str) -> None:
    """Raise InputError naming the first row with a value that is not finite, negative, or (in counts) not whole."""
    refuse_rows(rows, ~np.isfinite(rows.data), start, where, "is not finite")
    refuse_rows(rows, rows.data < 0, start, where, "is negative")
    if kind == "counts":
        fractional = ~is_integer(rows.data)
        refuse_rows(rows, fractional, start, where, "is not a whole number, although the sampled rows are counts")


def refuse_rows(rows: CSRRows, bad: npt.NDArray[np.bool_], start: int, where: str, problem: str) -> None:
    """Raise InputError naming the first row with a True in `bad`; the first of `rows` is row `start` of the matrix."""
    if not bad.any():
        return
    place = int(np.argmax(bad))
    row = start + int(np.searchsorted(rows.indptr, place, side="right")) - 1
    raise InputError(
        f"{where}, row {row}, column {int(rows.indices[place])}: the value {rows.data[place]:g} {problem}; "
        "repair the file, or name another matrix with --matrix"
    )
