"""The tables of an effects run: p and q of every pair of feature and gene, and a line for each feature."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import spearmanr

from feature_store.effects import Draws
from feature_store.storage import commit, schemas
from pipelines.effects.actors import NULLS
from pipelines.effects.cells import SPLIT
from sae_core.effects import INTERVENTIONS

N_OWN, N_MATCHED = 10, 10
"""Genes that count as a feature's own, and genes of like number of cells that each is held against."""
Q = 0.05


def draws_of(run: commit.Run) -> Draws:
    """The draws of a run; each intervention has nulls of its own."""
    return Draws(run=run, group="intervention", groups=INTERVENTIONS, target="gene_id", nulls=NULLS)


def write_effects(folder: Path, draws: Draws, plan: dict[str, Any], genes: pl.DataFrame) -> commit.Run:
    """Write the table `feature_effect`, in as many parts as the draws have.

    `genes`: the symbol and gene_id of each gene.
    """

    def finish(scored: pl.DataFrame) -> pl.DataFrame:
        named = scored.join(genes, on="gene_id", how="left", maintain_order="left").with_columns(split=pl.lit(SPLIT))
        return schemas.conform("feature_effect", named.rename({"symbol": "gene"}).drop("gene_id"))

    return draws.write_scored(folder, plan, finish)


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
