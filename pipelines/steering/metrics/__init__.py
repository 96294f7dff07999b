"""The metrics of steering: distances, neighbours, mixing of batches, scIB, dose response, and their intervals.

Each module computes numbers from arrays and reads no store. Which way a number is good is in
`feature_store.query.metrics`.
"""
