from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scipy.sparse as sp

from sae_core.errors import ConfigError, TokenizationError
from sae_core.scfm import GeneMatch, ScGPT, Tokens, load_model
from sae_core.scfm.scgpt.tokenizer import ScGPTTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

CLS = 7


def tokenizer(**options: Any) -> ScGPTTokenizer:
    settings = {"cls_id": CLS, "cls_value": -2.0, "n_bins": 5, "max_seq_len": 100, "tie_break": "midpoint"}
    return ScGPTTokenizer(**(settings | options))


def match(token_id: list[int], matched: list[bool] | None = None) -> GeneMatch:
    flags = np.ones(len(token_id), dtype=bool) if matched is None else np.array(matched)
    return GeneMatch(token_id=np.array(token_id, dtype=np.int64), matched=flags)


def run(
    rows: list[list[float]], genes: GeneMatch, *, seed: int = 0, max_tokens: int | None = None, **options: Any
) -> Tokens:
    x = sp.csr_matrix(np.array(rows, dtype=np.float32))
    return tokenizer(**options)(x.indptr, x.indices, x.data, genes, seed=seed, max_tokens=max_tokens)


def test_hand_computed_tokens_with_ties_at_the_midpoint() -> None:
    # nonzero values 1 1 2 9; four edges 1 1 2 9: a 1 may be digit 1 or 2, so 1.5; then 3 and 4
    tokens = run([[2, 0, 1, 9, 1]], match([0, 1, 2, 3, 4]))
    np.testing.assert_array_equal(tokens.gene_id, [CLS, 0, 2, 3, 4])
    np.testing.assert_array_equal(tokens.value, np.float32([-2, 3, 1.5, 4, 1.5]))
    np.testing.assert_array_equal(tokens.is_special, [True, False, False, False, False])


def test_columns_of_one_gene_are_added_and_unmatched_columns_left_out() -> None:
    # columns 0 and 2 are gene 5 (1 + 1 = 2), column 1 is unknown, columns 3 and 4 hold 1 and 9
    tokens = run([[1, 50, 1, 1, 9]], match([5, 0, 5, 2, 1], [True, False, True, True, True]), n_bins=4)
    np.testing.assert_array_equal(tokens.gene_id, [CLS, 1, 2, 5])
    np.testing.assert_array_equal(tokens.value, np.float32([-2, 3, 1, 2]))


def test_chosen_genes_are_binned_among_each_other_and_bring_all_their_columns() -> None:
    # columns 0 and 2 are gene 5; without gene 1, the highest, the values 2 1 7 are binned alone
    genes = match([5, 1, 5, 2, 3])
    tokens = run([[1, 50, 1, 1, 7]], genes.only(np.array([2, 3, 5])), n_bins=4)
    alone = run([[1, 1, 1, 7]], match([5, 5, 2, 3]), n_bins=4)
    np.testing.assert_array_equal(tokens.gene_id, [CLS, 2, 3, 5])
    np.testing.assert_array_equal(tokens.value, alone.value)
    assert run([[1, 50, 1, 1, 7]], genes, n_bins=4).value[3] < tokens.value[2]


def test_chosen_genes_with_zeros_are_tokens_of_every_cell() -> None:
    genes = match([0, 1, 2, 3]).only(np.array([1, 3]))
    tokens = run([[4, 0, 1, 2], [1, 0, 0, 0]], genes, include_zeros=True)
    np.testing.assert_array_equal(tokens.gene_id, [CLS, 1, 3])
    np.testing.assert_array_equal(tokens.value > 0, [False, False, True])


def test_a_cell_without_matched_genes_has_no_token_and_keeps_its_place() -> None:
    tokens = run([[1, 0], [0, 3], [0, 0], [2, 2]], match([4, 0], [True, False]))
    np.testing.assert_array_equal(tokens.lengths, [2, 0, 0, 2])
    np.testing.assert_array_equal(tokens.cell_of_token(), [0, 0, 3, 3])


def test_tokens_are_in_vocabulary_order_whatever_the_columns() -> None:
    np.testing.assert_array_equal(
        run([[3, 1, 2]], match([2, 0, 1])).gene_id, run([[1, 2, 3]], match([0, 1, 2])).gene_id
    )


def test_a_random_tie_is_uniform_over_the_digits_it_spans() -> None:
    n_cells = 3000
    rows = np.ones((n_cells, 3), dtype=np.float32)
    rows[:, 2] = 2
    # other cells have other genes: the draw comes from a cell's content
    genes = sp.csr_matrix(np.kron(np.eye(n_cells), np.ones((1, 3))) * np.tile(rows[0], n_cells))
    tokens = tokenizer(tie_break="random", n_bins=8)(
        genes.indptr, genes.indices, genes.data, match(list(range(10, 10 + 3 * n_cells))), seed=1
    )
    # 7 edges over ranks 0 to 2: a 1 at ranks 0 and 1 spans digits 1 to 4
    value = tokens.value[~tokens.is_special].reshape(n_cells, 3)
    share = np.bincount(value[:, :2].astype(int).ravel(), minlength=8) / (2 * n_cells)
    np.testing.assert_allclose(share[1:5], 0.25, atol=0.03)
    assert share[5:].sum() == share[0] == 0
    assert (value[:, 2] == 7).all()


def test_random_ties_depend_on_seed_and_cell_only() -> None:
    rng = np.random.default_rng(0)
    rows = rng.geometric(0.7, (6, 30)).astype(float)
    genes = match(list(range(30)))
    together = run(rows.tolist(), genes, tie_break="random", n_bins=51)
    alone = [run([row.tolist()], genes, tie_break="random", n_bins=51).value for row in rows]
    np.testing.assert_array_equal(together.value, np.concatenate(alone))
    assert (run(rows.tolist(), genes, tie_break="random", n_bins=51, seed=1).value != together.value).any()


@pytest.mark.parametrize("tie_break", ["midpoint", "random"])
def test_log_normalised_values_give_the_tokens_of_the_counts(tie_break: str) -> None:
    counts = np.random.default_rng(4).poisson(0.7, (20, 60)).astype(np.float64)
    lognorm = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    genes = match(list(range(10, 70)))
    a = run(counts.tolist(), genes, tie_break=tie_break, n_bins=51, max_seq_len=20)
    b = run(lognorm.tolist(), genes, tie_break=tie_break, n_bins=51, max_seq_len=20)
    np.testing.assert_array_equal(a.gene_id, b.gene_id)
    np.testing.assert_array_equal(a.value, b.value)


def test_truncation_keeps_cls_and_a_seeded_sample_with_the_bins_of_the_whole_cell() -> None:
    rows = [list(range(1, 31))]
    genes = match(list(range(30, 60)))
    whole, cut = run(rows, genes, n_bins=51), run(rows, genes, n_bins=51, max_tokens=11)
    assert cut.n_tokens == 11
    assert cut.gene_id[0] == CLS
    value_of = dict(zip(whole.gene_id.tolist(), whole.value.tolist(), strict=True))
    assert [value_of[g] for g in cut.gene_id.tolist()] == cut.value.tolist()
    np.testing.assert_array_equal(run(rows, genes, n_bins=51, max_tokens=11).gene_id, cut.gene_id)
    assert (run(rows, genes, n_bins=51, max_tokens=11, seed=5).gene_id != cut.gene_id).any()


def test_a_cell_that_just_fits_is_not_truncated() -> None:
    genes = match([0, 1, 2])
    assert run([[1, 2, 3]], genes, max_tokens=4).n_tokens == 4
    assert run([[1, 2, 3]], genes, max_tokens=3).n_tokens == 3


def test_scaled_data_are_refused_with_the_matrix_to_choose() -> None:
    with pytest.raises(TokenizationError, match=r"-1\.5 and 2.*--matrix raw"):
        run([[-1.5, 2]], match([0, 1]))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(TokenizationError, match=r"1 of them.*--matrix"):
        run([[np.nan, 2]], match([0, 1]))


def test_columns_that_were_not_matched_are_refused() -> None:
    with pytest.raises(TokenizationError, match=r"column 2.*`match_genes`"):
        run([[1, 2, 3]], match([0, 1]))


def test_no_room_for_a_gene_is_refused() -> None:
    with pytest.raises(ConfigError, match="1; allowed: 2"):
        run([[1, 2]], match([0, 1]), max_tokens=1)


def test_the_value_of_cls_is_a_setting_with_pad_value_as_default(
    write_checkpoint: Callable[..., Any], tokenize: Callable[..., Tokens]
) -> None:
    for name, args, expected in (("a", {}, -2.0), ("b", {"cls_value": 0}, 0.0), ("c", {"pad_value": -7}, -7.0)):
        model = load_model(write_checkpoint(name, args=args))
        assert isinstance(model, ScGPT)
        tokens = tokenize(model)
        assert (tokens.value[tokens.is_special] == expected).all()


def test_offsets_that_do_not_cut_the_arrays_are_refused() -> None:
    with pytest.raises(TokenizationError, match="2 offsets, 3 gene ids"):
        Tokens(
            offsets=np.array([0, 2], dtype=np.int64),
            gene_id=np.zeros(3, dtype=np.int64),
            value=np.zeros(3, dtype=np.float32),
            is_special=np.zeros(3, dtype=bool),
        )
