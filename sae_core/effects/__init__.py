"""Effects: what a feature does to the model's prediction of hidden genes, beside what other directions would do.

Part of a cell's genes are hidden, the feature is ablated or boosted on the visible tokens where it fires, the blocks
after the site run, and the model's pretraining head predicts the hidden genes. The change of the prediction is the
feature's effect in that cell. The same steps along other directions, of the same length and on the same tokens, are the
null: random directions, and mixtures of the decoder rows of other features of like density.

cell_at_site   `CellAtSite`: one cell at a site, from which variants go on
hidden_genes   `HiddenGenes`: one cell with hidden genes, and the head's answer for any activations at the site
directions     `Directions`: the feature's own direction, and those of its nulls
by_gene        `EffectSums`: the effects of one feature, summed over cells by gene
later_codes    `LaterCodes`, `LaterSums`: the effects of one feature on those of a later autoencoder

The other way round, `scsae inputs` asks which genes of a cell drive a feature:

candidates     the genes that are left out of cells: those of largest gradient, and null genes like them
inputs         `CellInputs`: one cell, its gradients, and its features without each of its genes
"""

from sae_core.effects.by_gene import INTERVENTIONS, EffectSums, FeatureEffect, add_cell
from sae_core.effects.candidates import CellGenes, GeneMeans, InputGenes, choose_genes, sums_by_gene
from sae_core.effects.cell_at_site import CellAtSite
from sae_core.effects.directions import Directions, draw_directions
from sae_core.effects.hidden_genes import HiddenGenes
from sae_core.effects.inputs import CellInputs, FeatureInputs, InputSums, add_cell_inputs
from sae_core.effects.later_codes import LaterCodes, LaterEffect, LaterSums, add_later, check_order

__all__ = [
    "INTERVENTIONS",
    "CellAtSite",
    "CellGenes",
    "CellInputs",
    "Directions",
    "EffectSums",
    "FeatureEffect",
    "FeatureInputs",
    "GeneMeans",
    "HiddenGenes",
    "InputGenes",
    "InputSums",
    "LaterCodes",
    "LaterEffect",
    "LaterSums",
    "add_cell",
    "add_cell_inputs",
    "add_later",
    "check_order",
    "choose_genes",
    "draw_directions",
    "sums_by_gene",
]
