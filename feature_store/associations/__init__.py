"""What each feature goes with: labels, batches, genes and gene sets, and what an SAE has above its baselines.

The door is `measure`, which computes all statistics of a range of features, and `assemble_measured`, which makes the
tables of the store from the ranges that were measured (`pipelines.associate` runs both). Cells come from
`feature_store.cells` and codes from `feature_store.codes` as plain arrays; tables go to `feature_store.maps` and
`feature_store.query`, from which nothing is imported here.

Inputs
    inputs                 labels, replicate units and strata as checked arrays
    token_statistics       token counts by feature and gene
    gene_sets              GMT files
    range_inputs           what a range of features is measured from
    config                 the options that determine the tables
Statistics, each in a file of its own
    label_p_values         the p of a label: which test it gets
    rank_tests             the tests: permutation within donors, and of whole donors
    familywise             p_max: the p over all features of a label
    multiple_testing       q: Benjamini-Hochberg over all tests
    donor_agreement        p_donor and the interval over donors
    auroc                  AUROC of a label
    thresholds             F1 and MCC of a label
    mutual_information     adjusted mutual information of a label
    gene_identity          precision, recall and lift of a gene's tokens
    gene_correlation       Pearson and Spearman correlation with a gene's expression
    gene_set_enrichment    over-representation and rank test of a gene set
    number_statistics      Spearman correlation with a number of the cells
    classes                gene-identity / cell-context / batch / mixed / dead
    ranks, moments         midranks that stay sparse; sums that give correlations and permutation moments
Tables
    label_statistics, batch_statistics    all statistics of one kind of labels; of batches within cell types
    label_table, number_table, gene_table, gene_set_table, feature_table    the rows of a range, and the finished table
    claims                 what a feature may be named after
    held_out_units         whether the donors of the test cells allow a claim about other donors
    split_facts, top_names                what the rows of a split share; the names of the largest scores
    measure, ranges, assemble             all of it for one range; ranges on disk; the tables of the store
Between runs
    comparison             the excess of an SAE over its baselines
    matching               the same features in two SAEs
"""

from feature_store.associations.assemble import assemble_measured
from feature_store.associations.auroc import auroc
from feature_store.associations.batch_statistics import associate_batch
from feature_store.associations.classes import CLASSES, ClassConfig, classify
from feature_store.associations.config import AssociationConfig
from feature_store.associations.familywise import Replicates, family_wise, merge_minima
from feature_store.associations.gene_correlation import GeneTiles
from feature_store.associations.gene_identity import identity
from feature_store.associations.gene_set_enrichment import over_representation, rank_enrichment
from feature_store.associations.inputs import Labels, Numbers, Strata, as_csr
from feature_store.associations.label_statistics import LabelRows, associate_labels
from feature_store.associations.measure import measure
from feature_store.associations.moments import BlockMoments
from feature_store.associations.multiple_testing import benjamini_hochberg
from feature_store.associations.mutual_information import adjusted_mutual_information, ami_by_threshold
from feature_store.associations.range_inputs import CellInputs, FeatureRange
from feature_store.associations.ranges import Measured, MeasuredRun, feature_ranges
from feature_store.associations.rank_tests import blocked_rank_test
from feature_store.associations.ranks import rank_scores
from feature_store.associations.thresholds import apply_thresholds, choose_thresholds
from feature_store.associations.token_statistics import TokenStatistics, token_statistics

__all__ = [
    "CLASSES",
    "AssociationConfig",
    "BlockMoments",
    "CellInputs",
    "ClassConfig",
    "FeatureRange",
    "GeneTiles",
    "LabelRows",
    "Labels",
    "Measured",
    "MeasuredRun",
    "Numbers",
    "Replicates",
    "Strata",
    "TokenStatistics",
    "adjusted_mutual_information",
    "ami_by_threshold",
    "apply_thresholds",
    "as_csr",
    "assemble_measured",
    "associate_batch",
    "associate_labels",
    "auroc",
    "benjamini_hochberg",
    "blocked_rank_test",
    "choose_thresholds",
    "classify",
    "family_wise",
    "feature_ranges",
    "identity",
    "measure",
    "merge_minima",
    "over_representation",
    "rank_enrichment",
    "rank_scores",
    "token_statistics",
]
