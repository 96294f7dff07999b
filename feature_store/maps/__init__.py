"""Two-dimensional maps (UMAP), each made once and stored beside the run that it is made of.

A stage, a plot or the atlas calls the function that returns a map; the first call makes it. `umap` is the method that
all share.

cells            `cell_map`: cells by their codes
features         `feature_map`: features by the directions of their decoder rows, and their nearest neighbours
label_profiles   `profile_map`: features by their associations with labels
steered_cells    `steering_map`: cells before and after steering
"""
