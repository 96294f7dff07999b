"""What reduced precision costs: the error of autocast against float32 on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sae_core.scfm.foundation import FoundationModel
from sae_core.scfm.sites import Site
from sae_core.scfm.tokens import Tokens


def precision_error(
    model: FoundationModel, tokens: Tokens, sites: Sequence[Site | str], *, autocast: torch.dtype = torch.bfloat16
) -> dict[Site, float]:
    """Root mean square error of each site's activations under `autocast`, over that of the activations themselves.

    .005 means that the error has half a percent of the activations' size. Runs the model twice.
    """
    before = model.autocast
    try:
        model.autocast = None
        exact = model.activations(tokens, sites)
        model.autocast = autocast
        rough = model.activations(tokens, sites)
    finally:
        model.autocast = before
    return {site: float((rough[site] - x).double().norm() / x.double().norm()) for site, x in exact.items()}
