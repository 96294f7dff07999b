"""The actors that steer cells: they write embeddings under every variant, and predictions of masked genes.

A shard is a fixed number of cells, in blocks of bounded memory. For each block the layers before the site run once and
the tokens are encoded once (`SteeredModel`). A table holds the rows of a variant only for the cells that the variant
steers; the other cells are, bit for bit, as in variant 0, which every cell has.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.query.steering import Role
from feature_store.storage import commit
from pipelines.steering.context import Block, Cells, SteeringPaths, open_context
from pipelines.steering.labels import Texts
from pipelines.steering.plan import InterventionType, Variant

if TYPE_CHECKING:
    import torch

    from sae_core.steering import Displace, GroupMeans, Intervention, SteeredModel, SteeredVectors, Steering

HEAD_SEED = 0
"""The seed of the choice of masked genes, which are the same for every variant."""


@dataclass(frozen=True, kw_only=True)
class SteerJob:
    """The inputs with which an actor steers any shard, as plain values that Ray can send to it.

    Attributes:
        paths: the paths of model, data and SAE.
        run: the folder of the run that is written.
        group_means: the folder of the run of group means, if any variant needs one.
        group_mean_features: the features of the columns of each of its parts; none for vectors of activations.
        variants: the variants that the model is run under, unsteered first.
        cells: cell_idx [n_cells], ascending; a shard is `shard_cells` of them.
        steered: which of the cells are steered [n_cells].
        group: the group of each cell in the group means [n_cells].
        scale: the 99th percentile of each feature, the unit of clamp and add.
        genes: the vocabulary ids of the genes whose tokens are steered; None: all.
        readout: the kind of embedding that is computed; None for given vectors, which are their own output.
        shard_cells: the number of cells of a shard.
    """

    paths: SteeringPaths
    run: str
    group_means: str | None
    group_mean_features: tuple[tuple[int, ...], ...]
    variants: tuple[Variant, ...]
    cells: Cells
    steered: npt.NDArray[np.bool_]
    group: Texts
    scale: tuple[float, ...]
    genes: tuple[int, ...] | None
    readout: str | None
    shard_cells: int


class _SteeringWorker(ABC):
    """An actor that writes the shards of a `SteerJob`."""

    def __init__(self, job: SteerJob) -> None:
        import torch

        self.job = job
        self.context = open_context(job.paths)
        self.run = commit.Run.open(job.run)
        self.unit = torch.tensor(job.scale)
        groups = sorted(set(job.group))
        self.group_code = {name: i for i, name in enumerate(groups)}
        self._means_of_variant: dict[int, GroupMeans | None] = {}

    def shard(self, number: int) -> dict[str, int]:
        """Compute and commit shard `number` unless it is committed; return counts."""
        own = slice(number * self.job.shard_cells, (number + 1) * self.job.shard_cells)
        cells, steered = self.job.cells[own], self.job.steered[own]
        if not self.run.committed(number):
            rows = [*self._frames(cells[~steered], self.job.variants[:1]), *self._frames(cells[steered])]
            frame = pl.concat(rows)
            stop = own.start + len(cells)
            self.run.commit_shard(number, lambda path: commit.write_frame(path, frame), start=own.start, stop=stop)
        return {"shards": 1, "cells": len(cells), "variants": len(self.job.variants)}

    @abstractmethod
    def rows(self, block: Block, running: "SteeredModel | SteeredVectors", variant: Variant) -> pl.DataFrame:
        """The rows of the table for the cells of a block under a variant."""

    def _frames(self, cells: Cells, variants: Sequence[Variant] | None = None) -> Iterator[pl.DataFrame]:
        for block in self.context.blocks(cells):
            running = self.context.running(block)
            for variant in self.job.variants if variants is None else variants:
                yield self.rows(block, running, variant)

    def steering(self, variant: Variant, cells: Cells) -> "Steering | Displace | None":
        """The change that a variant makes to these cells; None if it makes none."""
        import torch

        from sae_core.steering import Displace, Steering, random_direction

        if variant.role is Role.UNSTEERED:
            return None
        means = None if variant.references is None else self._group_means(variant)
        if variant.references is not None and means is None:
            return None
        group = torch.tensor([self.group_code[name] for name in self.job.group[np.searchsorted(self.job.cells, cells)]])
        if variant.role in (Role.BASELINE, Role.BASELINE_DOSE):
            assert means is not None
            amount = 1.0 if variant.dose is None else variant.dose
            return Displace(
                vectors=means, group_of_cell=group, amount=amount, genes=self.job.genes, include_masked_genes=True
            )
        seed, width = variant.direction_seed, self.context.sae.config.d_model
        return Steering(
            sae=self.context.sae,
            intervention=self._intervention(variant, means, group),
            mode=variant.mode,
            direction=None if seed is None else random_direction(width, seed=seed),
            genes=self.job.genes,
            include_masked_genes=means is None or means.gene_id is None,
        )

    def _intervention(self, variant: Variant, means: "GroupMeans | None", group: "torch.Tensor") -> "Intervention":
        """The intervention on the variant's features; for the reconstruction it scales one feature by 1."""
        from sae_core.steering import Ablate, Add, Clamp, Scale, Shift, Toward

        features, dose = sorted(variant.features), 1.0 if variant.dose is None else variant.dose
        if variant.role is Role.RECONSTRUCTION:
            return Scale(features=[0], factor=1.0)
        match variant.intervention:
            case InterventionType.ABLATE:
                return Ablate(features=features)
            case InterventionType.SCALE:
                return Scale(features=features, factor=dose)
            case InterventionType.CLAMP:
                return Clamp(features=features, dose=dose, unit=self.unit)
            case InterventionType.ADD:
                return Add(features=features, dose=dose, unit=self.unit)
            case InterventionType.TOWARD:
                assert means is not None
                return Toward(features=features, mean_code=means, amount=dose, group_of_cell=group)
            case InterventionType.SHIFT:
                assert means is not None
                return Shift(features=features, difference=means, amount=dose, group_of_cell=group)
            case None:
                raise ValueError(f"variant {variant.id} ({variant.name}) has no intervention")

    def _group_means(self, variant: Variant) -> "GroupMeans | None":
        """The variant's part of the group means, with the columns of its features; None if there are none."""
        if variant.id not in self._means_of_variant:
            assert variant.references is not None
            assert self.job.group_means is not None
            part = commit.Run.open(self.job.group_means).checked_part(variant.references)
            columns = self.job.group_mean_features[variant.references]
            at = [columns.index(feature) for feature in sorted(variant.features)] if columns else None
            self._means_of_variant[variant.id] = read_group_means(part, self.group_code, at)
        return self._means_of_variant[variant.id]


def read_group_means(part: Path, group_code: dict[str, int], columns: Sequence[int] | None) -> "GroupMeans | None":
    """The stored rows of the groups in `group_code`, with some columns (None: all); None if there are no rows.

    Rows are sorted by the name of the group, and codes ascend with the names.
    """
    import torch

    from sae_core.steering import GroupMeans

    frame = commit.read_part(part)
    frame = frame.filter(pl.col("group").is_in(list(group_code)))
    if not frame.height:
        return None
    values = frame["value"].to_numpy()
    whole = frame["gene_id"].null_count() == 0
    return GroupMeans(
        group=torch.tensor([group_code[name] for name in frame["group"]]),
        gene_id=torch.from_numpy(frame["gene_id"].to_numpy().copy()) if whole else None,
        values=torch.from_numpy(np.array(values if columns is None else values[:, columns], order="C")),
    )


class SteeredEmbedder(_SteeringWorker):
    """Writes the embeddings of cells under every variant, as rows cell_idx, variant, embedding."""

    def rows(self, block: Block, running: "SteeredModel | SteeredVectors", variant: Variant) -> pl.DataFrame:
        """See _SteeringWorker."""
        embedded = self.context.embeddings(running, self.steering(variant, block.cells), self.job.readout)
        return pl.DataFrame(
            {
                "cell_idx": block.cells,
                "variant": np.full(len(block.cells), variant.id, dtype=np.int32),
                "embedding": embedded,
            },
            schema_overrides={"embedding": pl.Array(pl.Float32, embedded.shape[1])},
        )


class MaskedGenePredictor(_SteeringWorker):
    """Writes the head's predictions of masked genes, as rows cell_idx, variant, gene_id, answer, target."""

    def rows(self, block: Block, running: "SteeredModel | SteeredVectors", variant: Variant) -> pl.DataFrame:
        """See _SteeringWorker."""
        from sae_core.steering import SteeredModel

        assert isinstance(running, SteeredModel)
        found = running.masked_gene_prediction(self.steering(variant, block.cells), seed=HEAD_SEED)
        return pl.DataFrame(
            {
                "cell_idx": block.cells[found.cell.numpy()],
                "variant": np.full(len(found.cell), variant.id, dtype=np.int32),
                "gene_id": found.gene_id.numpy(),
                "answer": found.prediction.numpy(),
                "target": found.target.numpy(),
            }
        )
