"""Queries over a store: which runs are read, their tables by name, SQL and the everyday look-ups.

The door is `FeatureStore` in `store`, also `feature_store.FeatureStore`. `runs` follows the plans from one run to those
that it came from, `tables` finds the folders of each table, and `metrics` says what the metrics of steering mean. It
reads what the rooms below it wrote and writes nothing; plots and the atlas stand on it.
"""
