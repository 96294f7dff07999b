"""The names of genes in var and the columns of obs, of one AnnData file and of several joined.

A column of obs goes from HDF5 or zarr to Polars in ranges of cells, in blocks or by the codes of its categories: as
Python strings a million cells would take 80 MB a column. Text stays as it is in the file; categories of numbers become
canonical text.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells.canonical import canonical_text
from feature_store.errors import InputError
from feature_store.storage.obs_columns import PREFIX

BLOCK_CELLS = 65_536
FILE_COLUMN = "file"
"""The obs column that names the file of each cell, if there are several files."""

SYMBOL_COLUMNS = ("gene_symbol", "gene_symbols", "gene_name", "gene_names", "feature_name", "symbol", "hgnc_symbol")
ENSEMBL_COLUMNS = ("ensembl_id", "ensembl", "gene_id", "gene_ids", "feature_id", "ensembl_gene_id")
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{6,}")
_MARK = "\0file"
_VERSION = re.compile(r"\.\d+$")
_PLAIN = {"b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f4", "f8"}


def gene_names(var: Any) -> tuple[list[str], list[str] | None]:
    """Symbols and Ensembl ids of the genes of a var frame, without version suffix; None if it has no Ensembl ids.

    A symbol is taken from the first of `SYMBOL_COLUMNS` that does not hold Ensembl ids; without one, or where it is
    missing, it is the var name. Ensembl ids are taken from the first of `ENSEMBL_COLUMNS` that mostly holds such ids,
    else from the var names if most of them are; "" where missing or not of that form ("ENSGunknown_7SK_1").
    """
    names = [str(name) for name in var.index]
    columns = {str(name).lower(): _strings(var[name]) for name in reversed(list(var.columns))}
    ensembl = next((columns[key] for key in ENSEMBL_COLUMNS if key in columns and _are_ensembl(columns[key])), None)
    if ensembl is None and _are_ensembl(names):
        ensembl = names
    symbols = next((columns[key] for key in SYMBOL_COLUMNS if key in columns and not _are_ensembl(columns[key])), names)
    return (
        [_VERSION.sub("", name) if _ENSEMBL.match(name) else name for name in map(_first, symbols, names)],
        None if ensembl is None else [_VERSION.sub("", name) if _ENSEMBL.match(name) else "" for name in ensembl],
    )


def _first(symbol: str, name: str) -> str:
    return symbol or name


def _are_ensembl(names: Sequence[str]) -> bool:
    return 2 * sum(_ENSEMBL.match(name) is not None for name in names) > len(names)


def _strings(column: Any) -> list[str]:
    return ["" if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)]


@dataclass(frozen=True, kw_only=True)
class ObsColumn:
    """One obs column on disk: its number of cells, and what reads those of a range [start, stop)."""

    n_cells: int
    read: Callable[[int, int], pl.Series]

    @classmethod
    def of_series(cls, column: pl.Series) -> "ObsColumn":
        """A column that is in memory."""
        return cls(n_cells=len(column), read=lambda start, stop: column.slice(start, stop - start))


def obs_column(name: str, node: Any, read: Callable[[Any], Any]) -> ObsColumn:
    """One obs column of an HDF5 or zarr node: numbers, booleans and dates stay, NaN becomes null, everything else
    (categories) becomes text.

    Of strings, categories, plain arrays and arrays with a mask, which are nearly all columns, a range alone is in
    memory, and never as Python objects for all of its cells at once; `read` makes a pandas array of any other node, and
    of the categories. KeyError, ValueError or PolarsError, here or when a range is read, for a node that violates the
    format.
    """
    encoding = node.attrs.get("encoding-type")
    if encoding == "string-array":
        return string_column(name, node, read)
    if encoding == "categorical":
        names, codes = _texts("", np.asarray(read(node["categories"]))), node["codes"]

        def texts(start: int, stop: int) -> pl.Series:
            # careful: methods of a series fail where its name is a pattern, such as `^x$`
            numbers = pl.Series(np.asarray(codes[start:stop]).astype(np.int64))
            return names.gather(numbers.set(numbers < 0, None)).rename(name)

        return ObsColumn(n_cells=codes.shape[0], read=texts)
    if encoding == "array" and _is_plain(node):
        return ObsColumn(
            n_cells=node.shape[0],
            read=lambda start, stop: pl.Series(name, np.asarray(node[start:stop]), nan_to_null=True),
        )
    if encoding in ("nullable-integer", "nullable-boolean") and _is_plain(node["values"]):
        values, mask = node["values"], node["mask"]

        def numbers(start: int, stop: int) -> pl.Series:
            found = pl.Series(np.asarray(values[start:stop]))
            return found.set(pl.Series(np.asarray(mask[start:stop])), None).rename(name)

        return ObsColumn(n_cells=values.shape[0], read=numbers)
    import pandas as pd

    return ObsColumn.of_series(obs_series(name, pd.Series(read(node))))


def _is_plain(node: Any) -> bool:
    return bool(node.dtype.isnative) and node.dtype.str[1:] in _PLAIN


def string_column(name: str, node: Any, read: Callable[[Any], Any]) -> ObsColumn:
    """The strings of a node, read block by block, or the texts of what `read` gives for another array."""
    if node.attrs.get("encoding-type") != "string-array":
        return ObsColumn.of_series(_texts(name, np.asarray(read(node))).fill_null(""))
    text = node.asstr() if hasattr(node, "asstr") else node

    def strings(start: int, stop: int) -> pl.Series:
        bounds = [*range(start, stop, BLOCK_CELLS), stop]
        blocks = pairwise(bounds if len(bounds) > 1 else [start, stop])
        return pl.concat([pl.Series(name, text[a:b].tolist(), dtype=pl.String) for a, b in blocks])

    return ObsColumn(n_cells=node.shape[0], read=strings)


def obs_series(name: str, column: Any) -> pl.Series:
    """One obs column of a pandas frame, converted as by `obs_column`."""
    if getattr(column.dtype, "kind", "O") in "biufmM" and column.dtype.name != "category":
        kept: pl.Series = pl.from_pandas(column, nan_to_null=True).rename(name)
        return kept
    values = np.array(
        [None if gone else value for value, gone in zip(column, column.isna(), strict=True)], dtype=object
    )
    return _texts(name, values)


def _texts(name: str, values: npt.NDArray[Any]) -> pl.Series:
    """Text as it is, and the canonical text of anything else."""
    are_text = values.dtype.kind in "TU" or all(value is None or isinstance(value, str) for value in values.tolist())
    texts = pl.Series(values.tolist(), dtype=pl.String) if are_text else canonical_text(values)
    return texts.rename(name)


def join_obs(parts: Sequence[tuple[str, int, pl.DataFrame]]) -> pl.DataFrame:
    """The obs of several files, one below the other, with a first column `file` that names the file of each cell.

    `parts` are the name, the number of cells and the obs of each file. Columns come in the order of their first
    appearance, and are null in files without them. Numbers take the type that holds all of them; columns that are
    numbers in one file and text in another become canonical text. A column with the name `file` becomes `obs_file`.
    """
    frames = [frame for _, _, frame in parts]
    marked = [
        pl.DataFrame([pl.Series(_MARK, [name]).new_from_index(0, n)]).hstack(_as_text_where_types_differ(frame, frames))
        for name, n, frame in parts
    ]
    joined = pl.concat(marked, how="diagonal_relaxed")
    own = FILE_COLUMN
    while own in joined.columns:
        own = f"{PREFIX}{own}"
    return joined.rename({FILE_COLUMN: own}, strict=False).rename({_MARK: FILE_COLUMN})


def _as_text_where_types_differ(frame: pl.DataFrame, frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    def differ(name: str) -> bool:
        types = [other.schema[name] for other in frames if name in other.columns]
        return len(set(types)) > 1 and not all(dtype.is_numeric() for dtype in types)

    def widened(column: pl.Series) -> pl.Series:
        # by its text: the float64 nearest to a float32 of 0.1 is not 0.1
        return column.cast(pl.String).cast(pl.Float64) if column.dtype == pl.Float32 and mixed(column.name) else column

    def mixed(name: str) -> bool:
        return pl.Float64 in {other.schema[name] for other in frames if name in other.columns}

    return frame.select(canonical_text(column) if differ(column.name) else widened(column) for column in frame)


def check_alike(name: str, columns: Mapping[str, pl.Series]) -> None:
    """Raise InputError if a column holds numbers (or truth values) in one file, and in another what cannot be one.

    `columns` are its different values in each file, in the order of their appearance. Texts that are the canonical text
    of numbers are numbers ("1015", and not "P1" or "007").
    """
    kinds = {file: _kind_of(column) for file, column in columns.items() if column.null_count() < len(column)}
    typed = {file: kind for file, kind in kinds.items() if kind != "text"}
    for file, kind in typed.items():
        for other in (other for other, found in kinds.items() if found != kind):
            if (odd := _first_unlike(columns[other], kind)) is not None:
                raise InputError(
                    f"the obs column {name!r} holds {kind} in {file} and the {kinds[other].removesuffix('s')} {odd!r} "
                    f"in {other}, so its values cannot be compared between these files; write it in one form in all of "
                    f"them, for example as text: a.obs[{name!r}] = a.obs[{name!r}].astype(str)"
                )


def _kind_of(column: pl.Series) -> str:
    return "numbers" if column.dtype.is_numeric() else "truth values" if column.dtype == pl.Boolean else "text"


def _first_unlike(column: pl.Series, kind: str) -> str | None:
    """The first value whose canonical text is not that of a value of this kind."""
    for text in canonical_text(column).drop_nulls().unique(maintain_order=True):
        try:
            fits = text in ("True", "False") if kind == "truth values" else canonical_text([float(text)])[0] == text
        except ValueError:
            fits = False
        if not fits:
            return str(text)
    return None


@dataclass(frozen=True, kw_only=True)
class JoinedGenes:
    """The union of the genes of several files, in the order of their first appearance.

    Attributes:
        symbols: symbol of each gene [n_genes].
        ensembl: Ensembl ids [n_genes], "" where unknown; None if no file has any.
        columns: for each file the joined gene of each of its genes, int32 [n_genes of the file].
        n_in_all: number of genes that every file has.
    """

    symbols: list[str]
    ensembl: list[str] | None
    columns: tuple[npt.NDArray[np.int32], ...]
    n_in_all: int


def join_genes(genes: Sequence[tuple[Sequence[str], Sequence[str] | None]], files: Sequence[str]) -> JoinedGenes:
    """Join the genes of several files, given as symbols and Ensembl ids, by Ensembl id if every file has them, else by
    symbol.

    A name that a file has twice is two genes: its first is joined with the first of the other files, its second with
    their second. InputError for a file without a gene in common with those before it.
    """
    by_ensembl = all(known is not None for _, known in genes)
    position: dict[tuple[str, int], int] = {}
    names: list[str] = []
    ids: list[str] = []
    columns = []
    for file, (symbols, known) in zip(files, genes, strict=True):
        n_before = len(position)
        pairs = list(zip(symbols, known or [""] * len(symbols), strict=True))
        keys = _numbered(ensembl if by_ensembl and ensembl else symbol for symbol, ensembl in pairs)
        for key, (symbol, ensembl) in zip(keys, pairs, strict=True):
            place = position.setdefault(key, len(position))
            if place == len(names):
                names.append(symbol)
                ids.append(ensembl)
            ids[place] = ids[place] or ensembl
        columns.append(np.array([position[key] for key in keys], dtype=np.int32))
        if n_before and columns[-1].min() >= n_before:
            raise InputError(
                f"{file} has no gene in common with {files[0]}: {', '.join(name for name, _ in keys[:3])}, ... against "
                f"{', '.join(name for name, _ in list(position)[:3])}, ...; use the same names in all files "
                "(symbols or Ensembl ids), and join files of one species only"
            )
    n_files = np.bincount(np.concatenate(columns), minlength=len(names))
    return JoinedGenes(
        symbols=names,
        ensembl=None if all(known is None for _, known in genes) else ids,
        columns=tuple(columns),
        n_in_all=int((n_files == len(files)).sum()),
    )


def _numbered(names: Iterable[str]) -> list[tuple[str, int]]:
    """Each name with the number of times it appeared before."""
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        numbered.append((name, seen[name]))
        seen[name] += 1
    return numbered
