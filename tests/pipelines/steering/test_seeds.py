"""Results of several SAEs, against scipy and counts by hand."""

import numpy as np
import polars as pl
import pytest
from scipy import stats

from feature_store.storage import schemas
from pipelines.errors import UsageError
from pipelines.steering.seeds import over_seeds


def results(value, *, p=0.04, n_features=20, dose=1.0, name="shift"):
    rows = [
        {"condition": "unsteered", "role": "unsteered", "value": 1.0, "chosen": False},
        {"condition": name, "role": "grid", "value": value, "chosen": True, "p_random_features": p,
         "p_random_direction": p, "p_shuffled_labels": None},
        {"condition": name, "role": "grid", "value": 0.9, "chosen": False, "dose": 0.5},
        {"condition": f"{name}, replace", "role": "replace", "value": value + 0.1, "chosen": False},
        {"condition": "random features", "role": "null", "value": 0.99, "chosen": False},
    ]  # fmt: skip
    frame = pl.DataFrame(
        [{"n_features": n_features, "dose": dose, **row, "effect": row["value"] - 1} for row in rows],
        infer_schema_length=None,
    )
    common = {"split": "test", "metric": "remaining", "group": "all", "n_draws": 1}
    missing = {
        name: pl.lit(None) for name in schemas.TABLES["steering"].columns if name not in {*frame.columns, *common}
    }
    return schemas.conform("steering", frame.with_columns(**{k: pl.lit(v) for k, v in common.items()}, **missing))


VALUES = [0.42, 0.5, 0.37, 0.46]


def test_the_chosen_points_of_all_seeds_are_one_row_with_student_s_interval():
    found = over_seeds([results(v, n_features=10 * (i + 1), dose=i + 1.0) for i, v in enumerate(VALUES)])
    row = found.filter(condition="chosen").row(0, named=True)
    low, high = stats.t.interval(0.95, 3, np.mean(VALUES), stats.sem(VALUES))
    assert (row["n_seeds"], row["mean"]) == (4, pytest.approx(np.mean(VALUES)))
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))
    assert row["effect_high"] == pytest.approx(high - 1)
    assert set(found["condition"]) == {"chosen", "unsteered", "replace", "random features"}


def test_seeds_that_are_better_than_a_null_are_counted_of_those_that_have_it():
    found = over_seeds([results(v, p=p) for v, p in zip(VALUES, [0.04, 0.05, 0.2, None], strict=True)])
    row = found.filter(condition="chosen").row(0, named=True)
    assert (row["n_better_random_features"], row["n_compared_random_features"]) == (2, 3)
    assert (row["n_better_shuffled_labels"], row["n_compared_shuffled_labels"]) == (0, 0)


def test_two_seeds_and_results_without_a_choice_are_refused():
    with pytest.raises(UsageError, match=r"2 .*scsae train --seed"):
        over_seeds([results(0.4), results(0.5)])
    with pytest.raises(UsageError, match=r"1 .*scsae steer"):
        over_seeds([results(0.4), results(0.5).with_columns(chosen=False), results(0.4)])
