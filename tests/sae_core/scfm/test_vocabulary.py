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


def test_genes_match_by_symbol_then_by_ensembl_id_without_its_version() -> None:
    match = VOCABULARY.match(["LYZ", "unknown", "ENSG00000156738.20", "x"], ["", "ENSG00000167286.1", "", "ENSG0"])
    np.testing.assert_array_equal(match.matched, [True, True, True, False])
    np.testing.assert_array_equal(match.token_id[:3], [2, 0, 1])
    assert (match.n_matched, match.n_genes) == (3, 4)


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
