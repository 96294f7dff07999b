"""Options of `scsae modules`."""

from pydantic import Field

from pipelines.config.options import Options


class ModulesOptions(Options):
    """Find groups of features that fire together beyond their rates.

    Features are compared inside cells of one cell type and donor, given depth, on `train` and `select` cells. Groups
    that resamples of the donors give again are modules. They are tested on `test` cells against features that fire as
    often, and beside the modules of shuffled codes. Tables `feature_module`, `module` and `module_gene_set`.
    """

    sae: str | None = None
    """SAE whose features are grouped; it has to have associations. Default: that of the newest associations."""
    features: int = Field(default=4096, ge=3)
    """Most features, those of the largest variance."""
    cells: int = Field(default=20_000, ge=10)
    """Most cells that the modules are found on, and most on which they are tested, drawn from the panel."""
    n_resamples: int = Field(default=20, ge=2)
    """Number of resamples, each of half of the donors."""
    n_draws: int = Field(default=500, ge=20)
    """Number of sets of other features that a module is tested against."""
    seed: int = Field(default=0, ge=0)
    """Seed of the cells, the resamples and the draws."""
