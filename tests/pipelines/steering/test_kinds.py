"""Which kind of edit is taken, and the doses that each kind has."""

from __future__ import annotations

import pytest

from pipelines.config import SteerOptions
from pipelines.steering.kinds import KINDS, KindOnSelect, best_kind, facts_of_choice, options_of, searches_kinds
from pipelines.steering.metrics.mixing import QuickMixing
from pipelines.steering.plan import InterventionType

MIX = SteerOptions(kind="batch", target="all", dose=(0.5, 1, 2))


def test_each_kind_has_the_doses_that_it_can_have():
    doses = {kind.value: options_of(MIX, kind).dose for kind in KINDS}
    assert doses == {"ablate": (1,), "scale": (0.5,), "toward": (0.5, 1, 2), "shift": (0.5, 1, 2)}
    assert options_of(MIX.model_copy(update={"dose": (1.0,)}), InterventionType.SCALE).dose == (0.5,)
    means = MIX.model_copy(update={"by": "gene"})
    assert {kind.value: options_of(means, kind).by for kind in KINDS} == {
        "ablate": None,
        "scale": None,
        "toward": "gene",
        "shift": "gene",
    }
    assert {options_of(MIX, kind).intervention for kind in KINDS} == {kind.value for kind in KINDS}


def test_kinds_are_searched_for_a_mixing_that_names_none():
    assert searches_kinds(MIX)
    assert not searches_kinds(MIX.model_copy(update={"intervention": "shift"}))
    assert not searches_kinds(SteerOptions(kind="condition", target="stim", toward="ctrl"))


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({"ablate": (0.6, 0.9), "shift": (0.8, 0.9)}, "shift"),
        ({"ablate": (0.6, 0.9), "shift": (0.8, 0.8)}, "ablate"),  # loses too much of the types
        ({"ablate": (0.6, 0.5), "shift": (0.8, 0.7)}, "shift"),  # all lose more: the one that loses least
        ({"ablate": (0.6, 0.9), "shift": (0.6, 0.9)}, "ablate"),
        ({"ablate": (None, None), "shift": (0.1, None)}, "shift"),
    ],
)
def test_the_best_kind_mixes_most_among_those_that_keep_the_types(scores, best):
    found = [
        KindOnSelect(
            kind=InterventionType(kind),
            score=QuickMixing(*score),
            unsteered=QuickMixing(0.5, 0.9),
        )
        for kind, score in scores.items()
    ]
    assert best_kind(found).kind == best


@pytest.mark.parametrize(
    ("score", "said"),
    [
        ((0.6, 0.9), {}),
        ((0.6, 0.883), {}),
        ((0.6, 0.8), {"conservation on select cells": "0.800 of 0.900"}),
        ((0.5, 0.9), {"mixing on select cells": "0.500, unsteered 0.500"}),
        ((0.4, 0.8), {"conservation on select cells": "0.800 of 0.900", "mixing on select cells": "0.400"}),
        ((None, None), {}),
    ],
)
def test_a_choice_for_want_of_a_better_one_is_said(score, said):
    best = KindOnSelect(
        kind=InterventionType.SHIFT, score=QuickMixing(*score), unsteered=QuickMixing(0.5, 0.9 if score[1] else None)
    )
    facts = facts_of_choice(best)
    assert set(facts) == set(said)
    assert all(facts[name].startswith(words) for name, words in said.items())
