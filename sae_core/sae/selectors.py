"""Which pre-activations become the code: the whole batch's largest, each token's largest, or those above a threshold.

A selector maps pre-activations [token feature] to `SparseCodes` and never keeps an entry <= 0: a pick of zero adds
nothing, gets no gradient and is no firing. No gradient flows here; `kernels` attach it to the chosen entries.

Cost: finding the k * B largest of a batch by `topk` over the flat matrix takes 409 ms at B 4096, F 8192, k 32 (2
cores), as it moves 33 M numbers to rank 0.4 % of them. A `floor` that lies somewhat below the cutoff (the trainer
knows the last one) leaves about 1.5 k B candidates, of which the exact cutoff takes 2 ms: 30 ms in all. The floor
changes the time, never the result: too few candidates, and the selection starts again from all positive entries.

Papers: BatchTopK arXiv 2412.06410, TopK arXiv 2406.04093.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.sae.codes import SparseCodes

Selector = Callable[[Tensor, int, float], SparseCodes]
"""(pre [token feature], k, floor) -> codes; `floor` is a guess of the smallest value that will be kept."""


def batch_topk(pre: Float[Tensor, "token feature"], k: int, floor: float = 0.0) -> SparseCodes:
    """The k * n_tokens largest positive entries of the whole batch; of equal ones at the cutoff the first in order."""
    wanted = k * pre.shape[0]
    flat = pre.flatten()
    place = (flat > max(floor, 0.0)).nonzero().squeeze(1)
    if place.numel() < wanted and floor > 0:
        place = (flat > 0).nonzero().squeeze(1)
    if place.numel() > wanted:
        value = flat[place]
        cutoff = value.kthvalue(value.numel() - wanted + 1).values
        above, tie = value > cutoff, value == cutoff
        place = place[above | (tie & (tie.cumsum(0) <= wanted - above.sum()))]
    return SparseCodes.from_flat(place, pre)


def token_topk(pre: Float[Tensor, "token feature"], k: int, floor: float = 0.0) -> SparseCodes:
    """The k largest positive entries of each token (`floor` is of no use here)."""
    n_tokens, n_features = pre.shape
    col = pre.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    start = torch.arange(n_tokens, device=pre.device) * n_features
    place = (col + start.unsqueeze(1)).flatten()
    return SparseCodes.from_flat(place[pre.flatten()[place] > 0], pre)


def above_threshold(pre: Float[Tensor, "token feature"], theta: float) -> SparseCodes:
    """The positive entries above `theta`: what a token's code is does not depend on the tokens beside it."""
    return SparseCodes.from_mask(pre, pre > max(theta, 0.0))
