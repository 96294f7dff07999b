"""What steering is measured by, in words: one home for the plots and the atlas."""

from collections.abc import Mapping
from typing import Literal, NamedTuple


class SteeringMetric(NamedTuple):
    """A metric of the table `steering`: what it says, and the direction in which it is good (None: neither)."""

    words: str
    better: Literal["higher", "lower"] | None


METRICS: Mapping[str, SteeringMetric] = {
    "remaining": SteeringMetric("share of the distance that remains", "lower"),
    "remaining_corrected": SteeringMetric("share of the distance that remains, less sampling noise", "lower"),
    "energy_remaining": SteeringMetric("share of the energy distance that remains", "lower"),
    "distance": SteeringMetric("distance between the means", "lower"),
    "distance_corrected": SteeringMetric("distance between the means, less sampling noise", "lower"),
    "energy_distance": SteeringMetric("energy distance", "lower"),
    "distance_from_target": SteeringMetric("distance of the means from where the cells were", None),
    "along": SteeringMetric("share of the way gone toward the other cells", "higher"),
    "off_axis": SteeringMetric("movement off that way, as a share of it", "lower"),
    "type_accuracy": SteeringMetric("kNN accuracy of the steered cells' types", "higher"),
    "type_macro_f1": SteeringMetric("kNN macro-F1 of the steered cells' types", "higher"),
    "type_changed": SteeringMetric("share of steered cells whose type changed", "lower"),
    "target_votes": SteeringMetric("share of target-type neighbours", None),
    "other_votes": SteeringMetric("other cells' share of target-type neighbours", None),
    "other_accuracy": SteeringMetric("kNN accuracy of the other cells", None),
    "target_shift": SteeringMetric("mean shift of the target cells' embedding", None),
    "other_shift": SteeringMetric("mean shift of the other cells' embedding", None),
    "batch_mixing": SteeringMetric("mixing of batches within types", "higher"),
    "label_conservation": SteeringMetric("conservation of labels", "higher"),
    "conservation_loss": SteeringMetric("share of the conservation of labels that is lost", "lower"),
    "lobo_accuracy": SteeringMetric("leave-one-batch-out accuracy", "higher"),
    "lobo_macro_f1": SteeringMetric("leave-one-batch-out macro-F1", "higher"),
    "scib_batch": SteeringMetric("scIB batch correction", "higher"),
    "scib_bio": SteeringMetric("scIB bio-conservation", "higher"),
    "scib_total": SteeringMetric("scIB total", "higher"),
}
"""Metric: its words, the most telling first. Of scIB's single scores (`scib_NAME`) higher is better."""
HEADLINES = ("remaining", "batch_mixing", "target_votes")
"""The metric that answers each question: a move, a mixing, an edit."""


def metric_of(name: str) -> SteeringMetric:
    """What a metric says; one that is not listed by its name."""
    unlisted = SteeringMetric(name.replace("_", " "), "higher" if name.startswith("scib_") else None)
    return METRICS.get(name, unlisted)
