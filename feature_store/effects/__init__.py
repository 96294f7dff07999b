"""Effects of features on the predictions of hidden genes, and on other features, beside those of null draws.

nulls    z and p from null draws that are pooled over features
draws    a table of draws, part by part, and the table of its scores
"""

from feature_store.effects.draws import Draws
from feature_store.effects.nulls import MIN_DRAWS, EffectBlock, PooledNull, Scores, pool_nulls

__all__ = ["MIN_DRAWS", "Draws", "EffectBlock", "PooledNull", "Scores", "pool_nulls"]
