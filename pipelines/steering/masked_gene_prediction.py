"""The model's predictions of masked genes in steered cells, by gene, beside the difference between real cells.

The same genes are masked in every variant. `change` is the mean prediction for steered cells minus that for the same
cells unsteered. `difference` is the mean of the true values in `toward` cells minus that in `target` cells (null if the
task has no such cells, or the gene was masked in none of them). The two agree if steering works.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from feature_store.query.steering import Role
from feature_store.storage import schemas
from pipelines.steering.plan import Variant

MASKED_GENE_CELLS = 300
"""Largest number of test cells with masked genes, of the steered cells and of the `toward` cells each."""


def masked_gene_variants(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """The variants whose predictions are made: unsteered, the chosen one, the first draw of each null, the baseline."""
    first = (Role.NULL, Role.BASELINE)
    return tuple(v for v in variants if v.id == 0 or v.chosen or (v.role in first and v.draw == 0))


def masked_gene_table(
    answers: pl.DataFrame, variants: Sequence[Variant], toward: Sequence[int], genes: pl.DataFrame
) -> pl.DataFrame:
    """The table `head`, by variant and gene.

    Args:
        answers: the rows cell_idx, variant, gene_id, answer, target.
        variants: the variants of these rows.
        toward: the cell_idx of the `toward` cells.
        genes: the symbol and gene_id of each gene.
    """
    names = dict(genes.select("gene_id", "symbol").iter_rows())
    is_toward = pl.col("cell_idx").is_in(list(toward))
    unsteered = answers.filter(variant=0)
    true = unsteered.group_by("gene_id").agg(
        to=pl.col("target").cast(pl.Float64).filter(is_toward).mean(),
        of=pl.col("target").cast(pl.Float64).filter(~is_toward).mean(),
    )
    frames = []
    for variant in variants:
        if variant.id == 0:
            continue
        own = answers.filter(variant=variant.id).join(
            unsteered.select("cell_idx", "gene_id", before="answer"), on=["cell_idx", "gene_id"]
        )
        change = (pl.col("answer").cast(pl.Float64) - pl.col("before").cast(pl.Float64)).mean()
        by_gene = own.sort("gene_id", "cell_idx").group_by("gene_id", maintain_order=True)
        frame = by_gene.agg(n_cells=pl.len(), change=change).join(true, on="gene_id", how="left", maintain_order="left")
        frames.append(
            frame.select(
                condition=pl.lit(variant.name),
                draw=pl.lit(variant.draw, dtype=pl.Int32),
                gene=pl.col("gene_id").replace_strict(names, default=None, return_dtype=pl.String).fill_null(""),
                n_cells=pl.col("n_cells").cast(pl.Int64),
                change="change",
                difference=pl.col("to") - pl.col("of"),
            )
        )
    table = pl.concat(frames) if frames else schemas.empty("steering_head")
    return schemas.conform("steering_head", table.filter(pl.col("gene") != "").sort("condition", "draw", "gene"))


def masked_gene_cells(cells: np.ndarray, steered: np.ndarray, *, seed: int) -> np.ndarray:
    """The ascending cell_idx of up to MASKED_GENE_CELLS steered cells and as many of the others, drawn by seed."""
    rng = np.random.default_rng(seed)
    chosen = [
        own if len(own) <= MASKED_GENE_CELLS else rng.choice(own, MASKED_GENE_CELLS, replace=False)
        for own in (cells[steered], cells[~steered])
    ]
    return np.sort(np.concatenate(chosen))
