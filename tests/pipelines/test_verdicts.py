"""The verdict of a comparison says what the table of means says, in words."""

import polars as pl
import pytest

from pipelines.compare import Comparison, verdicts


def compared(excess: list[float]) -> Comparison:
    """A comparison of labels, whose SAE is above the best baseline by each of some values."""
    n = len(excess)
    table = pl.DataFrame(
        {
            "target_kind": "cell_type",
            "target": [f"t{i}" for i in range(n)],
            "statistic": "auroc",
            "representation": ["neurons"] * (n - 1) + ["pca"],
            "test": [0.75] * n,
            "excess": excess,
            "best": True,
        }
    )
    return Comparison("run", table, pl.DataFrame())


@pytest.mark.parametrize(
    ("excess", "said"),
    [
        ([0.1, 0.11, 0.12], "the SAE is above its baselines, 0.860 against 0.750"),
        ([-0.1, -0.11, -0.12], "the SAE is below its baselines, 0.640 against 0.750"),
        ([-0.1, 0.02, 0.1], "the SAE and its baselines do not differ"),
    ],
)
def test_a_verdict_follows_the_interval_over_targets(excess, said):
    (line,) = verdicts(compared(excess))
    assert line.startswith(f"cell_type, auroc: {said}")
    n_better = sum(value > 0 for value in excess)
    assert f"better for {n_better} of 3 targets; most often the best baseline: neurons" in line


def test_of_two_targets_there_is_no_verdict():
    (line,) = verdicts(compared([0.1, 0.2]))
    assert "2 targets are too few for a verdict" in line


def test_a_notebook_shows_the_verdict_above_both_tables():
    made = compared([0.1, 0.11, 0.12])
    shown = made._repr_html_()
    assert verdicts(made)[0] in shown
    assert shown.count("<table") == 3
