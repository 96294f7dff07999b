"""A map of `test` cells before and after steering, kept beside the run (`steering/<run>/map`).

Both pairs of coordinates are computed from the unsteered cells alone and then fixed, so that cells move and the map
does not:

    pc1, pc2  principal components of the unsteered embeddings; steered ones are projected onto them
    x, y      UMAP of the unsteered embeddings; a steered cell lies at the mean of its 15 nearest unsteered ones,
              weighted by 1 / squared distance (Shepard, ACM National Conference 1968, doi:10.1145/800186.810616)

Why not umap-learn's own `transform`: over 12 variants of 86 PBMC, and over 5 of 174,

| | of a cell's 15 neighbours, also neighbours on the map | shift by noise of 1e-6, relative to the map's spread |
|---|---|---|
| transform | .68, .77 | .13, .05 |
| mean weighted by 1 / squared distance | .66, .76 | 0, 0 |
| position of the nearest cell | .66, .76 | 0, 0 |

so the mean is nearly as accurate, and a cell that steering does not change stays where it is, which `transform` does
not guarantee; 3,000 cells of 512 numbers take .2 CPU seconds a variant instead of 10. Either way UMAP puts a steered
cell among the unsteered ones, and cannot show that a cell left them all. The components can, as far as the shift lies
along the first two, and `gap` measures it in all dimensions: the distance to the nearest unsteered cell, in units of
the median distance of an unsteered cell to its nearest neighbour.

The map has the first draw of each null. Of more than `max_cells` cells it has a seeded sample, with the labels of the
steered kind in their proportions. A cell that a variant does not steer has no row for this variant.

Cost: 14 CPU seconds (8 of them import and compilation), .6 GB and 1.7 MB for 3,000 cells of 512 numbers under 25
variants; 9 s for 174 cells.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells import canonical_column
from feature_store.errors import InputError
from feature_store.maps.umap import MIN_POINTS, umap_from_neighbours
from feature_store.storage import schemas
from feature_store.storage.commit import Run, read_part, read_table, write_table
from feature_store.storage.layout import MANIFEST, Layout
from feature_store.storage.plans import MapPlan, SteeringPlan, as_json

if TYPE_CHECKING:
    from sklearn.neighbors import NearestNeighbors

UNSTEERED, BASELINE_DOSE = "unsteered", "baseline_dose"
Floats = npt.NDArray[np.float64]
_COORDINATES = ("pc1", "pc2", "x", "y", "gap")


@dataclass(frozen=True, kw_only=True)
class SteeringMapConfig:
    """How steered cells are laid out."""

    max_cells: int = 3000
    """The most test cells that are laid out; more are sampled."""
    n_neighbors: int = 15
    """Neighbours of a cell, for the layout and for the position of a steered cell."""
    min_dist: float = 0.3
    """Least distance of neighbours on the UMAP."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_cells < MIN_POINTS or self.n_neighbors < 2 or not 0 <= self.min_dist <= 1 or self.seed < 0:
            raise InputError(
                f"{self}: max_cells is at least {MIN_POINTS}, n_neighbors at least 2, min_dist 0 to 1, seed at least 0"
            )


def has_embeddings(layout: Layout, run: str) -> bool:
    """Whether a steering run has the embeddings of which a map is made."""
    folder = layout.steering_dir(run)
    return all((folder / name / MANIFEST).is_file() for name in ("per_cell", "variants"))


def steering_map(layout: Layout, run: str, config: SteeringMapConfig | None = None) -> pl.DataFrame:
    """The table `steering_map` of a run, by variant and cell_idx; the first call makes and commits it, later calls read
    it.

    It has no rows if fewer than 10 test cells have a token and a label of the steered kind. Raises NotFoundError for a
    run without embeddings (`has_embeddings`), PlanMismatchError if the store has a map of another config,
    StoreWriteError if it cannot be written.
    """
    config = config or SteeringMapConfig()
    folder = layout.steering_dir(run)
    per_cell = Run.open(folder / "per_cell")
    plan = MapPlan(made_of={"per_cell": per_cell.manifest().sha}, config=as_json(config))

    def make() -> pl.DataFrame:
        return _map_table(
            per_cell, _labelled(layout, per_cell), mapped_variants(read_table(folder / "variants")), config
        )

    write_table(folder / "map", make, plan.table("steering_map"))
    return read_table(folder / "map")


def mapped_variants(variants: pl.DataFrame) -> pl.DataFrame:
    """The rows of the table `steering_variants` that are on the map: all but the later draws of nulls and the further
    doses of baselines.
    """
    kept = (pl.col("role") != "null") | (pl.col("draw") == 0)
    return variants.filter(kept & (pl.col("role") != BASELINE_DOSE))


def sample(cells: pl.DataFrame, config: SteeringMapConfig) -> pl.DataFrame:
    """The cells of the map out of cells with a `label`, by cell_idx: all, or `max_cells` evenly over the labels."""
    if cells.height <= config.max_cells:
        return cells.sort("cell_idx")
    random = pl.Series("random", np.random.default_rng(config.seed).random(cells.height))
    shuffled = cells.sort("cell_idx").with_columns(random).sort("label", "random")
    taken = np.linspace(0, cells.height - 1, config.max_cells).round().astype(np.int64)
    return shuffled[taken].drop("random").sort("cell_idx")


@dataclass(frozen=True, kw_only=True, eq=False)
class UnsteeredMap:
    """The map of the unsteered cells, on which any embedding has a position.

    Attributes:
        embedding: embeddings of the unsteered cells [n_cells width], at least 10.
    """

    embedding: Floats
    config: SteeringMapConfig

    def coordinates(self, embedding: Floats) -> Floats:
        """pc1, pc2, x, y and gap of any embeddings [n width], as [n 5]."""
        distance, index = self._neighbours.kneighbors(embedding)
        # careful: the weight of a neighbour at distance 0 is not infinite; it outweighs all others
        weight = 1 / np.maximum(distance / np.maximum(distance[:, :1], 1e-12), 1.0) ** 2
        weight /= weight.sum(axis=1, keepdims=True)
        flat = (self.umap[index] * weight[:, :, None]).sum(axis=1)
        return np.column_stack([(embedding - self._mean) @ self._axes.T, flat, distance[:, 0] / self._unit])

    @cached_property
    def unsteered(self) -> Floats:
        """`coordinates` of the unsteered cells themselves [n_cells 5]; their gap is that to another cell."""
        gap = self._graph[0][:, 1] / self._unit
        return np.column_stack([(self.embedding - self._mean) @ self._axes.T, self.umap, gap])

    @cached_property
    def umap(self) -> Floats:
        """UMAP of the unsteered cells [n_cells 2]."""
        distance, index = self._graph
        config = self.config
        points = umap_from_neighbours(self.embedding, index, distance, min_dist=config.min_dist, seed=config.seed)
        return points.astype(np.float64)

    @cached_property
    def _mean(self) -> Floats:
        mean: Floats = self.embedding.mean(axis=0)
        return mean

    @cached_property
    def _axes(self) -> Floats:
        """The first two components [2 width], each with its largest entry positive, because its sign is arbitrary."""
        axes: Floats = np.linalg.svd(self.embedding - self._mean, full_matrices=False)[2][:2]
        largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
        return axes * np.sign(largest)

    @cached_property
    def _graph(self) -> tuple[Floats, npt.NDArray[np.int64]]:
        distance, index = self._neighbours.kneighbors(self.embedding)
        return distance, index

    @cached_property
    def _unit(self) -> float:
        """The median distance of a cell to its nearest neighbour."""
        return float(np.median(self._graph[0][:, 1])) or 1.0

    @cached_property
    def _neighbours(self) -> "NearestNeighbors":
        from sklearn.neighbors import NearestNeighbors

        n_neighbors = min(self.config.n_neighbors, len(self.embedding) - 1)
        return NearestNeighbors(n_neighbors=n_neighbors, algorithm="brute").fit(self.embedding)


def _labelled(layout: Layout, per_cell: Run) -> pl.DataFrame:
    """cell_idx and label of the test cells that have a label."""
    plan = SteeringPlan.of(per_cell)
    cells = read_table(layout.cells_dir(plan.dataset), columns=["cell_idx", "split", plan.kind])
    test = cells.filter(pl.col("split") == "test").select("cell_idx", label=canonical_column(plan.kind))
    return test.drop_nulls("label")


def _map_table(per_cell: Run, cells: pl.DataFrame, variants: pl.DataFrame, config: SteeringMapConfig) -> pl.DataFrame:
    """The table `steering_map`; the parts are read twice, first for the unsteered cells, then for the others."""
    base = int(variants.filter(pl.col("role") == UNSTEERED)["variant"][0])
    wanted = cells["cell_idx"].implode()
    unsteered = pl.concat(
        _finite(read_part(part).filter((pl.col("variant") == base) & pl.col("cell_idx").is_in(wanted)))
        for part in per_cell.checked_parts()
    )
    known = sample(cells.join(unsteered.select("cell_idx"), on="cell_idx", how="semi"), config)["cell_idx"]
    if len(known) < MIN_POINTS:
        return _rows(unsteered.clear(), np.zeros((0, len(_COORDINATES))))
    rows_unsteered = unsteered.filter(pl.col("cell_idx").is_in(known.implode())).sort("cell_idx")
    unsteered_map = UnsteeredMap(embedding=_array(rows_unsteered), config=config)
    tables = [_rows(rows_unsteered, unsteered_map.unsteered)]
    others = variants["variant"].filter(variants["variant"] != base).implode()
    for part in per_cell.checked_parts():
        rows = read_part(part).filter(pl.col("cell_idx").is_in(known.implode()) & pl.col("variant").is_in(others))
        if (rows := _finite(rows)).height:
            tables.append(_rows(rows, unsteered_map.coordinates(_array(rows))))
    return pl.concat(tables).sort("variant", "cell_idx")


def _rows(rows: pl.DataFrame, coordinates: Floats) -> pl.DataFrame:
    columns = {name: pl.Series(coordinates[:, i], dtype=pl.Float32) for i, name in enumerate(_COORDINATES)}
    return schemas.conform("steering_map", rows.select("variant", "cell_idx").with_columns(**columns))


def _array(rows: pl.DataFrame) -> Floats:
    embedding: Floats = rows["embedding"].to_numpy().astype(np.float64)
    return embedding


def _finite(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows of cells that have a token; the embedding of a cell without one is NaN."""
    return rows.filter(pl.Series(np.isfinite(_array(rows)).all(axis=1), dtype=pl.Boolean)) if rows.height else rows
