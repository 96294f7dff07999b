"""Gene identity: on the tokens of which genes does a feature fire?

From token counts: precision = fired tokens of g / fired tokens of f; recall = fired tokens of g / tokens of g;
lift = precision over g's share of all tokens. The p of a pair is the hypergeometric upper tail of its fired tokens: as
many tokens as the feature fires on, drawn at random from all of them.
"""

from typing import NamedTuple

import numpy as np

from feature_store.associations.inputs import Floats, Ints
from feature_store.associations.token_statistics import TokenStatistics


class Identity(NamedTuple):
    """precision, recall, lift: dense [n_features n_genes], 0 where the feature never fires on the gene."""

    precision: Floats
    recall: Floats
    lift: Floats


def identity(tokens: TokenStatistics) -> Identity:
    """Identity of every feature with every gene from token counts."""
    fired = tokens.fired.toarray().astype(np.float64)
    per_feature = np.maximum(tokens.feature_tokens, 1)[:, None]
    per_gene = np.maximum(tokens.gene_tokens, 1)[None, :]
    precision = fired / per_feature
    return Identity(precision, fired / per_gene, precision * tokens.n_tokens / per_gene)


def excess_p(tokens: TokenStatistics, genes: Ints) -> Floats:
    """The p of firing on more tokens of a gene than by chance, for the genes [n_features n] of each feature."""
    from scipy.stats import hypergeom

    rows = np.arange(genes.shape[0])[:, None]
    fired = np.asarray(tokens.fired.tocsr()[rows, genes].todense())
    of_feature = tokens.feature_tokens.astype(np.int64)[:, None]
    p = hypergeom.sf(fired - 1, tokens.n_tokens, tokens.gene_tokens[genes], of_feature)
    return np.asarray(p)
