"""Steering: change SAE features of cells, and measure what the change does to the cells' embeddings.

Data goes through the room in this order. `request` reads the options against the store, `plan` says which variants the
model is run under, `token_sample`, `feature_selection`, `group_means` and `dose_selection` choose features and dose on
`train` and `select` cells, `actors` steers cells under the variants and `shards` writes the tables that they make.
`evaluation` computes every metric of every condition, `mlflow_log` logs them, and `seeds` summarises several SAEs. The
door is `run.steer`.
"""
