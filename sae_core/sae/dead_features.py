"""Early warnings of a training: what is likely to end in a poor dictionary, said while it can still be stopped.

Two things predict dead features before the reconstruction shows them: a mean that is long against the spread (gamma,
arXiv 2605.31518), and a number of dead features that grows from one dead window to the next although AuxK pulls at
them.
"""

from typing import Literal, NamedTuple

HIGH_GAMMA = 10.0  # the mean is ten times as long as the spread
HIGH_DEAD_FRACTION = 0.02


class DeadFeatureRisk(NamedTuple):
    """Something to look at; training can go on."""

    kind: Literal["dead_growth", "high_gamma"]
    value: float
    """The share of dead features, or gamma."""
    message: str
    """What was found, why it matters, what to do."""


def dead_feature_risks(*, gamma: float, n_dead: int, n_dead_before: int, n_features: int) -> list[DeadFeatureRisk]:
    """Findings of a training with `n_dead` features dead now and `n_dead_before` of them one dead window ago."""
    findings = []
    dead = n_dead / n_features
    if dead > HIGH_DEAD_FRACTION and n_dead > n_dead_before:
        findings.append(
            DeadFeatureRisk(
                "dead_growth",
                dead,
                f"{n_dead} of {n_features} features ({100 * dead:.1f} %) have not fired for a dead window, up from "
                f"{n_dead_before} one window ago: lower the learning rate, take fewer features, or train on more "
                "tokens.",
            )
        )
    if gamma > HIGH_GAMMA:
        findings.append(
            DeadFeatureRisk(
                "high_gamma",
                gamma,
                f"the mean activation is {gamma:.1f} times as long as the spread around it, which predicts dead "
                "features: centring takes it away only if the normaliser saw what training sees, so fit it on a sample "
                "of the whole stream and watch n_dead.",
            )
        )
    return findings
