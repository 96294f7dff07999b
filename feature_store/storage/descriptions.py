"""What the tables of a store hold, in words: what a row is, which cells its figures are of, and each column with its
unit.

`schemas` says which columns a table has, and this module what they mean. `scsae describe TABLE` prints it, and the page
of all tables is made of it. A column that several tables have is described once, in SHARED.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Column(NamedTuple):
    """What a column holds, and its unit; an empty unit is that of names, ids and figures without one."""

    text: str
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class TableDescription:
    """What a table holds.

    Attributes:
        row: what a row is.
        measured_on: the cells and splits that its figures are of.
        columns: its columns that SHARED does not describe, or describes otherwise.
    """

    row: str
    measured_on: str
    columns: Mapping[str, Column] = field(default_factory=dict)

    def column(self, name: str) -> Column | None:
        """What a column holds; None for one that is not described, such as a column of obs."""
        return self.columns.get(name) or SHARED.get(name)


_CELLS, _GENES, _FEATURES, _TOKENS, _DONORS = "cells", "genes", "features", "tokens", "donors"
_CODE, _SHARE, _CORRELATION, _P = "unit of the code", "share, 0 to 1", "correlation, -1 to 1", "probability"
_HEAD = "unit of the model's head"
_SD = "standard deviations of the null"

SHARED: Mapping[str, Column] = {
    "feature_id": Column("the feature, a unit of the SAE; counted from 0"),
    "cell_idx": Column("the cell: its place in the data set, counted from 0"),
    "gene_idx": Column("the gene: its place in the data set, counted from 0"),
    "gene_id": Column("the gene: its id in the model's vocabulary"),
    "gene": Column("the symbol of the gene"),
    "token_pos": Column("the place of the token in the input of the cell, counted from 0"),
    "split": Column("the cells that the row is of: train, select or test"),
    "value": Column("the code: how strongly the feature fires", _CODE),
    "x": Column("first coordinate on the map, which has no unit"),
    "y": Column("second coordinate on the map, which has no unit"),
    "n": Column("cells of the split whose value is known", _CELLS),
    "n_cells": Column("cells that the figures are of", _CELLS),
    "n_donors": Column("donors (without donors batches) that the figures are of", _DONORS),
    "n_agree": Column("donors in which the effect has the sign of that of all cells", _DONORS),
    "n_features": Column("features", _FEATURES),
    "p": Column("p-value of the row's test", _P),
    "p_donor": Column("p-value of the test that takes whole donors as a sample", _P),
    "q": Column("p-value adjusted by Benjamini and Hochberg over all tests of one question and split", _P),
    "z": Column("distance of the figure from the mean of its null", _SD),
    "low": Column("lower end of the 95 % interval", "unit of the figure"),
    "high": Column("upper end of the 95 % interval", "unit of the figure"),
    "null": Column("which null the p is of: the one with the larger p"),
    "null_mean": Column("mean of the null", "unit of the figure"),
    "null_sd": Column("standard deviation of the null", "unit of the figure"),
    "p_random": Column("p-value beside random directions", _P),
    "p_mixture": Column("p-value beside mixtures of other features", _P),
    "method": Column("the test, with its options and version"),
    "run": Column("the run that the row is of"),
    "collection": Column("the collection of gene sets: the stem of the name of its GMT file"),
    "gene_set": Column("the gene set"),
    "label_kind": Column("the kind of the label: cell_type, batch or another obs column"),
    "label": Column("the label, for example one cell type"),
    "dead": Column("whether the feature never fires"),
    "rank_biserial": Column("2 AUROC - 1: above 0 where the feature is larger in the label's cells", _CORRELATION),
    "density": Column("share of the tokens at which the feature fires", _SHARE),
    "module": Column("the number of the module, counted from 0"),
    "top_genes": Column("the genes whose expression goes most with the feature, confirmed on test cells"),
}
"""Columns that mean the same in every table that does not describe them itself."""

_GENE_CHOICE = {
    "rank": Column("median of the gene's ranks over the batches in which it is among the first; null for a list"),
    "n_batches": Column("batches in which the gene is among the first", "batches"),
    "variance": Column("standardised variance of the counts, mean over batches", "variance of the expected one"),
}
_MODULE_SET = {
    "n_features": Column("features of the module that go with the gene set", _FEATURES),
    "n_known": Column("features of the module that fire and have associations", _FEATURES),
    "n_with_set": Column("all features that go with the gene set", _FEATURES),
    "n_all": Column("all features that fire and have associations", _FEATURES),
    "p": Column("hypergeometric p-value of n_features", _P),
}
DESCRIPTIONS: Mapping[str, TableDescription] = {
    "cells": TableDescription(
        row="one cell of the data set",
        measured_on="all cells; the obs columns of the data follow the columns that are listed",
        columns={
            "cell_id": Column("the name of the cell in the data"),
            "dataset": Column("the data set"),
            "split": Column("the split of the cell: train, select or test"),
            "panel": Column("whether the cell is of the panel, which gets everything"),
            "donor": Column("the donor, if a column was named"),
            "batch": Column("the batch, if a column was named"),
            "cell_type": Column("the cell type, if a column was named"),
        },
    ),
    "genes": TableDescription(
        row="one gene of the data set",
        measured_on="all cells",
        columns={
            "symbol": Column("the symbol of the gene"),
            "ensembl_id": Column("its Ensembl id, if the data have one"),
            "n_cells": Column("cells with a value above 0", _CELLS),
            "mean": Column("mean over all cells", "unit of the matrix that was read"),
        },
    ),
    "digests": TableDescription(
        row="one cell, recognised by its counts",
        measured_on="all cells",
        columns={
            "n_detected": Column("genes with a value", _GENES),
            "symbol_digest": Column("hash of the counts by symbol"),
            "ensembl_digest": Column("hash of the counts by Ensembl id"),
        },
    ),
    "codes": TableDescription(
        row="one code that is not 0, by cell and then by feature", measured_on="all splits; cells of the panel"
    ),
    "compact_codes": TableDescription(
        row="one of the largest codes of a cell, by cell and then by feature",
        measured_on="all splits; cells outside the panel",
    ),
    "umap": TableDescription(row="one cell of the map of cells", measured_on="all splits; cells of the panel"),
    "feature_umap": TableDescription(
        row="one feature of the map of decoder rows", measured_on="no cells: the directions of the SAE"
    ),
    "profile_umap": TableDescription(
        row="one living feature of the map by associations with labels", measured_on="select cells of the panel"
    ),
    "feature_neighbour": TableDescription(
        row="one of the nearest features of a feature",
        measured_on="no cells: the directions of the SAE",
        columns={
            "rank": Column("place among the nearest; 1 is the nearest"),
            "other_feature_id": Column("the near feature"),
            "cosine": Column("cosine of the two decoder rows", _CORRELATION),
        },
    ),
    "sample": TableDescription(row="one cell of a sample of a data set", measured_on="the cells of the sample"),
    "variable_genes": TableDescription(
        row="one of the most variable genes, the first one first", measured_on="train cells", columns=_GENE_CHOICE
    ),
    "chosen_genes": TableDescription(
        row="one gene that may be a token of the model",
        measured_on="train cells",
        columns={
            "token": Column("its name in the model's vocabulary"),
            "symbol": Column("its symbol in the data"),
            "ensembl_id": Column("its Ensembl id in the data"),
            **_GENE_CHOICE,
        },
    ),
    "cell_tokens": TableDescription(
        row="one cell that has tokens; a cell without any is in no statistic",
        measured_on="all cells",
        columns={"n_tokens": Column("tokens of the cell", _TOKENS)},
    ),
    "feature_firing": TableDescription(
        row="one feature and split in which it fires",
        measured_on="all cells of the split, also those outside the panel",
        columns={
            "n_cells": Column("cells in which it fires", _CELLS),
            "n_tokens": Column("tokens at which it fires", _TOKENS),
            "max": Column("its largest value", _CODE),
        },
    ),
    "feature_cell": TableDescription(
        row="one of the cells with the largest codes of a feature, the largest first",
        measured_on="all cells and splits, also those outside the panel",
    ),
    "token_top": TableDescription(
        row="one of the tokens at which a feature fires most", measured_on="all cells and splits"
    ),
    "top_cell_token": TableDescription(
        row="one token of the cell in which a feature fires most, in the order of the model's input",
        measured_on="that cell, of all cells and splits; the code is 0 at tokens on which the feature does not fire",
    ),
    "token_feature_gene": TableDescription(
        row="one feature, split and gene at whose tokens it fires",
        measured_on="cells of the panel",
        columns={
            "split": Column("the place of the split among train, select, test"),
            "n_tokens": Column("tokens of the gene at which the feature fires", _TOKENS),
        },
    ),
    "token_gene": TableDescription(
        row="one split and gene, whether or not a feature fires",
        measured_on="cells of the panel",
        columns={
            "split": Column("the place of the split among train, select, test"),
            "n_tokens": Column("tokens of the gene", _TOKENS),
        },
    ),
    "features": TableDescription(
        row="one feature of the SAE",
        measured_on="cells of the panel; each column says of which splits, and names are confirmed on test cells",
        columns={
            "density": Column("share of the tokens at which it fires; all splits", _SHARE),
            "cell_density": Column("share of the cells in which it fires; all splits", _SHARE),
            "mean": Column("mean code over train cells", _CODE),
            "max": Column("largest code in train cells", _CODE),
            "p99": Column("99th percentile of its codes above 0 in train cells", _CODE),
            "class": Column("what it follows: gene-identity, cell-context, batch, mixed or dead"),
            "class_confidence": Column("share of resamples of donors with the same class; no test cells", _SHARE),
            "gene_precision": Column("share of its firing on its most frequent gene; no test cells", _SHARE),
            "gene_effect": Column("share of its firing that the gene of the token explains; no test cells", _SHARE),
            "context_effect": Column(
                "share of the code's rank variance that a label explains inside batches; no test cells", _SHARE
            ),
            "batch_effect": Column(
                "share of the code's rank variance that the batch explains inside types; no test cells", _SHARE
            ),
            "context_kind": Column("the kind of label behind context_effect, confirmed on test cells"),
            "top_identity_genes": Column("the genes on whose tokens it fires most, confirmed on test cells"),
            "top_label": Column("the label that it goes with best on select cells, confirmed on test cells"),
            "top_label_kind": Column("the kind of top_label"),
            "top_label_auroc": Column("AUROC of top_label on test cells", _SHARE),
            "top_label_auroc_select": Column("AUROC of top_label on select cells", _SHARE),
        },
    ),
    "feature_label": TableDescription(
        row="one feature, label and split",
        measured_on="cells of the panel of the split; of a batch inside cell types",
        columns={
            "auroc": Column("chance that the code is larger in a cell of the label than in another", _SHARE),
            "f1": Column("F1 of `code > threshold`", _SHARE),
            "mcc": Column("Matthews correlation of `code > threshold`", _CORRELATION),
            "ami": Column("adjusted mutual information of label and firing above a share of the maximum", "at most 1"),
            "threshold": Column("the threshold on the code that is best on select cells", _CODE),
            "n_label": Column("cells of the label", _CELLS),
            "low": Column("lower end of the 95 % interval of rank_biserial over donors", _CORRELATION),
            "high": Column("upper end of the 95 % interval of rank_biserial over donors", _CORRELATION),
            "p": Column("p-value of the permutation of labels inside donors, or of donors, or inside types", _P),
            "p_max": Column("family-wise p-value: would the best of all features look as good by chance?", _P),
        },
    ),
    "feature_number": TableDescription(
        row="one feature, number of the cells and split",
        measured_on="cells of the panel of the split",
        columns={
            "number": Column("the obs column of numbers, such as pct_mito"),
            "spearman": Column("rank correlation with the code inside donors", _CORRELATION),
            "spearman_all": Column("rank correlation with the code over all cells", _CORRELATION),
            "low": Column("lower end of the 95 % interval of spearman over donors", _CORRELATION),
            "high": Column("upper end of the 95 % interval of spearman over donors", _CORRELATION),
        },
    ),
    "feature_gene": TableDescription(
        row="one feature, gene and split, of the pairs that are significant or among the best",
        measured_on="cells of the panel of the split; expression is log1p of counts per 10,000",
        columns={
            "identity_precision": Column("share of the feature's firing that is on tokens of the gene", _SHARE),
            "identity_recall": Column("share of the gene's tokens at which the feature fires", _SHARE),
            "lift": Column("identity_precision over the gene's share of all tokens", "ratio"),
            "pearson": Column("Pearson's correlation of code and expression", _CORRELATION),
            "pearson_within_type": Column("the same inside cell types", _CORRELATION),
            "spearman": Column("Spearman's correlation of code and expression", _CORRELATION),
            "nnz": Column("cells in which code and expression are both above 0", _CELLS),
            "p": Column("p-value of the rank correlation, permuted inside donors", _P),
        },
    ),
    "feature_geneset": TableDescription(
        row="one feature, gene set and split, where they overlap or where ranks stand out",
        measured_on="cells of the panel of the split; the background is the genes that any cell expresses",
        columns={
            "n": Column("genes of the background", _GENES),
            "overlap": Column("genes of the feature that are in the set", _GENES),
            "n_set": Column("genes of the set in the background", _GENES),
            "n_genes": Column("genes of the feature", _GENES),
            "odds_ratio": Column("odds ratio of the overlap, with 1/2 added to every count", "ratio"),
            "rank_biserial": Column("how far the set's genes are above the others by association", _CORRELATION),
            "p": Column("p-value of the overlap (hypergeometric)", _P),
            "p_matched": Column("p-value of the overlap beside genes of the same detection rates", _P),
            "p_rank": Column("p-value of the ranks of the set's genes", _P),
            "q_matched": Column("p_matched adjusted as q is", _P),
            "q_rank": Column("p_rank adjusted as q is", _P),
        },
    ),
    "gene_sets": TableDescription(
        row="one gene set that features were tested against",
        measured_on="no cells",
        columns={
            "description": Column("the description in the GMT file"),
            "n_genes": Column("genes of the set", _GENES),
            "n_shared": Column("those of them that the data have", _GENES),
            "genes": Column("the symbols of the genes"),
        },
    ),
    "feature_token": TableDescription(
        row="one of the tokens at which a feature fires most", measured_on="all cells and splits"
    ),
    "feature_effect": TableDescription(
        row="one feature, intervention and gene whose hidden value the model predicts",
        measured_on="cells of the split in which the feature fires",
        columns={
            "intervention": Column("what was done with the feature: ablate or boost"),
            "effect": Column("change of the predicted value", _HEAD),
            "direct": Column("the part of the effect that goes past all later blocks", _HEAD),
            "null_mean": Column("mean of the null", _HEAD),
            "null_sd": Column("standard deviation of the null", _HEAD),
            "q": Column("p adjusted by Benjamini and Hochberg over all pairs of the run", _P),
        },
    ),
    "feature_effect_summary": TableDescription(
        row="one feature and intervention",
        measured_on="the cells of feature_effect",
        columns={
            "intervention": Column("what was done with the feature: ablate or boost"),
            "n_genes": Column("genes that were tested", _GENES),
            "n_up": Column("genes predicted higher at q <= .05", _GENES),
            "n_down": Column("genes predicted lower at q <= .05", _GENES),
            "strength": Column("root mean square of the effect over genes", _HEAD),
            "strength_ratio": Column("strength over that of the stronger null", "ratio"),
            "specificity": Column(
                "mean size of the effect on the feature's own genes over that on genes of as many cells", "ratio"
            ),
            "specificity_null": Column("the same of the stronger null", "ratio"),
            "direct_spearman": Column("rank correlation of direct and effect over genes", _CORRELATION),
        },
    ),
    "feature_edge": TableDescription(
        row="one pair of a feature of an earlier SAE and one of a later SAE: the significant pairs, and those of the "
        "smallest p of each earlier feature",
        measured_on="cells of the split in which the earlier feature fires",
        columns={
            "from_sae": Column("the earlier SAE"),
            "from_feature_id": Column("the feature that is ablated"),
            "to_sae": Column("the later SAE"),
            "to_feature_id": Column("the feature that is read"),
            "relation": Column("excites: ablating the earlier feature lowers the later one; inhibits: it raises it"),
            "effect": Column("change of the later feature's mean code when the earlier one is ablated", _CODE),
            "share": Column("effect over the later feature's mean code", "share"),
            "null_mean": Column("mean of the null", _CODE),
            "null_sd": Column("standard deviation of the null", _CODE),
            "q": Column("p adjusted by Benjamini and Hochberg over all pairs of the run", _P),
            "n_cells": Column("cells of the earlier feature", _CELLS),
            "n_cells_fired": Column("those of them in which the later feature fires", _CELLS),
        },
    ),
    "edge_module": TableDescription(
        row="one feature of a module of edges",
        measured_on="the edges of feature_edge",
        columns={
            "sae": Column("the SAE of the feature"),
            "n_features": Column("features of the module", _FEATURES),
            "n_edges": Column("edges of the feature inside the module", "edges"),
        },
    ),
    "edge_module_gene_set": TableDescription(
        row="one module of edges and gene set that a feature of it goes with",
        measured_on="the associations of its features on test cells",
        columns=_MODULE_SET,
    ),
    "module_gene_set": TableDescription(
        row="one module and gene set that a feature of it goes with",
        measured_on="the associations of its features on test cells",
        columns=_MODULE_SET,
    ),
    "feature_module": TableDescription(
        row="one feature of a module of features that fire together",
        measured_on="train and select cells of the panel",
        columns={
            "n_features": Column("features of the module", _FEATURES),
            "r": Column("mean partial correlation with the other features of the module", _CORRELATION),
        },
    ),
    "module": TableDescription(
        row="one module, and one module that shuffled codes give",
        measured_on="r of train and select cells; r_test, the null, p and q of test cells; of the panel",
        columns={
            "control": Column("`shuffled codes` of a module of those, else null"),
            "n_features": Column("features of the module", _FEATURES),
            "stability": Column("how often pairs of it are together in resamples of half of the donors", _SHARE),
            "r": Column("mean partial correlation of its pairs on train and select cells", _CORRELATION),
            "r_test": Column("the same on test cells", _CORRELATION),
            "null_mean": Column("mean r_test of features that fire as often", _CORRELATION),
            "null_sd": Column("its standard deviation", _CORRELATION),
        },
    ),
    "feature_input": TableDescription(
        row="one feature, gene and path: what leaving the gene's token out takes from S, the sum of the feature's code "
        "over the gene tokens of a cell",
        measured_on="cells of the split that have the gene and the feature",
        columns={
            "path": Column("`own token`, the code that goes with the token, or `other tokens`, the fall of the rest"),
            "change": Column("change of S, mean over cells", _CODE),
            "share": Column("change over the mean of S in the same cells", "share"),
            "gradient": Column("gradient times input", _CODE),
            "null_mean": Column("mean share of the null", "share"),
            "null_sd": Column("standard deviation of the share of the null", "share"),
            "q": Column("p adjusted by Benjamini and Hochberg over all rows of the path", _P),
        },
    ),
    "feature_input_summary": TableDescription(
        row="one feature",
        measured_on="the cells of feature_input",
        columns={
            "n_genes": Column("genes that were tested", _GENES),
            "n_nulls": Column("null genes that were drawn", _GENES),
            "n_own": Column("genes at q <= .05 by their own token", _GENES),
            "n_other": Column("genes at q <= .05 by the other tokens", _GENES),
            "share_own": Column("share of S that the tested genes take by their own tokens", "share"),
            "share_other": Column("share of S that they take by the other tokens", "share"),
            "gradient_spearman": Column(
                "rank correlation over genes of gradient and the change by both paths", _CORRELATION
            ),
            "top_gene": Column("the gene at q <= .05 that takes most"),
        },
    ),
    "feature_probe": TableDescription(
        row="one feature of a probe of a label with k features",
        measured_on="gain of test cells; the order and the weights of train cells, the penalty of select cells",
        columns={
            "representation": Column("what the features are of: an SAE, a baseline, genes, or permuted labels"),
            "k": Column("features of the probe", _FEATURES),
            "rank": Column("the place in which the feature enters, counted from 1"),
            "feature_id": Column("the feature; of genes the gene_idx"),
            "name": Column("the gene, where the feature is one"),
            "weight": Column("its weight", "logits per standard deviation of the feature"),
            "gain": Column("AUROC of the first `rank` features less that of those before", "AUROC"),
        },
    ),
    "probe_score": TableDescription(
        row="one representation, label and k; and one without label for all labels of the kind together",
        measured_on="test cells; intervals are over donors",
        columns={
            "representation": Column("what the features are of: an SAE, a baseline, genes, or permuted labels"),
            "k": Column("features of each probe at most", _FEATURES),
            "n_features": Column("features of all probes together", _FEATURES),
            "auroc": Column("AUROC", _SHARE),
            "auroc_low": Column("lower end of its 95 % interval", _SHARE),
            "auroc_high": Column("upper end of its 95 % interval", _SHARE),
            "balanced_accuracy": Column("balanced accuracy; of all labels by the largest logit", _SHARE),
            "balanced_accuracy_low": Column("lower end of its 95 % interval", _SHARE),
            "balanced_accuracy_high": Column("upper end of its 95 % interval", _SHARE),
            "macro_f1": Column("macro-F1 of all labels by the largest logit", _SHARE),
            "macro_f1_low": Column("lower end of its 95 % interval", _SHARE),
            "macro_f1_high": Column("upper end of its 95 % interval", _SHARE),
            "ridge": Column("the ridge penalty with the smallest log loss on select cells"),
            "n": Column("test cells of the label", _CELLS),
            "n_cells": Column("test cells", _CELLS),
        },
    ),
    "feature_match": TableDescription(
        row="one feature and its nearest one in another SAE",
        measured_on="similarity of the directions, or of codes of select cells; similarity_test of test cells",
        columns={
            "sae": Column("the SAE of the feature"),
            "other": Column("the SAE that it is matched with"),
            "other_feature_id": Column("the nearest feature there"),
            "similarity": Column("cosine of the directions, or correlation of the codes on select cells", _CORRELATION),
            "similarity_test": Column("correlation of the codes on test cells; null by directions", _CORRELATION),
            "runner_up": Column("similarity of the second nearest", _CORRELATION),
            "rank": Column("place among the features of its own SAE by similarity, counted from 1"),
            "mutual": Column("whether each is the other's nearest"),
            "null_median": Column("median of the largest similarities by chance", _CORRELATION),
            "null_95": Column("95 % quantile of the largest similarities by chance", _CORRELATION),
            "random_median": Column("median of the nearest of uniform random directions", _CORRELATION),
            "method": Column("cosine, pearson or spearman"),
        },
    ),
    "comparison": TableDescription(
        row="one target, statistic and representation, for its one best feature",
        measured_on="the feature is chosen on select cells and reported on test cells",
        columns={
            "target_kind": Column("the kind of label, or gene"),
            "target": Column("the label or gene"),
            "statistic": Column("auroc of labels; pearson and identity_f1 of genes"),
            "representation": Column("the SAE, or one of its baselines"),
            "feature_id": Column("the best feature; null where it is not significant on test cells"),
            "select": Column("the statistic on select cells", "unit of the statistic"),
            "test": Column("the statistic on test cells", "unit of the statistic"),
            "f1": Column("F1 on test cells", _SHARE),
            "best": Column("whether it is the baseline that the headline compares with"),
            "excess": Column("test value of the SAE less that of the baseline", "unit of the statistic"),
            "low": Column("lower end of the 95 % interval of the excess over donors", "unit of the statistic"),
            "high": Column("upper end of the 95 % interval of the excess over donors", "unit of the statistic"),
            "n_units": Column("donors that have enough cells of both sides", _DONORS),
            "n_better": Column("those of them in which the SAE is better", _DONORS),
        },
    ),
    "representation": TableDescription(
        row="one representation: the SAE, or one of its baselines",
        measured_on="names by select cells, confirmed on test cells; l0, fvu and recovery of select cells",
        columns={
            "representation": Column("the SAE, or one of its baselines"),
            "run": Column("its associations"),
            "n_dead": Column("features that never fire", _FEATURES),
            "l0": Column("features that fire at a token, mean", _FEATURES),
            "fvu": Column("fraction of variance unexplained", _SHARE),
            "recovery": Column("embedding recovered from the reconstruction", "at most 1"),
            "n_label": Column(
                "features that mark a label: |rank_biserial| above .5 and q <= .05 on test cells", _FEATURES
            ),
            "n_batch": Column("features that mark a batch, by the same rule", _FEATURES),
            "n_gene_set": Column("features that go with a gene set at q <= .05 on test cells", _FEATURES),
            "class_gene_identity": Column("features of the class gene-identity", _FEATURES),
            "class_cell_context": Column("features of the class cell-context", _FEATURES),
            "class_batch": Column("features of the class batch", _FEATURES),
            "class_mixed": Column("features of the class mixed", _FEATURES),
            "class_dead": Column("features of the class dead", _FEATURES),
        },
    ),
    "steering": TableDescription(
        row="one split, condition, point of the grid, metric and group",
        measured_on="the cells of the split; choices are made on select cells, results are of test cells",
        columns={
            "condition": Column("what was done: the edit, a null, a baseline"),
            "role": Column("the part that the condition has; docs/steering-metrics.md says what each means"),
            "intervention": Column("ablate, clamp, add, scale, toward or shift"),
            "n_features": Column("features that were edited", _FEATURES),
            "dose": Column("dose of the edit", "that of the intervention"),
            "metric": Column("the metric; docs/steering-metrics.md says what each means"),
            "group": Column("`all`, or one label"),
            "n_draws": Column("draws of the null, 1 of other conditions; of role trend the donors", "draws"),
            "value": Column("value of the metric", "unit of the metric"),
            "effect": Column("value less that of unsteered cells", "unit of the metric"),
            "low": Column("lower end of the 95 % interval of the effect", "unit of the metric"),
            "high": Column("upper end of the 95 % interval of the effect", "unit of the metric"),
            "p_random_features": Column("share of the draws of random features that are as good", _P),
            "p_random_direction": Column("share of the draws of random directions that are as good", _P),
            "p_shuffled_labels": Column("share of the draws of shuffled labels that are as good", _P),
            "chosen": Column("whether the point was chosen on select cells"),
        },
    ),
    "steering_variants": TableDescription(
        row="one way in which test cells were run",
        measured_on="test cells",
        columns={
            "variant": Column("the number of the variant; 0 is unsteered"),
            "name": Column("what was done"),
            "role": Column("the part that the variant has"),
            "null": Column("the null of which the variant is a draw"),
            "intervention": Column("ablate, clamp, add, scale, toward or shift"),
            "n_features": Column("features that were edited", _FEATURES),
            "dose": Column("dose of the edit", "that of the intervention"),
            "mode": Column("delta: the change is added to the activation; replace: the reconstruction takes its place"),
            "draw": Column("the draw of the null, counted from 0"),
            "features": Column("the features, best first"),
            "chosen": Column("whether the point was chosen on select cells"),
            "direction_seed": Column("seed of the direction of a random direction"),
            "references": Column("the part of the group means that the edit uses"),
        },
    ),
    "steering_scores": TableDescription(
        row="one living feature, best first",
        measured_on="select cells",
        columns={
            "score": Column("how well it tells the labels", "unit of the code; of an edit rank-biserial"),
            "rank": Column("place by the score, counted from 1"),
            "n_units": Column(
                "what the score is the mean over: of a move pairs of donor and cell type with cells of both labels "
                "(else cell types, else 1), of a mix cell types; of an edit n_donors of feature_label",
                "units",
            ),
            "n_agree": Column("those of them with the sign of the score", "units"),
        },
    ),
    "steering_head": TableDescription(
        row="one condition, draw and gene whose masked value the model predicts",
        measured_on="test cells",
        columns={
            "condition": Column("what was done: the edit, a null, a baseline"),
            "draw": Column("the draw of the null, counted from 0"),
            "n_cells": Column("cells in which the gene was masked", _CELLS),
            "change": Column("mean prediction less that in the same cells unsteered", _HEAD),
            "difference": Column("true mean in the cells steered to, less that in the cells steered", _HEAD),
        },
    ),
    "steering_map": TableDescription(
        row="one variant and test cell of the map",
        measured_on="test cells",
        columns={
            "variant": Column("the variant, as in steering_variants"),
            "pc1": Column("first principal component of the unsteered embeddings", "unit of the embedding"),
            "pc2": Column("second principal component of the unsteered embeddings", "unit of the embedding"),
            "gap": Column("distance to the nearest unsteered cell", "median distance of unsteered neighbours"),
        },
    ),
}
"""Every table of `schemas.TABLES`."""
