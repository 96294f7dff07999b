"""A second map of the features: UMAP of how each goes with the labels; made once and kept beside the associations
(`associations/<run>/map`).

A feature is its profile: the rank-biserial correlation of its code with every label (cell types, batches, donors, ...)
on `select` cells. `feature_store.feature_map` asks which directions are alike, which says little; here features that
tell the same labels lie together, by construction. So that they do is no finding, and a feature's place follows from
the labels that were tested. What is one is how much of it other cells bear out. Maps made of `select` cells, 10 nearest
of a feature on the map, judged on `test` cells: the share with the same best cell type / the same class, the
correlation of their profiles (less the mean profile) / of their codes over cells, which knows of no label; three SAEs
of 1,024 features on layer 2 of the mini model:

| | PBMC 68k, 12 labels | Kang 2018, 12 | five cell lines, 10 |
|---|---|---|---|
| this map | .33 / .66 / .32 / .15 | .47 / .84 / .40 / .20 | .60 / .55 / .61 / .19 |
| by cosine | .33 / .59 / .31 / .14 | .48 / .77 / .41 / .20 | .62 / .45 / .63 / .18 |
| standardised by label | .32 / .64 / .31 / .15 | .45 / .81 / .38 / .20 | .52 / .52 / .55 / .17 |
| no map: nearest profiles | .34 / .66 / .35 / .16 | .51 / .86 / .45 / .20 | .62 / .60 / .67 / .20 |
| map of decoder rows | DECODER |
| chance | .19 / .50 / .00 / .04 | .32 / .60 / .00 / .11 | .20 / .41 / .00 / .00 |

Distances are Euclidean: by cosine the best cell type agrees as well, but the class does not, as a feature that tells no
label lies wherever its noise points. As they are: standardised, a batch that no feature tells counts as much as a type
that many do. 15 or 30 neighbours and a least distance of .1 or .3 differ by .03 at most; the smaller keep more of the
nearest (.35 of 10).

COST

McInnes, Healy and Melville, UMAP: Uniform Manifold Approximation and Projection, arXiv:1802.03426.
"""

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store import schemas
from feature_store.commit import Run, read_part, read_table, write_table
from feature_store.errors import InputError
from feature_store.feature_map import MIN_FEATURES, most_similar
from feature_store.layout import MANIFEST, Layout
from feature_store.umap import lay_out_neighbours

MIN_LABELS = 3
_LABEL = ("label_kind", "label")


@dataclass(frozen=True, kw_only=True)
class ProfileMapConfig:
    """How features are laid out by their labels."""

    n_neighbors: int = 15
    """Neighbours of a feature, itself among them."""
    min_dist: float = 0.1
    """Least distance of neighbours on the map."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.n_neighbors >= 2 and 0 <= self.min_dist <= 1 and self.seed >= 0):
            raise InputError(f"{self}: n_neighbors is at least 2, seed 0; min_dist is 0 to 1")


def has_profile_map(layout: Layout, associations: str) -> bool:
    """Whether the map of an associations run is made already."""
    return (layout.profile_map_dir(associations) / MANIFEST).is_file()


def profile_map(layout: Layout, associations: str, config: ProfileMapConfig | None = None) -> pl.DataFrame:
    """The table `profile_umap` of an associations run, by feature_id: laid out and committed at the first call, read
    afterwards. A dead feature has no row.

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

    plan = {table: run.manifest().sha for table, run in made_of.items()}
    write_table(layout.profile_map_dir(associations), make, {"table": "profile_umap", **plan, **asdict(config)})
    return read_table(layout.profile_map_dir(associations))


def profiles(feature_label: Run, features: pl.Series) -> npt.NDArray[np.float64]:
    """Rank-biserial correlations on `select` cells [n_features n_labels] of features, ascending; 0 where there is none.

    Columns are in the order of (label_kind, label). InputError for fewer than 3 labels.
    """
    columns = ["feature_id", *_LABEL, "split", "rank_biserial"]
    chosen = [
        read_part(part, columns).filter(pl.col("split") == "select", pl.col("feature_id").is_in(features.implode()))
        for part in feature_label.parts()
    ]
    rows = pl.concat(chosen).filter(pl.col("rank_biserial").is_finite())
    labels = rows.select(_LABEL).unique().sort(_LABEL)
    if labels.height < MIN_LABELS:
        raise InputError(f"a map by {labels.height} labels says nothing; it takes {MIN_LABELS} or more")
    place = rows.join(labels.with_row_index("place"), on=_LABEL, how="left", maintain_order="left")["place"]
    found = np.zeros((len(features), labels.height))
    found[features.search_sorted(rows["feature_id"]).to_numpy(), place.to_numpy()] = rows["rank_biserial"].to_numpy()
    return found


def lay_out(profiles: npt.NDArray[np.float64], config: ProfileMapConfig | None = None) -> npt.NDArray[np.float32]:
    """Coordinates [n_features 2] of profiles [n_features n_labels]. InputError for fewer than 10 features."""
    config = config or ProfileMapConfig()
    if len(profiles) < MIN_FEATURES:
        raise InputError(f"a map of {len(profiles)} living features says nothing; it takes {MIN_FEATURES} or more")
    half = (profiles**2).sum(axis=1) / 2
    # |a - b|^2 = |a|^2 - 2 (ab - |b|^2 / 2): the nearest are those of the largest ab - |b|^2 / 2
    found = most_similar(lambda own: profiles[own] @ profiles.T - half, len(profiles), config.n_neighbors - 1)
    distance = np.sqrt(np.maximum(2 * (half[:, None] - found.similarity), 0))
    own = np.arange(len(profiles))[:, None]
    return lay_out_neighbours(
        profiles,
        np.hstack([own, found.feature_id]),
        np.hstack([np.zeros_like(distance[:, :1]), distance]),
        min_dist=config.min_dist,
        seed=config.seed,
    )
