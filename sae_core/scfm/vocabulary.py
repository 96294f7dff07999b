"""Gene vocabularies: from symbols (and Ensembl ids, where a checkpoint knows them) to token ids.

`GeneMatch` reports, for each column of the data, whether and where it was found, so that no gene is dropped silently.
Several columns may match one token (duplicated symbols, a symbol and an Ensembl id); their values are added when tokens
are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from sae_core.checkpoint_files import read_json
from sae_core.errors import CheckpointError, VocabularyError


@dataclass(frozen=True, kw_only=True)
class GeneMatch:
    """Token id of each column of the data; `token_id` is 0 where `matched` is false."""

    token_id: Int64[np.ndarray, " gene"]
    matched: Bool[np.ndarray, " gene"]

    @property
    def n_genes(self) -> int:
        """Number of columns of the data."""
        return len(self.matched)

    @property
    def n_matched(self) -> int:
        """Number of columns found in the vocabulary."""
        return int(self.matched.sum())


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens of a model, and the names by which genes are found."""

    tokens: tuple[str, ...]
    """Names in the order of their ids."""
    special: frozenset[str] = frozenset({"<pad>", "<cls>", "<eoc>"})
    """Tokens that no gene matches."""
    ensembl: Mapping[str, str] = field(default_factory=dict)
    """Ensembl id (without version) to token."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names to token."""
    prefer: Literal["symbol", "ensembl"] = "symbol"
    """"symbol": a gene's symbol is tried before its Ensembl id, and a token's own name before the maps. "ensembl"
    (Geneformer): the Ensembl id is tried first, and the maps before the token's own name, because they collapse
    outdated ids; a name is tried as it is, then in upper case."""
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Index the tokens.

        Raises:
            CheckpointError: a token appears twice, or an Ensembl id or alias leads to an unknown token.
        """
        ids = {token: i for i, token in enumerate(self.tokens)}
        if len(ids) != len(self.tokens):
            raise CheckpointError(
                f"the vocabulary has {len(self.tokens)} tokens, of which only {len(ids)} are different; give each once"
            )
        for names, of in ((self.ensembl, "Ensembl ids"), (self.aliases, "aliases")):
            if unknown := [symbol for symbol in names.values() if symbol not in ids]:
                raise CheckpointError(f"{of} lead to tokens that the vocabulary lacks: {', '.join(unknown[:5])}")
        object.__setattr__(self, "_ids", ids)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_genes(self) -> int:
        """Number of tokens that are genes."""
        return len(self.tokens) - sum(token in self._ids for token in self.special)

    def id_of(self, token: str) -> int:
        """Id of a token: a gene's name as the model has it, or a special token.

        Raises:
            VocabularyError: it is not in the vocabulary.
        """
        if token not in self._ids:
            raise VocabularyError(f"{token!r} is not among the {len(self)} tokens of this vocabulary")
        return self._ids[token]

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    def match(self, symbols: Sequence[str], ensembl_ids: Sequence[str] | None = None) -> GeneMatch:
        """Token of each gene, found by its symbol or Ensembl id in the order that `prefer` gives.

        A symbol that is an Ensembl id is looked up as one; version suffixes (".3") are ignored.

        Raises:
            VocabularyError: the two sequences differ in length, or no gene matches.
        """
        if ensembl_ids is not None and len(ensembl_ids) != len(symbols):
            raise VocabularyError(
                f"there are {len(symbols)} symbols but {len(ensembl_ids)} Ensembl ids; give one of each per gene"
            )
        ids = [""] * len(symbols) if ensembl_ids is None else ensembl_ids
        found = [self._find(str(symbol), str(ensembl_id)) for symbol, ensembl_id in zip(symbols, ids, strict=True)]
        matched = np.array([i is not None for i in found], dtype=bool)
        if not matched.any():
            own = [t for t in self.tokens if t not in self.special][:3]
            raise VocabularyError(
                f"none of the {len(symbols)} genes of the data is in the vocabulary of {self.n_genes} genes; the data "
                f"has {', '.join(map(str, symbols[:3]))}, the vocabulary has {', '.join(own)}" + self._other_names()
            )
        return GeneMatch(token_id=np.array([i or 0 for i in found], dtype=np.int64), matched=matched)

    def _other_names(self) -> str:
        if self.prefer == "ensembl":
            known = f", and knows symbols such as {next(iter(self.aliases))}" if self.aliases else " and no symbols"
            return known + "; give the data human Ensembl ids (ENSG...) as var names or in a var column"
        known = f" and Ensembl ids such as {next(iter(self.ensembl))}" if self.ensembl else " and no Ensembl ids"
        return known + "; give the data human gene symbols in the vocabulary's spelling as var names"

    def _find(self, symbol: str, ensembl_id: str) -> int | None:
        if self.prefer == "ensembl":
            return next((i for name in (ensembl_id, symbol) if (i := self._find_ensembl(name)) is not None), None)
        if symbol in self._ids and symbol not in self.special:
            return self._ids[symbol]
        for candidate in (ensembl_id, symbol):
            known = self.ensembl.get(candidate.partition(".")[0])
            if known is not None:
                return self._ids[known]
        known = self.aliases.get(symbol)
        return None if known is None else self._ids[known]

    def _find_ensembl(self, name: str) -> int | None:
        stem = name.partition(".")[0] if name.upper().startswith("ENS") else name
        for candidate in (stem, stem.upper()):
            known = self.ensembl.get(candidate) or self.aliases.get(candidate)
            if known is not None:
                return self._ids[known]
            if candidate in self._ids and candidate not in self.special:
                return self._ids[candidate]
        return None


def read_vocabulary(path: Path, *, ensembl_path: Path | None = None) -> Vocabulary:
    """Vocabulary from a `vocab.json` {token: id} and, if given, a JSON file {Ensembl id: token}.

    Raises:
        CheckpointError: a file cannot be read, or the ids are not 0, 1, ..., n - 1.
    """
    ids = read_json(path)
    tokens = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise CheckpointError(f"{path}: the ids of {len(tokens)} tokens are not the numbers 0 to {len(tokens) - 1}")
    ensembl = {} if ensembl_path is None else read_json(ensembl_path)
    return Vocabulary(tokens=tuple(tokens), ensembl=ensembl)
