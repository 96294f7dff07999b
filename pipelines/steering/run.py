"""`scsae steer`: choose features and dose on `select` cells, steer `test` cells and evaluate; a second call resumes.

The folder of a run holds these tables, in the order in which they are made:

    survey/      codes of tokens of a sample of train and select cells       (move, mix)
    scores/      features ranked on select cells
    references/  group means of train cells (search/), and of train and select cells (test/)
    search/      select cells under every point of the grid                  (where there are several points)
    variants/    the variants that test cells are run under: the chosen point, nulls, baseline
    per_cell/    train cells unsteered, test cells under every variant
    answers/     the model's predictions of masked genes                     (--head), head/ by gene
    results/     every metric of every condition

No choice uses a table that holds test cells.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from feature_store.associations.claims import ENOUGH_DRAWS
from feature_store.cells import canonical_column
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import SteeringResultsPlan
from pipelines.config import SteerOptions
from pipelines.errors import UsageError
from pipelines.external.vectors import refuse_changed_of_codes
from pipelines.inputs import warn_of_samples
from pipelines.moved_data import record_new_place
from pipelines.runtime.checks import check_before_work, check_tracking, warn_of_few_draws
from pipelines.runtime.cluster import one_ray_session
from pipelines.runtime.progress import activity
from pipelines.runtime.stage import Clock, StageResult
from pipelines.steering import feature_selection, kinds, shards, token_sample
from pipelines.steering.actors import MaskedGenePredictor, SteeredEmbedder
from pipelines.steering.dose_selection import best_mixing, choose_dose, mixing_of_grid
from pipelines.steering.embeddings import SteeredEmbeddings
from pipelines.steering.evaluation import evaluate
from pipelines.steering.group_means import MeansTable, code_group_means, mean_differences
from pipelines.steering.labels import CellLabels
from pipelines.steering.masked_gene_prediction import masked_gene_cells, masked_gene_table, masked_gene_variants
from pipelines.steering.mlflow_log import log_evaluation
from pipelines.steering.plan import (
    InterventionType,
    Null,
    NullDraw,
    Point,
    Variant,
    cross_sections,
    read_variants,
    report_variants,
    search_variants,
    variants_frame,
)
from pipelines.steering.report import drawings_of, facts_of
from pipelines.steering.request import SteeringRequest
from pipelines.steering.shards import GroupMeansRun, ShardedTables
from pipelines.steering.token_sample import TokenSample
from sae_core.steering import matched_features

SEARCH, REPORT = "search", "test"


def steer(options: SteerOptions, store: Path, *, address: str | None = None) -> StageResult:
    """Steer as the options say, evaluate on `test` cells, and log to MLflow.

    Raises:
        UsageError: an option is invalid (see `SteeringRequest.of`), or given vectors moved or changed.
        NotFoundError: there are no associations.
    """
    clock = Clock()
    layout = Layout(store)
    check_before_work(layout, address=address)
    if kinds.searches_kinds(options):
        return _steer_best_kind(options, layout, clock, address)
    request = SteeringRequest.of(options, layout)
    record_new_place(layout, request.chain.associations.dataset, options.data)
    refuse_changed_of_codes(layout, request.chain, stage="steer")
    check_tracking(layout)
    _warn_of_few_nulls(options)
    return _finished(SteeringRun(request, address), clock)


def _warn_of_few_nulls(options: SteerOptions) -> None:
    enough = f"--n-nulls {ENOUGH_DRAWS} is the fewest that allow it"
    warn_of_few_draws(options.n_nulls, "draws of each null", enough=enough)


def _steer_best_kind(options: SteerOptions, layout: Layout, clock: Clock, address: str | None) -> StageResult:
    """Search every kind of edit on `select` cells, evaluate each on `test` cells, and return the best one's result."""
    runs: dict[InterventionType, SteeringRun] = {}
    for kind in kinds.KINDS:
        request = SteeringRequest.of(kinds.options_of(options, kind), layout, among_kinds=True)
        record_new_place(layout, request.chain.associations.dataset, options.data)
        refuse_changed_of_codes(layout, request.chain, stage="steer")
        # the sample depends on no kind, and takes as long as the search
        first = next(iter(runs.values()), None)
        runs[kind] = SteeringRun(request, address, sample_of=first)
    check_tracking(layout)
    _warn_of_few_nulls(options)
    with one_ray_session():
        found = [run.on_select() for run in runs.values()]
        chosen = kinds.best_kind(found)
        best = chosen.kind
        results = {kind: run.results() for kind, run in runs.items() if kind is not best}
        finished = _finished(runs[best], clock)
    results[best] = commit.read_table(finished.path / "results")
    ids = ", ".join(f"{kind.value} {run.folder.name}" for kind, run in runs.items())
    facts = {"kinds, searched on select cells": ids, **kinds.facts_of_choice(chosen), **kinds.facts_of_kinds(results)}
    return replace(finished, facts={**finished.facts, **facts})


def _finished(run: "SteeringRun", clock: Clock) -> StageResult:
    """Finish a run and return its result."""
    results = run.results()
    warn_of_samples(run.request.layout, run.plan.dataset)
    chosen = next(variant for variant in run.variants if variant.chosen)
    return StageResult(
        kind="steering",
        run=run.folder.name,
        path=run.folder,
        done=run.tables.n_done,
        reused=run.tables.n_reused,
        seconds=clock.seconds,
        facts=facts_of(run.request, chosen, results),
    )


class SteeringRun:
    """The tables of one steering run, each of which is made when it is needed and missing.

    Attributes:
        request: the checked request.
        folder: the folder of the run.
        tables: the tables that are made in shards.
    """

    def __init__(
        self, request: SteeringRequest, address: str | None, *, sample_of: "SteeringRun | None" = None
    ) -> None:
        """`sample_of` is a run with the same cells, SAE and seed, whose token sample this one takes."""
        self.request = request
        self._sample_of = sample_of
        plan = request.plan
        self.plan = replace(plan, config={**plan.config, "shards.SHARD_CELLS": shards.SHARD_CELLS})
        self.folder = request.layout.steering_dir(self.plan.id)
        self.tables = ShardedTables(request, self.folder, self.plan, address)

    def results(self) -> pl.DataFrame:
        """The table `results`, which is also logged to MLflow."""
        request = self.request
        per_cell = self.per_cell()
        head = self.masked_genes() if request.options.head else None
        splits = {"test": (per_cell, self.variants)}
        if len(request.grid) > 1:
            splits["select"] = (self.search, self.search_variants)
        results_plan = SteeringResultsPlan(
            **{field.name: getattr(self.plan, field.name) for field in fields(self.plan)},
            features=next(v for v in self.variants if v.chosen).features,
            runs={split: run.manifest().sha for split, (run, _) in sorted(splits.items())},
        )

        def made() -> pl.DataFrame:
            return pl.concat(
                evaluate(
                    request.task,
                    variants,
                    self.embeddings(run),
                    split=split,
                    seed=request.options.seed,
                    scib=request.options.scib and split == "test",
                    by=request.by,
                )
                for split, (run, variants) in splits.items()
            )

        with activity("steer", "computes the metrics of every condition"):
            commit.write_table(self.folder / "results", made, results_plan.table("results"))
        results = commit.read_table(self.folder / "results")
        tables = {"results": results, "variants": commit.read_table(self.folder / "variants")}
        tables |= {name: frame for name, frame in (("scores", self.scores), ("head", head)) if frame is not None}
        with activity("steer", "draws its plots and logs them to MLflow"):
            log_evaluation(
                request.layout, self.folder, results_plan, tables, lambda: drawings_of(request, self.folder.name)
            )
        return results

    # the choices, which use train and select cells

    @cached_property
    def token_sample(self) -> TokenSample:
        """The token codes of a sample of train and select cells."""
        if self._sample_of is not None:
            return self._sample_of.token_sample
        return self.tables.token_sample(
            self.request.sample(("train", "select"), most=token_sample.SAMPLE_CELLS, equal=True)
        )

    @cached_property
    def labels(self) -> CellLabels:
        """The labels of the sampled cells."""
        rows = pl.DataFrame({"cell_idx": self.token_sample.cell_idx})
        own = rows.join(self.request.cells, on="cell_idx", how="left", maintain_order="left")
        return CellLabels.of(own, self.request.task.kind)

    @cached_property
    def scores(self) -> pl.DataFrame | None:
        """The features ranked on select cells; None if the options give the features."""
        by_label = self.request.by_label
        if by_label is None and self.request.options.feature:
            return None
        made = self._scored if by_label is None else by_label
        commit.write_table(self.folder / "scores", made, self.plan.table("scores"))
        return commit.read_table(self.folder / "scores")

    @property
    def ranked(self) -> list[int]:
        """The features to edit, best first."""
        if self.request.options.feature or self.scores is None:
            return list(dict.fromkeys(self.request.options.feature))
        return self.scores.sort("rank")["feature_id"].to_list()

    @cached_property
    def search_variants(self) -> tuple[Variant, ...]:
        """The variants that select cells are run under."""
        displacement = 1 if self.request.task.intervention.needs_group_means else None
        return search_variants(self.request.task, self.ranked, self.request.grid, displacement=displacement)

    @cached_property
    def search(self) -> commit.Run:
        """The run with select cells under every point of the grid."""
        request, means = self.request, None
        cells = request.sample(("select",), most=request.options.max_cells)
        if request.task.intervention.needs_group_means:
            features = tuple(self.ranked[: max(point.n_features for point in request.grid)])
            parts = (
                lambda: self._code_means(features, self.labels, ("train",)),
                lambda: self._mean_differences(("train",)),
            )
            means = self.tables.group_means(SEARCH, (features, ()), lambda part: parts[part]())
        return self.tables.steered(SteeredEmbedder, "search", cells, self.search_variants, means)

    @cached_property
    def chosen(self) -> Point:
        """The best point of the grid on select cells."""
        if len(self.request.grid) == 1:
            return self.request.grid[0]
        best = choose_dose(self.request.task, self.search_variants, self.embeddings(self.search))
        assert best.dose is not None
        return Point(len(best.features), best.dose)

    def on_select(self) -> kinds.KindOnSelect:
        """The scores of the best point of a mixing on select cells."""
        found = mixing_of_grid(self.search_variants, self.embeddings(self.search))
        unsteered = found.pop(self.search_variants[0].id)
        best = best_mixing([(score, score) for score in found.values()], unsteered)
        return kinds.KindOnSelect(kind=self.request.task.intervention, score=best, unsteered=unsteered)

    # the tables of test cells

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """The variants that test cells are run under."""
        plan = self.plan.table("variants")
        commit.write_table(self.folder / "variants", lambda: variants_frame(self._variants()), plan)
        return read_variants(commit.read_table(self.folder / "variants"))

    def per_cell(self) -> commit.Run:
        """The run with train cells unsteered and test cells under every variant."""
        cells = self.request.sample(("train", "test"), most=self.request.options.max_cells)
        return self.tables.steered(SteeredEmbedder, "per_cell", cells, self.variants, self.report_group_means())

    def masked_genes(self) -> pl.DataFrame:
        """The table `head`: the model's predictions of masked genes, by gene."""
        request = self.request
        every = request.sample(("test",), most=request.options.max_cells)
        toward = request.cells.filter(canonical_column(request.task.kind) == (request.task.toward or ""))
        is_steered, is_toward = request.is_steered(every), np.isin(every, toward["cell_idx"].to_numpy())
        kept = is_steered | is_toward
        cells = masked_gene_cells(every[kept], is_steered[kept], seed=request.options.seed)
        variants = masked_gene_variants(self.variants)
        run = self.tables.steered(MaskedGenePredictor, "answers", cells, variants, self.report_group_means())
        plan = self.plan.table("head", answers_manifest=run.manifest().sha)
        away = toward["cell_idx"].to_list()

        def made() -> pl.DataFrame:
            return masked_gene_table(commit.read_table(run.path), variants, away, request.genes)

        commit.write_table(self.folder / "head", made, plan)
        return commit.read_table(self.folder / "head")

    def report_group_means(self) -> GroupMeansRun | None:
        """The group means of train and select cells, with each part that the variants need; None if they need none."""
        by_part = {v.references: v for v in reversed(self.variants) if v.references is not None}
        if not by_part:
            return None
        first = tuple(self.ranked[: max(len(v.features) for v in self.variants)])
        n_parts = max(by_part) + 1
        features = tuple(first if part == 0 and v.features else v.features for part, v in sorted(by_part.items()))
        assert len(features) == n_parts

        def table(part: int) -> MeansTable:
            variant = by_part[part]
            if not variant.features:
                return self._mean_differences(("train", "select"))
            labels = self._shuffled(variant.draw) if variant.null is Null.SHUFFLED_LABELS else self.labels
            return self._code_means(features[part], labels, ("train", "select"))

        return self.tables.group_means(REPORT, features, table)

    def embeddings(self, run: commit.Run) -> SteeredEmbeddings:
        """The embeddings that a run holds."""
        return SteeredEmbeddings.of(commit.read_table(run.path), self.request.cells, self.request.task.kind)

    def _scored(self) -> pl.DataFrame:
        labels, _ = self.labels, self.token_sample
        with activity("steer", "ranks the features on select cells"):
            found = self._scores_of(labels)
        order = feature_selection.rank_features(found, self.request.task, self.request.alive)
        return feature_selection.scores_frame(found, order, self.request.features["density"].to_numpy())

    def _scores_of(self, labels: CellLabels) -> feature_selection.FeatureScores:
        select = np.flatnonzero((labels.split == "select") & (self.token_sample.n_tokens > 0))
        return feature_selection.score_features(self._mean_codes[select], labels.at(select), self.request.task)

    @cached_property
    def _mean_codes(self) -> Any:
        return self.token_sample.mean_codes

    def _shuffled(self, draw: int) -> CellLabels:
        rng = np.random.default_rng([self.request.options.seed, draw])
        return feature_selection.shuffle_labels(self.labels, self.request.task, rng)

    def _code_means(self, features: Sequence[int], labels: CellLabels, splits: Sequence[str]) -> MeansTable:
        task = self.request.task
        usable = np.isin(labels.split.astype(str), splits)
        table = code_group_means(
            self.token_sample, labels, task, features, by=self.request.by, cells=usable, types=self._types
        )
        if not len(table.group) and labels is self.labels:
            raise UsageError(
                f"{' and '.join(splits)} cells give no mean codes for {task.text} by {self.request.by}: no cell type "
                "that may be used has tokens of one gene on both sides; give --by none, or other labels"
            )
        return table

    def _mean_differences(self, splits: Sequence[str]) -> MeansTable:
        usable = np.isin(self.labels.split.astype(str), splits)
        return mean_differences(
            self.token_sample, self.labels, self.request.task, by=self.request.by, cells=usable, types=self._types
        )

    @cached_property
    def _types(self) -> frozenset[str]:
        """The types of all cells that have a label, as some are of test cells alone."""
        return frozenset(CellLabels.of(self.request.cells, self.request.task.kind).cell_type)

    def _variants(self) -> tuple[Variant, ...]:
        """The variants of `report_variants`, after the draws of the nulls."""
        request, options, task = self.request, self.request.options, self.request.task
        density = torch.from_numpy(request.features["density"].to_numpy().copy())
        own = self.ranked[: self.chosen.n_features]
        part = iter(range(1, 2 * options.n_nulls + 2))
        by_means = task.intervention.needs_group_means

        def null(features: Sequence[int]) -> NullDraw:
            return NullDraw(features=tuple(features), references=next(part) if by_means else None)

        random = [null(matched_features(own, density, seed=options.seed + draw)) for draw in range(options.n_nulls)]
        shuffled = []
        if request.needs_token_sample and (by_means or not options.feature):
            with activity("steer", "ranks the features by shuffled labels"):
                for draw in range(options.n_nulls):
                    features = own if options.feature else self._ranked_by(self._shuffled(draw))[: len(own)]
                    shuffled.append(null(features))
        displaced = (next(part) if by_means else 0) if request.needs_token_sample else None
        return report_variants(
            task,
            self.ranked,
            cross_sections(request.grid, self.chosen, task.intervention),
            random=random,
            shuffled=shuffled,
            seed=options.seed,
            displacement=displaced,
        )

    def _ranked_by(self, labels: CellLabels) -> list[int]:
        found = self._scores_of(labels)
        order: list[int] = feature_selection.rank_features(found, self.request.task, self.request.alive).tolist()
        return order
