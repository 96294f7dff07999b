"""A map of the features: UMAP of an SAE's decoder rows, and the nearest neighbours of each; made once and kept beside
the SAE (`saes/<run>/map/{umap,neighbours}`).

A feature is its direction in the model's space, so the similarity of two is the cosine of their decoder
rows. Neighbours are exact. Read the map with care; the neighbours are the better guide: a thousand directions in
128 dimensions are nearly orthogonal (median cosine with the nearest other .4), and two dimensions keep 2 of the 10
nearest of a feature. The share of the 10 nearest with the same best label / of the same class, and the same by
chance (shuffled labels, and their 95 % point), for three SAEs of 1,024 features on layer 2 of the mini model:

| | PBMC 68k | Kang 2018 | five cell lines |
|---|---|---|---|
| by cosine | .26 / .55 | .36 / .66 | .29 / .44 |
| on the map | .25 / .53 | .37 / .67 | .23 / .39 |
| chance | .23 / .49 | .33 / .60 | .20 / .38 |
| its 95 % point | .23 / .50 | .34 / .61 | .20 / .39 |

All but one (a class on the map of the cell lines) are above chance, none is far above. Centred rows, 5 to 30 neighbours
and a least distance of .1 or .3 give the same figures within .02; the smaller distance keeps more of the nearest (.18
of the 10 instead of .13), which decided it.

Cost on one core: 8 CPU seconds for the import and the compilation of the first map, then .8 s for 1,024 features of 128
dimensions, 4 s for 4,096 of 512 and 182 s for 100,000 of 512 (142 s of them for the neighbours, 1.4 GB in all). The
same seed gives the same map on one machine.

McInnes, Healy and Melville, UMAP: Uniform Manifold Approximation and Projection, arXiv:1802.03426.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.errors import InputError
from feature_store.maps.umap import MIN_POINTS, umap_from_neighbours
from feature_store.storage import schemas
from feature_store.storage.commit import Run, is_intact, read_table, write_table
from feature_store.storage.layout import Layout
from feature_store.storage.plans import MapPlan, as_json

Rows = npt.NDArray[np.floating]

_BLOCK_VALUES = 1 << 24
"""Similarities in memory at once (64 MB of cosines)."""
_ROUNDED = 2e-6
"""Rounding changes the difference of two similarities by less than this."""


@dataclass(frozen=True, kw_only=True)
class FeatureMapConfig:
    """How features are laid out."""

    n_kept: int = 10
    """Nearest neighbours of a feature that are stored as a table."""
    n_neighbors: int = 15
    """Neighbours of a feature, itself included, from which the map is made."""
    min_dist: float = 0.1
    """Least distance of neighbours on the map."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.n_kept >= 1 and self.n_neighbors >= 2 and 0 <= self.min_dist <= 1 and self.seed >= 0):
            raise InputError(f"{self}: n_kept is at least 1, n_neighbors 2, seed 0; min_dist is 0 to 1")


class FeatureMap(NamedTuple):
    """The tables `feature_umap` and `feature_neighbour`."""

    umap: pl.DataFrame
    neighbours: pl.DataFrame


class NearestFeatures(NamedTuple):
    """The n features most similar to each feature, nearest first, and their similarities [n_features n]."""

    feature_id: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float32]


def has_feature_map(layout: Layout, sae: str) -> bool:
    """Whether the store holds the map of an SAE, undamaged."""
    folder = layout.feature_map_dir(sae)
    return all(is_intact(folder / name) for name in ("umap", "neighbours"))


def feature_map(
    layout: Layout, sae: str, rows: Callable[[], Rows], config: FeatureMapConfig | None = None
) -> FeatureMap:
    """The map of an SAE; the first call makes and commits it, later calls read it.

    `rows()` returns the decoder rows [n_features d_model]; it is called only if a table is missing. If a call was
    killed between the two tables, the next one makes the second. Raises PlanMismatchError if the store has the map of
    another config, StoreWriteError if it cannot be written, and what `nearest` and `unit_rows` raise.
    """
    config = config or FeatureMapConfig()
    made_of = {"sae": Run.open(layout.saes_dir(sae)).manifest().sha}
    folder = layout.feature_map_dir(sae)

    @cache
    def directions() -> Rows:
        return unit_rows(rows())

    @cache
    def nearest_features() -> NearestFeatures:
        return nearest(directions(), max(config.n_kept, config.n_neighbors - 1))

    def neighbours() -> pl.DataFrame:
        other, cosine = (values[:, : config.n_kept] for values in nearest_features())
        n_features, n_kept = cosine.shape
        columns = {
            "feature_id": np.repeat(np.arange(n_features), n_kept),
            "rank": np.tile(np.arange(n_kept) + 1, n_features),
            "other_feature_id": other.ravel(),
            "cosine": cosine.ravel(),
        }
        return schemas.conform("feature_neighbour", pl.DataFrame(columns))

    def umap() -> pl.DataFrame:
        points = lay_out(directions(), nearest_features(), config)
        columns = {"feature_id": np.arange(len(points)), "x": points[:, 0], "y": points[:, 1]}
        return schemas.conform("feature_umap", pl.DataFrame(columns))

    # the neighbours that are kept do not depend on how the map is laid out
    kept = MapPlan(made_of=made_of, config={"n_kept": config.n_kept})
    write_table(folder / "neighbours", neighbours, kept.table("feature_neighbour"))
    write_table(folder / "umap", umap, MapPlan(made_of=made_of, config=as_json(config)).table("feature_umap"))
    return FeatureMap(read_table(folder / "umap"), read_table(folder / "neighbours"))


def unit_rows(rows: Rows) -> npt.NDArray[np.float32]:
    """The rows [n_features d_model] scaled to length 1.

    InputError for fewer than 10 rows, and for a row of length 0 or that is not finite.
    """
    if len(rows) < MIN_POINTS:
        raise InputError(f"a map needs at least {MIN_POINTS} features; got {len(rows)}")
    length = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    if not (np.isfinite(length) & (length > 0)).all():
        bad = int(np.flatnonzero(~(np.isfinite(length) & (length > 0)))[0])
        raise InputError(f"decoder row {bad} has length {length[bad, 0]}; it needs a finite length above 0")
    unit: npt.NDArray[np.float32] = (rows / length).astype(np.float32)
    return unit


def nearest(directions: Rows, n: int) -> NearestFeatures:
    """The n features of largest cosine with each of the directions [n_features d_model] of length 1, or all others if
    they are fewer than n. Of equal cosines the smaller feature id comes first.
    """
    return most_similar(lambda block: directions[block] @ directions.T, len(directions), n)


def most_similar(similarity: Callable[[slice], Rows], n_features: int, n: int) -> NearestFeatures:
    """The n features most similar to each feature, in the order of `nearest`; `similarity(block)` returns
    [len(block) n_features].

    Similarities are rounded to 6 decimals, because the error of float32 would otherwise order the rows of a PCA or of
    the neurons, which are orthogonal, by chance.
    """
    n = min(n, n_features - 1)
    result = NearestFeatures(np.empty((n_features, n), dtype=np.int64), np.empty((n_features, n), dtype=np.float32))
    step = max(1, _BLOCK_VALUES // n_features)
    for start in range(0, n_features, step):
        block = similarity(slice(start, start + step))
        row_of_block = np.arange(len(block))
        block[row_of_block, row_of_block + start] = -np.inf
        # careful: every value that ties with the smallest of the n may be among the n
        least = np.partition(block, n_features - n, axis=1)[:, n_features - n] - _ROUNDED
        for feature, (row, smallest) in enumerate(zip(block, least, strict=True), start=start):
            others = np.flatnonzero(row >= smallest)
            values = np.round(row[others], 6)
            order = np.argsort(-values, kind="stable")[:n]
            result.feature_id[feature], result.similarity[feature] = others[order], values[order]
    return result


def lay_out(directions: Rows, neighbours: NearestFeatures, config: FeatureMapConfig) -> npt.NDArray[np.float32]:
    """Coordinates [n_features 2] of directions, from their nearest neighbours."""
    n = min(config.n_neighbors - 1, neighbours.similarity.shape[1])
    itself = np.arange(len(directions))[:, None]
    # the distance of two points on the unit sphere
    distance = np.sqrt(np.maximum(2 - 2 * neighbours.similarity[:, :n], 0))
    return umap_from_neighbours(
        directions,
        np.hstack([itself, neighbours.feature_id[:, :n]]),
        np.hstack([np.zeros_like(distance[:, :1]), distance]),
        min_dist=config.min_dist,
        seed=config.seed,
    )
