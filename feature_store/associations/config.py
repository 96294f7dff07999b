"""The options of the associations that determine what the tables hold."""

from dataclasses import dataclass, field

from feature_store.associations.claims import ALPHA
from feature_store.associations.classes import ClassConfig
from feature_store.associations.familywise import Replicates
from feature_store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AssociationConfig:
    """Which pairs are kept, how the genes of a feature are defined, and how classes and p_max are computed."""

    alpha: float = ALPHA
    """False discovery rate at which a gene counts as associated and a pair is kept."""
    n_genes: int = 30
    """Largest number of genes of a feature: those with q <= alpha and the largest positive Pearson correlation."""
    n_kept: int = 20
    """Pairs of a feature that are kept at any q: the strongest correlations, and the genes on which it fires most."""
    n_tokens: int = 20
    """Number of top-activating tokens that are kept of each feature."""
    classes: ClassConfig = field(default_factory=ClassConfig)
    replicates: Replicates = field(default_factory=Replicates)
    """The permutations of the labels from which p_max is computed."""

    def __post_init__(self) -> None:
        if not (0 < self.alpha < 1 and min(self.n_genes, self.n_kept, self.n_tokens) >= 1):
            raise InputError(f"{self}: alpha must lie in (0, 1), and n_genes, n_kept and n_tokens must be at least 1")
