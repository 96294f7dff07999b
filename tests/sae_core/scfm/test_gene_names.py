"""The likely reason why genes do not match is told from their names."""

import pytest

from sae_core.errors import VocabularyError
from sae_core.scfm import Vocabulary, likely_mismatch

HUMAN = ["CD3D", "LYZ", "MS4A1", "C1orf112", "HLA-DRA", "MT-CO1"]


@pytest.mark.parametrize(
    ("symbols", "ids", "words"),
    [
        (["Cd3d", "Lyz2", "Ms4a1", "H2-Aa"], None, ["Cd3d", "species", "orthologues"]),
        (["cd3e", "lyz", "ms4a1"], None, ["cd3e", "upper case (CD3E)", "species"]),
        (["CD3D", "LYZ"], ["ENSMUSG00000032094", "ENSMUSG00000069516"], ["ENSMUSG00000032094", "mouse", "orthologues"]),
        (["ENSMUSG00000032094.3", "ENSMUSG00000069516.1"], None, ["ENSMUSG00000032094", "mouse"]),
        (["a", "b"], ["ENST00000300692", "ENST00000261267"], ["ENST00000300692", "transcripts"]),
        (["GRCh38_CD3D", "GRCh38_LYZ"], None, ["GRCh38_CD3D", "genome"]),
        (["0", "1", "2"], None, ["numbers"]),
        (["7124", "920"], None, ["Entrez"]),
        (["ENSG00000167286", "ENSG00000090382"], None, ["ENSG00000167286", "gene_symbol"]),
    ],
)
def test_names_of_another_kind_are_named_with_what_to_do(symbols, ids, words):
    reason = likely_mismatch(symbols, ids)
    assert reason
    assert all(word in reason for word in words)


def test_human_symbols_give_no_reason():
    assert likely_mismatch(HUMAN) is None
    assert likely_mismatch(HUMAN, [""] * len(HUMAN)) is None


def test_the_error_of_a_vocabulary_that_knows_no_gene_gives_the_reason():
    vocabulary = Vocabulary(tokens=("CD3D", "LYZ", "<pad>", "<cls>", "<eoc>"))
    with pytest.raises(VocabularyError, match=r"Cd3d, Lyz.*CD3D, LYZ.*species.*orthologues"):
        vocabulary.match(["Cd3d", "Lyz2"])
