"""A map of the features: UMAP of an SAE's decoder rows, and each one's nearest others; made once and kept beside the
SAE (`saes/<run>/map/{umap,neighbours}`).

A feature is its direction in the model's space, so two are alike as far as their decoder rows point the same way
(cosine). Neighbours are exact. Read the map with care, the neighbours are the better guide: a thousand directions in
128 dimensions are nearly orthogonal (median cosine with the nearest other .4), and two dimensions keep 2 of the 10
nearest of a feature. Share of the 10 nearest with the same best label / of the same class, and what chance gives
(shuffled labels, its 95 % point), three SAEs of 1,024 features on layer 2 of the mini model:

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
from dataclasses import asdict, dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.errors import InputError
from feature_store.maps.cells import lay_out_neighbours
from feature_store.storage import schemas
from feature_store.storage.commit import Run, read_table, write_table
from feature_store.storage.layout import MANIFEST, Layout

Rows = npt.NDArray[np.floating]

MIN_FEATURES = 10
_BLOCK_VALUES = 1 << 24
"""Similarities held at once (64 MB of cosines)."""
_ROUNDED = 2e-6
"""More than rounding moves the difference of two similarities."""


@dataclass(frozen=True, kw_only=True)
class FeatureMapConfig:
    """How features are laid out."""

    n_kept: int = 10
    """Nearest others of a feature that are kept as a table."""
    n_neighbors: int = 15
    """Neighbours of a feature, itself among them, that make the map."""
    min_dist: float = 0.1
    """Least distance of neighbours on the map."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.n_kept >= 1 and self.n_neighbors >= 2 and 0 <= self.min_dist <= 1 and self.seed >= 0):
            raise InputError(f"{self}: n_kept is at least 1, n_neighbors 2, seed 0; min_dist is 0 to 1")


class FeatureMap(NamedTuple):
    """The two tables of a map, as `schemas` has them."""

    umap: pl.DataFrame
    neighbours: pl.DataFrame


class Nearest(NamedTuple):
    """The nearest others of each feature [n_features n], nearest first, and how similar they are."""

    feature_id: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float32]


def has_feature_map(layout: Layout, sae: str) -> bool:
    """Whether the map of an SAE is made already."""
    folder = layout.feature_map_dir(sae)
    return all((folder / name / MANIFEST).is_file() for name in ("umap", "neighbours"))


def feature_map(
    layout: Layout, sae: str, rows: Callable[[], Rows], config: FeatureMapConfig | None = None
) -> FeatureMap:
    """The map of an SAE: laid out and committed at the first call, read afterwards.

    `rows()` gives the decoder rows [n_features d_model]; it is called only where something is to be made. A call that
    was killed between the two tables makes the second. Raises PlanMismatchError if the store has the map of another
    config, StoreWriteError if it cannot be written, and what `nearest` and `unit_rows` raise.
    """
    config = config or FeatureMapConfig()
    plan = {"sae": Run.open(layout.saes_dir(sae)).manifest().sha}
    folder = layout.feature_map_dir(sae)

    @cache
    def directions() -> Rows:
        return unit_rows(rows())

    @cache
    def found() -> Nearest:
        return nearest(directions(), max(config.n_kept, config.n_neighbors - 1))

    def neighbours() -> pl.DataFrame:
        other, cosine = (values[:, : config.n_kept] for values in found())
        n_features, n_kept = cosine.shape
        columns = {
            "feature_id": np.repeat(np.arange(n_features), n_kept),
            "rank": np.tile(np.arange(n_kept) + 1, n_features),
            "other_feature_id": other.ravel(),
            "cosine": cosine.ravel(),
        }
        return schemas.conform("feature_neighbour", pl.DataFrame(columns))

    def umap() -> pl.DataFrame:
        points = lay_out(directions(), found(), config)
        columns = {"feature_id": np.arange(len(points)), "x": points[:, 0], "y": points[:, 1]}
        return schemas.conform("feature_umap", pl.DataFrame(columns))

    write_table(folder / "neighbours", neighbours, {"table": "feature_neighbour", "n_kept": config.n_kept, **plan})
    write_table(folder / "umap", umap, {"table": "feature_umap", **asdict(config), **plan})
    return FeatureMap(read_table(folder / "umap"), read_table(folder / "neighbours"))


def unit_rows(rows: Rows) -> npt.NDArray[np.float32]:
    """Rows [n_features d_model] of length 1.

    InputError for fewer than 10, and for a row that has no direction (of length 0, or not finite).
    """
    if len(rows) < MIN_FEATURES:
        raise InputError(f"a map of {len(rows)} features says nothing; it takes {MIN_FEATURES} or more")
    length = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    if not (np.isfinite(length) & (length > 0)).all():
        bad = int(np.flatnonzero(~(np.isfinite(length) & (length > 0)))[0])
        raise InputError(f"decoder row {bad} has length {length[bad, 0]}; it has to be finite and above 0")
    found: npt.NDArray[np.float32] = (rows / length).astype(np.float32)
    return found


def nearest(directions: Rows, n: int) -> Nearest:
    """The n others of the largest cosine of each of the directions [n_features d_model], of length 1; all
    others where there are fewer than n. Of equal cosines the smaller feature id comes first.
    """
    return most_similar(lambda own: directions[own] @ directions.T, len(directions), n)


def most_similar(similarity: Callable[[slice], Rows], n_features: int, n: int) -> Nearest:
    """The n others most similar to each feature, as `nearest` has them; `similarity(own)` gives [own n_features].

    Similarities are rounded to 6 decimals: what lies below is the error of float32, and would else order the rows of a
    PCA or of the neurons, which are orthogonal, by chance.
    """
    n = min(n, n_features - 1)
    found = Nearest(np.empty((n_features, n), dtype=np.int64), np.empty((n_features, n), dtype=np.float32))
    step = max(1, _BLOCK_VALUES // n_features)
    for start in range(0, n_features, step):
        block = similarity(slice(start, start + step))
        own = np.arange(len(block))
        block[own, own + start] = -np.inf
        # careful: of the values that equal the least of the n, any may be among the n
        least = np.partition(block, n_features - n, axis=1)[:, n_features - n] - _ROUNDED
        for feature, (row, smallest) in enumerate(zip(block, least, strict=True), start=start):
            others = np.flatnonzero(row >= smallest)
            values = np.round(row[others], 6)
            order = np.argsort(-values, kind="stable")[:n]
            found.feature_id[feature], found.similarity[feature] = others[order], values[order]
    return found


def lay_out(directions: Rows, found: Nearest, config: FeatureMapConfig) -> npt.NDArray[np.float32]:
    """Coordinates [n_features 2] of directions, from their nearest others."""
    n = min(config.n_neighbors - 1, found.similarity.shape[1])
    own = np.arange(len(directions))[:, None]
    # the distance of two points on the unit sphere
    distance = np.sqrt(np.maximum(2 - 2 * found.similarity[:, :n], 0))
    return lay_out_neighbours(
        directions,
        np.hstack([own, found.feature_id[:, :n]]),
        np.hstack([np.zeros_like(distance[:, :1]), distance]),
        min_dist=config.min_dist,
        seed=config.seed,
    )
