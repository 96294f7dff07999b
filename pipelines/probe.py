"""Probes: which few features tell the cells of a label from the others, for an SAE and what it is held against.

    <root>/probes/<run>/feature_probe/   the features of each probe, in their order, with weights and gains
    <root>/probes/<run>/probe_score/     how well each probe does on `test` cells

A part is one kind of label from one representation: the SAE, each of its baselines in the store, the most variable
genes, and PERMUTED: the SAE with the labels permuted among the cells of each donor and split, which finds nothing but
chance. `feature_store.probes` has the method. An actor holds the codes of the cells of three splits, at most `--cells`
of each, at 12 bytes a nonzero code, and a copy of them over their standard deviations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

import feature_store.probes.by_label as by_label_module
import feature_store.probes.logistic as logistic_module
import feature_store.probes.scores as scores_module
from feature_store.associations.held_out_units import unit_column
from feature_store.associations.inputs import Labels
from feature_store.associations.moments import column_moments
from feature_store.cells import ExpressionReader, read_panel, read_panel_cells
from feature_store.codes import CodesRun, load_cell_codes, panel_with_tokens
from feature_store.errors import OutdatedRunError
from feature_store.probes import ProbedCells, probe
from feature_store.query.probes import PERMUTED, SAE
from feature_store.query.runs import RunChain
from feature_store.storage import commit, schemas
from feature_store.storage.layout import PROBE_TABLES, Layout, RunInfo
from feature_store.storage.plans import AssociationsPlan, ProbePlan, constants_of
from pipelines.associate import associations_of, expression_dir, label_kinds, write_expression_by_gene
from pipelines.baseline import chain_of_sae
from pipelines.compare import baselines_of
from pipelines.config import ProbeOptions
from pipelines.errors import UsageError
from pipelines.inputs import warn_of_samples
from pipelines.runtime.actor_pool import do_shards
from pipelines.runtime.checks import check_before_work
from pipelines.runtime.cluster import one_ray_session
from pipelines.runtime.stage import Clock, StageResult

GENES = "genes"
CELL_TYPE = "cell_type"
_SPLIT = "test"
_STREAM = 29
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ProbeJob:
    """What an actor needs: the root of the store, and the folder and the plan of the run."""

    store: str
    folder: str
    plan: ProbePlan


class ProbeWorker:
    """The body of an actor: probes of one kind of label from one representation a shard."""

    def __init__(self, job: ProbeJob) -> None:
        self._job, self._layout = job, Layout(job.store)
        self._tables = [commit.Run.open(Path(job.folder) / name) for name in PROBE_TABLES]

    def shard(self, number: int) -> dict[str, int]:
        """Commit the rows of a shard in both tables."""
        plan = self._job.plan
        kind, representation = _parts(plan)[number]
        cells = _LabelledCells.of(self._layout, plan, kind)
        labels = cells.permuted(plan.seed) if representation == PERMUTED else cells.labels
        features, known = self._features(representation, cells)
        probed = probe(
            ProbedCells(
                features=features, label=labels.codes, names=labels.names, split=cells.split, unit=cells.unit_codes
            ),
            plan.ks,
        )
        shared = {"representation": representation, "label_kind": kind, "split": _SPLIT}
        for run, frame in zip(self._tables, (probed.features, probed.scores), strict=True):
            named = _named(frame, labels.names, known).with_columns(
                **{key: pl.lit(text) for key, text in shared.items()}
            )
            rows = schemas.conform(run.path.name, named)
            run.commit_shard(number, partial(commit.write_frame, frame=rows), start=number, stop=number + 1)
        return {"labels": probed.scores["label"].drop_nulls().n_unique()}

    def _features(self, representation: str, cells: "_LabelledCells") -> tuple[Any, pl.DataFrame]:
        """The features of the cells, sparse [n_cells n_features], and the feature_id and name of each."""
        plan = self._job.plan
        if representation == GENES:
            return self._expression(cells)
        run = plan.representations[SAE if representation == PERMUTED else representation]
        folder = self._layout.associations_dir(run)
        codes = CodesRun.open(self._layout.codes_dir(AssociationsPlan.of(commit.Run.open(folder / "features")).codes))
        known = commit.read_table(folder / "features", ["feature_id", "top_genes"])
        return load_cell_codes(codes, cells.cell_idx), known.sort("feature_id").rename({"top_genes": "name"})

    def _expression(self, cells: "_LabelledCells") -> tuple[Any, pl.DataFrame]:
        """The expression of the genes of the largest variance among `train` cells; a feature_id is a gene_idx."""
        plan, layout = self._job.plan, self._layout
        panel = read_panel(layout.cells_dir(plan.dataset))
        reader = ExpressionReader(commit.Run.open(expression_dir(layout, plan.dataset)), panel)
        rows, train = np.searchsorted(panel, cells.cell_idx), cells.split == "train"
        ranges = list(pairwise(reader.bounds))
        variance = np.concatenate([column_moments(reader.read(*span)[rows[train]])[1] for span in ranges])
        wanted = np.sort(np.argsort(-variance, kind="stable")[: plan.n_genes])
        of_range = [wanted[(wanted >= start) & (wanted < stop)] for start, stop in ranges]
        parts = [
            reader.read(start, stop)[:, own - start][rows]
            for (start, stop), own in zip(ranges, of_range, strict=True)
            if own.size
        ]
        symbols = commit.read_table(layout.genes_dir(plan.dataset), ["symbol"])["symbol"]
        return sparse.hstack(parts), pl.DataFrame({"feature_id": wanted, "name": symbols.gather(wanted)})


@dataclass(frozen=True, kw_only=True)
class _LabelledCells:
    """The cells of the panel that are probed for a kind of label: at most `cells` of each split, in order."""

    cell_idx: Ints
    split: npt.NDArray[Any]
    labels: Labels
    unit: Labels | None

    @classmethod
    def of(cls, layout: Layout, plan: ProbePlan, kind: str) -> "_LabelledCells":
        own = commit.Run.open(layout.associations_dir(plan.associations) / "features")
        codes = CodesRun.open(layout.codes_dir(AssociationsPlan.of(own).codes))
        cells = read_panel_cells(layout.cells_dir(plan.dataset))
        index = cells["cell_idx"].to_numpy()
        usable = panel_with_tokens(codes, index) & cells[kind].is_not_null().to_numpy()
        split = cells["split"].to_numpy()
        rng = np.random.default_rng((plan.seed, _STREAM))
        kept = []
        for name in schemas.SPLITS:
            rows = np.flatnonzero(usable & (split == name))
            kept.append(rng.choice(rows, min(plan.cells, len(rows)), replace=False))
        rows = np.sort(np.concatenate(kept))
        cells, split = cells[rows], split[rows]
        units = unit_column(cells)
        return cls(
            cell_idx=index[rows],
            split=split,
            labels=Labels.from_values(kind, cells[kind]),
            unit=None if units is None else Labels.from_values(units, cells[units].fill_null("")),
        )

    @cached_property
    def unit_codes(self) -> Ints | None:
        """The number of the donor of each cell, or of its batch; None where there are none."""
        return None if self.unit is None else self.unit.codes

    def permuted(self, seed: int) -> Labels:
        """The labels, permuted among the cells of each donor and split."""
        codes = self.labels.codes.copy()
        unit = np.zeros_like(codes) if self.unit_codes is None else self.unit_codes
        rng = np.random.default_rng((seed, _STREAM, 1))
        for split in schemas.SPLITS:
            for donor in np.unique(unit):
                rows = np.flatnonzero((self.split == split) & (unit == donor))
                codes[rows] = codes[rng.permutation(rows)]
        return Labels(kind=self.labels.kind, codes=codes, names=self.labels.names, known=self.labels.known)


def probe_labels(options: ProbeOptions, store: Path, *, address: str | None = None) -> StageResult:
    """Probe the labels from the SAE and from what it is held against; parts that are there are not made again.

    Raises:
        NotFoundError: there are no associations, or a run that they were made from is missing.
        UsageError: the run is a baseline itself, or there is no such kind of label, or none with enough cells.
    """
    clock, layout = Clock(), Layout(store)
    check_before_work(layout, address=address)
    chain = chain_of_sae(layout, associations_of(layout, options.sae), option="--sae")
    plan = _plan(options, layout, chain)
    folder = layout.probes_dir(plan.id)
    parts = _parts(plan)
    with one_ray_session():
        if plan.n_genes:
            write_expression_by_gene(layout, plan.dataset, options, address=address)
        tables = [commit.Run.create(folder / name, plan.table(name, n_shards=len(parts))) for name in PROBE_TABLES]
        with commit.exclusive(folder):
            pending = sorted({shard for run in tables for shard in run.pending()})
            job = ProbeJob(store=str(layout.root.resolve()), folder=str(folder.resolve()), plan=plan)
            do_shards(ProbeWorker, job, pending, options, title="probe", note=_done, address=address)
            for run in tables:
                run.finalize()
    warn_of_samples(layout, plan.dataset)
    return StageResult(
        kind="probes",
        run=folder.name,
        path=folder,
        done=len(pending),
        reused=len(parts) - len(pending),
        seconds=clock.seconds,
        facts={"sae": plan.sae, **_facts(commit.read_table(folder / "probe_score"))},
    )


def _plan(options: ProbeOptions, layout: Layout, chain: RunChain) -> ProbePlan:
    """The plan of the options. UsageError for a kind of label that there is not, or that has too few cells."""
    dataset = chain.associations.dataset
    cells = read_panel_cells(layout.cells_dir(dataset))
    known = label_kinds(layout, dataset, cells)
    if not known:
        raise UsageError(
            f"the cells of {dataset} have no labels to probe; give some to `scsae extract` with --cell-type or --label"
        )
    if unknown := [kind for kind in options.label if kind not in known]:
        raise UsageError(f"--label was {unknown[0]!r}; the cells of {dataset} have {', '.join(known)}")
    plan = ProbePlan(
        associations=chain.run,
        associations_manifest=commit.Run.open(layout.associations_dir(chain.run) / "features").manifest().sha,
        sae=chain.associations.sae,
        dataset=dataset,
        representations={SAE: chain.run, **_baselines(layout, chain)},
        n_genes=options.genes,
        label_kinds=tuple(dict.fromkeys(options.label or ((CELL_TYPE,) if CELL_TYPE in known else known[:1]))),
        ks=tuple(sorted(set(options.k))),
        cells=options.cells,
        seed=options.seed,
        constants=constants_of((logistic_module, by_label_module, scores_module)),
    )
    for kind in plan.label_kinds:
        found = _LabelledCells.of(layout, plan, kind)
        of_kind = ProbedCells(
            features=sparse.csr_array((len(found.cell_idx), 0)),
            label=found.labels.codes,
            names=found.labels.names,
            split=found.split,
        )
        if not of_kind.labels():
            raise UsageError(
                f"--label was {kind!r}, of which fewer than two labels have {by_label_module.LEAST_CELLS} cells "
                "in each of train, select and test: there is nothing to probe"
            )
    return plan


def _baselines(layout: Layout, chain: RunChain) -> dict[str, str]:
    """The newest associations of each baseline that has codes like those of the chain, by name.

    Probes read codes alone, so that a baseline also counts if the SAE's codes were associated again since, with other
    gene sets.
    """
    found: dict[str, str] = {}
    for info in layout.runs("associations"):
        if info.complete and _is_of_codes(info, chain.associations.codes):
            found = {**baselines_of(layout, RunChain.of(layout, info.run)), **found}
    return dict(sorted(found.items()))


def _is_of_codes(info: RunInfo, codes: str) -> bool:
    """Whether associations are of these codes; those of another version of the stage are of none."""
    try:
        return AssociationsPlan.of(commit.Run.open(info.path / "features")).codes == codes
    except OutdatedRunError:
        return False


def _parts(plan: ProbePlan) -> list[tuple[str, str]]:
    """Kind of label and representation of each shard; a plan that is read has its names in another order."""
    known = sorted(plan.representations, key=lambda name: (name != SAE, name))
    representations = [*known, *([GENES] if plan.n_genes else []), PERMUTED]
    return [(kind, name) for kind in plan.label_kinds for name in representations]


def _named(frame: pl.DataFrame, labels: Sequence[str], features: pl.DataFrame) -> pl.DataFrame:
    """The rows of a probe with labels by name, and with feature_id and name in the place of columns."""
    names = dict(enumerate(labels))
    frame = frame.with_columns(pl.col("label").replace_strict(names, default=None, return_dtype=pl.String))
    if "column" not in frame.columns:
        return frame.rename({"n_units": "n_donors"})
    own = features[frame["column"].to_numpy()]
    return frame.with_columns(own["feature_id"], own["name"])


def _facts(scores: pl.DataFrame) -> dict[str, str]:
    """For each kind of label and number of features: macro-F1 of the SAE, and of the best of the others."""
    facts = {}
    every = scores.filter(pl.col("label").is_null() & (pl.col("representation") != PERMUTED))
    for (kind, k), rows in every.group_by("label_kind", "k", maintain_order=True):
        own = rows.filter(representation=SAE)["macro_f1"].item()
        others = rows.filter(pl.col("representation") != SAE).sort("macro_f1", descending=True)
        best = f"; {others['representation'][0]} {others['macro_f1'][0]:.2f}" if others.height else ""
        facts[f"{kind}, {k} feature{'s' if k != 1 else ''}"] = f"macro-F1 {own:.2f} on test cells{best}"
    return facts


def _done(total: Mapping[str, int], seconds: float) -> str:
    return f"{total['labels']} labels, {total['labels'] / max(seconds, 1e-9):.1f} a second"
