import numpy as np
import pytest
from scipy import stats

from pipelines.errors import UsageError
from pipelines.steering.metrics.dose_response import dose_response

DOSES = [0.0, 0.5, 1.0, 1.5]


@pytest.fixture
def falling():
    rng = np.random.default_rng(0)
    return 5.0 + rng.normal(0, 3, (6, 1)) - np.array(DOSES) + rng.normal(0, 0.3, (6, 4))


def test_p_equals_page_statistic_summed_by_hand(falling):
    ranks = np.argsort(np.argsort(-falling, axis=1), axis=1) + 1
    page = (ranks.sum(0) * np.arange(1, 5)).sum()
    reference = stats.page_trend_test(ranks, ranked=True)
    assert reference.statistic == page
    assert dose_response(DOSES, falling, increasing=False).p == pytest.approx(reference.pvalue)


def test_p_of_two_units_in_order_is_the_share_of_permutations():
    perfect = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert dose_response([0, 1, 2], perfect, increasing=True).p == pytest.approx(1 / 36)


def test_a_trend_against_the_direction_is_not_significant(falling):
    assert dose_response(DOSES, falling, increasing=False).p < 0.01
    assert dose_response(DOSES, falling, increasing=True).p > 0.99


def test_spearman_is_of_the_mean_curve(falling):
    assert dose_response(DOSES, falling, increasing=False).spearman == pytest.approx(-1.0)


def test_columns_are_put_in_the_order_of_the_dose(falling):
    shuffled = [2, 0, 3, 1]
    again = dose_response([DOSES[i] for i in shuffled], falling[:, shuffled], increasing=False)
    assert again == dose_response(DOSES, falling, increasing=False)


def test_units_that_did_not_move_make_no_trend():
    still = dose_response(DOSES, np.ones((5, 4)), increasing=True)
    assert still.p >= 0.5
    assert still.spearman is None


def test_one_unit_or_two_doses_have_no_p(falling):
    one = dose_response(DOSES, falling[:1], increasing=False)
    assert (one.p, one.n_units) == (None, 1)
    assert one.spearman == pytest.approx(stats.spearmanr(DOSES, falling[0]).statistic)
    assert dose_response(DOSES[:2], falling[:, :2], increasing=False) == (None, None, 6, 2)
    assert dose_response(DOSES, np.empty((0, 4)), increasing=False) == (None, None, 0, 4)


def test_a_unit_without_a_value_at_a_dose_is_left_out(falling):
    holed = falling.copy()
    holed[2, 1] = np.nan
    assert dose_response(DOSES, holed, increasing=False) == dose_response(
        DOSES, np.delete(falling, 2, axis=0), increasing=False
    )


def test_a_table_of_the_wrong_shape_or_a_dose_twice_is_refused(falling):
    with pytest.raises(UsageError, match="3"):
        dose_response(DOSES[:3], falling, increasing=True)
    with pytest.raises(UsageError, match=r"\[0\.0, 1\.0, 1\.0, 2\.0\]"):
        dose_response([0, 1, 1, 2], falling, increasing=True)
