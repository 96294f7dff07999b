"""Early signs during training that many features will die, reported while the run can still be stopped.

Two quantities predict dead features before the reconstruction suffers: gamma, the length of the mean activation
relative to the spread (arXiv 2605.31518), and a number of dead features that grows from one dead window to the next
although AuxK acts on them.
"""

from typing import Literal, NamedTuple

HIGH_GAMMA = 10.0  # length of the mean activation relative to the spread
HIGH_DEAD_FRACTION = 0.02


class DeadFeatureRisk(NamedTuple):
    """A sign that features will die; training can continue."""

    kind: Literal["dead_growth", "high_gamma"]
    value: float
    """The share of dead features (`dead_growth`) or gamma (`high_gamma`)."""
    message: str
    """What was found, why it matters and what to do."""


def dead_feature_risks(*, gamma: float, n_dead: int, n_dead_before: int, n_features: int) -> list[DeadFeatureRisk]:
    """The signs in a run with `n_dead` features dead now and `n_dead_before` features dead one dead window ago."""
    risks = []
    dead = n_dead / n_features
    if dead > HIGH_DEAD_FRACTION and n_dead > n_dead_before:
        risks.append(
            DeadFeatureRisk(
                "dead_growth",
                dead,
                f"{n_dead} of {n_features} features ({100 * dead:.1f} %) have not fired for a dead window; one window "
                f"ago it was {n_dead_before}. Lower the learning rate (lr), use fewer features (n_features), or train "
                "for more steps (n_steps).",
            )
        )
    if gamma > HIGH_GAMMA:
        risks.append(
            DeadFeatureRisk(
                "high_gamma",
                gamma,
                f"the mean activation is {gamma:.1f} times as long as the spread around it, which predicts dead "
                "features. Centring removes the mean only if the normaliser was fitted on the same data as training: "
                "fit it on a sample of the whole stream, and watch n_dead.",
            )
        )
    return risks
