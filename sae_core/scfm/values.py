"""Values of an expression matrix, prepared for tokenizers: checked, matched to genes, and turned into counts.

Counts are taken as they are. Log-normalised values y = log1p(c u) with one unit u per cell (u = 10,000 / total, the
default of scanpy and Seurat) are inverted: expm1(y) / u must be integers, which is verified value by value against the
rounding of float32. Values that fail are refused, because a tokenizer that ranks or adds counts must not guess. The
unit is the largest one that fits, so a cell whose counts all share a factor is recovered without that factor, which
changes no rank. Recovering costs .2 to .6 us per value.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sae_core.errors import TokenizationError
from sae_core.scfm.vocabulary import GeneMatch

_MAX_SMALLEST_COUNT = 24
_ROUNDING = 1.5e-7
"""Relative rounding of a float32 logarithm and of the float32 normalisation before it."""
_MAX_ROUNDING = 0.25
_ADVICE = "give raw counts, e.g. --matrix raw or --matrix layers/counts"


class GeneValues(NamedTuple):
    """Values above zero of matched genes, sorted by (cell, gene id); columns of one gene are added."""

    gene_id: Int64[np.ndarray, " value"]
    value: Float64[np.ndarray, " value"]
    cell: Int64[np.ndarray, " value"]


def check_values(indices: np.ndarray, data: np.ndarray, match: GeneMatch) -> None:
    """Check that values and columns can be tokenized.

    Raises:
        TokenizationError: negative or non-finite values, or columns that `match` does not have.
    """
    if len(data) and (not np.isfinite(data).all() or data.min() < 0):
        n_bad = int((~np.isfinite(data)).sum())
        raise TokenizationError(
            f"the values lie between {np.nanmin(data):g} and {np.nanmax(data):g}, {n_bad} of them not finite; allowed: "
            "counts or log-normalised values, not scaled ones; give that matrix, e.g. --matrix raw or --matrix "
            "layers/counts"
        )
    if len(indices) and indices.max() >= match.n_genes:
        raise TokenizationError(
            f"the data has a column {indices.max()}, but `match` has {match.n_genes} genes; call `match_genes` with "
            "the genes of this data"
        )


def matched_values(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, match: GeneMatch) -> GeneValues:
    """Gene id, value and cell of every nonzero value of a matched gene, in CSR form (one row per cell).

    Raises:
        TokenizationError: as in `check_values`.
    """
    check_values(indices, data, match)
    cell = np.repeat(np.arange(len(indptr) - 1, dtype=np.int64), np.diff(indptr))
    use = match.matched[indices] & (data > 0)
    cell, gene_id, value = cell[use], match.token_id[indices[use]], data[use].astype(np.float64)
    key = cell * (int(match.token_id.max(initial=0)) + 1) + gene_id
    if (key[1:] < key[:-1]).any():
        order = np.argsort(key, kind="stable")
        cell, gene_id, value, key = cell[order], gene_id[order], value[order], key[order]
    new = np.ones(len(cell), dtype=bool)
    new[1:] = key[1:] != key[:-1]
    start = np.flatnonzero(new)
    total = np.add.reduceat(value, start) if len(start) else value
    return GeneValues(gene_id[start], total, cell[start])


def chosen_values(values: GeneValues, match: GeneMatch) -> GeneValues:
    """The values of the genes that may be tokens (`GeneMatch.only`), in the same order; without a choice all."""
    if match.chosen is None:
        return values
    keep = np.isin(values.gene_id, match.token_id[match.used])
    return GeneValues(values.gene_id[keep], values.value[keep], values.cell[keep])


def recover_counts(indptr: np.ndarray, data: np.ndarray, *, need_total: bool = False) -> Float64[np.ndarray, " stored"]:
    """Counts of the stored values of CSR rows: integers as they are, log-normalised rows inverted (module docstring).

    Each row is treated on its own. `need_total`: a row of one value is refused as well, because its count cannot be
    recovered from its logarithm (any number is a multiple of itself).

    Raises:
        TokenizationError: a row is neither counts nor log-normalised counts; the message names it and gives the reason.
    """
    value = data.astype(np.float64)
    cell = np.repeat(np.arange(len(indptr) - 1, dtype=np.int64), np.diff(indptr))
    whole = np.bincount(cell, value != np.rint(value), minlength=len(indptr) - 1) == 0
    logged = ~whole[cell] & (value > 0)
    if not logged.any():
        return value
    if value[logged].max() > 700:
        row = int(cell[logged][value[logged].argmax()])
        raise TokenizationError(
            f"row {row} holds values up to {value[logged].max():g} that are neither integers nor logarithms; {_ADVICE}"
        )
    value[logged] = _invert(value[logged], cell[logged], need_total=need_total)
    return value


def _invert(y: np.ndarray, cell: np.ndarray, *, need_total: bool) -> np.ndarray:
    """Integer counts of log1p(counts * unit); `cell` is sorted."""
    rate = np.expm1(y)
    rounding = _ROUNDING * (1 + rate) * (1 + y)
    rows, owner, n_of_row = np.unique(cell, return_inverse=True, return_counts=True)
    start = np.concatenate([[0], np.cumsum(n_of_row)[:-1]])
    smallest = np.minimum.reduceat(rate, start)
    counts: Float64[np.ndarray, " value"] = np.zeros_like(rate)
    open_rows = np.ones(len(rows), dtype=bool) if not need_total else n_of_row > 1
    for divisor in range(1, _MAX_SMALLEST_COUNT + 1):
        here = open_rows[owner]
        if not here.any():
            break
        found, worst = _fit(rate[here], rounding[here], owner[here], smallest / divisor)
        done = open_rows & (worst <= 1)
        counts[here] = np.where(done[owner[here]], found, counts[here])
        open_rows &= ~done
    refused = open_rows if not need_total else open_rows | (n_of_row == 1)
    if refused.any():
        raise TokenizationError(_refusal(rows, refused, n_of_row, y, cell))
    return counts


def _fit(rate: np.ndarray, rounding: np.ndarray, owner: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest integer multiples of each row's unit, and per row the largest misfit divided by the rounding error."""
    n_rows = len(unit)
    for reach in (30.0, 3000.0, np.inf):
        # small counts first: they round to the right integer for sure and refine the unit for the large ones
        near = rate <= reach * unit[owner]
        weight = np.rint(rate[near] / unit[owner[near]]) / rounding[near] ** 2
        top = np.bincount(owner[near], rate[near] * weight, minlength=n_rows)
        bottom = np.bincount(owner[near], np.rint(rate[near] / unit[owner[near]]) * weight, minlength=n_rows)
        unit = np.where(bottom > 0, top / np.maximum(bottom, 1e-300), unit)
    multiple = rate / unit[owner]
    allowed = 3 * rounding / unit[owner] + 1e-6
    misfit = np.where(allowed > _MAX_ROUNDING, np.inf, np.abs(multiple - np.rint(multiple)) / allowed)
    worst = np.zeros(n_rows)
    np.maximum.at(worst, owner, misfit)
    return np.rint(multiple), worst


def _refusal(rows: np.ndarray, refused: np.ndarray, n_of_row: np.ndarray, y: np.ndarray, cell: np.ndarray) -> str:
    first = int(np.flatnonzero(refused)[0])
    example = ", ".join(f"{v:.4g}" for v in y[cell == rows[first]][:4])
    reason = (
        "it holds one value, whose count cannot be recovered from its logarithm"
        if n_of_row[first] == 1
        else "expm1 of its values are not integer multiples of one unit, so they are not log1p of scaled counts"
    )
    where = f"row {rows[first]} ({example})"
    return f"{int(refused.sum())} rows cannot be turned back into counts, first {where}: {reason}; {_ADVICE}"


def cell_generator(seed: int, *content: np.ndarray) -> np.random.Generator:
    """Random generator of one cell, made from the seed and the cell's content, so that no batch changes its draws."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little", signed=True), digest_size=16)
    for array in content:
        digest.update(np.ascontiguousarray(array).tobytes())
    return np.random.default_rng(int.from_bytes(digest.digest(), "little"))


def sample_per_cell(
    gene_id: Int64[np.ndarray, " value"], n_of_cell: Int64[np.ndarray, " cell"], *, limit: int, seed: int
) -> Bool[np.ndarray, " value"]:
    """Whether each value is kept when a cell keeps at most `limit` values, drawn from (seed, the cell's genes)."""
    keep = np.ones(len(gene_id), dtype=bool)
    stop = np.cumsum(n_of_cell)
    for cell in np.flatnonzero(n_of_cell > limit):
        start = stop[cell] - n_of_cell[cell]
        rng = cell_generator(seed, gene_id[start : stop[cell]])
        keep[start + rng.permutation(n_of_cell[cell])[limit:]] = False
    return keep
