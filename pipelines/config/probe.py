"""Options of `scsae probe`."""

from typing import Annotated

import pydantic
from pydantic import Field

from pipelines.config.options import ActorOptions, Positive, as_tuple


class ProbeOptions(ActorOptions):
    """Find the few features that tell the cells of each label from the others.

    For each label, a sparse logistic regression is fitted to `train` cells, tuned on `select` cells and scored on
    `test` cells, with 1, 2, 5, ... features. The same is done with the baselines of the SAE, with single genes, and
    with labels permuted among the cells of each donor. Tables `feature_probe` and `probe_score`.
    """

    sae: str | None = None
    """SAE whose features are used; it has to have associations. Default: that of the newest associations."""
    label: Annotated[tuple[str, ...], pydantic.BeforeValidator(as_tuple)] = ()
    """Kind of label, e.g. cell_type or condition; may be repeated. Default: cell_type, or the first that there is."""
    k: Annotated[tuple[Positive, ...], pydantic.BeforeValidator(as_tuple)] = (1, 2, 5, 10, 20)
    """Number of features of a probe; may be repeated."""
    genes: int = Field(default=2000, ge=0)
    """Number of genes, those of the largest variance of log1p(CP10k) among `train` cells; 0: no genes."""
    cells: int = Field(default=20_000, ge=10)
    """Most cells of each split, drawn from those of the panel."""
    seed: int = Field(default=0, ge=0)
    """Seed of the cells and of the permuted labels."""
