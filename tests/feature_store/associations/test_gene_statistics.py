import numpy as np
import pytest
from scipy import sparse
from scipy.stats import pearsonr, rankdata, spearmanr

from feature_store.associations import GeneTiles, TokenStatistics, identity
from feature_store.associations.gene_correlation import CellBlocks


def test_identity_equals_counts_by_hand():
    tokens = TokenStatistics(
        fired=sparse.csr_array(np.array([[8, 2, 0], [0, 0, 0]])), gene_tokens=np.array([10, 40, 50])
    )
    found = identity(tokens)
    np.testing.assert_allclose(found.precision, [[0.8, 0.2, 0], [0, 0, 0]])
    np.testing.assert_allclose(found.recall, [[0.8, 0.05, 0], [0, 0, 0]])
    np.testing.assert_allclose(found.lift, [[8.0, 0.5, 0], [0, 0, 0]])


def test_correlations_equal_scipys(planted, correlate):
    whole = correlate(planted.codes, planted.expression, planted.donor, within=planted.cell_type)
    codes, genes = planted.codes.toarray(), planted.expression.toarray()
    for f, g in ((0, 0), (1, 3), (4, 20), (5, 30)):
        assert whole.pearson[f, g] == pytest.approx(pearsonr(codes[:, f], genes[:, g])[0], abs=1e-6)
        assert whole.spearman[f, g] == pytest.approx(spearmanr(codes[:, f], genes[:, g])[0], abs=1e-12)
        assert whole.n_both[f, g] == ((codes[:, f] > 0) & (genes[:, g] > 0)).sum()


@pytest.mark.parametrize("kept_bytes", [0, 10**9])
def test_a_tile_of_features_and_genes_is_that_part_of_the_whole_to_the_bit(planted, correlate, kept_bytes):
    whole = correlate(planted.codes, planted.expression, planted.donor, within=planted.cell_type)
    blocks = CellBlocks.of(np.ones(600, dtype=bool), planted.donor, planted.cell_type)
    by_gene, by_feature = planted.expression.tocsc(), planted.codes.tocsc()
    reads = []

    def read(start, stop):
        reads.append((start, stop))
        return by_gene[:, start:stop]

    tiles = GeneTiles(read, [0, 1, 17, 40], {"select": blocks}, kept_bytes=kept_bytes)
    for features in (slice(0, 5), slice(5, 42)):
        side = blocks.side(by_feature[:, features])
        for tile in tiles:
            part = blocks.correlate(side, tile.sides["select"])
            for name in whole._fields:
                np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[features, tile.genes])
    assert len(reads) == (3 if kept_bytes else 6)


def test_features_that_fire_nearly_everywhere_have_the_same_correlations(planted, correlate):
    rng = np.random.default_rng(0)
    fires = rng.random((600, 70)) < np.r_[[0.01] * 20, [0.9] * 50]
    codes = sparse.csr_array(np.where(fires, rng.gamma(2.0, 1.0, fires.shape), 0.0))
    found = correlate(codes, planted.expression, planted.donor)
    dense, genes = codes.toarray(), planted.expression.toarray()
    expected = np.corrcoef(dense.T, genes.T)[:70, 70:]
    np.testing.assert_allclose(found.pearson, expected, atol=1e-12)
    np.testing.assert_array_equal(found.n_both, (dense > 0).T.astype(int) @ (genes > 0))


def test_p_is_that_of_expression_permuted_within_donors(planted, correlate):
    rng = np.random.default_rng(0)
    codes, genes = planted.codes[:, [5, 19]].toarray(), planted.expression[:, 25:35].toarray()
    donor = planted.donor.codes
    p = correlate(sparse.csr_array(codes), sparse.csr_array(genes), planted.donor).p
    blocks = [np.flatnonzero(donor == d) for d in range(8)]
    a, b = (np.vstack([rankdata(x[rows], axis=0) / (rows.size + 1) for rows in blocks]) for x in (codes, genes))
    observed = a.T @ b
    above = np.zeros_like(observed)
    for _ in range(4000):
        order = np.concatenate([rng.permutation(rows) for rows in blocks])
        above += a.T @ b[order] >= observed
    exact = 2 * np.minimum(above, 4000 - above) / 4000
    np.testing.assert_allclose(p, exact, atol=0.05)


def test_a_difference_between_donors_alone_is_no_correlation(planted, correlate):
    rng = np.random.default_rng(0)
    level = planted.donor.codes * 1.0
    codes = sparse.csr_array((level + rng.random(600))[:, None])
    gene = sparse.csr_array((level + rng.random(600))[:, None])
    found = correlate(codes, gene, planted.donor)
    assert found.pearson[0, 0] > 0.9
    assert found.p[0, 0] > 0.01


def test_correlation_within_types_forgets_what_the_type_explains(planted, correlate):
    found = correlate(planted.codes, planted.expression, planted.donor, within=planted.cell_type)
    assert found.pearson[0, 0] > 0.3
    assert abs(found.within[0, 0]) < 0.15
    assert found.within[4, planted.target[4]] > 0.4
