"""Selectors of the active features: the largest entries of the batch or of each token, or those above a threshold.

A selector maps pre-activations [token feature] to `SparseCodes`. Except for `above`, it never keeps an entry <= 0,
because such an entry adds nothing and gets no gradient. Selectors are not differentiated; `kernels` attach gradients
to the selected entries.

Cost: the k * B largest entries of a batch by `topk` over the flat matrix take 409 ms at B 4096, F 8192, k 32 (2
cores), because 33 million numbers are moved to rank 0.4 % of them. Here a 16th of the tokens (found in the same way
from a 16th of those, and so on) gives an estimate of the cutoff; about 1.3 k B candidates lie above a slightly
lower value, and the exact cutoff among them takes 2 ms. The estimate affects the time and never the result: if there
are too few candidates, all positive entries are ranked.

Papers: BatchTopK arXiv 2412.06410, TopK arXiv 2406.04093.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_core.sae.codes import SparseCodes, positions_above

SMALL = 2**17  # up to this many entries are ranked without an estimate of the cutoff
SAMPLE = 16  # one token in this many is used to estimate the cutoff
MARGIN = 0.9  # factor on the estimate: low enough that the cutoff of the batch is hardly ever below it


def batch_topk(pre: Float[Tensor, "token feature"], k: int) -> SparseCodes:
    """The k * n_tokens largest positive entries of the batch; of equal entries at the cutoff, the first ones."""
    wanted, flat = k * pre.shape[0], pre.flatten()
    floor = _estimate_cutoff(pre, k)
    place = positions_above(flat, floor)
    if place.numel() < wanted and floor > 0:
        place = positions_above(flat, 0.0)
    if place.numel() > wanted:
        place = place[largest(flat[place], wanted)]
    return SparseCodes.from_flat(place, pre)


def largest(value: Float[Tensor, " n"], wanted: int) -> Bool[Tensor, " n"]:
    """Which are the `wanted` largest of at least as many numbers; of equal numbers at the cutoff, the first ones."""
    cutoff = value.kthvalue(value.numel() - wanted + 1).values
    above, tie = value > cutoff, value == cutoff
    return above | (tie & (tie.cumsum(0) <= wanted - above.sum()))


def _estimate_cutoff(pre: Float[Tensor, "token feature"], k: int) -> float:
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
    """The entries above the `theta` of their feature, also if they are negative."""
    return SparseCodes.from_mask(pre, pre > theta)


def above_threshold(pre: Float[Tensor, "token feature"], theta: Float[Tensor, " feature"]) -> SparseCodes:
    """The positive entries above the `theta` of their feature; a token's code does not depend on other tokens."""
    return above(pre, theta.clamp(min=0.0))
