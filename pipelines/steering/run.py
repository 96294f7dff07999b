"""`scsae steer`: survey, choice, search on `select` cells, report on `test` cells, results; resumed by calling again.

    survey/      codes of tokens of train and select cells       (move, mix)
    scores/      features ranked on select cells
    references/  mean codes of train cells (search/), of train and select cells (test/)
    search/      select cells under every point of the grid      (where there are several)
    variants/    what test cells are run under: the chosen point, nulls, baseline
    per_cell/    train cells unsteered, test cells under every variant
    answers/     what the model's head says of hidden genes      (--head), head/ by gene
    results/     every condition on every metric
Test cells are in none of the tables that something is chosen from.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from feature_store.query.metrics import HEADLINE_OF_TASK
from feature_store.storage import commit
from feature_store.storage.layout import Layout, run_id
from pipelines.config import SteerOptions
from pipelines.errors import UsageError
from pipelines.runtime.actor_pool import do_shards
from pipelines.runtime.stage import Clock, StageResult
from pipelines.steering import selection, token_sample
from pipelines.steering.actors import Asker, Steerer, SteerJob
from pipelines.steering.context import Cells
from pipelines.steering.evaluation import Embedded, best_variant, evaluate
from pipelines.steering.group_means import Table, code_references, displacements, group_of_cells, table_frame
from pipelines.steering.masked_gene_prediction import head_cells, head_table, head_variants
from pipelines.steering.mlflow_log import log_evaluation
from pipelines.steering.plan import (
    ALL,
    MEAN_DIFFERENCE,
    NULLS,
    SHUFFLED_LABELS,
    UNSTEERED,
    NullDraw,
    Point,
    Variant,
    cross_sections,
    read_variants,
    report_variants,
    search_variants,
    variants_frame,
)
from pipelines.steering.request import Asked
from pipelines.steering.selection import Labels
from pipelines.steering.token_sample import Survey, SurveyJob, Surveyor, read_survey
from sae_core.steering import matched_features

SHARD_CELLS = 64
"""Cells that an actor steers between two commits."""
SEARCH, REPORT = "search", "test"


def steer(options: SteerOptions, store: Path, *, address: str | None = None) -> StageResult:
    """Steer as asked, evaluate on `test` cells, log to MLflow.

    Raises:
        UsageError: see `Asked.of`.
        NotFoundError: there are no associations.
    """
    clock = Clock()
    trial = Trial(Asked.of(options, Layout(store)), address)
    results = trial.results()
    chosen = next(variant for variant in trial.variants if variant.chosen)
    return StageResult(
        kind="steering",
        run=trial.folder.name,
        path=trial.folder,
        done=trial.n_done,
        reused=trial.n_reused,
        seconds=clock.seconds,
        facts=facts_of(trial.asked, chosen, results),
    )


class Trial:
    """The tables of one steering run, each made when it is needed and not there.

    Attributes:
        asked: the checked question.
        folder: of the run.
        n_done, n_reused: shards done now, and found.
    """

    def __init__(self, asked: Asked, address: str | None) -> None:
        self.asked, self.address = asked, address
        self.plan = {**asked.plan, "shard_cells": SHARD_CELLS, "survey_cells": token_sample.SURVEY_CELLS}
        self.folder = asked.layout.steering_dir(run_id(self.plan))
        self.n_done = self.n_reused = 0

    def results(self) -> pl.DataFrame:
        """The table `results`, logged to MLflow."""
        asked = self.asked
        per_cell = self.per_cell()
        head = self.head() if asked.options.head else None
        splits = {"test": (per_cell, self.variants)}
        if len(asked.grid) > 1:
            splits["select"] = (self.search, self.search_variants)
        plan = {
            **self.plan,
            "table": "results",
            "features": list(next(v for v in self.variants if v.chosen).features),
            "runs": {split: run.manifest().sha for split, (run, _) in sorted(splits.items())},
        }

        def made() -> pl.DataFrame:
            return pl.concat(
                evaluate(
                    asked.question,
                    variants,
                    self.embedded(run),
                    split=split,
                    seed=asked.options.seed,
                    scib=asked.options.scib and split == "test",
                )
                for split, (run, variants) in splits.items()
            )

        commit.write_table(self.folder / "results", made, plan)
        results = commit.read_table(self.folder / "results")
        tables = {"results": results, "variants": commit.read_table(self.folder / "variants")}
        tables |= {name: frame for name, frame in (("scores", self.scores), ("head", head)) if frame is not None}
        log_evaluation(asked.layout, self.folder, plan, tables, lambda: drawings_of(asked, self.folder.name))
        return results

    @cached_property
    def surveyed(self) -> Survey:
        """Token codes of train and select cells."""
        asked = self.asked
        cells = asked.sample(("train", "select"), most=token_sample.SURVEY_CELLS, equal=True)
        n_shards = -(-len(cells) // token_sample.SHARD_CELLS)
        codes, means = (
            commit.Run.create(self.folder / "survey" / name, {**self.plan, "table": name, "n_shards": n_shards})
            for name in ("codes", "means")
        )
        job = SurveyJob(
            place=asked.place(),
            codes=str(codes.path.resolve()),
            means=str(means.path.resolve()),
            cells=cells,
            shard_cells=token_sample.SHARD_CELLS,
        )
        self._do(Surveyor, job, (codes, means), title="survey")
        return read_survey(codes.path, means.path, self.asked.features.height)

    @cached_property
    def labels(self) -> Labels:
        """Of the surveyed cells."""
        rows = pl.DataFrame({"cell_idx": self.surveyed.cell_idx})
        own = rows.join(self.asked.cells, on="cell_idx", how="left", maintain_order="left")
        return Labels.of(own, self.asked.question.kind)

    @cached_property
    def scores(self) -> pl.DataFrame | None:
        """Features ranked on select cells; None where the features were given and none was to be chosen."""
        by_label = self.asked.by_label
        if by_label is None and self.asked.options.feature:
            return None
        made = self._scored if by_label is None else by_label
        commit.write_table(self.folder / "scores", made, {**self.plan, "table": "scores"})
        return commit.read_table(self.folder / "scores")

    @property
    def ranked(self) -> list[int]:
        """Features to edit, best first."""
        if self.asked.options.feature or self.scores is None:
            return list(dict.fromkeys(self.asked.options.feature))
        return self.scores.sort("rank")["feature_id"].to_list()

    @cached_property
    def search_variants(self) -> tuple[Variant, ...]:
        """What select cells are run under."""
        return search_variants(self.asked.question, self.ranked, self.asked.grid)

    @cached_property
    def search(self) -> commit.Run:
        """Select cells under every point of the grid."""
        cells = self.asked.sample(("select",), most=self.asked.options.max_cells)
        references = None
        if self.asked.question.needs_references:
            features = (tuple(self.ranked[: max(point.n_features for point in self.asked.grid)]),)
            references = self._references(SEARCH, features, lambda _: self._own(features[0], self.labels, ("train",)))
        return self._steer(Steerer, "search", cells, self.search_variants, references)

    @cached_property
    def chosen(self) -> Point:
        """The point of the grid that does best on select cells."""
        if len(self.asked.grid) == 1:
            return self.asked.grid[0]
        best = best_variant(self.asked.question, self.search_variants, self.embedded(self.search))
        assert best.dose is not None
        return Point(len(best.features), best.dose)

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """What test cells are run under."""
        plan = {**self.plan, "table": "variants"}
        commit.write_table(self.folder / "variants", lambda: variants_frame(self._variants()), plan)
        return read_variants(commit.read_table(self.folder / "variants"))

    def per_cell(self) -> commit.Run:
        """Train cells unsteered and test cells under every variant."""
        cells = self.asked.sample(("train", "test"), most=self.asked.options.max_cells)
        return self._steer(Steerer, "per_cell", cells, self.variants, self.report_references())

    def head(self) -> pl.DataFrame:
        """What the model's head says, by gene."""
        asked = self.asked
        every = asked.sample(("test",), most=asked.options.max_cells)
        toward = asked.cells.filter(pl.col(asked.question.kind).cast(pl.String) == (asked.question.toward or ""))
        is_steered, is_toward = asked.is_steered(every), np.isin(every, toward["cell_idx"].to_numpy())
        kept = is_steered | is_toward
        cells = head_cells(every[kept], is_steered[kept], seed=asked.options.seed)
        variants = head_variants(self.variants)
        run = self._steer(Asker, "answers", cells, variants, self.report_references())
        plan = {**self.plan, "table": "head", "answers_manifest": run.manifest().sha}
        away = toward["cell_idx"].to_list()
        commit.write_table(
            self.folder / "head", lambda: head_table(commit.read_table(run.path), variants, away, asked.genes), plan
        )
        return commit.read_table(self.folder / "head")

    def report_references(self) -> "tuple[commit.Run, tuple[tuple[int, ...], ...]] | None":
        """References of train and select cells, a part for each that the variants name."""
        by_part = {v.references: v for v in reversed(self.variants) if v.references is not None}
        if not by_part:
            return None
        first = tuple(self.ranked[: max(len(v.features) for v in self.variants)])
        n_parts = max(by_part) + 1
        features = tuple(first if part == 0 and v.features else v.features for part, v in sorted(by_part.items()))
        assert len(features) == n_parts

        def table(part: int) -> Table:
            variant = by_part[part]
            if not variant.features:
                return self._displacements()
            labels = self._shuffled(variant.draw) if variant.null == SHUFFLED_LABELS else self.labels
            return self._own(features[part], labels, ("train", "select"))

        return self._references(REPORT, features, table)

    def embedded(self, run: commit.Run) -> Embedded:
        """The embeddings of a run."""
        return Embedded.of(commit.read_table(run.path), self.asked.cells, self.asked.question.kind)

    def _scored(self) -> pl.DataFrame:
        found = self._scores_of(self.labels)
        order = selection.ranked(found, self.asked.question, self.asked.alive)
        return selection.scores_frame(found, order, self.asked.features["density"].to_numpy())

    def _scores_of(self, labels: Labels) -> selection.Scores:
        select = np.flatnonzero((labels.split == "select") & (self.surveyed.n_tokens > 0))
        return selection.scores(self._mean_codes[select], labels.at(select), self.asked.question)

    @cached_property
    def _mean_codes(self) -> Any:
        return self.surveyed.mean_codes

    def _shuffled(self, draw: int) -> Labels:
        rng = np.random.default_rng([self.asked.options.seed, draw])
        return selection.shuffled(self.labels, self.asked.question, rng)

    def _own(self, features: Sequence[int], labels: Labels, splits: Sequence[str]) -> Table:
        question = self.asked.question
        usable = np.isin(labels.split.astype(str), splits)
        table = code_references(self.surveyed, labels, question, features, by=self.asked.by, cells=usable)
        if not len(table.group) and labels is self.labels:
            raise UsageError(
                f"{' and '.join(splits)} cells give no mean codes for {question.text}: no cell type has tokens of one "
                "gene on both sides; take --by none, or other labels"
            )
        return table

    def _displacements(self) -> Table:
        usable = np.isin(self.labels.split.astype(str), ("train", "select"))
        return displacements(self.surveyed, self.labels, self.asked.question, by=self.asked.by, cells=usable)

    def _variants(self) -> tuple[Variant, ...]:
        """`report_variants` with the nulls drawn."""
        asked, options, question = self.asked, self.asked.options, self.asked.question
        density = torch.from_numpy(asked.features["density"].to_numpy().copy())
        own = self.ranked[: self.chosen.n_features]
        part = iter(range(1, 2 * options.n_nulls + 2))
        refers = question.needs_references

        def null(features: Sequence[int]) -> NullDraw:
            return NullDraw(features=tuple(features), references=next(part) if refers else None)

        random = [null(matched_features(own, density, seed=options.seed + draw)) for draw in range(options.n_nulls)]
        shuffled = []
        if asked.surveys and (refers or not options.feature):
            for draw in range(options.n_nulls):
                features = own if options.feature else self._ranked_by(self._shuffled(draw))[: len(own)]
                shuffled.append(null(features))
        displaced = (next(part) if refers else 0) if asked.surveys else None
        return report_variants(
            question,
            self.ranked,
            cross_sections(asked.grid, self.chosen, question.intervention),
            random=random,
            shuffled=shuffled,
            seed=options.seed,
            displacement=displaced,
        )

    def _ranked_by(self, labels: Labels) -> list[int]:
        order: list[int] = selection.ranked(self._scores_of(labels), self.asked.question, self.asked.alive).tolist()
        return order

    def _references(
        self, name: str, features: tuple[tuple[int, ...], ...], table: Callable[[int], Table]
    ) -> tuple[commit.Run, tuple[tuple[int, ...], ...]]:
        """The run of references of a split, with the features of each part."""
        plan = {**self.plan, "table": "references", "of": name, "features": features, "n_shards": len(features)}
        run = commit.Run.create(self.folder / "references" / name, plan)
        for part in run.pending():
            frame = table_frame(table(part))
            run.commit_shard(part, partial(commit.write_frame, frame=frame), start=part, stop=part + 1)
        run.finalize()
        return run, features

    def _steer(
        self,
        worker: type,
        table: str,
        cells: Cells,
        variants: tuple[Variant, ...],
        references: "tuple[commit.Run, tuple[tuple[int, ...], ...]] | None",
    ) -> commit.Run:
        """The run of a table of cells under variants, finished."""
        asked = self.asked
        rows = pl.DataFrame({"cell_idx": cells}).join(asked.cells, on="cell_idx", how="left", maintain_order="left")
        labels = Labels.of(rows, asked.question.kind)
        n_shards = -(-len(cells) // SHARD_CELLS)
        listed = variants_frame(variants)
        plan = {
            **self.plan,
            "table": table,
            "variants": listed.to_dicts(),
            "references": None if references is None else references[0].manifest().sha,
            "n_shards": n_shards,
        }
        run = commit.Run.create(self.folder / table, plan)
        job = SteerJob(
            place=asked.place(),
            run=str(run.path.resolve()),
            references=None if references is None else str(references[0].path.resolve()),
            reference_features=() if references is None else references[1],
            variants=variants,
            cells=cells,
            steered=asked.is_steered(cells) & (labels.split != "train"),
            group=group_of_cells(labels, asked.question, asked.by),
            scale=tuple(asked.features["p99"].fill_null(0.0).to_list()),
            genes=asked.gene_ids,
            readout=asked.options.readout,
            shard_cells=SHARD_CELLS,
        )
        self._do(worker, job, (run,), title=table.replace("_", " "))
        return run

    def _do(self, worker: type, job: Any, runs: Sequence[commit.Run], *, title: str) -> None:
        """Do the shards that any of the runs lacks, and finish the runs."""
        pending = sorted({shard for run in runs for shard in run.pending()})
        if pending:
            with runs[0].sole_driver():
                do_shards(worker, job, pending, self.asked.options, title=title, note=_count, address=self.address)
        for run in runs:
            run.finalize()
        self.n_done += len(pending)
        self.n_reused += runs[0].n_shards - len(pending)


def drawings_of(asked: Asked, run: str) -> dict[str, Callable[[Path], object]]:
    """The plots of a finished run, by name; nothing is drawn yet."""
    from feature_store import FeatureStore
    from feature_store.plots.steering import steering_drawings

    found = FeatureStore.open(asked.layout.root, associations=asked.associations.path.parent.name)
    return dict(steering_drawings(found, run))


def facts_of(asked: Asked, chosen: Variant, results: pl.DataFrame) -> dict[str, Any]:
    """What a person wants to see first."""
    metric = HEADLINE_OF_TASK[asked.question.name]
    rows = results.filter(split="test", group=ALL, metric=metric)
    own = rows.filter("chosen").row(0, named=True)
    facts: dict[str, Any] = {"target": asked.question.text, "features": list(chosen.features)}
    if asked.question.name == "edit":
        facts["effect on target_votes"] = own["effect"]
        facts["95 % interval"] = [own["low"], own["high"]]
    else:
        facts["intervention"] = f"{chosen.intervention}, {len(chosen.features)} features, dose {chosen.dose:g}"
        for name in (UNSTEERED, *NULLS, MEAN_DIFFERENCE):
            found = rows.filter(condition=name)["value"]
            if len(found) and found[0] is not None:
                facts[f"{metric} of {name}"] = found[0]
        facts[metric] = own["value"]
    for null in NULLS:
        if (p := own[f"p_{null.replace(' ', '_')}"]) is not None:
            facts[f"p against {null}"] = p
    return facts


def _count(total: Mapping[str, int], _seconds: float) -> str:
    return f"{total['cells']} cells under {total['variants'] // max(total['shards'], 1)} variants"
