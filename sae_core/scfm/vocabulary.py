"""Gene vocabularies: from symbols (and Ensembl ids, where a checkpoint knows them) to token ids.

An Ensembl id identifies a gene and a symbol may not: symbols are reused, and clone names are aliases of other genes.
Geneformer and TranscriptFormer know genes by id, so the id decides and symbols are for genes without one: a gene whose
id the model lacks has no token, whatever its symbol is. Ids of species that Ensembl names in another way
("FBgn0000008") are those that the model has. scGPT and scFoundation know genes by symbol, so a gene is found by its
symbol. Where a table of ids (`vocab_ensembl.json`) says that the token of this symbol is another gene, the id decides
there too; if the table lacks the gene's id, the symbol holds unless another column of the data has the token's own id.

`GeneMatch` reports, for each column of the data, whether, where and how it was found, so that no gene is dropped
silently. Several columns may match one token (duplicated symbols, outdated ids); their values are added when tokens are
made. A match can be narrowed to some genes (`GeneMatch.only`): these alone become tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from sae_core.checkpoint_files import read_json
from sae_core.errors import CheckpointError, VocabularyError
from sae_core.scfm.gene_names import likely_mismatch

_ENSEMBL_ID = re.compile(r"(ENS[A-Z]*GR?\d{6,})(\.\d+)?(_PAR_Y)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class GeneMatch:
    """Token id of each column of the data; `token_id` is 0 where `matched` is false."""

    token_id: Int64[np.ndarray, " gene"]
    matched: Bool[np.ndarray, " gene"]
    n_by_symbol: int = 0
    """Number of columns that were found by their symbol; the others were found by their Ensembl id."""
    chosen: Bool[np.ndarray, " gene"] | None = None
    """Whether the gene of each column may be a token of a cell (`only`); None: every matched gene."""

    @property
    def used(self) -> Bool[np.ndarray, " gene"]:
        """Whether each column is a token of the cells that express it: it is matched, and its gene may be a token."""
        return self.matched if self.chosen is None else self.matched & self.chosen

    def only(self, token_ids: Int64[np.ndarray, " chosen"]) -> GeneMatch:
        """The same match in which the genes of these tokens alone go into the model.

        The others stay matched, because what a family computes from the whole cell (its total) does not change.
        """
        return replace(self, chosen=np.isin(self.token_id, token_ids))

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
    genes_are: Literal["symbols", "ids"] = "symbols"
    """What the tokens of genes are. "ids" (Geneformer): a gene with an Ensembl id is found by it alone, and `ensembl`
    comes before the token's own name, because it collapses outdated ids; a symbol is tried as it is, then in upper
    case."""
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)
    _with_id: frozenset[str] = field(init=False, repr=False, compare=False)

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
        object.__setattr__(self, "_with_id", frozenset(self.ensembl.values()))

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
        """Token of each gene: by its Ensembl id if it has one that decides (module docstring), else by its symbol.

        What has not the form of an Ensembl id ("", "ENSGunknown_7SK_1") is none, wherever it stands, unless the model
        knows genes by it, and a symbol that has it is one. Version suffixes (".3") are ignored.

        Raises:
            VocabularyError: the two sequences differ in length, or no gene matches.
        """
        if ensembl_ids is not None and len(ensembl_ids) != len(symbols):
            raise VocabularyError(
                f"there are {len(symbols)} symbols but {len(ensembl_ids)} Ensembl ids; give one of each per gene"
            )
        given = [""] * len(symbols) if ensembl_ids is None else ensembl_ids
        ids = [
            self._identifier(str(i)) or self._identifier(str(symbol)) for symbol, i in zip(symbols, given, strict=True)
        ]
        by_id = [self._find_id(i) for i in ids]
        by_symbol = [self._find_symbol(str(s), i, own) for s, i, own in zip(symbols, ids, by_id, strict=True)]
        # a second gene of the same symbol is not the model's where the model's own is there
        taken = {own for own, token in zip(by_id, by_symbol, strict=True) if token is None}
        by_symbol = [t if i is None or t not in taken else None for i, t in zip(ids, by_symbol, strict=True)]
        found = [own if token is None else token for own, token in zip(by_id, by_symbol, strict=True)]
        matched = np.array([i is not None for i in found], dtype=bool)
        if not matched.any():
            own = [t for t in self.tokens if t not in self.special][:3]
            raise VocabularyError(
                f"none of the {len(symbols)} genes of the data is in the vocabulary of {self.n_genes} genes; the data "
                f"has {', '.join(map(str, symbols[:3]))}, the vocabulary has {', '.join(own)}"
                + (f"; {reason}" if (reason := likely_mismatch(symbols, ensembl_ids)) else self._other_names())
            )
        token_id = np.array([i or 0 for i in found], dtype=np.int64)
        return GeneMatch(token_id=token_id, matched=matched, n_by_symbol=sum(t is not None for t in by_symbol))

    def _other_names(self) -> str:
        if self.genes_are == "ids":
            known = f", and knows symbols such as {next(iter(self.aliases))}" if self.aliases else " and no symbols"
            return known + "; give the data Ensembl ids (ENSG..., for human) as var names or in a var column"
        known = f" and Ensembl ids such as {next(iter(self.ensembl))}" if self.ensembl else " and no Ensembl ids"
        return known + "; give the data human gene symbols in the vocabulary's spelling as var names"

    def _identifier(self, name: str) -> str | None:
        """The id of a gene in a name, without its version; None if the name is none."""
        found = ensembl_id(name)
        if found is None and self.genes_are == "ids":
            own = name.strip().partition(".")[0]
            found = own if own in self._ids and own not in self.special else None
        return found

    def _find_id(self, identifier: str | None) -> int | None:
        if identifier is None:
            return None
        token = self.ensembl.get(identifier, identifier if self.genes_are == "ids" else None)
        return None if token is None or token in self.special else self._ids.get(token)

    def _find_symbol(self, symbol: str, identifier: str | None, by_id: int | None) -> int | None:
        """Token of a symbol where the symbol decides, although the id leads elsewhere (`by_id`) or nowhere (None)."""
        names = [symbol]
        if self.genes_are == "ids":
            names = [symbol, symbol.upper()] if identifier is None else []
        token = next((t for name in names if (t := name if name in self._ids else self.aliases.get(name))), None)
        if token is None or token in self.special or (by_id is not None and token in self._with_id):
            return None
        return self._ids[token]


def ensembl_id(name: str) -> str | None:
    """The Ensembl gene id in `name` without its version, in upper case; None if `name` is no such id.

    The copy of a gene on chromosome Y ("ENSG00000182378.15_PAR_Y") has the id of the gene; an old id of such a copy
    ("ENSGR0000182378") is one of its own, as in Geneformer V1.
    """
    found = _ENSEMBL_ID.fullmatch(name.strip())
    return None if found is None else found[1].upper()


def read_vocabulary(path: Path, *, ensembl_path: Path | None = None) -> Vocabulary:
    """Vocabulary from a `vocab.json` {token: id} and, if given, a JSON file {Ensembl id: token}.

    Raises:
        CheckpointError: a file cannot be read, or the ids are not 0, 1, ..., n - 1.
    """
    ids = read_json(path)
    for token, i in ids.items():
        if type(i) is not int:
            raise CheckpointError(f"{path.name} has {token!r}: {i!r}; allowed: the row of each token, a whole number")
    tokens = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise CheckpointError(f"{path}: the ids of {len(tokens)} tokens are not the numbers 0 to {len(tokens) - 1}")
    return Vocabulary(tokens=tuple(tokens), ensembl={} if ensembl_path is None else read_ensembl(ensembl_path))


def read_ensembl(path: Path) -> dict[str, str]:
    """A table from Ensembl ids to tokens.

    Raises:
        CheckpointError: the file cannot be read, or an id leads to anything but a name.
    """
    ensembl = read_json(path)
    for name, token in ensembl.items():
        if not isinstance(token, str):
            raise CheckpointError(f"{path} has {name!r}: {token!r}; allowed: the token of each Ensembl id")
    return ensembl
