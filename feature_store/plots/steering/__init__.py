"""Pictures of a steering run: its effect beside its nulls, along its doses, its gain against its cost, by cell type, by
cell, and by gene.

All figures are of `test` cells. Intervals are 95 %. The interval of a null is that of its mean over draws; nulls and
baselines stand at the point where they were measured. `steering_all` draws every picture of a run. `rows` chooses what
is drawn; each other module draws one or two pictures.
"""

from feature_store.plots.steering.all_plots import steering_all, steering_drawings
from feature_store.plots.steering.by_type import steering_distances
from feature_store.plots.steering.cell_map import steering_map
from feature_store.plots.steering.effects import steering_bars
from feature_store.plots.steering.gene_predictions import steering_head
from feature_store.plots.steering.grid import steering_curve, steering_pareto

__all__ = [
    "steering_all",
    "steering_bars",
    "steering_curve",
    "steering_distances",
    "steering_drawings",
    "steering_head",
    "steering_map",
    "steering_pareto",
]
