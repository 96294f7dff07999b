"""Effects of features on the predictions of hidden genes, beside those of other directions.

nulls    z and p from null directions that are pooled over features
"""

from feature_store.effects.nulls import MIN_DRAWS, EffectBlock, PooledNull, Scores, pool_nulls

__all__ = ["MIN_DRAWS", "EffectBlock", "PooledNull", "Scores", "pool_nulls"]
