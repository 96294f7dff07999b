"""The request of a steering run: its options, all checked against the store before anything is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from feature_store import FeatureStore
from feature_store.cells import canonical_column, canonical_name, canonical_text, read_panel_cells, source_location
from feature_store.codes import CodesRun, panel_with_tokens
from feature_store.query.runs import RunChain, resolve_run
from feature_store.query.suggestions import did_you_mean, join_names
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.obs_columns import columns_of_cells, find_column, shown_name
from feature_store.storage.plans import SteeringPlan, as_json
from pipelines.associate import label_kinds
from pipelines.config import SteerOptions
from pipelines.errors import UsageError
from pipelines.external.vectors import VectorsJob, load_vectors_location
from pipelines.inputs import load_token_of_gene, no_model
from pipelines.steering.constants import result_constants
from pipelines.steering.context import Cells, SteeringPaths
from pipelines.steering.feature_selection import choose_features_of_label, kind_named
from pipelines.steering.group_means import By, default_grouping
from pipelines.steering.metrics.scib import check_scib
from pipelines.steering.plan import ALL, Point, SteeringTask, Task, grid_of, task_of
from pipelines.steering.token_sample import sample_cells


@dataclass(frozen=True, kw_only=True)
class SteeringRequest:
    """A checked request to steer with one SAE.

    Attributes:
        options, layout: the options and the layout of the store, unchanged.
        chain: the runs that steering starts from.
        associations: the associations run that features are chosen from.
        task, by: the steering task, and the grouping of the group means.
        features: the table features of the associations.
        cells: the rows of the cell table that have a label, for move one of the two labels.
        steered: the cell_idx of the cells that an intervention may steer, ascending.
        genes: the symbol and gene_id of the genes that model and data share.
        gene_ids: the gene_id of the genes whose tokens are steered; None: all.
        by_label: for edit, the ranked features of the label.
        among_kinds: whether runs of other kinds of edit are searched beside this one.
    """

    options: SteerOptions
    layout: Layout
    chain: RunChain
    associations: commit.Run
    task: SteeringTask
    by: By
    features: pl.DataFrame
    cells: pl.DataFrame
    steered: Cells
    genes: pl.DataFrame
    gene_ids: tuple[int, ...] | None
    by_label: pl.DataFrame | None
    among_kinds: bool

    @classmethod
    def of(cls, options: SteerOptions, layout: Layout, *, among_kinds: bool = False) -> "SteeringRequest":
        """Read the inputs from the store and check all options.

        `among_kinds`: whether the run is searched together with those of other kinds of edit.

        Raises:
            UsageError: a kind, label, feature, gene or cell is unknown, features or cells are too few, the SAE does not
                belong to the model and site, or scIB's scores are wanted without the extra.
            NotFoundError: there are no associations.
        """
        if options.scib:
            check_scib()
        options = _with_canonical_labels(options)
        named = resolve_run(layout, "associations", options.associations, option="--associations")
        chain = RunChain.of(layout, named.run)
        refuse_other_site(chain)
        if chain.activations.origin == "vectors":
            _refuse_options_of_tokens(options)
        associations = commit.Run.open(layout.associations_dir(chain.run) / "features")
        features = commit.read_table(associations.path)
        dataset = chain.associations.dataset
        every = read_panel_cells(layout.cells_dir(dataset))
        # from here on the names are those of the columns of the cell table
        kinds = label_kinds(layout, dataset, every)

        def where(column: str, value: str) -> str:
            found = FeatureStore.open(layout.root, associations=chain.run).elsewhere("feature_label", column, value)
            return f"; read were associations {chain.run} (data set {dataset}){found}"

        kind = kind_named(options.kind, kinds, where)
        chosen = [_column_and_value(text, every) for text in options.cells]
        given, options = options, options.model_copy(update={"kind": kind, "cells": tuple(map("=".join, chosen))})
        by_label, target = None, options.target
        if options.toward is None and options.target != ALL:
            labels = commit.read_table(associations.path.parent / "feature_label")
            target, by_label = choose_features_of_label(labels, features, given, kinds=kinds, where=where)
        assert target is not None
        task = task_of(options, target)
        _check_features(options, features, by_label, chain.run)
        label = canonical_column(options.kind)
        codes = CodesRun.open(layout.codes_dir(chain.associations.codes))
        has_tokens = panel_with_tokens(codes, every["cell_idx"].to_numpy())
        cells = every.filter(label.is_not_null() & pl.Series(has_tokens))
        if task.type is Task.MOVE:
            _check_labels(task, canonical_text(cells[options.kind]), where)
            cells = cells.filter(label.is_in([task.target, task.toward]))
        steered = cells.filter(_mask(chosen, every))
        if task.type is Task.MOVE:
            steered = steered.filter(label == task.target)
        genes = load_token_of_gene(layout, codes)
        genes = genes.drop_nulls("gene_id").select("symbol", "gene_id").unique("symbol", keep="first").sort("gene_id")
        request = cls(
            options=options,
            layout=layout,
            chain=chain,
            associations=associations,
            task=task,
            by=options.by or default_grouping(task),
            features=features,
            cells=cells,
            steered=steered["cell_idx"].sort().to_numpy(),
            genes=genes,
            gene_ids=_gene_ids(options.gene, genes),
            by_label=by_label,
            among_kinds=among_kinds,
        )
        request.check_cells()
        return request

    @property
    def dataset(self) -> str:
        """The data set whose cells are steered."""
        return self.chain.associations.dataset

    @property
    def grid(self) -> tuple[Point, ...]:
        """The points of the grid."""
        if self.by_label is None or self.options.feature:
            return grid_of(self.options)
        # a label may have fewer features than the options give
        return tuple(point._replace(n_features=min(point[0], self.by_label.height)) for point in grid_of(self.options))

    @property
    def needs_token_sample(self) -> bool:
        """Whether a sample of token codes is needed, to choose features or for group means."""
        return self.task.type is not Task.EDIT

    @cached_property
    def alive(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether each feature fires [n_features]."""
        return ((~self.features["dead"]) & (self.features["density"] > 0)).to_numpy()

    @property
    def plan(self) -> SteeringPlan:
        """The plan, which holds all that determines the run."""
        options, task = self.options, self.task
        return SteeringPlan(
            control_of=self.chain.associations.control_of,
            associations=self.chain.run,
            associations_manifest=self.associations.manifest().sha,
            sae=self.chain.associations.sae,
            dataset=self.dataset,
            site=self.chain.sae.site,
            question=task.type.value,
            kind=task.kind,
            target=task.target,
            toward=task.toward,
            intervention=task.intervention.value,
            by=self.by if task.intervention.needs_group_means else None,
            feature=options.feature,
            grid=tuple(tuple(point) for point in self.grid),
            gene=options.gene,
            cells=options.cells,
            n_nulls=options.n_nulls,
            readout=self.readout,
            max_cells=options.max_cells,
            head=options.head,
            scib=options.scib,
            seed=options.seed,
            config=as_json(result_constants()),
        )

    @property
    def steers_vectors(self) -> bool:
        """Whether given vectors are steered, which no model takes further."""
        return self.chain.activations.origin == "vectors"

    @property
    def readout(self) -> str | None:
        """The cell embedding that is evaluated; None for given vectors, which are their own output."""
        return None if self.steers_vectors else self.options.readout

    def _vectors(self) -> str | VectorsJob | None:
        """The given vectors that the codes were made of, if a model was not."""
        if not self.steers_vectors:
            return None
        if self.chain.codes.fused is None:
            return str(self.chain.activations_run.path.resolve())
        where = source_location(self.layout, self.dataset)
        place = load_vectors_location(self.layout.codes_dir(self.chain.associations.codes))
        return VectorsJob(
            data=where.places,
            matrix=where.matrix,
            where=where.where,
            vectors=place.vectors,
            dtype=self.chain.activations.dtype,
        )

    def paths(self) -> SteeringPaths:
        """The paths at which actors find model, data and SAE."""
        return SteeringPaths(
            activations=str(self.chain.activations_run.path.resolve()),
            sae=str(self.layout.saes_dir(self.chain.associations.sae).resolve()),
            store=str(self.layout.root.resolve()),
            dataset=self.dataset,
            site=self.chain.sae.site,
            seed=self.chain.activations.seed,
            device="cuda" if self.options.num_gpus > 0 else "cpu",
            stage="steer",
            vectors=self._vectors(),
        )

    def sample(self, splits: Sequence[str], *, most: int, equal: bool = False) -> Cells:
        """The ascending cell_idx of a sample of each split; labels and types keep their proportions, or are equal."""
        drawn = [
            sample_cells(
                self.cells.filter(split=split),
                most=most,
                seed=self.options.seed,
                strata=list(dict.fromkeys((self.task.kind, "cell_type"))),
                equal=equal,
            )
            for split in splits
        ]
        return np.sort(np.concatenate(drawn))

    def is_steered(self, cells: Cells) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Whether an intervention may steer each of these cells [n_cells]."""
        return np.isin(cells, self.steered)

    def check_cells(self) -> None:
        """Raise UsageError unless every split has the cells that the task needs."""
        task, options, kind = self.task, self.options, shown_name(self.task.kind)
        searches = self.among_kinds or len(self.grid) > 1
        chooses = self.needs_token_sample and not options.feature
        needed = {
            "test": True,
            "select": searches or chooses,
            "train": searches and task.intervention.needs_group_means,
        }
        for split in (split for split, is_needed in needed.items() if is_needed):
            own = self.cells.filter(split=split)
            found = canonical_text(own[task.kind]).unique().drop_nulls().to_list()
            wanted = [] if task.type is Task.MIX else [task.target, task.toward]
            if missing := [name for name in wanted if name is not None and name not in found]:
                raise UsageError(
                    f"no {split} cell has {kind} {missing[0]!r}; choose another --target or another data split"
                )
            if task.type is Task.MIX and len(found) < 2:
                n = canonical_text(self.cells[task.kind]).n_unique()
                raise UsageError(
                    f"{split} cells have {len(found)} {kind} of {n}, {join_names(found)}: nothing to mix; extract "
                    "so that each is in every split, with --batch COLUMN and --split-by cell, or with --split COLUMN"
                )
            if split != "train" and not self.is_steered(own["cell_idx"].to_numpy()).any():
                raise UsageError(
                    f"--cells {' '.join(options.cells)} selects none of the {own.height} {split} cells that could be "
                    f"steered ({task.text}); choose cells that occur there"
                )


def _with_canonical_labels(options: SteerOptions) -> SteerOptions:
    """The options with target and toward in their canonical text, so that `true` and `True` ask for the same run."""

    def label(text: str) -> str:
        return canonical_name(text) or text

    return options.model_copy(
        update={
            "target": options.target and label(options.target),
            "toward": options.toward and label(options.toward),
        }
    )


def refuse_other_site(chain: RunChain) -> None:
    """Raise UsageError if the SAE does not read tokens of the model at the site that its activations are of."""
    name, sae, activations = chain.associations.sae, chain.sae, chain.activations
    if activations.origin == "recorded":
        raise UsageError(
            f"{no_model(chain.activations_run)}, and steering runs the model behind the site again: apply "
            "sae_core.steering.Steering to the output of that module in your own loop, with scsae.load_sae"
        )
    if activations.readout is not None:
        raise UsageError(
            f"the SAE {name} was trained on cell vectors (--readout {activations.readout}), and the model has tokens "
            "to steer; extract without --readout and train on that"
        )
    pairs = {
        "site": (sae.site, activations.site),
        "d_model": (sae.d_model, activations.d_model),
        "model": (sae.model_digest[:12], activations.model_digest[:12]),
    }
    if differ := {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}:
        said = "; ".join(f"{key} {own!r} against {other!r}" for key, (own, other) in differ.items())
        raise UsageError(
            f"{name} is an SAE of another model or site than its activations {sae.activations}: {said}; train one on "
            "them with `scsae train`"
        )


def _refuse_options_of_tokens(options: SteerOptions) -> None:
    """Raise UsageError for an option that needs tokens, or a model behind the site."""
    given = {
        "--head": options.head,
        "--gene": options.gene,
        f"--by {options.by}": options.by in ("gene", "both"),
        f"--readout {options.readout}": "readout" in options.model_fields_set,
    }
    if refused := [name for name, is_given in given.items() if is_given]:
        raise UsageError(
            f"{', '.join(refused)}: the SAE was trained on given vectors, one for each cell, which have no tokens of "
            "genes, and there is no model behind them; leave it out"
        )


def _check_features(
    options: SteerOptions, features: pl.DataFrame, by_label: pl.DataFrame | None, associations: str
) -> None:
    alive = set(features.filter(~pl.col("dead") & (pl.col("density") > 0))["feature_id"].to_list())
    if unknown := [feature for feature in options.feature if feature >= features.height]:
        raise UsageError(
            f"--feature was {unknown[0]}; the SAE of associations {associations} has features 0 to "
            f"{features.height - 1}: `scsae features` lists them"
        )
    if dead := [feature for feature in options.feature if feature not in alive]:
        raise UsageError(f"--feature was {dead[0]}, which never fires; choose one that `scsae features` lists")
    wanted = len(set(options.feature)) or max(options.n_features)
    wanted = min(wanted, by_label.height) if by_label is not None and not options.feature else wanted
    if wanted > len(alive) // 2:
        name = "--feature named" if options.feature else "--n-features was"
        raise UsageError(
            f"{name} {wanted}, and {len(alive)} features fire; the null needs as many others, so take "
            f"{len(alive) // 2} at most"
        )


def _check_labels(task: SteeringTask, labels: pl.Series, where: Callable[[str, str], str]) -> None:
    names, kind = labels.unique().drop_nulls().sort().to_list(), shown_name(task.kind)
    for option, name in (("--target", task.target), ("--toward", task.toward)):
        if name not in names:
            raise UsageError(
                f"{option} was {name!r}; {kind} is one of: {join_names(names)}{did_you_mean(str(name), names)}"
                f"{where('label', str(name))}"
            )


def _mask(chosen: Sequence[tuple[str, str]], cells: pl.DataFrame) -> pl.Expr:
    """The cells that have any of these values, each given with its column."""
    for column, value in chosen:
        found, name = canonical_text(cells[column]).unique().drop_nulls().to_list(), shown_name(column)
        if value not in found:
            raise UsageError(
                f"--cells was {f'{name}={value}'!r}, which selects nothing; {name} is one of "
                f"{join_names(found)}{did_you_mean(value, found)}"
            )
    masks = [canonical_column(column) == value for column, value in chosen]
    return pl.any_horizontal(masks) if masks else pl.lit(True)


def _column_and_value(text: str, cells: pl.DataFrame) -> tuple[str, str]:
    """The column of the cell table and the canonical value that COLUMN=VALUE means; a name may hold a `=` itself."""
    known = columns_of_cells(cells)
    for end in (place for place, letter in enumerate(text) if letter == "="):
        column = find_column(text[:end], known)
        if column is not None:
            value = text[end + 1 :]
            return column, canonical_name(value) or value
    shown = [shown_name(column) for column in known]
    raise UsageError(
        f"--cells was {text!r}; columns of the cell table are {join_names(shown)}"
        f"{did_you_mean(text.partition('=')[0], shown)}"
    )


def _gene_ids(symbols: Sequence[str], genes: pl.DataFrame) -> tuple[int, ...] | None:
    known = dict(genes.select("symbol", "gene_id").iter_rows())
    for symbol in symbols:
        if symbol not in known:
            raise UsageError(
                f"--gene was {symbol!r}, which selects nothing: data and model share no gene of that name"
                f"{did_you_mean(symbol, list(known))}"
            )
    return tuple(sorted({known[symbol] for symbol in symbols})) if symbols else None
