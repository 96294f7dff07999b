"""Two-dimensional maps (UMAP) of cells, of features, of the label profiles of features, and of steered cells."""
