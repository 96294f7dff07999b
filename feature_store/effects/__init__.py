"""Effects of features on the predictions of hidden genes, and on other features, beside those of null draws; and what
genes do to features, beside null genes.

nulls    z and p from null draws that are pooled over features
draws    a table of draws, part by part, and the table of its scores
matched  z and p from null genes that are drawn for each gene
"""

from feature_store.effects.draws import Draws
from feature_store.effects.matched import GeneEffects, MatchedNull, pool_matched
from feature_store.effects.nulls import MIN_DRAWS, EffectBlock, PooledNull, Scores, pool_nulls

__all__ = [
    "MIN_DRAWS",
    "Draws",
    "EffectBlock",
    "GeneEffects",
    "MatchedNull",
    "PooledNull",
    "Scores",
    "pool_matched",
    "pool_nulls",
]
