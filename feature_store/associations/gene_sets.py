"""Gene sets: reading GMT files (MSigDB, Enrichr, or the small one that ships with the package).

A line is a name, a description and genes, separated by tabs and by nothing else: a reader that splits on any white
space loses or invents genes. `canonical_immune.gmt` holds textbook markers. The tests of features against sets are in
`feature_store.associations.gene_set_enrichment`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from feature_store.errors import InputError, NotFoundError
from feature_store.storage.hashing import content_sha


@dataclass(frozen=True, kw_only=True)
class GeneSets:
    """A collection of named gene sets, in the order of its file."""

    collection: str
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    genes: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise InputError(f"gene sets {self.collection!r}: no set in it; a GMT line is name, description and genes")
        repeated = (
            {n for n in self.names if self.names.count(n) > 1} if len(set(self.names)) < len(self.names) else set()
        )
        if repeated:
            raise InputError(f"gene sets {self.collection!r}: {sorted(repeated)[0]!r} is there twice; names are unique")

    @property
    def digest(self) -> str:
        """Sha256 of names and genes, wherever the file lies."""
        return content_sha({name: list(genes) for name, genes in zip(self.names, self.genes, strict=True)})

    def membership(self, genes: Sequence[str]) -> Any:
        """CSR float64 [n_genes n_sets]: which of `genes` are in which set."""
        position: dict[str, list[int]] = {}
        for i, gene in enumerate(genes):
            position.setdefault(gene, []).append(i)
        pairs = [(i, s) for s, members in enumerate(self.genes) for g in set(members) for i in position.get(g, ())]
        rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
        shape = (len(genes), len(self.names))
        return sparse.csr_array((np.ones(len(pairs)), (np.array(rows, int), np.array(columns, int))), shape=shape)


def read_gmt(path: str | Path, *, collection: str | None = None) -> GeneSets:
    """Read a GMT file: a line is name TAB description TAB gene TAB gene ...; the collection is the file's stem unless
    named.

    Raises NotFoundError for a missing file, InputError with the line's number for a malformed line.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"no gene-set file {path}; give a .gmt file (name, description, genes; tab-separated)")
    names, descriptions, genes = [], [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t")]
        members = tuple(dict.fromkeys(field for field in fields[2:] if field))
        if not fields[0] or not members:
            raise InputError(
                f"{path.name}, line {number}: {line[:60]!r} has {len(fields)} tab-separated fields; "
                "expected a name, a description and at least one gene"
            )
        names.append(fields[0])
        descriptions.append(fields[1])
        genes.append(members)
    return GeneSets(
        collection=collection or path.stem, names=tuple(names), descriptions=tuple(descriptions), genes=tuple(genes)
    )


def canonical_immune() -> GeneSets:
    """The small collection that ships with the package: canonical immune programs from textbook markers."""
    with resources.as_file(resources.files("feature_store.associations") / "canonical_immune.gmt") as path:
        return read_gmt(path)
