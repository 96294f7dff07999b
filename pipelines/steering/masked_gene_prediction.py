"""What the model predicts of hidden genes of steered cells, gene by gene, beside the difference between real cells.

The same genes are hidden in every variant. `change` is the mean prediction for steered cells less that for the same
cells unsteered; `difference` is the mean of the true values in `toward` cells less that in `target` cells (null where
the task has no such cells, or the gene was hidden in none of them). If steering does what it should, they agree.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from feature_store.storage import schemas
from pipelines.steering.plan import Variant

MASKED_GENE_CELLS = 300
"""Test cells with hidden genes, at most: of those that are steered, and of those that they are moved toward."""


def masked_gene_variants(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """Unsteered, the chosen variant, and the first draw of each null."""
    return tuple(v for v in variants if v.id == 0 or v.chosen or (v.null is not None and v.draw == 0))


def masked_gene_table(
    answers: pl.DataFrame, variants: Sequence[Variant], toward: Sequence[int], genes: pl.DataFrame
) -> pl.DataFrame:
    """The table `head`, by variant and gene.

    Args:
        answers: rows cell_idx, variant, gene_id, answer, target.
        variants: those of the answers.
        toward: cell_idx of the cells that the others are moved toward.
        genes: symbol and gene_id.
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
    """Ascending cell_idx of at most MASKED_GENE_CELLS of the steered cells and as many of the others, drawn by seed."""
    rng = np.random.default_rng(seed)
    chosen = [
        own if len(own) <= MASKED_GENE_CELLS else rng.choice(own, MASKED_GENE_CELLS, replace=False)
        for own in (cells[steered], cells[~steered])
    ]
    return np.sort(np.concatenate(chosen))
