"""What a steering run says beside its headline: the rival that does better, and the metrics that became worse."""

from __future__ import annotations

import polars as pl
import pytest

from feature_store.query.steering import Role
from pipelines.steering.plan import Null
from pipelines.steering.report import best_rival, few_nulls, is_better, unmoved_types, worsened


def rows(*of: tuple[str, str, float | None, float | None, float | None, float | None]) -> pl.DataFrame:
    return pl.DataFrame(of, schema=["condition", "role", "value", "effect", "low", "high"], orient="row")


@pytest.mark.parametrize(("metric", "best", "value"), [("remaining", "centred", 0.2), ("type_accuracy", "mean", 0.4)])
def test_the_best_rival_is_that_of_the_metrics_direction(metric, best, value):
    found = rows(
        ("mean", Role.BASELINE, 0.4, 0.0, None, None),
        ("centred", Role.BASELINE, 0.2, 0.0, None, None),
        ("random", Role.NULL, 0.0, 0.0, None, None),
        ("not measured", Role.BASELINE, None, None, None, None),
    )
    rival = best_rival(found, metric)
    assert (rival["condition"], rival["value"]) == (best, value)
    assert best_rival(found.filter(condition="random"), metric) is None
    assert is_better("remaining", 0.2, 0.3)
    assert not is_better("type_accuracy", 0.2, 0.3)


def test_metrics_are_worse_beyond_their_interval_alone():
    found = rows(
        ("worse", Role.GRID, 0.7, -0.2, -0.3, -0.1),
        ("within noise", Role.GRID, 0.85, -0.05, -0.2, 0.1),
        ("better", Role.GRID, 0.95, 0.05, 0.01, 0.1),
        ("no interval", Role.GRID, 0.1, -0.8, None, None),
    ).with_columns(metric=pl.lit("type_accuracy"))
    assert worsened(found) == ["type_accuracy 0.9 -> 0.7"]
    assert worsened(found.with_columns(metric=pl.lit("remaining"))) == ["remaining 0.9 -> 0.95"]


def test_types_that_a_move_leaves_where_they_are_are_named():
    own = {"split": "test", "metric": "target_shift", "intervention": "shift", "dose": 1.0, "chosen": True}
    table = pl.DataFrame(
        [{**own, "group": name, "value": value} for name, value in (("all", 0.0), ("A", 0.0), ("B", 2.0))]
    )
    assert unmoved_types(table) == ["A"]
    assert unmoved_types(table.with_columns(split=pl.lit("select"))) == []
    assert unmoved_types(table.with_columns(dose=0.0)) == []
    assert unmoved_types(table.with_columns(chosen=False)) == []
    assert unmoved_types(table.with_columns(intervention=pl.lit("ablate"))) == []


def test_few_draws_say_which_nulls_the_effect_beat_and_how_many_draws_are_enough():
    beaten, other, missing = Null.RANDOM_FEATURES, Null.RANDOM_DIRECTION, Null.SHUFFLED_LABELS
    said = few_nulls({beaten.column: 1 / 11, other.column: 2 / 11, missing.column: None}, 10)
    assert "with 10 draws of each, p is 0.091 at best" in said
    assert "the effect is ahead of every draw of random features; " in said
    assert "the effect is not ahead of every draw of random direction; " in said
    assert "--n-nulls 19 is" in said
    assert missing not in said


def test_nineteen_draws_and_no_p_need_no_such_line():
    row = {null.column: 1 / 20 for null in Null}
    assert few_nulls(row, 19) is None
    assert few_nulls({null.column: 1 / 19 for null in Null}, 18) is not None
    assert few_nulls(dict.fromkeys(row), 10) is None
