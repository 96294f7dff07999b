"""A second map of the features: UMAP of their associations with labels; made once and kept beside the associations
(`associations/<run>/map`).

A feature is its profile: the rank-biserial correlation of its code with every label (cell types, batches, donors, ...)
on `select` cells. Features of the same labels therefore lie together by construction: this is no finding about the SAE,
and another set of labels gives another map. The question is how much of the map other cells confirm. The table
evaluates maps made of `select` cells on `test` cells, by the 10 nearest of a feature on the map: the share with the
same best cell type / the squared distance of their profiles, relative to that of any two / the correlation of their
profiles minus the mean profile / the correlation of their codes over cells, which uses no label; three SAEs of 1,024
features on layer 2 of the mini model:

| | PBMC 68k, 12 labels | Kang 2018, 12 | five cell lines, 10 |
|---|---|---|---|
| this map | .34 / .54 / .32 / .15 | .46 / .42 / .40 / .20 | .60 / .31 / .61 / .19 |
| of cosines | .33 / .60 / .31 / .14 | .48 / .45 / .41 / .20 | .62 / .37 / .63 / .18 |
| of labels scaled to unit variance | .32 / .56 / .31 / .15 | .45 / .44 / .38 / .20 | .52 / .39 / .55 / .17 |
| no map: the 10 nearest profiles | .34 / .49 / .35 / .16 | .50 / .33 / .45 / .20 | .62 / .23 / .67 / .20 |
| the map of decoder rows | .21 / .93 / .05 / .06 | .34 / .91 / .07 / .13 | .25 / .92 / .06 / .04 |
| chance | .19 / 1 / .00 / .04 | .32 / 1 / .00 / .11 | .20 / 1 / .00 / .00 |

Distances are Euclidean: cosines do as well for which label a feature is associated with, and worse for how strongly,
because a feature of no label lies wherever its noise points. Labels are not scaled: a batch that no feature is
associated with would count as much as a type that many are associated with. 15 or 30 neighbours and a least distance of
.1 or .3 differ by .04 at most; the smaller keep more of the nearest (.35 of the 10 instead of .30), which decided it.
Another seed moves these figures by .01. A dead feature has no profile and is not on the map; one that fires in no
`select` cell has a profile of zeros.

Cost on one core, besides the 8 s for the import and the compilation of the first map: .8 CPU seconds for 1,024 features
of 12 labels, 4 s for 4,096 of 40, 111 s and 1.6 GB for 100,000 of 40 (58 s of them for the neighbours, which are
exact).

McInnes, Healy and Melville, UMAP: Uniform Manifold Approximation and Projection, arXiv:1802.03426.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.errors import InputError
from feature_store.maps.features import most_similar
from feature_store.maps.umap import MIN_POINTS, umap_from_neighbours
from feature_store.storage import schemas
from feature_store.storage.commit import Run, is_intact, read_part, read_table, write_table
from feature_store.storage.layout import Layout
from feature_store.storage.plans import MapPlan, as_json

MIN_LABELS = 3
_LABEL = ("label_kind", "label")


@dataclass(frozen=True, kw_only=True)
class ProfileMapConfig:
    """How features are laid out by their labels."""

    n_neighbors: int = 15
    """Neighbours of a feature, itself included."""
    min_dist: float = 0.1
    """Least distance of neighbours on the map."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.n_neighbors >= 2 and 0 <= self.min_dist <= 1 and self.seed >= 0):
            raise InputError(f"{self}: n_neighbors is at least 2, seed 0; min_dist is 0 to 1")


def has_profile_map(layout: Layout, associations: str) -> bool:
    """Whether the store holds the map of an associations run, undamaged."""
    return is_intact(layout.profile_map_dir(associations))


def profile_map(layout: Layout, associations: str, config: ProfileMapConfig | None = None) -> pl.DataFrame:
    """The table `profile_umap` of an associations run, by feature_id; the first call makes and commits it, later calls
    read it. A dead feature has no row.

    Raises InputError for fewer than 3 labels or 10 living features, PlanMismatchError if the store has the map of
    another config, StoreWriteError if it cannot be written.
    """
    config = config or ProfileMapConfig()
    folder = layout.associations_dir(associations)
    made_of = {table: Run.open(folder / table) for table in ("features", "feature_label")}

    def make() -> pl.DataFrame:
        features = read_table(made_of["features"].path, ["feature_id", "dead"])
        living = features.filter(~pl.col("dead"))["feature_id"].sort()
        points = lay_out(profiles(made_of["feature_label"], living), config)
        return schemas.conform(
            "profile_umap", pl.DataFrame({"feature_id": living, "x": points[:, 0], "y": points[:, 1]})
        )

    plan = MapPlan(made_of={table: run.manifest().sha for table, run in made_of.items()}, config=as_json(config))
    write_table(layout.profile_map_dir(associations), make, plan.table("profile_umap"))
    return read_table(layout.profile_map_dir(associations))


def profiles(feature_label: Run, features: pl.Series) -> npt.NDArray[np.float64]:
    """Rank-biserial correlations on `select` cells [n_features n_labels] of ascending features; 0 where there is none.

    Columns are in the order of (label_kind, label). InputError for fewer than 3 labels.
    """
    columns = ["feature_id", *_LABEL, "split", "rank_biserial"]
    chosen = [
        read_part(part, columns).filter(pl.col("split") == "select", pl.col("feature_id").is_in(features.implode()))
        for part in feature_label.checked_parts()
    ]
    rows = pl.concat(chosen).filter(pl.col("rank_biserial").is_finite())
    labels = rows.select(_LABEL).unique().sort(_LABEL)
    if labels.height < MIN_LABELS:
        raise InputError(f"a map by labels needs at least {MIN_LABELS} labels; got {labels.height}")
    place = rows.join(labels.with_row_index("place"), on=_LABEL, how="left", maintain_order="left")["place"]
    profile = np.zeros((len(features), labels.height))
    profile[features.search_sorted(rows["feature_id"]).to_numpy(), place.to_numpy()] = rows["rank_biserial"].to_numpy()
    return profile


def lay_out(profiles: npt.NDArray[np.float64], config: ProfileMapConfig | None = None) -> npt.NDArray[np.float32]:
    """Coordinates [n_features 2] of profiles [n_features n_labels]. InputError for fewer than 10 features."""
    config = config or ProfileMapConfig()
    if len(profiles) < MIN_POINTS:
        raise InputError(f"a map needs at least {MIN_POINTS} living features; got {len(profiles)}")
    half = (profiles**2).sum(axis=1) / 2
    # |a - b|^2 = |a|^2 - 2 (ab - |b|^2 / 2): the nearest b has the largest ab - |b|^2 / 2
    nearest = most_similar(lambda block: profiles[block] @ profiles.T - half, len(profiles), config.n_neighbors - 1)
    distance = np.sqrt(np.maximum(2 * (half[:, None] - nearest.similarity), 0))
    itself = np.arange(len(profiles))[:, None]
    return umap_from_neighbours(
        profiles,
        np.hstack([itself, nearest.feature_id]),
        np.hstack([np.zeros_like(distance[:, :1]), distance]),
        min_dist=config.min_dist,
        seed=config.seed,
    )
