"""The figures of a steering evaluation that versions are listed with and compared by, and which way each is better."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UPWARDS_BEYOND: Mapping[str, float | None] = {"ablate": None, "scale": 1.0, "clamp": 0.0, "add": 0.0}
"""Intervention: the dose above which it makes a feature stronger; None for never."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One figure; `higher_is_better` None: higher if the intervention makes the features stronger, else lower."""

    name: str
    about: str
    higher_is_better: bool | None

    def is_higher_better(self, params: Mapping[str, Any]) -> bool:
        """Which way is better in an evaluation with these parameters (intervention, chosen.dose)."""
        if self.higher_is_better is not None:
            return self.higher_is_better
        beyond = UPWARDS_BEYOND.get(str(params.get("intervention")))
        dose = params.get("chosen.dose", "None")
        return beyond is not None and dose != "None" and float(dose) > beyond


HEADLINES = {
    headline.name: headline
    for headline in (
        Headline(name="remaining", about="distance to the reference that is left", higher_is_better=False),
        Headline(name="remaining_corrected", about="the same without sampling noise", higher_is_better=False),
        Headline(name="energy_remaining", about="energy distance that is left", higher_is_better=False),
        Headline(name="scib_total", about="scIB, batches and labels together", higher_is_better=True),
        Headline(name="batch_mixing", about="neighbours from other batches", higher_is_better=True),
        Headline(name="label_conservation", about="neighbours of the same label", higher_is_better=True),
        Headline(name="lobo_macro_f1", about="macro-F1 of labels, leaving a batch out", higher_is_better=True),
        Headline(name="lobo_accuracy", about="accuracy of labels, leaving a batch out", higher_is_better=True),
        Headline(name="scib_batch", about="scIB, mixing of batches", higher_is_better=True),
        Headline(name="scib_bio", about="scIB, labels kept", higher_is_better=True),
        Headline(name="target_votes", about="votes for the target label", higher_is_better=None),
        Headline(name="other_accuracy", about="labels of the other cells kept", higher_is_better=True),
    )
}
"""Those that count, the one that decides first."""
FIT = {
    name: Headline(name=name, about=f"variance unexplained on {name[:-4]} tokens", higher_is_better=False)
    for name in ("test_fvu", "select_fvu")
}
"""Figures of the training that can stand in where versions have no evaluation in common."""
