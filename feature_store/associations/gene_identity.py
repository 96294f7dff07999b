"""Gene identity: on the tokens of which genes does a feature fire?

From token counts: precision = fired tokens of g / fired tokens of f; recall = fired tokens of g / tokens of g;
lift = precision over g's share of all tokens.
"""

from typing import NamedTuple

import numpy as np

from feature_store.associations.inputs import Floats
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
