"""Steering: edit the features of one target inside the running model and measure what changes, beside its nulls.

Features are chosen by their score on `select` cells; the judge is fitted on unsteered `train` cells; what is reported
comes from `test` cells, which were used for no choice. Conditions: the intervention (with the SAE's error term kept, so
that doing nothing is exactly the identity), the same in `replace` mode beside a reconstruction-only row, and two nulls:
random features of matched density under the same intervention, and random directions of the same norm.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from feature_store import commit, files, ingest
from feature_store.layout import Layout, as_path, run_id
from pipelines.associate import label_kinds
from pipelines.config import SteerOptions
from pipelines.effects import Judge, effects
from pipelines.errors import UsageError
from pipelines.inputs import recalled_model, recalled_source
from pipelines.shards import do_shards
from pipelines.stage import FORMAT_VERSION, Clock, StageResult, parent_run
from pipelines.tracking import Tracking

if TYPE_CHECKING:
    import torch

    from sae_core.scfm import Patch, Prefix, Site, Tokens
    from sae_core.steering import Intervention

SHARD_CELLS = 256
UNSTEERED, RECONSTRUCTION, RANDOM_FEATURES, RANDOM_DIRECTION = (
    "unsteered",
    "reconstruction",
    "random features",
    "random direction",
)
NULLS = (RANDOM_FEATURES, RANDOM_DIRECTION)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One way to run the model; `draw` tells the draws of a null apart."""

    name: str
    draw: int = 0
    features: tuple[int, ...] = ()
    mode: Literal["delta", "replace"] = "delta"
    seed: int | None = None
    """Seed of the direction, for the random-direction null; its norm is that of the edit of `features`."""


@dataclass(frozen=True, kw_only=True)
class SteerJob:
    """Everything an actor needs to steer any shard; plain values, so that it travels."""

    activations: str
    sae: str
    store: str
    dataset: str
    per_cell: str
    site: str
    intervention: str
    dose: float
    scale: tuple[float, ...]
    conditions: tuple[Condition, ...]
    readout: str
    seed: int
    device: str


class Steerer:
    """Does shards of a `SteerJob`: the body of an actor, callable without Ray."""

    def __init__(self, job: SteerJob) -> None:
        from sae_core.sae import load_sae

        self.job = job
        layout = Layout(job.store)
        self.model = recalled_model(commit.Run.open(job.activations), device=job.device)
        self.source = recalled_source(layout, job.dataset)
        self.match = self.model.match_genes(self.source.gene_symbols, self.source.ensembl_ids)
        with files.local_folder(as_path(job.sae)) as folder:
            self.sae = load_sae(folder, device=job.device)
        self.split = ingest.read_splits(layout.cells_dir(job.dataset))
        self.run = commit.Run.open(job.per_cell)

    def shard(self, number: int) -> dict[str, int]:
        """Embed shard `number`: train cells unsteered, test cells under every condition; return counts."""
        n_conditions = len(self.job.conditions)
        if self.run.committed(number):
            return {"shards": 1, "cells": 0, "conditions": n_conditions}
        start, stop = number * SHARD_CELLS, min((number + 1) * SHARD_CELLS, self.source.n_cells)
        frame = self._embed(start, stop)
        self.run.commit_shard(number, lambda path: commit.write_frame(path, frame), start=start, stop=stop)
        return {"shards": 1, "cells": stop - start, "conditions": n_conditions}

    def _embed(self, start: int, stop: int) -> pl.DataFrame:
        """Rows cell_idx, condition, draw, embedding of the shard's cells; blocks before the site run once."""
        split = self.split[start:stop]
        train, test = (np.flatnonzero(split == name) for name in ("train", "test"))
        tokens = self._tokens(start, stop, train)
        parts = [self._rows(train + start, Condition(name=UNSTEERED), self._read(tokens))]
        tokens = self._tokens(start, stop, test)
        prefix = self._prefix(tokens)
        for condition in self.job.conditions:
            embedded = self._read(tokens, patches=self._patches(condition), prefix=prefix)
            parts.append(self._rows(test + start, condition, embedded))
        return pl.concat(parts)

    def _read(
        self, tokens: "Tokens", *, patches: "dict[Site | str, Patch] | None" = None, prefix: "Prefix | None" = None
    ) -> "torch.Tensor":
        """Embeddings [cell width] where a patch at the SAE's site shows."""
        site = self.model.reading_site(self.job.site)
        return self.model.embed(tokens, readout=self.job.readout, site=site, patches=patches, prefix=prefix)

    def _tokens(self, start: int, stop: int, chosen: npt.NDArray[np.int64]) -> "Tokens":
        """Tokens of the cells `chosen` among [start, stop)."""
        rows = self.source.read_rows(start, stop)
        shape = (stop - start, self.source.n_genes)
        own = sparse.csr_array((rows.data, rows.indices, rows.indptr), shape=shape)[chosen]
        return self.model.tokenize(own.indptr, own.indices, own.data, self.match, seed=self.job.seed)

    def _prefix(self, tokens: "Tokens") -> "Prefix | None":
        """Activations at the SAE's site, shared by all conditions; None for a site inside a block."""
        from sae_core.scfm import Prefix, Site

        site = Site.parse(self.job.site)
        if site.kind not in ("embedding", "layer"):
            return None
        return Prefix(site, self.model.activations(tokens, [site])[site])

    def _rows(self, cells: npt.NDArray[np.int64], condition: Condition, embedded: "torch.Tensor") -> pl.DataFrame:
        """Table rows of some cells under one condition."""
        return pl.DataFrame(
            {
                "cell_idx": cells,
                "condition": [condition.name] * len(cells),
                "draw": np.full(len(cells), condition.draw, dtype=np.int32),
                "embedding": embedded.float().numpy(),
            },
            schema_overrides={"embedding": pl.Array(pl.Float32, embedded.shape[1])},
        )

    def _patches(self, condition: Condition) -> "dict[Site | str, Patch]":
        """The patch of one condition at the SAE's site; none for the unsteered run."""
        from sae_core.steering import Steering, random_direction

        if condition.name == UNSTEERED:
            return {}
        direction = None if condition.seed is None else random_direction(self.model.d_model, seed=condition.seed)
        patch = Steering(
            sae=self.sae, intervention=self._intervention(condition), mode=condition.mode, direction=direction
        )
        return {self.job.site: patch}

    def _intervention(self, condition: Condition) -> "Intervention":
        """What is done to the condition's features; the reconstruction scales one by 1, which changes nothing."""
        import torch

        from sae_core.steering import Ablate, Add, Clamp, Scale

        if condition.name == RECONSTRUCTION:
            return Scale(features=[0], factor=1.0)
        features, dose, unit = condition.features, self.job.dose, torch.tensor(self.job.scale)
        match self.job.intervention:
            case "ablate":
                return Ablate(features=features)
            case "scale":
                return Scale(features=features, factor=dose)
            case "clamp":
                return Clamp(features=features, dose=dose, unit=unit)
            case _:
                return Add(features=features, dose=dose, unit=unit)


def steer(options: SteerOptions, store: Path, *, address: str | None = None) -> StageResult:
    """Steer towards or away from one target, evaluate on `test` cells, log to MLflow; resumed by calling again.

    Raises:
        UsageError: no such kind or target, no feature of the target on `select` cells, or no `test` cell that has it.
    """
    clock = Clock()
    layout = Layout(store)
    associations = commit.Run.open(parent_run(layout, "associations", options.run).path / "features")
    sae = commit.Run.open(layout.saes_dir(associations.plan["sae"]))
    activations = commit.Run.open(layout.activations_dir(sae.plan["activations"]))
    if activations.plan["readout"] is not None:
        raise UsageError(
            f"the SAE {sae.path.name} was trained on cell vectors (--readout {activations.plan['readout']}), and the "
            "model has tokens to steer; extract without --readout and train on that"
        )
    features = commit.read_table(associations.path)
    dataset = associations.plan["dataset"]
    cells = ingest.read_cells(layout.cells_dir(dataset))
    target, chosen = choose_features(
        commit.read_table(associations.path.parent / "feature_label"),
        features,
        options,
        kinds=label_kinds(layout, dataset, cells),
    )
    if not cells.filter(pl.col(options.kind).cast(pl.String) == target, split="test").height:
        raise UsageError(f"no test cell has {options.kind} {target!r}; choose another --target or another data split")
    conditions = make_conditions(options, chosen, features)
    plan = {
        "format": FORMAT_VERSION,
        "associations": associations.path.parent.name,
        "associations_manifest": associations.manifest().sha,
        "sae": sae.path.name,
        "dataset": dataset,
        "site": sae.plan["site"],
        "kind": options.kind,
        "target": target,
        "features": list(chosen),
        "intervention": options.intervention or "ablate",
        "dose": options.dose[0],
        "n_nulls": options.n_nulls,
        "readout": options.readout,
        "seed": options.seed,
        "n_shards": -(-cells.height // SHARD_CELLS),
    }
    folder = layout.steering_dir(run_id(plan))
    per_cell = commit.Run.create(folder / "per_cell", {**plan, "table": "per_cell"})
    pending = per_cell.pending()
    if pending:
        job = SteerJob(
            activations=str(activations.path.resolve()),
            sae=str(sae.path.resolve()),
            store=str(layout.root.resolve()),
            dataset=dataset,
            per_cell=str(per_cell.path.resolve()),
            site=sae.plan["site"],
            intervention=options.intervention or "ablate",
            dose=options.dose[0],
            scale=tuple(features["p99"].fill_null(0.0).to_list()),
            conditions=conditions,
            readout=options.readout,
            seed=activations.plan["seed"],
            device="cuda" if options.num_gpus > 0 else "cpu",
        )
        with per_cell.sole_driver():
            do_shards(Steerer, job, pending, options, title="steer", note=_count, address=address)
    per_cell.finalize()
    plan_of_results = {**plan, "table": "results", "per_cell_manifest": per_cell.manifest().sha}
    commit.write_table(folder / "results", lambda: evaluate(per_cell, cells, options, target), plan_of_results)
    results = commit.read_table(folder / "results")
    _log(layout, folder, plan, results)
    row = results.filter(
        (pl.col("condition") == (options.intervention or "ablate")) & (pl.col("metric") == "target_votes")
    )
    return StageResult(
        kind="steering",
        run=folder.name,
        path=folder,
        done=len(pending),
        reused=per_cell.n_shards - len(pending),
        seconds=clock.seconds,
        facts={
            "target": f"{options.kind} = {target}",
            "features": list(chosen),
            "effect on target_votes": row["effect"].item(),
            "95 % interval": [row["low"].item(), row["high"].item()],
            **{f"p against {null}": row[f"p_{null}"].item() for null in NULLS},
        },
    )


def choose_features(
    labels: pl.DataFrame, features: pl.DataFrame, options: SteerOptions, *, kinds: list[str]
) -> tuple[str, tuple[int, ...]]:
    """Return the target and its features: those with the smallest p for it on `select` cells, best first.

    By p and not by AUROC: of a label with few cells, some feature always has a high AUROC by chance.

    Args:
        labels: table feature_label.
        features: table features.
        options: kind, target (None takes the label of the kind with the best feature) and n_features.
        kinds: kinds of label that the data set has.
    """
    if options.kind not in kinds:
        raise UsageError(f"--kind was {options.kind!r}; this data set has {', '.join(kinds) or 'no labels'}")
    known = labels.filter((pl.col("label_kind") == options.kind) & (pl.col("split") == "select"))
    names = known["label"].unique().sort().to_list()
    if options.target is not None and options.target not in names:
        raise UsageError(
            f"--target was {options.target!r}; {options.kind} among select cells is one of: {', '.join(names)}"
        )
    alive = features.filter(~pl.col("dead"))["feature_id"]
    ranked = known.filter(pl.col("feature_id").is_in(alive.implode()) & (pl.col("auroc") > 0.5)).sort("p", "feature_id")
    if options.target is None and ranked.height:
        target = ranked["label"][0]
    elif options.target is not None:
        target = options.target
    else:
        raise UsageError(f"no feature has an AUROC above 0.5 for any {options.kind} on select cells; nothing to steer")
    chosen = ranked.filter(pl.col("label") == target)["feature_id"].head(options.n_features[0]).to_list()
    if not chosen:
        raise UsageError(f"no feature has an AUROC above 0.5 for {options.kind} {target!r} on select cells")
    return str(target), tuple(chosen)


def make_conditions(options: SteerOptions, chosen: tuple[int, ...], features: pl.DataFrame) -> tuple[Condition, ...]:
    """The intervention, its replace mode, the reconstruction alone, and the draws of both nulls."""
    import torch

    from sae_core.steering import matched_features

    density = torch.from_numpy(features["density"].to_numpy().copy())
    draws = range(options.n_nulls)
    matched = [matched_features(chosen, density, seed=options.seed + draw) for draw in draws]
    return (
        Condition(name=UNSTEERED),
        Condition(name=options.intervention or "ablate", features=chosen),
        Condition(name=f"{options.intervention or 'ablate'}, replace", features=chosen, mode="replace"),
        Condition(name=RECONSTRUCTION, mode="replace"),
        *(Condition(name=RANDOM_FEATURES, draw=draw, features=tuple(matched[draw])) for draw in draws),
        *(Condition(name=RANDOM_DIRECTION, draw=draw, features=chosen, seed=options.seed + draw) for draw in draws),
    )


def evaluate(per_cell: commit.Run, cells: pl.DataFrame, options: SteerOptions, target: str) -> pl.DataFrame:
    """Effects of every condition from the stored embeddings; cells without label or embedding are left out."""
    stored = commit.read_table(per_cell.path)
    labelled = cells.select("cell_idx", "split", label=pl.col(options.kind).cast(pl.String)).drop_nulls("label")
    empty = stored.filter(pl.col("embedding").arr.first().is_nan())["cell_idx"].unique()
    known = stored.join(labelled, on="cell_idx").filter(~pl.col("cell_idx").is_in(empty.implode()))
    known = known.sort("condition", "draw", "cell_idx")
    base = known.filter(pl.col("condition") == UNSTEERED)
    train, test = (base.filter(pl.col("split") == split) for split in ("train", "test"))
    judge = Judge(
        train["embedding"].to_numpy(),
        train["label"].to_list(),
        test["embedding"].to_numpy(),
        test["label"].to_list(),
        target,
    )
    draws: dict[str, list[npt.NDArray[Any]]] = {}
    for (name, _), frame in known.filter(pl.col("split") == "test").group_by("condition", "draw", maintain_order=True):
        draws.setdefault(str(name), []).append(frame["embedding"].to_numpy())
    return effects(judge, draws, nulls=NULLS, seed=options.seed)


def _log(layout: Layout, folder: Path, plan: dict[str, Any], results: pl.DataFrame) -> None:
    """Log the evaluation to MLflow, once, attached to the registered SAE."""
    tracking = Tracking(layout)
    if tracking.find(folder.name) is not None:
        return
    version = tracking.of_run(plan["sae"])
    rows = results.filter(pl.col("condition") != UNSTEERED).iter_rows(named=True)
    metrics = {f"{row['condition']}/{row['metric']}".replace(",", ""): row["effect"] for row in rows}
    tags = {"scsae.sae": plan["sae"], "scsae.kind": "steering", "scsae.features": json.dumps(plan["features"])}
    params = {
        key: plan[key] for key in ("kind", "target", "intervention", "dose", "n_nulls", "readout", "seed", "site")
    }
    with tracking.run(folder.name, params=params, tags=tags) as mlflow_run:
        tracking.log_metrics(mlflow_run, metrics, model_id=version.model_id if version else None)


def _count(total: Mapping[str, int], _seconds: float) -> str:
    return f"{total['cells']} cells under {total['conditions'] // max(total['shards'], 1)} conditions"
