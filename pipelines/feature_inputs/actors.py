"""The actors that measure inputs: a shard is a few features, each with its own cells.

The genes of a feature are chosen on its `select` cells. Its `test` cells are then gone through twice: for their genes,
among which null genes are drawn, and with the model; a token that several features of the shard want left out of a cell
is left out once. A shard holds what every gene does, null genes too, so that these can be pooled over all features when
all shards are there. Memory, for each feature of a shard: 16 bytes a token of its `test` cells, and a few
numbers a gene.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from feature_store.storage import commit
from feature_store.storage.layout import Layout, as_path
from pipelines.effects.cells import MIN_CELLS, FeatureCells
from pipelines.effects.shards import FeaturesJob, commit_shard
from pipelines.steering.context import SteeringContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_core.effects import CellGenes, FeatureInputs, GeneMeans

DRAWS_SCHEMA: dict[str, pl.DataType] = {
    "feature_id": pl.Int32(),
    "gene_id": pl.Int32(),
    "of": pl.Int32(),
    "n_cells": pl.Int32(),
    "n_donors": pl.Int32(),
    "total": pl.Float64(),
    "own": pl.Float64(),
    "other": pl.Float64(),
    "gradient": pl.Float64(),
    "n_cells_fired": pl.Int32(),
    "sum_total": pl.Float64(),
}
"""The columns of the table of draws, as in `sae_core.effects.FeatureInputs`."""


@dataclass(frozen=True, kw_only=True)
class InputsJob(FeaturesJob):
    """A job of inputs.

    Attributes:
        genes: number of genes of each feature that are tested.
    """

    genes: int


class InputsMeasurer:
    """Measures shards of an `InputsJob`; it is the body of an actor and can be called without Ray."""

    def __init__(self, job: InputsJob) -> None:
        self.job = job
        self.run = commit.Run.open(job.run)
        self.context = SteeringContext(job.paths)
        cells_dir = Layout(as_path(job.paths.store)).cells_dir(job.paths.dataset)
        self.cells = {
            split: FeatureCells(as_path(job.codes), cells_dir, n_cells=job.cells, seed=job.seed, split=split)
            for split in ("select", "test")
        }

    def shard(self, number: int) -> dict[str, int]:
        """Measure and commit shard `number` unless it is committed; return the counts for the progress display."""
        return commit_shard(self.run, number, self.job.features, self._measure)

    def _measure(self, features: tuple[int, ...]) -> pl.DataFrame:
        from sae_core.effects import CellInputs, InputSums, add_cell_inputs, choose_genes

        job, context = self.job, self.context
        attribution, cells = self._attributions(features), self._test_cells(features)
        genes = [
            choose_genes(
                attribution[j],
                cells[j],
                n_genes=job.genes,
                n_nulls=job.n_nulls,
                min_cells=MIN_CELLS,
                seed=(job.seed, feature),
            )
            for j, feature in enumerate(features)
        ]
        sums = [InputSums(own) for own in genes]

        for tokens, cell_idx, places in self.cells["test"].each(context, features):
            if chosen := [j for j in places if genes[j].n_candidates]:
                cell = CellInputs(context.model, tokens, context.sae, context.site, [features[j] for j in chosen])
                add_cell_inputs([sums[j] for j in chosen], cell, donor=self.cells["test"].donor(cell_idx))
        return draws_frame(features, [own.mean() for own in sums])

    def _attributions(self, features: tuple[int, ...]) -> "list[GeneMeans]":
        """The attributions of genes on the `select` cells of each feature."""
        from sae_core.effects import CellInputs, GeneMeans, sums_by_gene

        context = self.context
        means = [GeneMeans(len(context.model.vocabulary)) for _ in features]

        for tokens, _, places in self.cells["select"].each(context, features):
            cell = CellInputs(context.model, tokens, context.sae, context.site, [features[j] for j in places])
            found, is_gene = cell.attributions().double().numpy(), ~tokens.is_special
            for j, total, own in zip(places, cell.total.tolist(), found, strict=True):
                if total > 0:
                    means[j].add(*sums_by_gene(tokens.gene_id[is_gene], own[is_gene]))
        return means

    def _test_cells(self, features: tuple[int, ...]) -> "list[CellGenes]":
        """The genes of the `test` cells of each feature."""
        from sae_core.effects import CellGenes

        cells = [CellGenes(len(self.context.model.vocabulary)) for _ in features]

        for tokens, _, places in self.cells["test"].each(self.context, features):
            for j in places:
                cells[j].add(tokens)
        return cells


def draws_frame(features: tuple[int, ...], found: "Sequence[FeatureInputs]") -> pl.DataFrame:
    """The rows of a shard, by feature and gene; genes of fewer than MIN_CELLS cells are left out."""
    frames = [pl.DataFrame(schema=DRAWS_SCHEMA)]
    by_gene = [name for name in DRAWS_SCHEMA if name not in ("feature_id", "n_cells_fired", "sum_total")]
    for feature, own in zip(features, found, strict=True):
        kept = own.n_cells >= MIN_CELLS
        frame = pl.DataFrame({name: getattr(own, name)[kept] for name in by_gene}).with_columns(
            feature_id=pl.lit(feature), n_cells_fired=pl.lit(own.n_cells_fired), sum_total=pl.lit(own.sum_total)
        )
        frames.append(frame.select(pl.col(name).cast(dtype) for name, dtype in DRAWS_SCHEMA.items()))
    return pl.concat(frames)
