"""The context of a cell in Nicheformer: its species, assay and modality, each a token before the genes.

A field of the context is one value for all cells, or "obs:COLUMN" where each cell has its own, or "none", which leaves
its token out, as the authors' embedding script leaves out all three. Values are the names of the official tables
whatever their case, quotes and underscores, the ids of the ontologies that CELLxGENE uses (EFO, NCBITaxon), or the
numbers of the tokens, as the official embedding notebook has them. A value that is missing or in no table is refused:
one official tokenizer stops there too, and the other takes token 0, the mask, without a word.

Token 9 is Xenium in two of the official tables (the Xenium notebook, the tokenizer on the hub) and Visium in the
others; here both names lead to it. The assay also tells the technology whose mean expression divides that of the cell
(`sae_core.scfm.nicheformer.tokenizer`), and the modality, unless that is given: spatial for tokens 7 to 9.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from sae_core.errors import ConfigError, TokenizationError
from sae_core.scfm.cell_context import OF_CELLS, values_of_cells

NONE, BY_ASSAY = "none", "by assay"
"""The value of a field whose token is left out, and that of a modality that follows the assay."""
DISSOCIATED, MERFISH, COSMX, XENIUM = "dissociated", "merfish", "cosmx", "xenium"
TECHNOLOGIES = (DISSOCIATED, MERFISH, COSMX, XENIUM)
"""Technologies that an assay may be of, by the names of their files of means."""
FIELDS = ("species", "assay", "modality")
"""The fields in the order of their tokens."""

_SPECIES = {"human": 5, "Homo sapiens": 5, "NCBITaxon:9606": 5, "mouse": 6, "Mus musculus": 6, "NCBITaxon:10090": 6}
_MODALITIES = {"dissociated": 3, "spatial": 4}
_ASSAYS = {
    "MERFISH": 7,
    "EFO:0008992": 7,
    "CosMx": 8,
    "NanoString digital spatial profiling": 8,
    "EFO:0030029": 8,
    "Xenium": 9,
    "Visium": 9,
    "Visium Spatial Gene Expression": 9,
    "EFO:0010961": 9,
    "10x 5' v2": 10,
    "EFO:0009900": 10,
    "10x 3' v3": 11,
    "EFO:0009922": 11,
    "10x 3' v2": 12,
    "EFO:0009899": 12,
    "10x 5' v1": 13,
    "EFO:0011025": 13,
    "10x 3' v1": 14,
    "EFO:0009901": 14,
    "10x 3' transcription profiling": 15,
    "EFO:0030003": 15,
    "10x transcription profiling": 15,
    "EFO:0030080": 15,
    "10x 5' transcription profiling": 16,
    "EFO:0030004": 16,
    "CITE-seq": 17,
    "Smart-seq v4": 18,
}
_TECHNOLOGY = {7: MERFISH, 8: COSMX, 9: XENIUM}
_WITHOUT_MEANS = ("Visium", "Visium Spatial Gene Expression", "EFO:0010961")
"""Names of an assay that shares its token with Xenium and of whose technology there is no file of means."""
_SHOWN = 4


class _Value(NamedTuple):
    token_id: int | None
    """None: the token is left out."""
    technology: str | None = None
    """Of an assay: the technology, None where there are no means of it."""


class CellContexts(NamedTuple):
    """The context of some cells."""

    token_id: Int64[np.ndarray, "cell field"]
    """Tokens that come before the genes of each cell."""
    technology: tuple[str | None, ...]
    """Technology of each cell; None where the assay has no means of its own."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Species, assay and modality of cells, as the module docstring has their values.

    The defaults are those of dissociated human cells of 10x: neither the weights nor a matrix tell the context.
    """

    species: str = "human"
    assay: str = "10x 3' transcription profiling"
    modality: str = BY_ASSAY

    def __post_init__(self) -> None:
        """Check the values that are not those of each cell.

        Raises:
            ConfigError: one is in no official table; the message lists what is allowed.
        """
        for name in FIELDS:
            value = getattr(self, name)
            if value.startswith(OF_CELLS):
                continue
            if _parsed(name, value) is None:
                raise ConfigError(f"{name} was {value!r}; allowed: {_allowed(name)}, obs:COLUMN, none")

    @property
    def present(self) -> tuple[str, ...]:
        """The fields that are tokens, in their order."""
        return tuple(name for name in FIELDS if getattr(self, name) != NONE)

    @property
    def technologies(self) -> tuple[str, ...]:
        """Technologies whose means the cells may need."""
        if self.assay.startswith(OF_CELLS):
            return TECHNOLOGIES
        found = _parsed("assay", self.assay)
        return () if found is None or found.technology is None else (found.technology,)

    @property
    def salt(self) -> str:
        """Text that is the same for two names of one context, and differs between contexts."""
        parts = []
        for name in FIELDS:
            value = getattr(self, name)
            found = None if value.startswith(OF_CELLS) else _parsed(name, value)
            parts.append(value if found is None else f"{found.token_id} {found.technology}")
        return "\n".join(parts)

    def of_cells(self, n_cells: int, obs: Mapping[str, Sequence[str]] | None) -> CellContexts:
        """Context of cells; `obs` holds the columns that the fields name.

        Raises:
            TokenizationError: a column is not there, or a value of it is missing or in no official table.
        """
        found = {name: self._values(name, n_cells, obs) for name in FIELDS}
        assays = found["assay"]
        if self.modality == BY_ASSAY:
            found["modality"] = [_modality_of(value) for value in assays]
        columns = [[value.token_id for value in found[name]] for name in self.present]
        return CellContexts(
            token_id=np.array(columns, dtype=np.int64).reshape(len(columns), n_cells).T,
            technology=tuple(value.technology for value in assays),
        )

    def _values(self, name: str, n_cells: int, obs: Mapping[str, Sequence[str]] | None) -> list[_Value]:
        given = getattr(self, name)
        if not given.startswith(OF_CELLS):
            found = _parsed(name, given)
            assert found is not None
            return [found] * n_cells
        column, values = given.removeprefix(OF_CELLS), values_of_cells(name, given, n_cells, obs)
        known = {value: _parsed(name, value) for value in set(values) if value not in (NONE, BY_ASSAY)}
        if wrong := [cell for cell, value in enumerate(values) if known.get(value) is None]:
            unknown = sorted({values[cell] for cell in wrong})
            shown = ", ".join("no value" if not value else repr(value) for value in unknown[:_SHOWN])
            raise TokenizationError(
                f"{len(wrong)} of {n_cells} cells, the first in row {wrong[0]}, have {shown} as {name} in the obs "
                f"column {column!r}; allowed: {_allowed(name)}; correct the column, or give one {name} for all cells: "
                f"--model-option {name}=VALUE"
            )
        return [value for value in map(known.get, values) if value is not None]


def _modality_of(assay: _Value) -> _Value:
    is_spatial = assay.token_id in _TECHNOLOGY
    return _Value(_MODALITIES["spatial" if is_spatial else "dissociated"])


def _parsed(name: str, text: str) -> _Value | None:
    """What a value of a field means; None if it is in no table."""
    if text == NONE or (name == "modality" and text == BY_ASSAY):
        return _Value(None)
    table = _TABLES[name]
    token_id = table.get(_plain(text))
    if token_id is None and re.fullmatch(r"\d+(\.0)?", text.strip()):
        number = int(float(text))
        token_id = number if number in table.values() else None
    if token_id is None:
        return None
    if name != "assay":
        return _Value(token_id)
    technology = None if _plain(text) in map(_plain, _WITHOUT_MEANS) else _TECHNOLOGY.get(token_id, DISSOCIATED)
    return _Value(token_id, technology)


def _plain(name: str) -> str:
    """A name without case, quotes, separators and the word "sequencing" that older labels of assays end with."""
    words = re.sub(r"['`’′]", "", name.lower())
    return re.sub(r"[\s_-]+", " ", words).strip().removesuffix(" sequencing")


def _allowed(name: str) -> str:
    """The names in the table of a field, for messages: one for each token."""
    first = {token_id: key for key, token_id in reversed(list(_NAMES[name].items()))}
    return ", ".join(first[token_id] for token_id in sorted(first))


_NAMES: Mapping[str, Mapping[str, int]] = {"species": _SPECIES, "assay": _ASSAYS, "modality": _MODALITIES}
_TABLES = {name: {_plain(key): token_id for key, token_id in table.items()} for name, table in _NAMES.items()}
