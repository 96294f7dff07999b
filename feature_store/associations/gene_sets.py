"""Gene sets: reading GMT files (MSigDB, Enrichr, or the small one that ships with the package).

A line is a name, a description and genes, separated by tabs and by nothing else: a reader that splits on any white
space loses or invents genes. `canonical_immune.gmt` holds textbook markers. The tests of features against sets are in
`feature_store.associations.gene_set_enrichment`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy import sparse

from feature_store.errors import InputError
from feature_store.storage import schemas
from feature_store.storage.hashing import content_sha
from feature_store.storage.text_files import plain_stem, read_text

MOST_NAMED = 10
"""Largest number of sets that a message names."""
_WEIGHT = re.compile(r",-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?$")


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

    def n_shared(self, genes: Sequence[str]) -> list[int]:
        """The number of genes of each set that are among `genes`."""
        known = set(genes)
        return [len(known.intersection(members)) for members in self.genes]

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
    named. The file may be compressed, and Latin-1; the weights of Enrichr (`GENE,1.0`) are left out.

    Raises NotFoundError for a missing file, InputError with the line's number for a malformed line.
    """
    path = Path(path)
    names, descriptions, genes = [], [], []
    # careful: splitlines would also split at characters that are part of a name
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t")]
        members = tuple(dict.fromkeys(_WEIGHT.sub("", field) for field in fields[2:] if field))
        if not fields[0] or not members:
            raise InputError(
                f"{path.name}, line {number}: {line[:60]!r} has {len(fields)} tab-separated fields; "
                "expected a name, a description and at least one gene"
            )
        names.append(fields[0])
        descriptions.append(fields[1])
        genes.append(members)
    return GeneSets(
        collection=collection or plain_stem(path),
        names=tuple(names),
        descriptions=tuple(descriptions),
        genes=tuple(genes),
    )


def _read(path: Path) -> str:
    wanted = "a .gmt file (name, description, genes; tab-separated), or leave --gmt out for the built-in immune sets"
    return read_text(path, "the gene-set file", wanted=wanted, latin1=True)


def read_collections(paths: Sequence[str | Path]) -> tuple[GeneSets, ...]:
    """The collections of several GMT files, or the one that ships with the package where no file is given.

    Raises what `read_gmt` raises, and InputError for two files of one name, which could not be told apart.
    """
    found: dict[str, tuple[Path, GeneSets]] = {}
    for path in map(Path, paths):
        sets = read_gmt(path)
        if sets.collection in found:
            raise InputError(
                f"{found[sets.collection][0]} and {path} are both the collection {sets.collection!r}; give each file "
                "once, under a name of its own"
            )
        found[sets.collection] = path, sets
    return tuple(sets for _, sets in found.values()) or (canonical_immune(),)


def canonical_immune() -> GeneSets:
    """The small collection that ships with the package: canonical immune programs from textbook markers."""
    with resources.as_file(resources.files("feature_store.associations") / "canonical_immune.gmt") as path:
        return read_gmt(path)


def table_of_sets(collections: Sequence[GeneSets], genes: Sequence[str]) -> pl.DataFrame:
    """The table `gene_sets`: a row a set in the order of the files, with the number of its genes among `genes`."""
    rows = [
        {
            "collection": sets.collection,
            "gene_set": name,
            "description": description,
            "n_genes": len(members),
            "n_shared": n_shared,
            "genes": list(members),
        }
        for sets in collections
        for name, description, members, n_shared in zip(
            sets.names, sets.descriptions, sets.genes, sets.n_shared(genes), strict=True
        )
    ]
    return pl.DataFrame(rows, schema=schemas.schema("gene_sets").columns)


def sets_of_table(table: pl.DataFrame) -> tuple[GeneSets, ...]:
    """The collections that a table `gene_sets` holds."""
    return tuple(
        GeneSets(
            collection=str(collection),
            names=tuple(part["gene_set"]),
            descriptions=tuple(part["description"]),
            genes=tuple(tuple(members) for members in part["genes"].to_list()),
        )
        for (collection,), part in table.group_by("collection", maintain_order=True)
    )


def without_shared_genes(collections: Sequence[GeneSets], genes: Sequence[str]) -> list[str]:
    """A sentence for each collection with sets that share no gene with `genes`: which, and why it may be so."""
    return [_unshared(sets, genes) for sets in collections if 0 in sets.n_shared(genes)]


def refuse_without_shared_genes(collections: Sequence[GeneSets], genes: Sequence[str]) -> None:
    """Raise InputError for a collection of which no set shares a gene with `genes`."""
    for sets in collections:
        if not any(sets.n_shared(genes)):
            raise InputError(f"{_unshared(sets, genes)}. Give sets of the names that the data have")


def _unshared(sets: GeneSets, genes: Sequence[str]) -> str:
    alone = [name for name, n in zip(sets.names, sets.n_shared(genes), strict=True) if not n]
    which = ", ".join(alone[:MOST_NAMED]) + (f", ... ({len(alone)})" if len(alone) > MOST_NAMED else "")
    members = [gene for name, own in zip(sets.names, sets.genes, strict=True) if name in set(alone) for gene in own]
    folded = {gene.casefold(): gene for gene in genes}
    in_case = next(((gene, folded[gene.casefold()]) for gene in members if gene.casefold() in folded), None)
    hint = f"the sets have {', '.join(members[:3])}; the data have {', '.join(list(genes)[:3])}"
    if in_case is not None:
        hint = f"the names differ in upper and lower case ({in_case[0]} and {in_case[1]}), as those of two species do"
    said = f"{len(alone)} of {len(sets.names)} gene sets of {sets.collection!r} share no gene with the data"
    return f"{said}: {which}; {hint}"
