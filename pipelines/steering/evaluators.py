"""The metrics of one embedding under one steering task, by group.

The metrics of each task:

    move   distances of the moved cells to the `toward` cells and to their unsteered selves, and `remaining`, the share
           of the distance that is left; movement along and off the line between the labels; whether the moved cells
           keep their type; the share of their neighbours that carry the label
    mix    leave-one-batch-out accuracy and macro-F1, mixing of batches and conservation of labels
    edit   the share of neighbours that carry the label, for the cells of the label and for the others
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from pipelines.steering.evaluation_cells import ALL, EvaluationCells, MetricValue
from pipelines.steering.metrics import mixing, scib, type_preservation
from pipelines.steering.metrics.distances import distance_table
from pipelines.steering.metrics.intervals import Bools, Floats
from pipelines.steering.metrics.knn import KNNClassifier, knn_labels
from pipelines.steering.plan import SteeringTask, Task

MIN_CELLS = 10
"""Least number of cells of a type on either side for a distance; with six, noise alone leaves half of it."""
DISTANCES = {
    "mean": ("distance", "remaining"),
    "corrected": ("distance_corrected", "remaining_corrected"),
    "energy": ("energy_distance", "energy_remaining"),
}
"""For each kind of distance, the names of the distance to the `toward` label and of the share that remains."""
_LEFT_OUT = ("lobo_accuracy", "lobo_macro_f1")


class Evaluator(ABC):
    """Computes the metrics of a task from embeddings [n_cells width] of the same cells."""

    def __init__(self, cells: EvaluationCells) -> None:
        self.cells = cells

    @abstractmethod
    def metrics(self, embedding: Floats) -> list[MetricValue]:
        """The values of every metric, by group."""


class EditEvaluator(Evaluator):
    """The share of neighbours that carry the label, for the cells that carry it and for the others."""

    def __init__(self, cells: EvaluationCells, target: str) -> None:
        super().__init__(cells)
        self.is_target = cells.label == target
        # there are no train cells beside select cells, because no choice uses neighbours
        self._knn = (
            KNNClassifier(cells.train, cells.train_label.tolist(), cells.unsteered, cells.label.tolist(), target)
            if len(cells.train)
            else None
        )

    def metrics(self, embedding: Floats) -> list[MetricValue]:
        """The metrics of `metrics.knn`; none without train cells."""
        columns = {} if self._knn is None else self._knn.columns(embedding)
        return [
            self.cells.mean(name, values, ~self.is_target if name.startswith("other") else self.is_target)
            for name, values in columns.items()
        ]


class MoveEvaluator(EditEvaluator):
    """The distances of the cells of one label to those of another within types, and the other changes of the cells."""

    def __init__(self, cells: EvaluationCells, target: str, toward: str) -> None:
        super().__init__(cells, target)
        self.is_toward = cells.label == toward
        self._types = None
        if len(cells.train) and self.is_target.any():
            self._types = knn_labels(cells.train, cells.train_type)
            self._before = self._types(cells.unsteered[self.is_target])

    def table(self, embedding: Floats, **options: Any) -> pl.DataFrame:
        """`distance_table` of these cells."""
        return distance_table(
            self.cells.unsteered,
            embedding,
            self.is_target,
            self.is_toward,
            self.cells.cell_type.tolist(),
            **{"n_splits": 0, "min_cells": MIN_CELLS, "seed": self.cells.seed, **options},
        )

    def metrics(self, embedding: Floats) -> list[MetricValue]:
        """The distances, movement, types and neighbours of the moved cells; the other cells do not change."""
        neighbours = {} if self._knn is None else self._knn.columns(embedding)
        return [
            *self._distances(embedding),
            *self._movement(embedding),
            *self._type_preservation(embedding),
            *(
                own
                for name, values in neighbours.items()
                if not name.startswith("other")
                for own in self._by_type(name, values)
            ),
        ]

    def floor(self) -> list[MetricValue]:
        """The distances that sampling noise alone would give if the moved cells were a sample of the `toward` cells."""
        found = []
        for row in self.table(self.cells.unsteered, n_splits=4).iter_rows(named=True):
            distance, remaining = DISTANCES[row["distance"]]
            share = row["floor"] / row["target_toward"] if row["target_toward"] and row["floor"] is not None else None
            found.append(MetricValue(distance, row["group"], row["floor"], row["n_target"]))
            found.append(MetricValue(remaining, row["group"], share, row["n_target"]))
        return found

    def units(self, embedding: Floats) -> dict[tuple[str, str], float]:
        """`remaining` by (donor, type) if donors have cells of both labels, else by type (donor "")."""
        donor = self.cells.donor.tolist() if (self.cells.donor != "").any() else None
        table = self.table(embedding, donor=donor, kinds=("mean",)).filter(pl.col("group") != ALL)
        table = table.drop_nulls("remaining")
        within = table.filter(pl.col("donor").is_not_null())
        chosen = within if within.height else table
        keys = zip(chosen["donor"].fill_null(""), chosen["group"], strict=True)
        return dict(zip(keys, chosen["remaining"], strict=True))

    def _distances(self, embedding: Floats) -> list[MetricValue]:
        found = []
        sampled = self._sampled(embedding)
        for row in self.table(embedding).iter_rows(named=True):
            distance, remaining = DISTANCES[row["distance"]]
            after, before = (sampled.get((row["distance"], row["group"], when)) for when in ("after", "before"))
            share = None if after is None or before is None else after / np.where(before > 0, before, np.nan)
            n = row["n_target"] or 0
            found.append(MetricValue(distance, row["group"], row["steered_toward"], n, after))
            found.append(MetricValue(remaining, row["group"], row["remaining"], n, share))
            if row["distance"] == "mean":
                found.append(MetricValue("distance_from_target", row["group"], row["steered_target"], n))
        return found

    def _sampled(self, embedding: Floats) -> dict[tuple[str, str, str], Floats]:
        """The distances in subsamples by (kind, group, before | after), for the kinds that are computed from means."""
        found: dict[tuple[str, str, str], Floats] = {}
        groups = []
        for name in np.unique(self.cells.cell_type):
            target, toward = (own & (self.cells.cell_type == name) for own in (self.is_target, self.is_toward))
            if min(target.sum(), toward.sum()) < MIN_CELLS:
                continue
            groups.append(str(name))
            reached = self._moments(self.cells.unsteered, toward)
            for when, values in (("before", self.cells.unsteered), ("after", embedding)):
                mean, noise = self._moments(values, target)
                squared = ((mean - reached[0]) ** 2).sum(1)
                found["mean", str(name), when] = np.sqrt(squared)
                found["corrected", str(name), when] = np.sqrt(np.maximum(squared - noise - reached[1], 0))
        for kind in ("mean", "corrected") if groups else ():
            for when in ("before", "after"):
                found[kind, ALL, when] = np.mean([found[kind, group, when] for group in groups], axis=0)
        return found

    def _moments(self, values: Floats, cells: Bools) -> tuple[Floats, Floats]:
        """The means [n_samples width] of `cells` in the subsamples, and what noise adds to their squared distance."""
        kept, own = self.cells.kept[:, cells], values[cells]
        n = kept.sum(1)
        # careful: variances about a far origin would lose digits in single precision
        centred = (own - own.mean(0)).astype(np.float32)
        mean = kept @ centred / n[:, None]
        spread = kept @ (centred**2).sum(1) / n - (mean**2).sum(1)
        return mean.astype(np.float64) + own.mean(0), spread.astype(np.float64) / (n - 1)

    def _movement(self, embedding: Floats) -> list[MetricValue]:
        types = self.cells.cell_type.tolist()
        table = type_preservation.off_axis(
            self.cells.unsteered, embedding, self.is_target, self.is_toward, types, min_cells=MIN_CELLS
        )
        return [
            MetricValue(metric, row["group"], row[metric], row["n_cells"])
            for row in table.iter_rows(named=True)
            for metric in ("along", "off_axis")
        ]

    def _type_preservation(self, embedding: Floats) -> list[MetricValue]:
        """The preservation of the type of the moved cells, by their nearest neighbours among unsteered train cells."""
        own = self.is_target
        if self._types is None:
            return []
        truth, after = self.cells.cell_type[own], self._types(embedding[own])
        return [
            *self._by_type("type_accuracy", (after == truth).astype(float)),
            self.cells.macro_f1("type_macro_f1", truth, after, own),
            *self._by_type("type_changed", (after != self._before).astype(float)),
        ]

    def _by_type(self, metric: str, values: Floats) -> list[MetricValue]:
        """The mean of values of the moved cells [n_moved] over all of them, and over each type of enough cells."""
        own = self.is_target
        found, types = [self.cells.mean(metric, values, own)], self.cells.cell_type[own]
        for name in np.unique(types):
            if (types == name).sum() >= MIN_CELLS:
                cells = own & (self.cells.cell_type == name)
                found.append(self.cells.mean(metric, values[types == name], cells, str(name)))
        return found


class MixEvaluator(Evaluator):
    """The mixing of batches and the conservation of cell types."""

    @cached_property
    def _conservation(self) -> float | None:
        return mixing.quick_mixing(
            self.cells.unsteered, self.cells.label.tolist(), self.cells.cell_type.tolist()
        ).conservation

    def metrics(self, embedding: Floats) -> list[MetricValue]:
        """The leave-one-batch-out metrics by batch and over batches, mixing, conservation and its relative loss."""
        batch, types, n = self.cells.label.tolist(), self.cells.cell_type.tolist(), len(embedding)
        mixed, conservation = mixing.quick_mixing(embedding, batch, types)
        before = self._conservation
        loss = None if not before or conservation is None else 1 - conservation / before
        return [
            *self._left_out(embedding),
            MetricValue("batch_mixing", ALL, mixed, n),
            MetricValue("label_conservation", ALL, conservation, n),
            MetricValue("conservation_loss", ALL, loss, n),
        ]

    def _left_out(self, embedding: Floats) -> list[MetricValue]:
        """The leave-one-batch-out metrics (`mixing.predict_left_out`) by batch, and their means over batches."""
        cells = self.cells
        batches = np.unique(cells.label)
        if len(batches) < 2:
            return []
        predicted = mixing.predict_left_out(embedding, cells.label.tolist(), cells.cell_type.tolist())
        found = []
        for name in batches:
            own = cells.label == name
            truth, said = cells.cell_type[own], predicted[own]
            found.append(cells.mean("lobo_accuracy", (truth == said).astype(float), own, str(name)))
            found.append(cells.macro_f1("lobo_macro_f1", truth, said, own, str(name)))
        return [*found, *(_mean_of([own for own in found if own.metric == name]) for name in _LEFT_OUT)]

    def scib_metrics(self, embedding: Floats) -> list[MetricValue]:
        """The scores of scIB, which take tens of seconds."""
        batch, types = self.cells.label.tolist(), self.cells.cell_type.tolist()
        found = scib.scib(embedding, self.cells.unsteered, batch, types)
        return [MetricValue(scib.metric_name(name), ALL, value, len(embedding)) for name, value in found.values.items()]


def evaluator_of(task: SteeringTask, cells: EvaluationCells) -> EditEvaluator | MixEvaluator:
    """The evaluator of a task on these cells."""
    match task.type:
        case Task.EDIT:
            return EditEvaluator(cells, task.target)
        case Task.MOVE:
            return MoveEvaluator(cells, task.target, task.toward or "")
        case Task.MIX:
            return MixEvaluator(cells)


def _mean_of(found: Sequence[MetricValue]) -> MetricValue:
    """The mean of one metric over groups, each with the same weight."""
    values = [own.value for own in found if own.value is not None]
    sampled = [own.sampled for own in found if own.sampled is not None]
    return MetricValue(
        found[0].metric,
        ALL,
        float(np.mean(values)),
        sum(own.n_cells for own in found),
        np.mean(sampled, axis=0),
    )
