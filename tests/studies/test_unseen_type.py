"""The study of unseen types: which cells are left out, and what the page says of planted figures."""

from __future__ import annotations

import pandas as pd
import polars as pl
import pytest

CELL_TYPE = "B cells"


class Planted:
    """A run whose results are planted."""

    cell_type = CELL_TYPE

    def __init__(self, results: pl.DataFrame, sae: int = 0) -> None:
        from unseen_type import with_searched_rival

        self.results = with_searched_rival(results)
        self.run = type("Run", (), {"sae": sae})


def results(left: dict[int, float], drift: dict[int, float], *, rival_half: float = 0.05) -> pl.DataFrame:
    """Shift with some numbers of features at dose 1, and the mean difference in three doses, of which 1.5 is best on
    select cells.
    """
    rows = []

    def add(
        condition, role, metric, value, *, split="test", group=CELL_TYPE, n=None, dose=None, half=0.1, chosen=False
    ):
        effect = value - 1.0
        rows.append(
            {
                "split": split, "condition": condition, "role": role, "metric": metric, "group": group, "n_features": n,
                "dose": dose, "value": value, "effect": effect, "low": effect - half, "high": effect + half,
                "chosen": chosen,
            }
        )  # fmt: skip

    for n, value in left.items():
        point = {"n": n, "dose": 1.0, "chosen": n == max(left)}
        add("shift", "grid", "remaining_corrected", value, **point)
        add("shift", "grid", "off_axis", drift[n], **point)
        add("shift", "grid", "type_accuracy", 0.9, **point)
    for dose, remaining, beside in ((0.5, 0.7, 0.3), (1.0, 0.5, 0.6), (1.5, 0.4, 0.9)):
        role = "baseline" if dose == 1 else "baseline_dose"
        add("mean difference", role, "remaining", 1 - dose / 2, split="select", group="all", dose=dose)
        add("mean difference", role, "remaining_corrected", remaining, dose=dose, half=rival_half)
        add("mean difference", role, "off_axis", beside, dose=dose)
        add("mean difference", role, "type_accuracy", 0.9, dose=dose)
    add("unsteered", "unsteered", "type_accuracy", 0.95)
    for null in ("random features", "random direction", "shuffled labels"):
        add(null, "null", "remaining_corrected", 0.95, n=5, dose=1.0)
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_stimulated_cells_of_a_type_are_left_out_but_for_tested_donors():
    from unseen_type import is_seen

    obs = pd.DataFrame(
        {
            "condition": ["stim", "stim", "stim", "ctrl", "stim"],
            "cell_type": [CELL_TYPE, CELL_TYPE, CELL_TYPE, CELL_TYPE, "NK cells"],
            "fold0": ["train", "select", "test", "train", "train"],
        }
    )
    assert is_seen(obs, CELL_TYPE, "fold0").tolist() == [False, False, True, True, True]


def test_the_rival_takes_the_dose_that_leaves_least_on_select_cells():
    from unseen_type import SEARCHED, value_of

    run = Planted(results({5: 0.6}, {5: 0.2}))
    assert run.results.filter(condition=SEARCHED)["dose"].unique().to_list() == [1.5]
    assert value_of(run, "remaining_corrected", SEARCHED) == 0.4
    assert value_of(run, "remaining_corrected", "mean difference") == 0.5
    assert value_of(run, "remaining_corrected") == 0.6


def test_the_fewest_features_within_the_rivals_interval_are_held_against_its_drift_at_the_same_distance():
    from unseen_type import few_features

    found = few_features(Planted(results({1: 0.9, 5: 0.44, 20: 0.41}, {1: 0.1, 5: 0.5, 20: 0.8})))
    assert (found["chosen"], found["fewest features"]) == ("20, dose 1", "5")
    assert (found["their remaining"], found["their drift"], found["its drift"]) == (0.44, 0.5, 0.9)
    assert found["mean difference"] == "0.40 [0.35, 0.45]"
    # .44 lies three fifths of the way from dose 1 (.5, drift .6) to dose 1.5 (.4, drift .9)
    assert found["its drift there"] == pytest.approx(0.6 + 0.6 * 0.3)
    none = few_features(Planted(results({1: 0.9, 5: 0.46}, {1: 0.1, 5: 0.5})))
    assert (none["fewest features"], none["their drift"]) == ("none", None)


def test_a_curve_has_no_drift_where_it_does_not_come_down():
    from unseen_type import drift_at

    curve = [(1.0, 0.0), (0.6, 0.2), (0.8, 0.5)]
    assert drift_at(curve, 0.8) == pytest.approx(0.1)
    assert drift_at(curve, 1.0) == 0
    assert drift_at(curve, 0.5) is None


def test_the_verdict_counts_losses_as_well_as_wins():
    from unseen_type import TYPES, verdict

    better = results({5: 0.3}, {5: 0.2})
    worse = results({5: 0.6}, {5: 1.2})
    beyond = results({5: 0.97}, {5: 1.0})
    runs = []
    for name in TYPES:
        for sae, frame in enumerate((better, worse, beyond)):
            run = Planted(frame.with_columns(group=pl.col("group").replace(CELL_TYPE, name)), sae)
            run.cell_type = name
            runs.append(run)
    text = " ".join(verdict(runs).split())
    assert "9 are on this page (3 for CD4 T cells, 3 for CD14+ Monocytes, 3 for B cells)." in text
    assert "nearer than every null for 6 of them." in text
    assert "less of the distance than the mean difference for 3, drifted less for 3, and did both for 3." in text
    assert "| B cells | 3 | +0.22 [" in text
    assert "| 0.95 [0.95, 0.95], 0.90 [0.90, 0.90], 0.90 [0.90, 0.90] |" in text


def test_genes_are_pooled_by_the_cells_in_which_they_were_hidden():
    from unseen_type import pooled

    frame = {"condition": "shift", "gene": ["IFI6", "LYZ"], "change": [1.0, 2.0], "difference": [4.0, None]}
    table = pooled(
        [pl.DataFrame({**frame, "n_cells": [2, 50]}), pl.DataFrame({**frame, "n_cells": [8, 1], "change": [2.0, 1.0]})]
    )
    assert table.rows() == [("shift", "IFI6", 1.8, 4.0, 10)]
