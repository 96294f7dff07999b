"""The columns with the largest scores of each row, as a mask or as text."""

from collections.abc import Sequence

import numpy as np

from feature_store.associations.inputs import Bools, Floats


def largest(score: Floats, n: int) -> Bools:
    """A mask of the n largest positive scores of each row; of equal scores the one in the lower column is taken."""
    n = min(n, score.shape[1])
    out = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(out, np.argsort(-score, axis=1, kind="stable")[:, :n], True, axis=1)
    answer: Bools = out & (score > 0)
    return answer


def top_names(score: Floats, names: Sequence[str], n: int) -> list[str | None]:
    """The names of the n largest positive scores of each row, separated by spaces; None where no score is positive."""
    order = np.argsort(-score, axis=1, kind="stable")[:, :n]
    return [" ".join(names[j] for j in row if s[j] > 0) or None for row, s in zip(order, score, strict=True)]
