"""Which pre-activations become the code: the whole batch's largest, each token's largest, or those above a threshold.

A selector maps pre-activations [token feature] to `SparseCodes` and, `above` excepted, never keeps an entry <= 0: a
pick of zero adds nothing, gets no gradient and is no firing. No gradient flows here; `kernels` attach it to the chosen
entries.

Cost: finding the k * B largest of a batch by `topk` over the flat matrix takes 409 ms at B 4096, F 8192, k 32 (2
cores), as it moves 33 M numbers to rank 0.4 % of them. Here an eighth of the tokens (for them an eighth again, and so
on) tells about where the cutoff lies; what is above a little less than that is about 1.3 k B candidates, among which
the exact cutoff takes 2 ms. The guess decides the time, never the result: too few candidates, and all positive
entries are ranked.

Papers: BatchTopK arXiv 2412.06410, TopK arXiv 2406.04093.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.sae.codes import SparseCodes, positions_above

SMALL = 2**17  # entries that are ranked without a guess
SAMPLE = 8  # one token in so many tells where the cutoff lies
MARGIN = 0.9  # of the sample's cutoff: low enough that the batch's own hardly ever lies below


def batch_topk(pre: Float[Tensor, "token feature"], k: int) -> SparseCodes:
    """The k * n_tokens largest positive entries of the whole batch; of equal ones at the cutoff the first in order."""
    wanted, flat = k * pre.shape[0], pre.flatten()
    floor = _guess_cutoff(pre, k)
    place = positions_above(flat, floor)
    if place.numel() < wanted and floor > 0:
        place = positions_above(flat, 0.0)
    if place.numel() > wanted:
        value = flat[place]
        cutoff = value.kthvalue(value.numel() - wanted + 1).values
        above, tie = value > cutoff, value == cutoff
        place = place[above | (tie & (tie.cumsum(0) <= wanted - above.sum()))]
    return SparseCodes.from_flat(place, pre)


def _guess_cutoff(pre: Float[Tensor, "token feature"], k: int) -> float:
    if pre.numel() <= SMALL or pre.shape[0] < 2 * SAMPLE:
        return 0.0
    sample = batch_topk(pre[::SAMPLE], k)
    return MARGIN * float(sample.value.min()) if sample.nnz == k * sample.n_tokens else 0.0


def token_topk(pre: Float[Tensor, "token feature"], k: int) -> SparseCodes:
    """The k largest positive entries of each token."""
    n_tokens, n_features = pre.shape
    col = pre.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    start = torch.arange(n_tokens, device=pre.device) * n_features
    place = (col + start.unsqueeze(1)).flatten()
    return SparseCodes.from_flat(place[pre.flatten()[place] > 0], pre)


def above(pre: Float[Tensor, "token feature"], theta: Float[Tensor, " feature"]) -> SparseCodes:
    """The entries above their feature's `theta`, positive or not."""
    return SparseCodes.from_mask(pre, pre > theta)


def above_threshold(pre: Float[Tensor, "token feature"], theta: Float[Tensor, " feature"]) -> SparseCodes:
    """The positive entries above their feature's `theta`: a token's code does not depend on the tokens beside it."""
    return above(pre, theta.clamp(min=0.0))
