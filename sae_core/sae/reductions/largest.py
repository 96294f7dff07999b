"""The largest codes of each cell."""

from jaxtyping import Bool, Float
from torch import Tensor

from sae_core.sae.reductions.ordering import nth_largest


def largest_of_each(rows: Float[Tensor, "cell feature"], keep: int) -> Bool[Tensor, "cell feature"]:
    """Which entries are among the `keep` largest of their row and above 0; of equal ones, the first features are."""
    positive = rows > 0
    if keep >= rows.shape[1]:
        return positive
    nth = nth_largest(rows, keep)
    chosen = (rows >= nth) & positive
    tied_rows = (chosen.sum(1) > keep).nonzero().squeeze(1)
    if tied_rows.numel():
        some, limit = rows[tied_rows], nth[tied_rows]
        above, tied = some > limit, some == limit
        room = keep - above.sum(1, keepdim=True)
        chosen[tied_rows] = above | (tied & (tied.cumsum(1) <= room))
    return chosen
