import numpy as np
import pytest
from scipy import sparse
from scipy.stats import fisher_exact, mannwhitneyu

from feature_store.associations.gene_set_enrichment import over_representation, rank_enrichment
from feature_store.associations.gene_sets import canonical_immune, read_gmt
from feature_store.errors import InputError, NotFoundError


def write(tmp_path, text):
    path = tmp_path / "my_sets.gmt"
    path.write_text(text)
    return path


def test_a_gmt_is_read_as_written(tmp_path):
    sets = read_gmt(write(tmp_path, "S1\thttp://x\tA\tB\tA\n\nS2\t\tC\t\n"))
    assert (sets.collection, sets.names, sets.genes) == ("my_sets", ("S1", "S2"), (("A", "B"), ("C",)))
    np.testing.assert_array_equal(sets.membership(["B", "C", "D", "B"]).toarray(), [[1, 0], [0, 1], [0, 0], [1, 0]])


@pytest.mark.parametrize("line", ["S2 description A B", "S2\tdescription", "S2\tdescription\t", "\tdescription\tA"])
def test_a_malformed_line_is_named_by_its_number(tmp_path, line):
    with pytest.raises(InputError, match=r"my_sets\.gmt, line 2"):
        read_gmt(write(tmp_path, f"S1\tx\tA\n{line}\n"))


def test_missing_empty_and_repeated_sets_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match=r"nowhere\.gmt"):
        read_gmt(tmp_path / "nowhere.gmt")
    with pytest.raises(InputError, match="no set in it"):
        read_gmt(write(tmp_path, "\n"))
    with pytest.raises(InputError, match="'S1'"):
        read_gmt(write(tmp_path, "S1\tx\tA\nS1\tx\tB\n"))


def test_the_shipped_collection_holds_the_canonical_markers():
    sets = canonical_immune()
    genes = dict(zip(sets.names, map(set, sets.genes), strict=True))
    assert {"CD79A", "MS4A1"} <= genes["B_CELL"]
    assert {"GNLY", "KLRD1"} <= genes["NK_CELL"]
    assert {"ISG15", "IFIT1"} <= genes["INTERFERON_RESPONSE"]
    assert len(sets.names) >= 14
    assert all(5 <= len(g) <= 100 for g in sets.genes)


def test_over_representation_equals_fishers_exact_test_on_detected_genes(rng):
    n_genes = 120
    chosen = rng.random((4, n_genes)) < 0.2
    members = rng.random((n_genes, 3)) < 0.15
    members[:, 2] = False
    detected = rng.random(n_genes) < 0.8
    found = over_representation(chosen, sparse.csr_array(members.astype(float)), detected)
    for f in range(4):
        for s in range(3):
            a, b = chosen[f, detected], members[detected, s]
            table = np.array([[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]])
            assert found.overlap[f, s] == table[0, 0]
            assert found.p[f, s] == pytest.approx(fisher_exact(table, alternative="greater").pvalue)
            corrected = table + 0.5
            odds = corrected[0, 0] * corrected[1, 1] / corrected[0, 1] / corrected[1, 0]
            assert found.odds_ratio[f, s] == pytest.approx(odds)


def test_genes_that_no_cell_expresses_are_no_background():
    chosen = np.array([[True, True, False, False, False, False]])
    members = sparse.csr_array(np.array([[1.0], [1], [0], [0], [0], [0]]))
    all_genes = over_representation(chosen, members, np.ones(6, bool)).p.item()
    detected = over_representation(chosen, members, np.array([True, True, True, False, False, False])).p.item()
    assert all_genes == pytest.approx(1 / 15)
    assert detected == pytest.approx(1 / 3)


def test_rank_enrichment_is_the_mann_whitney_test_of_scores_and_signed(rng, monkeypatch):
    score = rng.normal(size=(3, 200))
    members = rng.random((200, 2)) < 0.2
    score[0, members[:, 0]] += 1
    score[1, members[:, 0]] -= 1
    detected = rng.random(200) < 0.9
    monkeypatch.setattr("feature_store.associations.gene_set_enrichment._CHUNK_VALUES", 200)
    found = rank_enrichment(score, sparse.csr_array(members.astype(float)), detected)
    assert found.rank_biserial[0, 0] > 0.3
    assert found.rank_biserial[1, 0] < -0.3
    for f in range(3):
        for s in range(2):
            x, y = score[f, members[:, s] & detected], score[f, ~members[:, s] & detected]
            expected = mannwhitneyu(x, y, use_continuity=False, method="asymptotic")
            assert found.rank_biserial[f, s] == pytest.approx(2 * expected.statistic / x.size / y.size - 1)
            assert found.p[f, s] == pytest.approx(expected.pvalue, rel=0.2)


@pytest.fixture
def rng():
    return np.random.default_rng(3)
