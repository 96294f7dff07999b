from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from sae_core.errors import TokenizationError
from sae_core.scfm.values import recover_counts


def random_counts(mean: float, *, cells: int = 60, genes: int = 900, seed: int = 0) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    dense = rng.poisson(rng.gamma(0.3, 1.0, genes) * mean, (cells, genes))
    dense[:, :2] += 1
    return sp.csr_matrix(dense.astype(np.float32))


def logged(x: sp.csr_matrix, target: float) -> np.ndarray:
    """As scanpy does it, in float32."""
    total = np.asarray(x.sum(1)).ravel()
    factor = (target / total).astype(np.float32)
    return np.log1p(x.data * np.repeat(factor, np.diff(x.indptr)))


@pytest.mark.parametrize("target", [1.0, 1e3, 1e4, 1e6, 1234.5])
@pytest.mark.parametrize("mean", [0.3, 3.0, 60.0])
def test_counts_come_back_exactly_from_any_target_sum_and_depth(mean: float, target: float) -> None:
    x = random_counts(mean)
    np.testing.assert_array_equal(recover_counts(x.indptr, logged(x, target)), x.data)


def test_counts_are_left_alone_cell_by_cell() -> None:
    x = random_counts(1.0)
    mixed = logged(x, 1e4)
    mixed[: x.indptr[10]] = x.data[: x.indptr[10]]
    np.testing.assert_array_equal(recover_counts(x.indptr, mixed), x.data)


def test_a_cell_whose_smallest_count_is_not_one_is_recovered() -> None:
    counts = np.array([6, 9, 15, 4, 3, 22, 7], dtype=np.float32)
    x = sp.csr_matrix(counts[None])
    np.testing.assert_array_equal(recover_counts(x.indptr, logged(x, 1e4)), counts)


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: np.log2(1 + x.data * 0.37),
        lambda x: np.sqrt(x.data * 0.7),
        lambda x: x.data * 0.37,
        lambda x: logged(x, 1e4) * 1.01,
        lambda x: logged(x, 1e4).astype(np.float16).astype(np.float32),
    ],
)
def test_other_transforms_are_refused(bad: object) -> None:
    x = random_counts(3.0)
    with pytest.raises(TokenizationError, match="--matrix"):
        recover_counts(x.indptr, bad(x).astype(np.float32))  # type: ignore[operator]


def test_large_values_that_are_no_integers_are_refused() -> None:
    with pytest.raises(TokenizationError, match=r"row 1 .*1000.*--matrix"):
        recover_counts(np.array([0, 1, 2]), np.array([1.0, 1000.5], dtype=np.float32))


def test_a_single_value_is_refused_only_where_the_total_matters() -> None:
    indptr, data = np.array([0, 1]), np.array([2.3], dtype=np.float32)
    np.testing.assert_array_equal(recover_counts(indptr, data), [1.0])
    with pytest.raises(TokenizationError, match=r"row 0 \(2\.3\)"):
        recover_counts(indptr, data, need_total=True)


def test_stored_zeros_and_empty_cells_stay() -> None:
    indptr = np.array([0, 0, 3, 3])
    data = np.log1p(np.array([0.0, 2.5, 5.0], dtype=np.float32))
    np.testing.assert_array_equal(recover_counts(indptr, data), [0, 1, 2])
