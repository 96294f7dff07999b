"""Why the genes of a data set may not be those of a model: another species, another kind of identifier.

Every reason is told from the names alone, so it is a likely one; each comes with what to do about it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_ENSEMBL = re.compile(r"ENS([A-Z]*)([GTP])\d{6,}")
_SPECIES = {"MUS": "mouse", "RNO": "rat", "DAR": "zebrafish", "MMU": "macaque", "SSC": "pig", "BTA": "cow"}
_ORTHOLOGUES = "map the genes to their human orthologues (Ensembl BioMart lists them), name them so in var"
_MOST = 0.5


def likely_mismatch(symbols: Sequence[str], ensembl_ids: Sequence[str] | None = None) -> str | None:
    """The likely reason why few genes match a human vocabulary, and what to do about it; None if the names show none.

    The first of these that holds for most genes: Ensembl ids of another species; Ensembl ids of transcripts or
    proteins; symbols that begin with the name of a genome; symbols in lower case; symbols that go on in lower case, as
    those of mouse do; numbers; Ensembl ids in the place of symbols.
    """
    names = [str(symbol) for symbol in symbols]
    ids = [str(name) for name in ensembl_ids or ()]
    found = [match for name in (*ids, *(names if not any(ids) else ())) if (match := _ENSEMBL.match(name))]
    if len(found) > _MOST * len(names):
        prefix, kind = Counter(match.groups() for match in found).most_common(1)[0][0]
        example = found[0].group()
        if prefix:
            species = _SPECIES.get(prefix, "not human")
            return f"the Ensembl ids are of another species ({example}, ...: {species}); {_ORTHOLOGUES}"
        if kind != "G":
            return f"the Ensembl ids are of transcripts or proteins ({example}, ...); name genes (ENSG...) in var"
    if most := _most(names, r"(?:GRCh\d+|hg\d+|mm\d+|GRCm\d+)_+"):
        return f"the symbols begin with the name of a genome ({most}, ...); take it off the var names"
    if most := _most(names, r"[a-z][a-z0-9.:-]*$"):
        return (
            f"the symbols are in lower case ({most}, ...): write those of human genes in upper case ({most.upper()}); "
            f"if the cells are of another species, as zebrafish, {_ORTHOLOGUES}"
        )
    if most := _most(names, r"[A-Za-z][a-z0-9.-]*[a-z][a-z0-9.-]*$"):
        return f"the symbols are written as those of another species ({most}, ..., as in mouse); {_ORTHOLOGUES}"
    if most := _most(names, r"\d+(\.0)?$"):
        what = "positions or Entrez ids"
        return f"the genes are named by numbers ({most}, ...: {what}); put symbols or Ensembl ids into the var names"
    if most := _most(names, r"ENSG\d{6,}"):
        return (
            f"the genes are named by Ensembl ids ({most}, ...), of which the model knows few; put human symbols into "
            "the var column gene_symbol"
        )
    return None


def _most(names: Sequence[str], pattern: str) -> str | None:
    """The first name that fits a pattern, if most do."""
    fits = [name for name in names if re.match(pattern, name)]
    return fits[0] if len(fits) > _MOST * len(names) else None
