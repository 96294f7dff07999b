"""Steering: what a change of features does to cells' embeddings, and the measures that say how much."""
