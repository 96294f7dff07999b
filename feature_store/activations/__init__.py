"""Token activations of one site in Parquet: `parts` writes and reads them, `stream` shuffles them for training."""
