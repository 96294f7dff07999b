"""The edges of the features of an SAE: features of other layers that change one of them, or that it changes."""

from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from feature_store.errors import StoreError
from feature_store.query.runs import newest_run_of
from feature_store.storage import commit

if TYPE_CHECKING:
    from feature_store.query.store import FeatureStore

Side = Literal["upstream", "downstream"]
SIDES: tuple[Side, ...] = ("upstream", "downstream")
NAMES = ("top_label", "top_genes", "class")
_EDGE = "relation effect share null null_mean null_sd z p q n_cells n_cells_fired n_donors n_agree p_donor".split()


def edges_beside(store: "FeatureStore", side: Side, *, n: int, feature: int | None = None) -> pl.DataFrame:
    """The n edges of smallest p of a feature of the store's SAE, or of each, on one side.

    Columns: feature_id, the feature of this SAE; other_sae, other_feature_id; those of the table `feature_edge`; and
    top_label, top_genes and class of the other feature, null where the store has no associations of its SAE. Of several
    runs that have a pair, the newest counts. QueryError if there is no table `feature_edge`.
    """
    own, other = ("to", "from") if side == "upstream" else ("from", "to")
    pair = ["feature_id", "other_sae", "other_feature_id"]
    mine = pl.col(f"{own}_sae") == store.lineage.sae
    if feature is not None:
        mine &= pl.col(f"{own}_feature_id") == feature
    rows = store.frame("feature_edge").filter(mine)
    rows = rows.select(
        pl.col(f"{own}_feature_id").alias("feature_id"),
        pl.col(f"{other}_sae").alias("other_sae"),
        pl.col(f"{other}_feature_id").alias("other_feature_id"),
        *_EDGE,
    )
    rows = rows.unique(pair, keep="first", maintain_order=True)
    order = ["p", pl.col("z").abs(), "other_sae", "other_feature_id"]
    rows = rows.sort(order, descending=[False, True, False, False], nulls_last=True)
    best = rows.group_by("feature_id", maintain_order=True).head(n).collect()
    names = [_names_of(store, sae) for sae in best["other_sae"].unique().sort()]
    empty = pl.DataFrame(
        schema={"other_sae": pl.String, "other_feature_id": pl.Int32} | dict.fromkeys(NAMES, pl.String)
    )
    return best.join(
        pl.concat([empty, *names]), on=["other_sae", "other_feature_id"], how="left", maintain_order="left"
    )


def site_of(store: "FeatureStore", sae: str) -> str | None:
    """The site of an SAE; None if it is not in the store any more."""
    try:
        return str(store.sae_facts(sae)["site"])
    except StoreError:
        return None


def _names_of(store: "FeatureStore", sae: str) -> pl.DataFrame:
    of: dict[str, Any] = {"sae": sae, "dataset": store.lineage.dataset}
    info = newest_run_of(store.layout, "associations", of)
    columns = (pl.lit(sae).alias("other_sae"), pl.col("feature_id").cast(pl.Int32).alias("other_feature_id"))
    if info is None:
        return pl.DataFrame({"feature_id": [], **{name: [] for name in NAMES}}).select(
            *columns, pl.col(NAMES).cast(pl.String)
        )
    return commit.read_table(info.path / "features").select(*columns, pl.col(NAMES).cast(pl.String))
