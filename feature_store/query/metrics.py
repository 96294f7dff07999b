"""The registry of metrics: every figure that a training or a steering run writes, and which way it is good.

This is the only module that says whether more of a metric is better. The tests of steering, the promotion of a model
version, the plots and the atlas all ask `metric_of`, so that they cannot disagree. Names are those of the stored
tables, of `summary.json` and of MLflow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

_KNN = "5 nearest neighbours among unsteered `train` cells"
_MIXING = "pipelines.steering.metrics.mixing"
_DISTANCES = "pipelines.steering.metrics.distances"
_SCIB = "scIB, Luecken et al. 2022, doi:10.1038/s41592-021-01336-8"
_TRAINING = "sae_core.sae.trainer"
_SAE_METRICS = "sae_core.sae.metrics"
_LOSS_RECOVERED = "pipelines.loss_recovered"
_PAGE = "Page 1963, doi:10.1080/01621459.1963.10500843"
_MAY_BE_WANTED = "an edit that strengthens the features of a label may be meant to change the other cells as well"


class Direction(StrEnum):
    """Which values of a metric are good."""

    HIGHER = "higher"
    LOWER = "lower"
    AS_INTENDED = "as intended"
    """Higher where the intervention strengthens the features, lower where it weakens them: see `under`."""
    NEITHER = "neither"

    def under(self, intervention: str | None, dose: float | None) -> "Direction":
        """The direction under one intervention, which decides `AS_INTENDED`; the others stay as they are."""
        if self is not Direction.AS_INTENDED:
            return self
        above = STRENGTHENS_ABOVE.get(intervention or "")
        strengthens = above is not None and dose is not None and dose > above
        return Direction.HIGHER if strengthens else Direction.LOWER


STRENGTHENS_ABOVE: Mapping[str, float | None] = {"ablate": None, "scale": 1.0, "clamp": 0.0, "add": 0.0}
"""Intervention: the dose above which it makes a feature stronger; None where it never does."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What one figure means.

    Attributes:
        name: as it is stored.
        description: in words, for plots and the atlas.
        direction: which values are good.
        source: the module, formula or paper that defines it.
        low, high: the values that it can take; None where there is no bound.
        unit: of the value; "" for a number without one.
        reason: why the direction is what it is, where that is not plain.
    """

    name: str
    description: str
    direction: Direction
    source: str
    low: float | None = None
    high: float | None = None
    unit: str = ""
    reason: str = ""

    def gain(self, value: float) -> float | None:
        """The value with the sign that makes a larger one better; None where there is no better direction."""
        match self.direction:
            case Direction.HIGHER:
                return value
            case Direction.LOWER:
                return -value
            case _:
                return None

    @property
    def better(self) -> Literal["higher", "lower"] | None:
        """The direction as a word that fits before "is better"; None where it depends or there is none."""
        match self.direction:
            case Direction.HIGHER:
                return "higher"
            case Direction.LOWER:
                return "lower"
            case _:
                return None


def _distance(name: str, description: str, source: str) -> Metric:
    return Metric(
        name=name,
        description=description,
        direction=Direction.LOWER,
        source=source,
        low=0.0,
        unit="" if "remaining" in name else "the embedding's unit",
    )


def _share(name: str, description: str, direction: Direction, source: str, reason: str = "") -> Metric:
    return Metric(
        name=name, description=description, direction=direction, source=source, low=0.0, high=1.0, reason=reason
    )


def _scib(name: str, description: str, *, low: float | None = 0.0) -> Metric:
    return Metric(name=name, description=description, direction=Direction.HIGHER, source=_SCIB, low=low, high=1.0)


def _of_training(
    name: str,
    description: str,
    direction: Direction,
    source: str,
    *,
    low: float | None = 0.0,
    high: float | None = None,
    unit: str = "",
    reason: str = "",
) -> Metric:
    return Metric(
        name=name,
        description=description,
        direction=direction,
        source=source,
        low=low,
        high=high,
        unit=unit,
        reason=reason,
    )


_STEERING = (
    _distance("remaining", "share of the distance that remains", _DISTANCES),
    _distance("remaining_corrected", "share of the distance that remains, less sampling noise", _DISTANCES),
    _distance("energy_remaining", "share of the energy distance that remains", _DISTANCES),
    _distance("distance", "distance between the means", _DISTANCES),
    _distance("distance_corrected", "distance between the means, less sampling noise", _DISTANCES),
    _distance("energy_distance", "energy distance", "Székely & Rizzo 2013, doi:10.1016/j.jspi.2013.03.018"),
    Metric(
        name="distance_from_target",
        description="distance of the means from where the cells were",
        direction=Direction.NEITHER,
        source=_DISTANCES,
        low=0.0,
        unit="the embedding's unit",
        reason="a long way can lead to the other cells or elsewhere; `along` and `off_axis` tell them apart",
    ),
    Metric(
        name="along",
        description="share of the way gone toward the other cells",
        direction=Direction.HIGHER,
        source="pipelines.steering.metrics.type_preservation",
        reason="above 1 the cells went too far, which `remaining` shows",
    ),
    Metric(
        name="off_axis",
        description="movement beside the way to the other cells, as a share of it",
        direction=Direction.LOWER,
        source="pipelines.steering.metrics.type_preservation",
        low=0.0,
    ),
    _share("type_accuracy", "kNN accuracy of the steered cells' types", Direction.HIGHER, _KNN),
    _share("type_macro_f1", "kNN macro-F1 of the steered cells' types", Direction.HIGHER, _KNN),
    _share("type_changed", "share of steered cells whose type changed", Direction.LOWER, _KNN),
    _share(
        "target_votes",
        "share of target-type neighbours",
        Direction.AS_INTENDED,
        _KNN,
        "weakening the features of a label should take its cells away from it, strengthening them should bring cells "
        "to it; p is two-sided, because both are asked",
    ),
    _share("other_votes", "other cells' share of target-type neighbours", Direction.NEITHER, _KNN, _MAY_BE_WANTED),
    _share(
        "other_accuracy",
        "kNN accuracy of the other cells",
        Direction.HIGHER,
        _KNN,
        "editing the features of one label must leave the labels of the other cells as they are, so a fall is harm and "
        "never a success",
    ),
    Metric(
        name="target_shift",
        description="mean shift of the target cells' embedding",
        direction=Direction.NEITHER,
        source=_KNN,
        low=0.0,
        unit="RMS distance of the cells from their mean",
        reason="it says how far the cells moved and not whether they moved to where they should",
    ),
    Metric(
        name="other_shift",
        description="mean shift of the other cells' embedding",
        direction=Direction.NEITHER,
        source=_KNN,
        low=0.0,
        unit="RMS distance of the cells from their mean",
        reason=f"{_MAY_BE_WANTED}; whether the shift does harm is what `other_accuracy` says",
    ),
    _share("batch_mixing", "mixing of batches within types", Direction.HIGHER, _MIXING),
    _share("label_conservation", "conservation of labels", Direction.HIGHER, _MIXING),
    Metric(
        name="conservation_loss",
        description="share of the conservation of labels that is lost",
        direction=Direction.LOWER,
        source="1 - label_conservation / label_conservation of the unsteered cells",
        high=1.0,
    ),
    _share("lobo_accuracy", "leave-one-batch-out accuracy", Direction.HIGHER, _MIXING),
    _share("lobo_macro_f1", "leave-one-batch-out macro-F1", Direction.HIGHER, _MIXING),
    _scib("scib_batch", "scIB batch correction", low=None),
    _scib("scib_bio", "scIB bio-conservation", low=None),
    _scib("scib_total", "scIB total", low=None),
    _scib("scib_bras", "scIB BRAS, batches mixed within labels"),
    _scib("scib_ilisi", "scIB iLISI, batches among neighbours"),
    _scib("scib_kbet", "scIB kBET"),
    _scib("scib_graph_connectivity", "scIB graph connectivity"),
    _scib("scib_pcr_comparison", "scIB principal component regression"),
    _scib("scib_isolated_labels", "scIB isolated labels"),
    _scib("scib_nmi", "scIB k-means NMI"),
    _scib("scib_ari", "scIB k-means ARI", low=-1.0),
    _scib("scib_silhouette_label", "scIB silhouette of labels"),
    _scib("scib_clisi", "scIB cLISI, labels among neighbours"),
    _scib("scib_silhouette_batch", "scIB silhouette of batches"),
)
"""The metrics of the table `steering`, the most telling first."""

_DOSE_RESPONSE = tuple(
    Metric(
        name=f"{axis}_{name}",
        description=description.format(over),
        direction=Direction.NEITHER,
        source=_PAGE,
        low=low,
        high=1.0,
        reason=reason,
    )
    for axis, over in (("dose", "the dose"), ("n_features", "the number of features"))
    for name, description, low, reason in (
        ("spearman", "Spearman's correlation of the metric with {}", -1.0, "its good sign is that of the metric"),
        ("page_p", "p of Page's test that the metric follows {}", 0.0, "a p-value is evidence and not a quality"),
    )
)
"""Whether the headline metric of a steering run follows the dose and the number of features."""

_HELD_OUT = (
    _of_training(
        "test_fvu", "fraction of variance unexplained, test tokens", Direction.LOWER, _SAE_METRICS,
    ),
    _of_training(
        "select_fvu", "fraction of variance unexplained, select tokens", Direction.LOWER, _SAE_METRICS,
    ),
    _of_training(
        "select_l0", "active features a token, select tokens", Direction.NEITHER, _SAE_METRICS,
        reason="it is chosen by k or by the sparsity penalty, and the unexplained variance falls as it rises",
    ),
    _of_training(
        "select_dead_fraction", "share of features that never fire, select tokens", Direction.LOWER, _SAE_METRICS,
        high=1.0,
    ),
    _of_training("select_tokens", "select tokens measured", Direction.NEITHER, _SAE_METRICS, unit="tokens"),
    _of_training("theta", "mean threshold of the features", Direction.NEITHER, _TRAINING),
    _of_training("gamma", "scale of the normaliser", Direction.NEITHER, "sae_core.sae.normaliser"),
    _of_training(
        "select_recovery", "embedding recovered from the reconstruction, select cells", Direction.HIGHER,
        _LOSS_RECOVERED, low=None, high=1.0,
    ),
    _of_training(
        "select_recovery_loss", "pretraining loss recovered from the reconstruction, select cells", Direction.HIGHER,
        _LOSS_RECOVERED, low=None,
    ),
    _of_training("recovery_cells", "cells behind the recovery", Direction.NEITHER, _LOSS_RECOVERED, unit="cells"),
    _of_training(
        "select_loss_whole", "pretraining loss of the model as it is", Direction.NEITHER, _LOSS_RECOVERED, low=None,
        reason="it is a property of the foundation model",
    ),
    _of_training(
        "select_loss_x_hat", "pretraining loss with the reconstruction", Direction.LOWER, _LOSS_RECOVERED, low=None,
    ),
    _of_training(
        "select_loss_ablated", "pretraining loss without the activations", Direction.NEITHER, _LOSS_RECOVERED,
        low=None, reason="it is a property of the foundation model",
    ),
    _of_training("ica_iterations", "iterations of FastICA", Direction.NEITHER, "sae_core.sae.baselines"),
    _of_training("ica_change", "change in the last iteration of FastICA", Direction.LOWER, "sae_core.sae.baselines"),
)  # fmt: skip
"""Figures of a finished autoencoder or baseline, in `summary.json`."""

CURVES = (
    _of_training("loss", "training loss", Direction.LOWER, _TRAINING),
    _of_training("mse", "squared error a token, training", Direction.LOWER, _TRAINING),
    _of_training("aux", "AuxK loss, unweighted", Direction.LOWER, _TRAINING),
    _of_training(
        "sparsity", "sparsity loss, unweighted", Direction.NEITHER, _TRAINING,
        reason="it is traded against the squared error by its coefficient",
    ),
    _of_training(
        "l0", "active features a token, training", Direction.NEITHER, _TRAINING,
        reason="it is chosen by k or by the sparsity penalty, and the error falls as it rises",
    ),
    _of_training("n_dead", "features that have not fired for the dead window", Direction.LOWER, _TRAINING),
    _of_training("lr", "learning rate", Direction.NEITHER, _TRAINING),
)  # fmt: skip
"""Figures of a training step, in `history.json`."""

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (*_STEERING, *_DOSE_RESPONSE, *_HELD_OUT, *CURVES)}
"""Every metric by its name."""

HEADLINE_OF_TASK: Mapping[str, str] = {"move": "remaining", "mix": "batch_mixing", "edit": "target_votes"}
"""Steering task: the metric that answers it."""
HEADLINES = tuple(HEADLINE_OF_TASK.values())

COMPARED_BY = (
    *("remaining", "remaining_corrected", "energy_remaining", "scib_total", "batch_mixing", "label_conservation"),
    *("lobo_macro_f1", "lobo_accuracy", "scib_batch", "scib_bio", "target_votes", "other_accuracy"),
)
"""Metrics of a steering evaluation by which versions of a model are compared, the one that decides first."""
COMPARED_BY_TRAINING = ("test_fvu", "select_fvu")
"""Figures of the training by which versions are compared that have no steering evaluation in common."""


def metric_of(name: str) -> Metric:
    """The record of a metric; one that is not listed has no direction and is described by its name."""
    unlisted = Metric(name=name, description=name.replace("_", " "), direction=Direction.NEITHER, source="unknown")
    return METRICS.get(name, unlisted)
