from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from sae_core.errors import CheckpointError, VocabularyError
from sae_core.scfm import Vocabulary
from sae_core.scfm.vocabulary import read_vocabulary

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = Vocabulary(
    tokens=("CD3D", "MS4A1", "LYZ", "<pad>", "<cls>"), ensembl={"ENSG00000167286": "CD3D", "ENSG00000156738": "MS4A1"}
)


BY_ID = Vocabulary(
    tokens=("<pad>", "<cls>", "ENSG00000000001", "ENSG00000000002", "ENSG00000000003"),
    ensembl={"ENSG00000000009": "ENSG00000000001", "ENSG00000000008": "<cls>"},
    aliases={"ONE": "ENSG00000000001", "TWO": "ENSG00000000002", "ENSA": "ENSG00000000003"},
    genes_are="ids",
)


def tokens_of(vocabulary: Vocabulary, genes: dict[str, str] | list[tuple[str, str]]) -> list[str | None]:
    """Token of each (symbol, Ensembl id)."""
    pairs = list(genes.items()) if isinstance(genes, dict) else genes
    match = vocabulary.match([symbol for symbol, _ in pairs], [i for _, i in pairs])
    names = [vocabulary.tokens[token] for token in match.token_id.tolist()]
    return [name if known else None for name, known in zip(names, match.matched.tolist(), strict=True)]


def test_genes_match_by_symbol_then_by_ensembl_id_without_its_version() -> None:
    match = VOCABULARY.match(["LYZ", "unknown", "ENSG00000156738.20", "x"], ["", "ENSG00000167286.1", "", "ENSG0"])
    np.testing.assert_array_equal(match.matched, [True, True, True, False])
    np.testing.assert_array_equal(match.token_id[:3], [2, 0, 1])
    assert (match.n_matched, match.n_genes, match.n_by_symbol) == (3, 4, 1)


def test_where_genes_are_ids_an_id_decides_even_if_it_is_unknown() -> None:
    genes = [("TWO", "ENSG00000000001"), ("TWO", "ENSG00000000009.4"), ("ONE", "ENSG00000000777"), ("ONE", "")]
    assert tokens_of(BY_ID, genes) == ["ENSG00000000001", "ENSG00000000001", None, "ENSG00000000001"]
    assert BY_ID.match(*zip(*genes, strict=True)).n_by_symbol == 1


def test_what_has_not_the_form_of_an_id_is_none() -> None:
    for no_id in ("", "ENSGunknown_7SK_1", "nan", "NA", "ERCC-00002", "ENST00000000001", "ENSG", "ENSG00000000001-x"):
        assert tokens_of(BY_ID, [("TWO", no_id), ("unknown", no_id)]) == ["ENSG00000000002", None]
    assert tokens_of(BY_ID, [("ENSA", ""), ("two", ""), ("", "ENSGunknown_7SK_1")]) == [
        "ENSG00000000003",
        "ENSG00000000002",
        None,
    ]


def test_ids_are_read_with_any_version_in_any_case_and_from_the_place_of_the_symbol() -> None:
    for name in ("ENSG00000000002", "ENSG00000000002.17", "ensg00000000002", " ENSG00000000002.3_PAR_Y"):
        assert tokens_of(BY_ID, [(name, ""), ("ONE", name), (name, name)]) == ["ENSG00000000002"] * 3
    assert tokens_of(BY_ID, [("ONE", "ENSG00000000008"), ("TWO", "")]) == [None, "ENSG00000000002"]


def test_ids_of_other_forms_are_those_that_the_model_has_without_their_version() -> None:
    fly = Vocabulary(
        tokens=("[PAD]", "FBgn0000008", "YAL001C", "ENSG00000000001"), special=frozenset({"[PAD]"}), genes_are="ids"
    )
    genes = [
        ("a", "FBgn0000008"),
        ("FBgn0000008.2", ""),
        ("YAL001C", "ENSG00000000009"),
        ("[PAD]", "[PAD]"),
        ("fbgn0000008", ""),
    ]
    assert tokens_of(fly, genes) == ["FBgn0000008", "FBgn0000008", None, None, None]
    assert fly.match(["FBgn0000008", "YAL001C"]).n_by_symbol == 0
    # where genes are symbols, a name in the place of an id is none
    assert tokens_of(VOCABULARY, [("unknown", "LYZ"), ("LYZ", "")]) == [None, "LYZ"]


def test_where_genes_are_symbols_an_id_decides_only_against_the_tokens_own() -> None:
    own, other, unknown = "ENSG00000156738", "ENSG00000167286", "ENSG00000000077"
    # LYZ has no id in the table, so its name holds; MS4A1 has, so the id of CD3D is CD3D's whatever its symbol
    assert tokens_of(VOCABULARY, {"LYZ": other, "MS4A1": other}) == ["LYZ", "CD3D"]
    # an unknown id may be that of another release, unless the data have the token's own gene too
    assert tokens_of(VOCABULARY, {"MS4A1": unknown}) == ["MS4A1"]
    assert tokens_of(VOCABULARY, [("MS4A1", unknown), ("MS4A1", own)]) == [None, "MS4A1"]
    assert tokens_of(VOCABULARY, [("MS4A1", unknown), ("renamed", own)]) == [None, "MS4A1"]


def test_without_a_table_of_ids_equal_symbols_share_a_token() -> None:
    plain = Vocabulary(tokens=("TBCE", "LYZ"))
    match = plain.match(["TBCE", "TBCE"], ["ENSG00000284770", "ENSG00000285053"])
    assert (match.token_id.tolist(), match.n_matched, match.n_by_symbol) == ([0, 0], 2, 2)


def test_a_gene_never_matches_a_special_token() -> None:
    assert VOCABULARY.match(["<pad>", "LYZ"]).n_matched == 1
    assert VOCABULARY.n_genes == 3


def test_no_common_gene_is_an_error_that_shows_both_sides() -> None:
    with pytest.raises(VocabularyError, match=r"Cd3d.*CD3D"):
        VOCABULARY.match(["Cd3d", "Lyz2"])


def test_ids_must_be_given_for_every_gene() -> None:
    with pytest.raises(VocabularyError, match=r"2 symbols.* 1 "):
        VOCABULARY.match(["LYZ", "CD3D"], ["ENSG1"])


def test_an_unknown_token_has_no_id() -> None:
    assert VOCABULARY.id_of("LYZ") == 2
    with pytest.raises(VocabularyError, match="'CD4'"):
        VOCABULARY.id_of("CD4")


def test_vocab_json_with_a_gap_in_its_ids_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"A": 0, "B": 2}')
    with pytest.raises(CheckpointError, match="0 to 1"):
        read_vocabulary(tmp_path / "vocab.json")


def test_vocab_json_is_read_in_the_order_of_its_ids(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"B": 1, "A": 0}')
    assert read_vocabulary(tmp_path / "vocab.json").tokens == ("A", "B")
