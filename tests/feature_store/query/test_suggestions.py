"""Which known names are proposed for an unknown one."""

from __future__ import annotations

import pytest

from feature_store.query.suggestions import MOST_COMPARED, closest_names, did_you_mean

LABELS = ["CD14+ Monocyte", "CD19+ B", "CD34+", "CD8+ Cytotoxic T", "CD8+/CD45RA+ Naive Cytotoxic", "Dendritic"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("CD8", ["CD8+ Cytotoxic T", "CD8+/CD45RA+ Naive Cytotoxic"]),
        ("cytotoxic NAIVE", ["CD8+/CD45RA+ Naive Cytotoxic"]),
        ("B cells", ["CD19+ B"]),
        ("cd19 b", ["CD19+ B"]),
        ("Dendritik", ["Dendritic"]),
        ("foo", []),
        ("", []),
    ],
)
def test_names_with_the_words_come_first_then_similar_ones_then_those_that_share_a_word(name, near):
    assert closest_names(name, LABELS) == near


def test_no_column_is_near_a_word_that_shares_half_of_its_letters():
    assert closest_names("foo", ["donor", "feature_id", "of"]) == []
    assert closest_names("aurok", ["auroc", "f1"]) == ["auroc"]


def test_a_name_in_another_case_is_the_only_proposal():
    assert did_you_mean("cd34+", [*LABELS, "CD34+ stem"], n=3) == "; did you mean 'CD34+'?"


def test_among_too_many_names_none_is_looked_for():
    assert closest_names("x1", [f"x{number}" for number in range(MOST_COMPARED + 1)]) == []
