"""What the var and obs frames of an AnnData say: names of genes, columns of cells.

The frames are pandas, and are read here through their attributes alone: pandas is not imported.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

SYMBOL_COLUMNS = ("gene_symbol", "gene_symbols", "gene_name", "gene_names", "feature_name", "symbol", "hgnc_symbol")
ENSEMBL_COLUMNS = ("ensembl_id", "ensembl", "gene_id", "gene_ids", "feature_id", "ensembl_gene_id")
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{6,}")
_VERSION = re.compile(r"\.\d+$")


def gene_names(var: Any) -> tuple[list[str], list[str] | None]:
    """Symbols and Ensembl ids of the genes of a var frame, without version suffix; None if it has no Ensembl ids.

    A symbol is taken from the first of `SYMBOL_COLUMNS` that does not hold Ensembl ids, else (or where it is missing)
    the var name. Ensembl ids are taken from the first of `ENSEMBL_COLUMNS` that mostly looks like it, else the var
    names if they do; "" where missing.
    """
    names = [str(name) for name in var.index]
    columns = {str(name).lower(): _strings(var[name]) for name in reversed(list(var.columns))}
    ensembl = next((columns[key] for key in ENSEMBL_COLUMNS if key in columns and _are_ensembl(columns[key])), None)
    if ensembl is None and _are_ensembl(names):
        ensembl = names
    symbols = next((columns[key] for key in SYMBOL_COLUMNS if key in columns and not _are_ensembl(columns[key])), names)
    return (
        [_VERSION.sub("", name) if _ENSEMBL.match(name) else name for name in map(_first, symbols, names)],
        None if ensembl is None else [_VERSION.sub("", name) for name in ensembl],
    )


def _first(symbol: str, name: str) -> str:
    return symbol or name


def _are_ensembl(names: Sequence[str]) -> bool:
    return 2 * sum(_ENSEMBL.match(name) is not None for name in names) > len(names)


def _strings(column: Any) -> list[str]:
    return ["" if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)]


def obs_series(name: str, column: Any) -> pl.Series:
    """One obs column: numbers, booleans and dates as they are, NaN as null, everything else (categories) as strings."""
    if getattr(column.dtype, "kind", "O") in "biufmM" and column.dtype.name != "category":
        kept: pl.Series = pl.from_pandas(column, nan_to_null=True).rename(name)
        return kept
    values = [None if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)]
    return pl.Series(name, values, dtype=pl.String)


def without_clashes(obs: pl.DataFrame, asked: Mapping[str, str | None], own: Sequence[str]) -> pl.DataFrame:
    """Obs without the columns that became the table's own; others with a name of the table's get the suffix `_obs`."""
    obs = obs.drop([key for key, column in asked.items() if column == key])
    taken = {*own, *obs.columns}
    for name in [name for name in obs.columns if name in own]:
        new = f"{name}_obs"
        while new in taken:
            new += "_obs"
        taken.add(new)
        obs = obs.rename({name: new})
    return obs
