import gzip

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import fisher_exact, mannwhitneyu

from feature_store.associations.gene_set_enrichment import over_representation, rank_enrichment
from feature_store.associations.gene_sets import (
    canonical_immune,
    read_collections,
    read_gmt,
    refuse_without_shared_genes,
    without_shared_genes,
)
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


def test_weights_of_enrichr_and_latin1_and_compressed_files_are_read(tmp_path):
    line = b"S\tna\xefve\tCD74,1.0\tB2M,0.5\tHLA-A,2e-3\tA,B\n"
    (tmp_path / "enrichr.gmt.gz").write_bytes(gzip.compress(line))
    sets = read_gmt(tmp_path / "enrichr.gmt.gz")
    assert (sets.collection, sets.descriptions, sets.genes) == (
        "enrichr",
        ("naïve",),
        (("CD74", "B2M", "HLA-A", "A,B"),),
    )


def test_two_files_of_one_name_are_refused_as_their_sets_could_not_be_told_apart(tmp_path):
    paths = [tmp_path / name / "h.gmt" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text("S\tx\tA\n")
    with pytest.raises(InputError, match=r"a/h\.gmt.*b/h\.gmt.*'h'"):
        read_collections(paths)
    assert read_collections([]) == (canonical_immune(),)


def test_sets_without_a_gene_of_the_data_are_named_with_the_reason(tmp_path):
    some = read_collections([write(tmp_path, "MINE\tx\tCD74\nMOUSE\tx\tCd79a\tMs4a1\nOTHER\tx\tYAL001C\n")])
    genes = ["CD74", "CD79A", "MS4A1"]
    refuse_without_shared_genes(some, genes)
    (said,) = without_shared_genes(some, genes)
    assert all(word in said for word in ("2 of 3", "'my_sets'", "MOUSE", "OTHER", "Cd79a", "CD79A"))
    assert without_shared_genes(some, ["CD74", "Cd79a", "YAL001C"]) == []
    with pytest.raises(InputError, match=r"'my_sets'.*MINE.*CD74"):
        refuse_without_shared_genes(some, ["ENSG01", "ENSG02"])


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
