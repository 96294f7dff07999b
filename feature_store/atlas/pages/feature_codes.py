"""The code of a feature in cells: where it fires, how strongly by label, and the features that fire in the same cells.

All is computed from the codes when a page asks for it, over every cell of the panel in a split and not only those on
the map. An operation of numpy or scipy takes as long for one feature of few cells as for many, so that what a page
needs is computed for neighbouring features together, which a page of a large panel does not pay for. CPU seconds of a
document: .011 in an export of a store of 700 cells, on cores that were shared.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from scipy import sparse

from feature_store.associations.inputs import Bools, Floats, Ints, Labels, Sparse, Strata, as_csr
from feature_store.associations.label_p_values import BLOCKED
from feature_store.atlas.data import BLOCK, AtlasData
from feature_store.atlas.pages.null_bands import Band, null_band
from feature_store.atlas.pages.violins import Grouping, quantiles, violins
from feature_store.cells import canonical_column

SPLITS = ("test", "all")
"""The cells that a violin can show: one split, or all."""
MOST_TOGETHER = 20_000
"""Cells of `select` and `test` up to which the features that fire in the same cells are looked for: all codes of these
cells are held in memory."""
N_TOGETHER = 10
MOST_BLOCK = 2_000_000
"""Codes of neighbouring features that are read together at most, were they all to fire in every cell."""
AT_ONCE, MOST_AT_ONCE = 32, 100_000
"""Neighbouring features that are computed together at most, and codes of them, were they all to fire in every cell."""
MOST_PRODUCTS = 8_000_000
"""Multiplications for the correlations of features that are computed together at most, or of one feature."""
N_BARS = 30
"""Bars of the histogram of a feature's codes."""
N_FIFTHS, PER_FIFTH = 5, 4
"""Parts of the cells in which a feature fires, by strength, and cells that are listed of each."""
_BLOCKS = f"{BLOCKED} blocks="


class Firing(NamedTuple):
    """The cells of the panel in which a feature fires, ascending, their places in it, and its code there."""

    cell_idx: Ints
    place: Ints
    value: Floats


class Columns(NamedTuple):
    """The codes of a split, CSC [n_cells n_features], with the mean and the standard deviation of each feature."""

    values: Sparse
    mean: Floats
    sd: Floats

    @classmethod
    def of(cls, values: Sparse) -> "Columns":
        """From the codes themselves."""
        mean = np.asarray(values.mean(axis=0)).ravel()
        square = np.asarray((values * values).mean(axis=0)).ravel()
        return cls(values, mean, np.sqrt(np.maximum(square - mean**2, 0.0)))


class Codes:
    """The cells of the panel, by cell_idx, with their labels as numbers, and the codes of a feature in them.

    A cell is known by its place among them, so that memory does not grow with the cells outside the panel.
    """

    def __init__(self, data: AtlasData) -> None:
        self._data = data
        cells = data.store.frame("cells").filter("panel").select("cell_idx", "split").sort("cell_idx").collect()
        self._cell_idx: Ints = cells["cell_idx"].to_numpy()
        self.n_features = data.features.height
        used = data.store.panel_cells().select("cell_idx").collect()["cell_idx"].to_numpy()
        has_tokens = np.zeros(cells.height, dtype=bool)
        has_tokens[np.searchsorted(self._cell_idx, used)] = True
        self._split = {"all": has_tokens}
        for name in ("select", "test"):
            self._split[name] = has_tokens & (cells["split"] == name).to_numpy()
        # a page needs one feature, and an export all of them in order
        self._at_once = min(AT_ONCE, max(1, MOST_AT_ONCE // max(cells.height, 1)))
        n_block = min(BLOCK, max(1, MOST_BLOCK // max(cells.height, 1)))
        self._n_block = max(n_block // self._at_once, 1) * self._at_once
        self._block = lru_cache(maxsize=2)(self._read_block)
        self.firing = lru_cache(maxsize=4)(self._firing)
        self.labels = lru_cache(maxsize=32)(self._labels)
        self._grouping = lru_cache(maxsize=64)(self._group_cells)
        self._bands = lru_cache(maxsize=8)(self._compute_bands)
        self._correlated = lru_cache(maxsize=2)(self._correlate)
        self._columns = lru_cache(maxsize=2)(self._read_columns)

    def mask(self, split: str) -> Bools:
        """Which cells of the panel have tokens and are of a split, or of any [n_panel]."""
        return self._split[split]

    def _firing(self, feature: int) -> Firing:
        first = feature // self._n_block * self._n_block
        found, starts = self._block(first)
        rows = slice(starts[feature - first], starts[feature - first + 1])
        cell_idx = found["cell_idx"].to_numpy()[rows]
        value = found["value"].to_numpy()[rows].astype(np.float64)
        return Firing(cell_idx, np.searchsorted(self._cell_idx, cell_idx), value)

    def _read_block(self, first: int) -> tuple[pl.DataFrame, Ints]:
        """The codes of neighbouring features, by feature and cell, and the first row of each feature and the end."""
        last = min(first + self._n_block, self.n_features)
        found = self._data.store.codes_between(first, last)
        return found, np.searchsorted(found["feature_id"].to_numpy(), np.arange(first, last + 1))

    def _labels(self, column: str) -> Labels | None:
        """A column of the cell table as labels; None where there is no such column."""
        table = self._data.store.frame("cells")
        if column not in table.collect_schema():
            return None
        rows = table.filter("panel").select("cell_idx", canonical_column(column)).sort("cell_idx")
        text = rows.collect()[column]
        names = sorted(text.drop_nulls().unique().to_list())
        codes = text.cast(pl.Enum(names)).to_physical().fill_null(0).cast(pl.Int64).to_numpy()
        return Labels(kind=column, codes=codes, names=tuple(names), known=text.is_not_null().to_numpy())

    def violins(self, feature: int, columns: Sequence[str], split: str) -> dict[str, dict[str, Any]]:
        """How a feature's code spreads over the labels of each column among the cells of a split; see `violins`."""
        found = self.firing(feature)
        return violins({column: self._grouping(column, split) for column in columns}, found.place, found.value)

    def _group_cells(self, column: str, split: str) -> Grouping:
        labels, mask = self.labels(column), self.mask(split)
        if labels is None:
            return Grouping((), np.full(mask.size, -1), np.empty(0, np.int64), 0)
        shown = mask & labels.known
        n = np.bincount(labels.codes[shown], minlength=len(labels.names))
        return Grouping(labels.names, np.where(shown, labels.codes, -1), n, int((mask & ~labels.known).sum()))

    def histogram(self, feature: int, split: str) -> dict[str, Any]:
        """How strongly a feature fires: cells of a split in which it does, in N_BARS even bins from 0 to its largest
        code there, the quartiles of these codes, and the number of all cells.
        """
        mask, found = self.mask(split), self.firing(feature)
        value = found.value[mask[found.place]]
        about = {"n": int(mask.sum()), "n_firing": int(value.size), "high": float(value.max()) if value.size else 0.0}
        # numpy's histogram takes ten times as long
        bars = np.minimum(value * (N_BARS / (about["high"] or 1.0)), N_BARS - 1).astype(np.int64)
        counts = np.bincount(bars, minlength=N_BARS)
        quartiles = None
        if value.size:
            quartiles = quantiles(np.sort(value), np.zeros(1, np.int64), np.array([value.size]))[0, 1:4].tolist()
        return {**about, "counts": counts.tolist(), "quartiles": quartiles}

    def by_quantile(self, feature: int) -> list[dict[str, Any]]:
        """Cells of the panel from every fifth of those in which a feature fires, not the strongest alone.

        A row is fifth (1 is the strongest), cell_idx and value; PER_FIFTH cells of each, at even ranks.
        """
        found = self.firing(feature)
        order = np.lexsort((found.cell_idx, -found.value))
        rows = []
        for number, part in enumerate(np.array_split(order, N_FIFTHS), start=1):
            places = np.unique(np.linspace(0, part.size - 1, min(PER_FIFTH, part.size)).round().astype(np.int64))
            chosen = part[places]
            values = zip(found.cell_idx[chosen].tolist(), found.value[chosen].tolist(), strict=True)
            rows += [{"fifth": number, "cell_idx": cell, "value": value} for cell, value in values]
        return rows

    def null_ends(self, feature: int, kind: str, method: str) -> Mapping[str, tuple[float, float]] | None:
        """The ends of the null band of each label of a kind among `test` cells, by the method that tested them; None
        where whole donors were permuted, or the method is not known.
        """
        first = feature // self._at_once * self._at_once
        band = self._bands(first, kind, method)
        return None if band is None else band.ends(feature - first)

    def _compute_bands(self, first: int, kind: str, method: str) -> Band | None:
        """The null bands of neighbouring features."""
        labels, blocks = self.labels(kind), method.removeprefix(_BLOCKS)
        inside = None if blocks == "none" else self.labels(blocks)
        if labels is None or not method.startswith(_BLOCKS) or (inside is None and blocks != "none"):
            return None
        mask = self.mask("test") & labels.known
        strata = Strata.of(int(mask.sum()), None if inside is None else inside.take(mask))
        return null_band(self._between(first, mask), labels.take(mask), strata, within=kind == "batch")

    def _between(self, first: int, mask: Bools) -> Sparse:
        """The codes of the features that are computed together with `first`, in the cells of a mask, CSR."""
        block = first // self._n_block * self._n_block
        found, starts = self._block(block)
        last = min(first + self._at_once, self.n_features)
        rows = slice(starts[first - block], starts[last - block])
        at = np.searchsorted(self._cell_idx, found["cell_idx"].to_numpy()[rows])
        inside = mask[at]
        place = (np.cumsum(mask) - 1)[at[inside]]
        feature = found["feature_id"].to_numpy()[rows][inside] - first
        value = found["value"].to_numpy()[rows][inside].astype(np.float64)
        return as_csr(sparse.csr_array((value, (place, feature)), shape=(int(mask.sum()), last - first)), "codes")

    def together(self, feature: int) -> list[dict[str, Any]] | None:
        """Features whose code goes with this one's across cells: the largest Pearson correlations on `select` cells,
        with those on `test` cells. None where the cells are too many.
        """
        n = {split: int(self.mask(split).sum()) for split in ("select", "test")}
        if sum(n.values()) > MOST_TOGETHER:
            return None
        if min(n.values()) < 3:
            return []
        n_stored = max(self._columns(split).values.nnz for split in n)
        at_once = min(AT_ONCE, max(1, MOST_PRODUCTS // max(n_stored, 1)))
        first = feature // at_once * at_once
        select, test = (r[:, feature - first] for r in self._correlated(first, first + at_once))
        chosen = np.nan_to_num(select, nan=-1.0)
        chosen[feature] = -1.0
        # all features are not worth a sort
        least = np.partition(chosen, -min(N_TOGETHER, chosen.size))[-min(N_TOGETHER, chosen.size)]
        best = np.flatnonzero((chosen >= least) & (chosen > 0))
        best = best[np.argsort(-chosen[best], kind="stable")][:N_TOGETHER]
        return [
            {"feature_id": int(i), "pearson_select": float(chosen[i]), "pearson": float(test[i])} for i in best.tolist()
        ]

    def _correlate(self, start: int, stop: int) -> tuple[Floats, Floats]:
        """`correlations` of neighbouring features on `select` and on `test` cells."""
        select, test = (correlations(self._columns(split), start, stop) for split in ("select", "test"))
        return select, test

    def _read_columns(self, split: str) -> Columns:
        mask = self.mask(split)
        wanted = self._cell_idx[mask]
        rows = self._data.store.frame("codes").filter(pl.col("cell_idx").is_in(pl.Series(wanted).implode()))
        keys = ["cell_idx", "feature_id"]
        found = rows.group_by(keys).agg(pl.col("value").max()).sort(keys).collect()
        place = np.searchsorted(wanted, found["cell_idx"].to_numpy())
        entries = (found["value"].cast(pl.Float64).to_numpy(), (place, found["feature_id"].to_numpy()))
        return Columns.of(sparse.csc_array(entries, shape=(int(mask.sum()), self.n_features)))


def correlations(columns: Columns, start: int, stop: int) -> Floats:
    """Pearson correlation [n_features stop - start] of each column with some of them; NaN where one of the two does not
    vary.
    """
    values, mean, sd = columns
    product = values.T @ values[:, start:stop].toarray() / values.shape[0] - mean[:, None] * mean[start:stop]
    scale = sd[:, None] * sd[start:stop]
    found: Floats = np.divide(product, scale, out=np.full_like(product, np.nan), where=scale > 1e-12)
    return found
