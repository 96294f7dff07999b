"""The metrics of steering: distances, neighbours, mixing of batches, scIB, dose response, and their intervals.

Each module computes numbers from arrays and reads no store. `feature_store.query.metrics` holds the direction in which
each metric is better.
"""
