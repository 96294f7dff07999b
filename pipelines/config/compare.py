"""The options of comparing an SAE with others: with other SAEs and with baselines."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from pipelines.config.options import ActorOptions, MovedDataOptions, Options, as_tuple

BaselineKind = Literal["neurons", "pca", "ica", "random", "random-model"]


class MatchOptions(Options):
    """Match the features of SAEs with each other.

    The result says which features another seed, layer, model or data set finds again.

    The matches join the other tables, e.g.: scsae sql "SELECT m.other, m.similarity, f.top_genes FROM feature_match m
    JOIN features f USING (feature_id) WHERE m.mutual ORDER BY m.similarity DESC"
    """

    sae: str | None = None
    """SAE run whose features are matched; default: the newest that is no `other`."""
    other: tuple[str, ...] = ()
    """SAE run to match with; may be repeated."""
    method: Literal["auto", "cosine", "pearson", "spearman"] = "auto"
    """Similarity of two features: the cosine of their directions, or the correlation of their codes of the same cells.
    auto takes the cosine for SAEs of the same model and site, else pearson."""
    n_null: int = Field(default=39, ge=19)
    """Number of permutations of the cells within donors, which give the null distribution of a correlation."""
    max_cells: int = Field(default=5000, ge=3)
    """Number of cells of each split at most for a correlation; of more cells a seeded sample is taken."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random directions, the permutations and the sample."""


class BaselineOptions(ActorOptions, MovedDataOptions):
    """Make the baselines of an SAE and compare it with them.

    Baselines are fitted, encoded and associated by the same code and into the same tables as the SAE.

    neurons: the neurons of the model. pca, ica: components of the same activations. random: an SAE with random
    directions. random-model: the same SAE trained on a model with random weights; its extraction and training take as
    long as those of the SAE. A baseline is never the default of another command. `scsae compare` shows the comparison
    again.
    """

    associations: str | None = None
    """Associations run of the SAE that the baselines are compared with; default: the newest."""
    kind: Annotated[tuple[BaselineKind, ...], pydantic.BeforeValidator(as_tuple)] = Field(
        default=("neurons", "pca", "ica", "random"), min_length=1
    )
    """Baseline to make: neurons, pca, ica, random or random-model; may be repeated. Default: all but random-model."""
    gmt: tuple[Path, ...] = ()
    """GMT file that the features of the SAE were associated with; may be repeated. Default: the gene sets of these
    associations, which the store holds."""
    fit_tokens: int = Field(default=65_536, ge=2)
    """Number of tokens of `train` cells, a seeded sample, from which means, components and directions are estimated."""
