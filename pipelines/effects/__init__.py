"""The stage `scsae effects`: what each feature does to the model's predictions of hidden genes.

chain      what the stages behind an SAE share: its associations, its features, its model
cells      the cells in which a feature is measured
request    the options, checked against the store, and the plan
actors     the actors that measure a shard of features
tables     nulls, p and q over all features; the tables that are read
run        the stage
"""

from pipelines.effects.run import effects

__all__ = ["effects"]
