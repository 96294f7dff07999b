"""Probes: which few features of a representation tell the cells of a label from the others, and how well.

logistic  logistic regression with few features, and the order in which a lasso lets features in
by_label  probes of all labels of a kind, fitted on `train`, tuned on `select`, scored on `test` cells
scores    scores of probes, with intervals over donors
"""

from feature_store.probes.by_label import LEAST_CELLS, Probed, ProbedCells, probe
from feature_store.probes.logistic import Fit, entry_order, fit_ridge
from feature_store.probes.scores import Score, auroc, balanced_accuracy, jackknife, macro_f1, macro_recall

__all__ = [
    "LEAST_CELLS",
    "Fit",
    "Probed",
    "ProbedCells",
    "Score",
    "auroc",
    "balanced_accuracy",
    "entry_order",
    "fit_ridge",
    "jackknife",
    "macro_f1",
    "macro_recall",
    "probe",
]
