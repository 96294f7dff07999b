"""The stage `scsae inputs`: which genes of a cell make a feature fire.

request    the options, checked against the store, and the plan
actors     the actors that measure a shard of features
tables     nulls, p and q over all features; the tables that are read
run        the stage

What it shares with its sibling `pipelines.effects` (the cells of a feature, the model behind an SAE) lies there.
"""

from pipelines.feature_inputs.run import inputs

__all__ = ["inputs"]
