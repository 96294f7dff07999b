"""Pictures of a store, in the manner of scanpy: a function draws one plot of a `FeatureStore`, takes show=, save= and
ax=, and returns the axes.

>>> from feature_store import FeatureStore, plots
>>> store = FeatureStore.open("scsae-store")
>>> plots.dotplot(store)                                   # the best feature of each cell type
>>> plots.umap(store, ["cell_type", 17], save="map.png")   # a label and a feature, side by side
>>> plots.violin(store, 17)                                # by cell type, and by batch

What is chosen (features, genes, gene sets) is chosen on `select` cells, and what is drawn is of `test` cells unless
another `split` is asked for; the title says which. What is not significant (q > alpha) is marked so.

matplotlib is imported at the first plot (0.5 s), never at import of the package. `save` writes .png (200 dots per
inch), .pdf or .svg, and `save=ImageFile(path="map.svg", size=(6, 4))` at another size; the metadata of a file name the
store, the run and its date. `show=True` opens a window, None shows the picture in a notebook and nowhere else; with
`ax` you draw into your own figure. Plots of several panels (`umap`, `violin`, `steering_curve`, `steering_map`) return
a list of axes. Colours are Okabe and Ito's, which colour-blind readers tell apart. Cost: 0.1 to 0.6 s a picture; `umap`
lays the cells out at its first call.
"""

from feature_store.plots.canvas import CLASS_COLOURS, ImageFile
from feature_store.plots.cells import umap, violin
from feature_store.plots.dots import best_features, dotplot
from feature_store.plots.edges import edge_graph
from feature_store.plots.features import batch_quadrant, density_histogram
from feature_store.plots.genes import effect_bars, gene_bars, gene_features, geneset_bars, input_bars
from feature_store.plots.probes import probe_lines
from feature_store.plots.steering import (
    steering_all,
    steering_bars,
    steering_curve,
    steering_distances,
    steering_head,
    steering_map,
    steering_pareto,
)

__all__ = [
    "CLASS_COLOURS",
    "ImageFile",
    "batch_quadrant",
    "best_features",
    "density_histogram",
    "dotplot",
    "edge_graph",
    "effect_bars",
    "gene_bars",
    "gene_features",
    "geneset_bars",
    "input_bars",
    "probe_lines",
    "steering_all",
    "steering_bars",
    "steering_curve",
    "steering_distances",
    "steering_head",
    "steering_map",
    "steering_pareto",
    "umap",
    "violin",
]
