"""Sparse autoencoders: from activations of a foundation model to sparse, readable features, and back.

The room takes activations as tensors [token d_model] and gives codes, reconstructions and saved autoencoders; it knows
nothing of cells, genes, data files or clusters. To train: `Normaliser.fit` -> `Trainer.step` for each batch ->
`Trainer.finish` -> `save_sae`. To use a trained autoencoder, the door is `load_sae` (`read_foreign` for those of other
libraries), followed by `SparseAutoencoder.encode` and `decode`. `fit_baseline` makes the dictionaries that a trained
one is compared with, and `evaluate` gives the metrics of both.
"""

from sae_core.sae.architectures import ARCHITECTURES
from sae_core.sae.autoencoder import SparseAutoencoder
from sae_core.sae.baselines import BASELINES, FittedBaseline, fit_baseline
from sae_core.sae.calibration import Calibration, calibrate_threshold, calibrated_theta
from sae_core.sae.checkpoint import SAEInfo, load_sae, load_training, read_info, save_sae, save_training
from sae_core.sae.codes import SparseCodes
from sae_core.sae.config import SAEConfig, TrainConfig
from sae_core.sae.dead_features import DeadFeatureRisk
from sae_core.sae.interop import (
    FOREIGN_FORMATS,
    ForeignFolder,
    ForeignSAE,
    Origin,
    find_foreign,
    read_dictionary_learning,
    read_foreign,
    read_saelens,
    read_sparsify,
    write_dictionary_learning,
    write_saelens,
    write_sparsify,
)
from sae_core.sae.metrics import MetricAccumulator, Metrics, evaluate
from sae_core.sae.normaliser import Normaliser
from sae_core.sae.reductions import ShardReduction, ShardStatistics
from sae_core.sae.sweep import Sweep
from sae_core.sae.synthetic import SyntheticDictionary, mean_max_cosine
from sae_core.sae.trainer import StepMetrics, Trainer, TrainerState

__all__ = [
    "ARCHITECTURES",
    "BASELINES",
    "FOREIGN_FORMATS",
    "Calibration",
    "DeadFeatureRisk",
    "FittedBaseline",
    "ForeignFolder",
    "ForeignSAE",
    "MetricAccumulator",
    "Metrics",
    "Normaliser",
    "Origin",
    "SAEConfig",
    "SAEInfo",
    "ShardReduction",
    "ShardStatistics",
    "SparseAutoencoder",
    "SparseCodes",
    "StepMetrics",
    "Sweep",
    "SyntheticDictionary",
    "TrainConfig",
    "Trainer",
    "TrainerState",
    "calibrate_threshold",
    "calibrated_theta",
    "evaluate",
    "find_foreign",
    "fit_baseline",
    "load_sae",
    "load_training",
    "mean_max_cosine",
    "read_dictionary_learning",
    "read_foreign",
    "read_info",
    "read_saelens",
    "read_sparsify",
    "save_sae",
    "save_training",
    "write_dictionary_learning",
    "write_saelens",
    "write_sparsify",
]
