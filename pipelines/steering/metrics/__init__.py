"""What steering is measured by: distances, neighbours, mixing of batches, scIB, dose response and their intervals."""
