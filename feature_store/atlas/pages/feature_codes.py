"""The code of a feature in cells: where it fires, its distribution by label, the null band of permuted labels, and the
features that fire in the same cells.

All is computed from the codes when a page asks for it, over every cell of the panel in a split and not only those on
the map. The null band of a label is that of the statistic which is shown, the rank-biserial: of all cells where labels
are permuted within donors (blocks), and of cells inside each type for batches. Its mean and standard deviation under
permutation are exact (a rank sum is a sum over blocks of draws without replacement); its ends are mean +- 1.96 of them.
z of the table does not give it: that is of van Elteren's statistic, which weights blocks otherwise, so that
rank_biserial / z is the null's standard deviation only where there is one block. Labels that are constant within donors
are tested by donor, and get no band: permuting a handful of donors has no such form.

Violins are Gaussian densities with Scott's bandwidth, as matplotlib's, of values that are counted into 512 bins first.
CPU seconds of a document: .022 of a store of 700 cells; of a million firing cells .1 for each column of 20 labels and
split, and .3 for the bands of each kind of labels.

Scott, Multivariate Density Estimation, 1992; van Elteren, Bull. Inst. Int. Stat. 37 (1960) 351.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from scipy import sparse

from feature_store.associations.inputs import Bools, Floats, Ints, Labels, Sparse, Strata, as_csr
from feature_store.associations.label_p_values import BLOCKED
from feature_store.associations.ranks import rank_scores
from feature_store.atlas.data import BLOCK, AtlasData
from feature_store.cells import canonical_column

SPLITS = ("test", "all")
"""The cells that a violin can show: one split, or all."""
FEW = 20
"""Firing cells up to which each is drawn as a dot, because so few give no density."""
N_POINTS = 48
"""Points of an outline."""
MOST_GROUPS = 40
"""Labels of a column that are drawn, those of the highest mean."""
MOST_TOGETHER = 20_000
"""Cells of `select` and `test` up to which the features that fire in the same cells are looked for: all codes of these
cells are held in memory."""
N_TOGETHER = 10
MOST_BLOCK = 2_000_000
"""Codes of neighbouring features that are read together at most, were they all to fire in every cell."""
N_BARS = 30
"""Bars of the histogram of a feature's codes."""
N_FIFTHS, PER_FIFTH = 5, 4
"""Parts of the cells in which a feature fires, by strength, and cells that are listed of each."""
_N_BINS = 512
_EVEN = np.linspace(0, 1, N_POINTS)
_NORMAL_95 = 1.959963984540054
_BLOCKS = f"{BLOCKED} blocks="


class Firing(NamedTuple):
    """The cells of the panel in which a feature fires, ascending, their places in it, and its code there."""

    cell_idx: Ints
    place: Ints
    value: Floats


class Band(NamedTuple):
    """The rank-biserial of each label, and its mean and standard deviation under permuted labels, each [n_labels]; NaN
    where a side is empty.
    """

    names: tuple[str, ...]
    effect: Floats
    mean: Floats
    sd: Floats

    def of(self, label: str) -> tuple[float, float]:
        """Mean and standard deviation of one label, NaN for an unknown one."""
        if label not in self.names:
            return float("nan"), float("nan")
        place = self.names.index(label)
        return float(self.mean[place]), float(self.sd[place])


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
        self._n_block = min(BLOCK, max(1, MOST_BLOCK // max(cells.height, 1)))
        self._block = lru_cache(maxsize=2)(self._read_block)
        self.firing = lru_cache(maxsize=4)(self._firing)
        self.labels = lru_cache(maxsize=32)(self._labels)
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

    def column(self, feature: int, mask: Bools) -> Sparse:
        """The code of a feature in the cells of a mask, CSR [n 1]."""
        found = self.firing(feature)
        place = np.cumsum(mask) - 1
        inside = mask[found.place]
        rows = place[found.place[inside]]
        shape = (int(mask.sum()), 1)
        return as_csr(sparse.csr_array((found.value[inside], (rows, np.zeros_like(rows))), shape=shape), "codes")

    def violins(self, feature: int, column: str, split: str) -> dict[str, Any]:
        """How a feature's code spreads over the labels of a column, the highest mean first.

        groups: label, n, n_firing, mean (of all its cells) and of the firing ones: low, high, quartiles, and `outline`
        [N_POINTS] between low and high, 1 at its widest, or `dots`. Cells without a label are `n_unknown`.
        """
        labels = self.labels(column)
        if labels is None:
            return {"groups": [], "n_unknown": 0, "n_left_out": 0}
        mask, found = self.mask(split), self.firing(feature)
        n = np.bincount(labels.codes[mask & labels.known], minlength=len(labels.names))
        inside = (mask & labels.known)[found.place]
        code, value = labels.codes[found.place[inside]], found.value[inside]
        # numpy sorts 16 bits stably by counting
        order = np.argsort(code.astype(np.uint16) if n.size < 1 << 16 else code, kind="stable")
        parts = np.split(value[order], np.cumsum(np.bincount(code, minlength=n.size))[:-1])
        groups = [(name, size, part) for name, size, part in zip(labels.names, n.tolist(), parts, strict=True) if size]
        groups.sort(key=lambda group: (-float(group[2].sum()) / group[1], group[0]))
        return {
            "groups": [spread(name, size, part) for name, size, part in groups[:MOST_GROUPS]],
            "n_unknown": int((mask & ~labels.known).sum()),
            "n_left_out": max(0, len(groups) - MOST_GROUPS),
        }

    def histogram(self, feature: int, split: str) -> dict[str, Any]:
        """How strongly a feature fires: cells of a split in which it does, in N_BARS even bins from 0 to its largest
        code there, the quartiles of these codes, and the number of all cells.
        """
        mask, found = self.mask(split), self.firing(feature)
        value = found.value[mask[found.place]]
        about = {"n": int(mask.sum()), "n_firing": int(value.size), "high": float(value.max()) if value.size else 0.0}
        counts, _ = np.histogram(value, N_BARS, range=(0.0, about["high"] or 1.0))
        quartiles = quantiles(value, (0.25, 0.5, 0.75)) if value.size else None
        return {**about, "counts": counts.tolist(), "quartiles": quartiles}

    def by_quantile(self, feature: int) -> pl.DataFrame:
        """Cells of the panel from every fifth of those in which a feature fires, not the strongest alone.

        Columns: feature_id, fifth (1 is the strongest), cell_idx, value; PER_FIFTH cells of each, at even ranks.
        """
        found = self.firing(feature)
        order = np.lexsort((found.cell_idx, -found.value))
        fifths = np.array_split(order, N_FIFTHS)
        rows = []
        for number, part in enumerate(fifths, start=1):
            places = np.unique(np.linspace(0, part.size - 1, min(PER_FIFTH, part.size)).round().astype(np.int64))
            rows += [(feature, number, int(found.cell_idx[i]), float(found.value[i])) for i in part[places]]
        schema = {"feature_id": pl.Int32, "fifth": pl.Int32, "cell_idx": pl.Int64, "value": pl.Float64}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def null_band(self, feature: int, kind: str, method: str) -> Band | None:
        """What permuting the labels of a kind among `test` cells gives, by the method that tested them; None where
        whole donors were permuted, or the method is not known.
        """
        labels, blocks = self.labels(kind), method.removeprefix(_BLOCKS)
        inside = None if blocks == "none" else self.labels(blocks)
        if labels is None or not method.startswith(_BLOCKS) or (inside is None and blocks != "none"):
            return None
        mask = self.mask("test") & labels.known
        strata = Strata.of(int(mask.sum()), None if inside is None else inside.take(mask))
        return null_band(self.column(feature, mask), labels.take(mask), strata, within=kind == "batch")

    def together(self, feature: int) -> list[dict[str, Any]] | None:
        """Features whose code goes with this one's across cells: the largest Pearson correlations on `select` cells,
        with those on `test` cells. None where the cells are too many.
        """
        n = {split: int(self.mask(split).sum()) for split in ("select", "test")}
        if sum(n.values()) > MOST_TOGETHER:
            return None
        if min(n.values()) < 3:
            return []
        r = {split: correlations(self._columns(split), feature) for split in n}
        chosen = np.nan_to_num(r["select"], nan=-1.0)
        chosen[feature] = -1.0
        best = np.argsort(-chosen, kind="stable")[:N_TOGETHER]
        return [
            {"feature_id": int(i), "pearson_select": float(chosen[i]), "pearson": float(r["test"][i])}
            for i in best
            if chosen[i] > 0
        ]

    def _read_columns(self, split: str) -> Columns:
        mask = self.mask(split)
        wanted = self._cell_idx[mask]
        rows = self._data.store.frame("codes").filter(pl.col("cell_idx").is_in(pl.Series(wanted).implode()))
        keys = ["cell_idx", "feature_id"]
        found = rows.group_by(keys).agg(pl.col("value").max()).sort(keys).collect()
        place = np.searchsorted(wanted, found["cell_idx"].to_numpy())
        entries = (found["value"].cast(pl.Float64).to_numpy(), (place, found["feature_id"].to_numpy()))
        return Columns.of(sparse.csc_array(entries, shape=(int(mask.sum()), self.n_features)))


def spread(label: str, n: int, fires: Floats) -> dict[str, Any]:
    """One violin: see `Codes.violins`."""
    about: dict[str, Any] = {
        "label": label,
        "n": n,
        "n_firing": fires.size,
        "mean": _short(float(fires.sum()) / n),
        "outline": None,
        "dots": None,
    }
    if not fires.size:
        return about
    low, q25, median, q75, high = quantiles(fires, (0, 0.25, 0.5, 0.75, 1))
    figures = {"low": low, "q25": q25, "median": median, "q75": q75, "high": high}
    about |= {name: _short(value) for name, value in figures.items()}
    if fires.size <= FEW:
        return about | {"dots": [_short(value) for value in fires.tolist()]}
    if high - low <= 1e-9 * high:
        return about | {"dots": [_short(median)]}
    return about | {"outline": np.round(outline(fires), 3).tolist()}


def _short(value: float) -> float:
    """A code with the 7 digits that a float32 has; all 17 of a float64 would double the size of a violin."""
    return float(f"{value:.7g}")


def quantiles(values: Floats, shares: Sequence[float]) -> list[float]:
    """The quantiles of some values, at least one, as `numpy.quantile` gives them; that takes .1 ms for a few values."""
    ordered = np.sort(values)
    place = np.array(shares) * (ordered.size - 1)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, ordered.size - 1)
    found: list[float] = (ordered[below] + (ordered[above] - ordered[below]) * (place - below)).tolist()
    return found


def outline(values: Floats) -> Floats:
    """Density of values that differ at N_POINTS even places from the smallest to the largest, 1 at its highest.

    A Gaussian kernel of Scott's bandwidth, n^(-1/5) standard deviations, but never narrower than the places are apart.
    """
    low, high = float(values.min()), float(values.max())
    # numpy's histogram takes longer than the densities do
    width = (high - low) / _N_BINS
    count = np.bincount(np.minimum((values - low) / width, _N_BINS - 1).astype(np.int64), minlength=_N_BINS)
    filled = np.flatnonzero(count)
    place = low + (high - low) * _EVEN
    scale = max(float(values.std(ddof=1)) * values.size**-0.2, (high - low) / (N_POINTS - 1))
    distance = (place[:, None] - (low + (filled + 0.5) * width)[None]) / scale
    density: Floats = np.exp(-(distance**2) / 2) @ count[filled]
    relative: Floats = density / density.max()
    return relative


def null_band(codes: Sparse, labels: Labels, blocks: Strata, *, within: bool) -> Band:
    """What permuting labels inside blocks of cells gives for the rank-biserial of one feature with each of them.

    codes: CSR [n_cells 1]; every cell has a label. within: cells are compared inside blocks alone (2 sum U / sum pairs
    - 1 over blocks), else all with all, and only the permutation stays inside blocks.
    """
    ranked = rank_scores(codes, blocks if within else Strata.single(codes.shape[0]))
    score = ranked.scores.toarray().ravel()
    n_labels, n_blocks = len(labels.names), blocks.n_strata
    cells = np.bincount(blocks.codes * n_labels + labels.codes, minlength=n_blocks * n_labels).astype(np.float64)
    n = cells.reshape(n_blocks, n_labels)
    size = blocks.sizes()[:, None]
    mean = np.bincount(blocks.codes, score, n_blocks)[:, None] / size
    square = np.bincount(blocks.codes, score**2, n_blocks)[:, None] / size
    # of a block's cells some are drawn without replacement
    variance = (n * (size - n) / np.maximum(size - 1, 1) * np.maximum(square - mean**2, 0)).sum(axis=0)
    if within:
        ties, pairs = n * (ranked.zero_rank - (n + 1) / 2), (n * (size - n)).sum(axis=0)
    else:
        n_label = n.sum(axis=0)
        ties, pairs = (n_label * (ranked.zero_rank - (n_label + 1) / 2)), n_label * (size.sum() - n_label)
    observed = np.bincount(labels.codes, score, n_labels)
    u, expected = (x + ties.sum(axis=0) for x in (observed, (n * mean).sum(axis=0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return Band(labels.names, 2 * u / pairs - 1, 2 * expected / pairs - 1, 2 * np.sqrt(variance) / pairs)


def ends(mean: float, sd: float) -> tuple[float, float]:
    """The middle 95 % of a normal null of a rank-biserial."""
    return max(-1.0, mean - _NORMAL_95 * sd), min(1.0, mean + _NORMAL_95 * sd)


def correlations(columns: Columns, place: int) -> Floats:
    """Pearson correlation [n_features] of one column with each; NaN where one of the two does not vary."""
    values, mean, sd = columns
    product = np.asarray(values.T @ values[:, [place]].toarray()).ravel() / values.shape[0] - mean * mean[place]
    scale = sd * sd[place]
    found: Floats = np.divide(product, scale, out=np.full_like(product, np.nan), where=scale > 1e-12)
    return found
