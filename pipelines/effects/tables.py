"""The tables of an effects run: nulls pooled over all features, p and q of every pair, and a line for each feature.

The draws are read part by part, several times (`feature_store.effects.pool_nulls`). p of a pair is the larger of the p
from the two nulls, and its row names that null with its mean, its standard deviation and z. q is over all pairs and
both interventions.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import spearmanr

from feature_store.associations.multiple_testing import q_lookup
from feature_store.effects import EffectBlock, PooledNull, pool_nulls
from feature_store.storage import commit, schemas
from pipelines.effects.actors import SPLIT

NULLS = ("random", "mixture")
N_OWN, N_MATCHED = 10, 10
"""Genes that count as a feature's own, and genes of like number of cells that each is held against."""
Q = 0.05
_SCORES = ("null_mean", "null_sd", "z", "p", "p_random", "p_mixture")


class Draws:
    """The parts of a table of draws, as blocks of features by genes.

    Attributes:
        run: the finished run of draws.
        interventions: those that are measured.
    """

    def __init__(self, run: commit.Run, interventions: tuple[str, ...]) -> None:
        self.run, self.interventions = run, interventions
        self.n_genes = 0
        for part in self.parts():
            if part.height:
                self.n_genes = max(self.n_genes, int(part["gene_id"].max()) + 1)  # type: ignore[arg-type]

    def parts(self) -> Iterator[pl.DataFrame]:
        """The rows, part by part."""
        for path in self.run.checked_parts():
            yield commit.read_part(path)

    def blocks(self, intervention: str, null: str) -> Iterator[EffectBlock]:
        """The effects under an intervention beside a null, part by part."""
        for part in self.parts():
            own = part.filter(intervention=intervention)
            if own.height:
                yield self.block(own, null)[0]

    def block(self, rows: pl.DataFrame, null: str) -> tuple[EffectBlock, tuple[np.ndarray, np.ndarray]]:
        """The rows of some features as a block, and the place of each row in it."""
        features = rows["feature_id"].unique(maintain_order=True).to_numpy()
        place = np.searchsorted(features, rows["feature_id"].to_numpy()), rows["gene_id"].to_numpy()
        drawn = rows[null].to_numpy().astype(np.float64)
        effect = np.full((len(features), self.n_genes), np.nan)
        draws = np.full((len(features), drawn.shape[1], self.n_genes), np.nan)
        effect[place] = rows["effect"].to_numpy()
        draws[place[0], :, place[1]] = drawn
        return EffectBlock(effect=effect, draws=draws), place


def write_effects(folder: Path, draws: Draws, plan: dict[str, Any], genes: pl.DataFrame) -> None:
    """Write the table `feature_effect`, in as many parts as the draws have.

    `genes`: the symbol and gene_id of each gene.
    """
    pooled = {
        (intervention, null): pool_nulls(partial(draws.blocks, intervention, null), draws.n_genes)
        for intervention in draws.interventions
        for null in NULLS
    }
    q_of = q_lookup([scored(draws, part, pooled)["p"].to_numpy() for part in draws.parts()])
    run = commit.Run.create(folder, plan)
    for number, part in enumerate(draws.parts()):
        frame = scored(draws, part, pooled)
        frame = frame.with_columns(q=pl.Series(q_of(frame["p"].to_numpy()), dtype=pl.Float64))
        named = frame.join(genes, on="gene_id", how="left", maintain_order="left")
        table = schemas.conform("feature_effect", named.with_columns(gene=pl.col("symbol")).drop("symbol", "gene_id"))
        marker = draws.run.manifest().shards[number]
        run.commit_shard(number, partial(commit.write_frame, frame=table), start=marker.start, stop=marker.stop)
    run.finalize()


def scored(draws: Draws, part: pl.DataFrame, pooled: dict[tuple[str, str], PooledNull]) -> pl.DataFrame:
    """The rows of a part with the null of the larger p: its name, mean, standard deviation, z and p."""
    frames = []
    for intervention in draws.interventions:
        rows = part.filter(intervention=intervention)
        if not rows.height:
            continue
        found = {}
        for null in NULLS:
            block, place = draws.block(rows, null)
            scores = pooled[intervention, null].scores(block)
            found[null] = np.stack([scores.mean[place], scores.sd[place], scores.z[place], scores.p[place]])
        # careful: a gene without any null draw that moves has no p, and was not tested
        p = np.stack([np.nan_to_num(found[null][3], nan=1.0) for null in NULLS])
        harder = p.argmax(0)
        mean, sd, z, _ = np.where(harder == 0, found[NULLS[0]], found[NULLS[1]])
        frames.append(
            rows.drop(NULLS).with_columns(
                split=pl.lit(SPLIT),
                null=pl.Series([NULLS[i] for i in harder], dtype=pl.String),
                null_mean=pl.Series(mean),
                null_sd=pl.Series(sd),
                z=pl.Series(z).fill_nan(None),
                p=pl.Series(p.max(0)),
                p_random=pl.Series(p[0]),
                p_mixture=pl.Series(p[1]),
            )
        )
    empty = (
        part.drop(NULLS)
        .head(0)
        .with_columns(
            split=pl.lit(SPLIT),
            null=pl.lit("", dtype=pl.String),
            **{name: pl.lit(0.0, dtype=pl.Float64) for name in _SCORES},
        )
    )
    return pl.concat([empty, *frames])


def summary_frame(
    draws: Draws, effects: commit.Run, own_genes: dict[int, list[str]], genes: pl.DataFrame
) -> pl.DataFrame:
    """A line for each feature and intervention.

    `own_genes`: the genes that a feature goes with, chosen on `select` cells and significant on `test` cells. `genes`:
    symbol and gene_id.
    """
    rows = []
    symbols = dict(genes.select("gene_id", "symbol").iter_rows())
    for part, path in zip(draws.parts(), effects.checked_parts(), strict=True):
        scores = commit.read_part(path)
        for (feature, intervention), drawn in part.group_by("feature_id", "intervention", maintain_order=True):
            own = scores.filter(feature_id=feature, intervention=intervention)
            names = [symbols.get(gene, "") for gene in drawn["gene_id"].to_list()]
            rows.append(
                {
                    "feature_id": feature,
                    "intervention": intervention,
                    "n_genes": drawn.height,
                    "n_up": own.filter((pl.col("q") <= Q) & (pl.col("effect") > pl.col("null_mean"))).height,
                    "n_down": own.filter((pl.col("q") <= Q) & (pl.col("effect") < pl.col("null_mean"))).height,
                    **_strength(drawn),
                    **_specificity(drawn, names, own_genes.get(int(feature), [])),
                    "direct_spearman": _spearman(drawn["direct"].to_numpy(), drawn["effect"].to_numpy()),
                }
            )
    empty = schemas.empty("feature_effect_summary")
    return schemas.conform("feature_effect_summary", pl.DataFrame(rows, schema=empty.schema))


def _strength(drawn: pl.DataFrame) -> dict[str, float | None]:
    """Root mean square of the effect over genes, and its ratio to that of the stronger null."""
    own = float(np.sqrt((drawn["effect"].to_numpy().astype(np.float64) ** 2).mean()))
    nulls = [float(np.sqrt((drawn[null].to_numpy().astype(np.float64) ** 2).mean())) for null in NULLS]
    return {"strength": own, "strength_ratio": own / max(nulls) if max(nulls) > 0 else None}


def _specificity(drawn: pl.DataFrame, names: list[str], own: list[str]) -> dict[str, float | None]:
    """Mean |effect| on the feature's own genes over that on genes of as many cells; and the same of the nulls."""
    is_own = np.isin(names, own[:N_OWN])
    if not is_own.any() or is_own.sum() + N_MATCHED > len(is_own):
        return {"specificity": None, "specificity_null": None}
    n_cells = drawn["n_cells"].to_numpy().astype(np.int64)
    others = np.flatnonzero(~is_own)
    matched = np.stack(
        [
            others[np.argsort(np.abs(n_cells[others] - n_cells[i]), kind="stable")[:N_MATCHED]]
            for i in np.flatnonzero(is_own)
        ]
    )

    def ratio(effect: np.ndarray) -> float:
        return float(np.abs(effect[is_own]).mean() / np.abs(effect[matched]).mean())

    nulls = [drawn[null].to_numpy() for null in NULLS]
    of_nulls = [np.mean([ratio(own_null[:, j]) for j in range(own_null.shape[1])]) for own_null in nulls]
    return {"specificity": ratio(drawn["effect"].to_numpy()), "specificity_null": float(max(of_nulls))}


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)
