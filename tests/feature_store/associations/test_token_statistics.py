import numpy as np
import polars as pl
import pytest
from scipy import sparse

from feature_store.associations import TokenStatistics, token_statistics
from feature_store.errors import InputError


def tables():
    fired = pl.DataFrame(
        {"split": [0, 0, 2], "feature_id": [0, 1, 1], "gene_id": [7, 9, 7], "n_tokens": [3, 4, 5]},
        schema_overrides={"gene_id": pl.Int32, "feature_id": pl.Int32},
    )
    gene = pl.DataFrame(
        {"split": [0, 0, 0, 2], "gene_id": [7, 9, 99, 7], "n_tokens": [10, 11, 50, 12]},
        schema_overrides={"gene_id": pl.Int32},
    )
    return fired, gene


def test_counts_land_on_the_expression_columns_and_special_tokens_are_left_out():
    found = token_statistics(*tables(), gene_id=[9, None, 7, 7], n_features=3)
    np.testing.assert_array_equal(found["train"].fired.toarray(), [[0, 0, 3, 0], [4, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(found["train"].gene_tokens, [11, 0, 10, 0])
    np.testing.assert_array_equal(found["test"].fired.toarray()[1], [0, 0, 5, 0])
    assert found["train"].n_tokens == 21
    np.testing.assert_array_equal((found["train"] + found["test"]).feature_tokens, [3, 9, 0])


def test_a_feature_that_the_codes_do_not_have_is_refused():
    with pytest.raises(InputError, match=r"feature_id 1.* 0\.\.0"):
        token_statistics(*tables(), gene_id=[9, 7], n_features=1)


def test_counts_on_different_gene_axes_are_refused():
    with pytest.raises(InputError, match=r"fired.* 3 .*gene_tokens.* 2"):
        TokenStatistics(fired=sparse.csr_array((1, 3), dtype=np.int64), gene_tokens=np.array([1, 2]))
