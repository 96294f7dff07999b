"""Steering: change SAE features of cells, and measure what the change does to the cells' embeddings.

Data goes through this folder in this order. `request` checks the options against the store, `plan` lists the variants
that the model is run under, `token_sample`, `feature_selection`, `group_means` and `dose_selection` choose features and
dose on `train` and `select` cells, `actors` steers cells under the variants and `shards` writes the tables that they
make. `evaluation` computes every metric of every condition, `mlflow_log` logs them, and `seeds` summarises several
SAEs. The entry point is `run.steer`.
"""
