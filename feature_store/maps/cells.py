"""A map of the cells: UMAP of their codes, made once for a codes run and kept beside the codes (`codes/<run>/umap`).

Codes are scaled to unit variance, reduced to 30 principal components and laid out by umap-learn from exact nearest
neighbours. Why this way: the share of a cell's 15 neighbours that are of its own type, mean over cells / over types,

| | 700 PBMC, 10 types | 2,000 PBMC (Kang 2018), 8 types |
|---|---|---|
| the codes themselves | .56 / .40 | .71 / .49 |
| principal components of log codes | .64 / .45 | .75 / .52 |
| principal components of scaled codes | .69 / .51 | .82 / .60 |

so scaling is what matters (max-pooled codes fire in most cells, and features of large codes are seldom the telling
ones), and the logarithm is not. Exact neighbours instead of umap-learn's own need no approximation below `max_cells`
and halve what numba has to compile.

Cost: 8 CPU seconds for 700 cells, nearly all of it import and compilation, 17 s and .6 GB for 20,000 cells of 200 codes
each. At most `max_cells` cells are laid out, a seeded sample of a larger data set, and the others are left out: a
picture of more dots shows no more. The same seed gives the same map on one machine; the last digits depend on the
libraries and the processor, which is why it is stored.

McInnes, Healy and Melville, UMAP: Uniform Manifold Approximation and Projection, arXiv:1802.03426.
"""

import warnings
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from feature_store.associations.inputs import Sparse
from feature_store.codes import load_cell_codes
from feature_store.errors import InputError
from feature_store.storage import schemas
from feature_store.storage.commit import Run, read_table, write_table
from feature_store.storage.layout import MANIFEST, Layout

MIN_FIRING = 3
"""Cells in which a feature has to fire to count: one cell alone would be far from all others."""
MIN_CELLS = 10


@dataclass(frozen=True, kw_only=True)
class UmapConfig:
    """How cells are laid out."""

    n_components: int = 30
    """Principal components of the scaled codes."""
    n_neighbors: int = 15
    """Neighbours of a cell: more show the large, fewer the small."""
    min_dist: float = 0.3
    """Least distance of neighbours on the map."""
    max_cells: int = 50_000
    """Cells laid out at most, sampled from all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.n_components >= 2 and self.n_neighbors >= 2 and 0 <= self.min_dist <= 1):
            raise InputError(f"{self}: n_components and n_neighbors are at least 2, min_dist is 0 to 1")
        if self.max_cells < MIN_CELLS or self.seed < 0:
            raise InputError(f"{self}: max_cells is at least {MIN_CELLS}, seed at least 0")


def has_umap(layout: Layout, codes: str) -> bool:
    """Whether the map of a codes run is made already."""
    return (layout.umap_dir(codes) / MANIFEST).is_file()


def cell_umap(layout: Layout, codes: str, config: UmapConfig | None = None) -> pl.DataFrame:
    """The map of a codes run: cell_idx (ascending), x, y; laid out and committed at the first call, read afterwards.

    The number of cells is that of the data set in the codes' plan. Raises PlanMismatchError if the store has the map of
    another config, StoreWriteError if it cannot be written, and what `lay_out` raises.
    """
    config = config or UmapConfig()
    by_cell = Run.open(layout.codes_dir(codes) / "by_cell")
    plan = {"table": "umap", "by_cell": by_cell.manifest().sha, **asdict(config)}

    def make() -> pl.DataFrame:
        n_cells = Run.open(layout.cells_dir(by_cell.plan["dataset"])).manifest().rows
        chosen = sample(n_cells, config)
        points = lay_out(load_cell_codes(by_cell, n_cells, chosen), config)
        return schemas.conform("umap", pl.DataFrame({"cell_idx": chosen, "x": points[:, 0], "y": points[:, 1]}))

    folder = layout.umap_dir(codes)
    write_table(folder, make, plan)
    return read_table(folder)


def sample(n_cells: int, config: UmapConfig) -> npt.NDArray[np.int64]:
    """The cells that are laid out, ascending: all, or `max_cells` of them drawn without replacement."""
    if n_cells <= config.max_cells:
        return np.arange(n_cells)
    drawn = np.random.default_rng(config.seed).choice(n_cells, config.max_cells, replace=False)
    return np.sort(drawn).astype(np.int64)


def lay_out(codes: Sparse, config: UmapConfig | None = None) -> npt.NDArray[np.float32]:
    """Coordinates [n_cells 2] of CSR codes [n_cells n_features].

    InputError for fewer than 10 cells, and where fewer than 3 features vary and fire in 3 cells or more.
    """
    config = config or UmapConfig()
    components = principal_components(codes, config)
    from sklearn.neighbors import NearestNeighbors

    n_neighbors = min(config.n_neighbors, codes.shape[0] - 1)
    distance, index = NearestNeighbors(n_neighbors=n_neighbors).fit(components).kneighbors(components)
    return lay_out_neighbours(components, index, distance, min_dist=config.min_dist, seed=config.seed)


def lay_out_neighbours(
    points: npt.NDArray[np.floating],
    index: npt.NDArray[np.integer],
    distance: npt.NDArray[np.floating],
    *,
    min_dist: float,
    seed: int,
) -> npt.NDArray[np.float32]:
    """Coordinates [n_points 2] of points [n_points dimension] of which the neighbours are known.

    Args:
        points: they decide where on the map its unconnected pieces begin.
        index: the neighbours of each, itself first [n_points n_neighbors].
        distance: Euclidean distances of these [n_points n_neighbors].
        min_dist: least distance of neighbours on the map.
        seed: of the layout.
    """
    with warnings.catch_warnings():
        # of missing extras at its import, of points that are no neighbours of any other, and of numba's own
        warnings.simplefilter("ignore")
        import umap

        model = umap.UMAP(
            n_neighbors=index.shape[1],
            min_dist=min_dist,
            random_state=seed,
            n_jobs=1,
            precomputed_knn=(index.astype(np.int32), distance.astype(np.float32), None),
            force_approximation_algorithm=True,
        )
        laid_out: npt.NDArray[np.float32] = model.fit_transform(points.astype(np.float32)).astype(np.float32)
    return laid_out


def principal_components(codes: Sparse, config: UmapConfig) -> npt.NDArray[np.float64]:
    """Principal components [n_cells n_components] of codes scaled to unit variance; nothing is made dense."""
    from sklearn.decomposition import PCA

    n_cells = codes.shape[0]
    if n_cells < MIN_CELLS:
        raise InputError(f"a map of {n_cells} cells says nothing; it takes {MIN_CELLS} or more")
    columns = sparse.csc_array(codes, dtype=np.float64)
    mean: npt.NDArray[np.float64] = np.asarray(columns.mean(axis=0)).ravel()
    variance = np.asarray((columns * columns).mean(axis=0)).ravel() - mean**2
    fires = np.diff(columns.indptr) >= MIN_FIRING
    kept = np.flatnonzero(fires & (variance > 1e-9 * np.maximum(mean**2, 1e-30)))
    if kept.size < MIN_FIRING:
        raise InputError(
            f"{kept.size} of {codes.shape[1]} features vary and fire in {MIN_FIRING} cells or more: too few "
            "for a map; see `scsae features`"
        )
    scaled = sparse.csr_array(columns[:, kept] @ sparse.diags_array(1 / np.sqrt(variance[kept])))
    n_components = min(config.n_components, n_cells - 1, kept.size - 1)
    found: npt.NDArray[np.float64] = PCA(n_components, svd_solver="arpack", random_state=config.seed).fit_transform(
        scaled
    )
    return found
