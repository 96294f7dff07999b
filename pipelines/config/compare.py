"""The options of comparing an SAE with others: with other SAEs and with baselines."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from pipelines.config.options import ActorOptions, Options, as_tuple

BaselineKind = Literal["neurons", "pca", "ica", "random", "random-model"]


class MatchOptions(Options):
    """Match the features of SAEs with each other: which are found again by another seed, layer, model or data set?

    The matches join the other tables, e.g.: scsae sql "SELECT m.other, m.similarity, f.top_genes FROM feature_match m
    JOIN features f USING (feature_id) WHERE m.mutual ORDER BY m.similarity DESC"
    """

    sae: str | None = None
    """SAE run whose features are matched; default: the newest."""
    other: tuple[str, ...] = ()
    """SAE run to match them with; may be repeated."""
    method: Literal["auto", "cosine", "pearson", "spearman"] = "auto"
    """How features are compared: by the cosine of their directions, or by the correlation of their codes of the same
    cells; auto takes the cosine for SAEs of the same model and site, else pearson."""
    n_null: int = Field(default=39, ge=19)
    """Permutations of the cells, within donors, that a correlation is held against."""
    max_cells: int = Field(default=5000, ge=3)
    """Cells of each split that a correlation is computed over, at most: a seeded sample of more."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random directions, the permutations and the sample."""


class BaselineOptions(ActorOptions):
    """Fit, encode and associate what an SAE has to surpass, by the same code into the same tables.

    neurons: the model's own. pca, ica: components of the same activations. random: an SAE with random directions.
    random-model: the SAE trained anew on the model with random weights, which is extracted again and takes as long.
    None of them is ever a default of another command. `scsae compare` says what the SAE has above them.
    """

    associations: str | None = None
    """Associations run of the SAE that the baselines are compared with; default: the newest."""
    kind: Annotated[tuple[BaselineKind, ...], pydantic.BeforeValidator(as_tuple)] = Field(
        default=("neurons", "pca", "ica", "random"), min_length=1
    )
    """Baseline: neurons, pca, ica, random or random-model; may be repeated."""
    gmt: tuple[Path, ...] = ()
    """The GMT files that the SAE's features were associated with; may be repeated."""
    fit_tokens: int = Field(default=65_536, ge=2)
    """Tokens of `train` cells, a seeded sample, that mean, components and directions are found on."""
