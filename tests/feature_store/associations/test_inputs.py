import numpy as np
import pytest
from scipy import sparse

from feature_store.associations import Labels, Strata, as_csr
from feature_store.errors import InputError


def test_labels_keep_unknown_cells_apart():
    labels = Labels.from_values("cell_type", ["B", None, "A", float("nan"), "B"])
    assert labels.names == ("A", "B")
    np.testing.assert_array_equal(labels.known, [True, False, True, False, True])
    np.testing.assert_array_equal(labels.one_hot().toarray(), [[0, 1], [0, 0], [1, 0], [0, 0], [0, 1]])


def test_strata_are_the_cross_of_their_columns():
    a, b = Labels.from_values("a", ["x", "x", "y", "y"]), Labels.from_values("b", ["1", "2", "1", None])
    assert Strata.of(4, a, None, b).n_strata == 4
    assert Strata.of(4, a).sizes().tolist() == [2, 2]
    assert Strata.of(4).n_strata == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_with_their_number(value):
    with pytest.raises(InputError, match="codes: 1 "):
        as_csr(np.array([[1.0, value]]), "codes")


def test_stored_zeros_are_dropped_and_the_input_is_left_alone():
    matrix = sparse.csr_array((np.array([1.0, 0.0]), (np.array([0, 1]), np.array([0, 0]))), shape=(2, 1))
    assert as_csr(matrix, "codes").nnz == 1
    assert matrix.nnz == 2


def test_codes_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"0\.\.1.* 0\.\.0"):
        Labels(kind="x", codes=np.array([0, 1]), names=("a",), known=np.array([True, True]))
