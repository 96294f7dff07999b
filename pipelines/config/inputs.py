"""Options of `scsae inputs`."""

from typing import Annotated

import pydantic
from pydantic import Field

from pipelines.config.options import ActorOptions, FeatureId, MovedDataOptions, as_tuple


class InputsOptions(ActorOptions, MovedDataOptions):
    """Measure which genes of a cell make features fire.

    Genes are chosen by gradient times input on `select` cells in which a feature fires. In `test` cells the token of
    each is left out, and the feature's code falls by two paths: the code on the gene's own token, and the code on the
    other tokens. Other genes like these are the null. The table `feature_input` has a row for each feature, gene and
    path.
    """

    sae: str | None = None
    """SAE whose features are measured; it has to have associations. Default: that of the newest associations."""
    feature: Annotated[tuple[FeatureId, ...], pydantic.BeforeValidator(as_tuple)] = ()
    """Id of a feature to measure; may be repeated. Default: all features that fire."""
    cells: int = Field(default=64, ge=1)
    """Number of select cells and of test cells for each feature, drawn from those in which it fires, evenly from the
    donors."""
    genes: int = Field(default=20, ge=1)
    """Number of genes of each feature to leave out: those of the largest gradient times input."""
    n_nulls: int | None = Field(default=None, ge=1)
    """Number of null genes for each gene, as far as the cells have enough genes. Default: 4, and more where few
    features are measured."""
    seed: int = Field(default=0, ge=0)
    """Seed of the cells and of the null genes."""
