"""The options of the associations that determine what the tables hold."""

from dataclasses import dataclass, field

from feature_store.associations.classes import ClassConfig
from feature_store.associations.familywise import Replicates
from feature_store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AssociationConfig:
    """What is kept and how a feature's genes are defined."""

    alpha: float = 0.05
    """False discovery rate at which a gene counts as associated and a pair is kept."""
    n_genes: int = 30
    """A feature's genes: at most so many, positively correlated, q <= alpha on the split, by Pearson."""
    n_kept: int = 20
    """Pairs of a feature kept whatever their q: the strongest correlations, and the genes it fires on most."""
    n_tokens: int = 20
    """Top-activating tokens kept per feature."""
    classes: ClassConfig = field(default_factory=ClassConfig)
    replicates: Replicates = field(default_factory=Replicates)
    """Permutations of the labels behind p_max."""

    def __post_init__(self) -> None:
        if not (0 < self.alpha < 1 and min(self.n_genes, self.n_kept, self.n_tokens) >= 1):
            raise InputError(f"{self}: alpha is in (0, 1), the counts are at least 1")
