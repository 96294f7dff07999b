"""A map of the cells: UMAP of their codes, made once for a codes run and kept beside the codes (`codes/<run>/umap`).

Codes are scaled to unit variance, reduced to 30 principal components and laid out by umap-learn from exact nearest
neighbours. Why this way: the share of a cell's 15 neighbours that are of its own type, mean over cells / over types,

| | 700 PBMC, 10 types | 2,000 PBMC (Kang 2018), 8 types |
|---|---|---|
| the codes themselves | .56 / .40 | .71 / .49 |
| principal components of log codes | .64 / .45 | .75 / .52 |
| principal components of scaled codes | .69 / .51 | .82 / .60 |

so scaling matters and the logarithm does not: max-pooled codes fire in most cells, and the features with the largest
codes are seldom those that distinguish cell types.

Cost: 8 CPU seconds for 700 cells, nearly all of it import and compilation, 17 s and .6 GB for 20,000 cells of 200 codes
each. Of a larger data set a seeded sample of `max_cells` cells is laid out, as a picture of more dots shows no more.

McInnes, Healy and Melville, UMAP: Uniform Manifold Approximation and Projection, arXiv:1802.03426.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from feature_store.associations.inputs import Sparse
from feature_store.cells import read_panel
from feature_store.codes import CodesRun, load_cell_codes, panel_with_tokens
from feature_store.errors import InputError
from feature_store.maps.umap import MIN_POINTS, umap_from_neighbours
from feature_store.storage import schemas
from feature_store.storage.commit import is_intact, read_table, write_table
from feature_store.storage.layout import Layout
from feature_store.storage.plans import MapPlan, as_json

MIN_FIRING = 3
"""A feature counts if it fires in at least this many cells: a single cell would be far from all others."""


@dataclass(frozen=True, kw_only=True)
class CellMapConfig:
    """How cells are laid out."""

    n_components: int = 30
    """Principal components of the scaled codes."""
    n_neighbors: int = 15
    """Neighbours of a cell: more show large structures, fewer small ones."""
    min_dist: float = 0.3
    """Least distance of neighbours on the map."""
    max_cells: int = 50_000
    """The most cells that are laid out; a larger data set is sampled."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.n_components >= 2 and self.n_neighbors >= 2 and 0 <= self.min_dist <= 1):
            raise InputError(f"{self}: n_components and n_neighbors are at least 2, min_dist is 0 to 1")
        if self.max_cells < MIN_POINTS or self.seed < 0:
            raise InputError(f"{self}: max_cells is at least {MIN_POINTS}, seed at least 0")


def has_cell_map(layout: Layout, codes: str) -> bool:
    """Whether the store holds the map of a codes run, undamaged."""
    return is_intact(layout.umap_dir(codes))


def cell_map(layout: Layout, codes: str, config: CellMapConfig | None = None) -> pl.DataFrame:
    """The map of a codes run: cell_idx (ascending), x, y; the first call makes and commits it, later calls read it.

    The cells are those of the panel that have tokens. Raises PlanMismatchError if the store has the map of
    another config, StoreWriteError if it cannot be written, and what `lay_out` raises.
    """
    config = config or CellMapConfig()
    run = CodesRun.open(layout.codes_dir(codes))
    plan = MapPlan(
        made_of={"by_cell": run.by_cell.manifest().sha}, config={**as_json(config), "min_firing": MIN_FIRING}
    )

    def make() -> pl.DataFrame:
        panel = read_panel(layout.cells_dir(run.plan.dataset))
        with_tokens = panel[panel_with_tokens(run, panel)]
        chosen = with_tokens[sample(len(with_tokens), config)]
        points = lay_out(load_cell_codes(run, chosen), config)
        return schemas.conform("umap", pl.DataFrame({"cell_idx": chosen, "x": points[:, 0], "y": points[:, 1]}))

    folder = layout.umap_dir(codes)
    write_table(folder, make, plan.table("umap"))
    return read_table(folder)


def sample(n_cells: int, config: CellMapConfig) -> npt.NDArray[np.int64]:
    """The cells of the map, ascending: all, or `max_cells` of them drawn without replacement."""
    if n_cells <= config.max_cells:
        return np.arange(n_cells)
    drawn = np.random.default_rng(config.seed).choice(n_cells, config.max_cells, replace=False)
    return np.sort(drawn).astype(np.int64)


def lay_out(codes: Sparse, config: CellMapConfig | None = None) -> npt.NDArray[np.float32]:
    """Coordinates [n_cells 2] of CSR codes [n_cells n_features].

    InputError for fewer than 10 cells, and where fewer than 3 features vary and fire in 3 cells or more.
    """
    config = config or CellMapConfig()
    components = principal_components(codes, config)
    from sklearn.neighbors import NearestNeighbors

    n_neighbors = min(config.n_neighbors, codes.shape[0] - 1)
    distance, index = NearestNeighbors(n_neighbors=n_neighbors).fit(components).kneighbors(components)
    return umap_from_neighbours(components, index, distance, min_dist=config.min_dist, seed=config.seed)


def principal_components(codes: Sparse, config: CellMapConfig) -> npt.NDArray[np.float64]:
    """Principal components [n_cells n_components] of codes scaled to unit variance; the codes stay sparse."""
    from sklearn.decomposition import PCA

    n_cells = codes.shape[0]
    if n_cells < MIN_POINTS:
        raise InputError(f"a map needs at least {MIN_POINTS} cells; got {n_cells}")
    columns = sparse.csc_array(codes, dtype=np.float64)
    mean: npt.NDArray[np.float64] = np.asarray(columns.mean(axis=0)).ravel()
    variance = np.asarray((columns * columns).mean(axis=0)).ravel() - mean**2
    fires = np.diff(columns.indptr) >= MIN_FIRING
    kept = np.flatnonzero(fires & (variance > 1e-9 * np.maximum(mean**2, 1e-30)))
    if kept.size < MIN_FIRING:
        raise InputError(
            f"a map needs at least {MIN_FIRING} features that vary and fire in {MIN_FIRING} cells or more; "
            f"got {kept.size} of {codes.shape[1]}; see `scsae features`"
        )
    scaled = sparse.csr_array(columns[:, kept] @ sparse.diags_array(1 / np.sqrt(variance[kept])))
    n_components = min(config.n_components, n_cells - 1, kept.size - 1)
    components: npt.NDArray[np.float64] = PCA(
        n_components, svd_solver="arpack", random_state=config.seed
    ).fit_transform(scaled)
    return components
