"""Modules: groups of features that fire together beyond their rates, in cells of one type and donor.

cofiring     codes without what cell type, donor and depth explain, and their correlations
gene_sets    the gene sets of modules
communities  groups of the graph of nearest features, with their stability over resamples of donors
"""

from feature_store.modules.cofiring import correlations, residuals, shuffled_in_blocks
from feature_store.modules.communities import Modules, coherence, find_modules
from feature_store.modules.gene_sets import module_gene_sets, significant_sets

__all__ = [
    "Modules",
    "coherence",
    "correlations",
    "find_modules",
    "module_gene_sets",
    "residuals",
    "shuffled_in_blocks",
    "significant_sets",
]
