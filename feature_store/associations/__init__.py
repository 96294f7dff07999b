"""Feature associations: one file per statistic, one job that assembles the tables.

inputs       labels and replicate units as checked arrays
tokens       token counts by feature and gene
ranks        midranks that stay sparse
moments      additive sums -> correlations and permutation moments
pvalues      donor-aware tests, Benjamini-Hochberg
labels       feature x label: AUROC, rank-biserial;  thresholds: F1, MCC;  ami: adjusted mutual information
donors       do donors agree: p across donors and intervals;  familywise: p over all features of a label
batch        feature x batch within cell type
genes        feature x gene: identity by tokens, correlation with expression
enrichment   feature x gene set: over-representation and ranks
classes      gene-identity / cell-context / batch / mixed / dead
measure      all of these for a range of features
ranges       how features are cut into ranges, and what was measured of them on disk
assemble     the five tables
"""

from feature_store.associations.ami import adjusted_mutual_information, ami_by_threshold
from feature_store.associations.assemble import AssociationInputs, InMemory, assemble, assemble_measured
from feature_store.associations.batch import associate_batch
from feature_store.associations.classes import CLASSES, ClassConfig, classify
from feature_store.associations.enrichment import over_representation, rank_enrichment
from feature_store.associations.familywise import Replicates, family_wise, merge_minima
from feature_store.associations.genes import GeneTiles, associate_expression, identity
from feature_store.associations.inputs import Labels, Strata, as_csr
from feature_store.associations.labels import LabelRows, associate_labels, auroc
from feature_store.associations.measure import AssociationConfig, CellInputs, FeatureRange, Measured, measure
from feature_store.associations.moments import BlockMoments
from feature_store.associations.pvalues import benjamini_hochberg, blocked_rank_test, unit_test
from feature_store.associations.ranges import MeasuredRun, feature_ranges
from feature_store.associations.ranks import rank_scores
from feature_store.associations.thresholds import apply_thresholds, choose_thresholds
from feature_store.associations.tokens import TokenStatistics, token_statistics

__all__ = [
    "CLASSES",
    "AssociationConfig",
    "AssociationInputs",
    "BlockMoments",
    "CellInputs",
    "ClassConfig",
    "FeatureRange",
    "GeneTiles",
    "InMemory",
    "LabelRows",
    "Labels",
    "Measured",
    "MeasuredRun",
    "Replicates",
    "Strata",
    "TokenStatistics",
    "adjusted_mutual_information",
    "ami_by_threshold",
    "apply_thresholds",
    "as_csr",
    "assemble",
    "assemble_measured",
    "associate_batch",
    "associate_expression",
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
    "unit_test",
]
