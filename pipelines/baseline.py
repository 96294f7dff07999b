"""Baselines of an SAE: they are fitted, encoded and associated as the SAE was, to measure its excess over them.

A baseline is a run of kind `saes` (`sae_core.sae.baselines` defines its directions) whose plan marks it as a control:
commands use it only if it is named. It is fitted to a sample of the `train` tokens that the SAE was trained on, its
threshold and metrics come from the SAE's own `select` tokens and cells, its codes cover the cells that the SAE's codes
cover, and the same association makes its tables. `random-model` is a whole chain: the foundation model with random
weights, extracted with the options of the original model, and an SAE trained with the options of the original SAE.

Every stage can be resumed, and so can the whole. `baselines` states the cost of a fit; beside it, 65,536 tokens and
their whitened copy are held in memory (0.4 GB at d_model 512).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from feature_store.activations import ActivationReader, sample_tokens
from feature_store.associations.gene_sets import GeneSets, read_collections, sets_of_table
from feature_store.cells import SELECT, TRAIN, load_source_location, read_split_numbers
from feature_store.errors import IntegrityError
from feature_store.query.runs import RunChain, resolve_run
from feature_store.storage import commit
from feature_store.storage.layout import SUMMARY, Layout, RunInfo
from feature_store.storage.plans import RANDOM_MODEL, BaselineFit, GeneSetFile, SAEPlan, as_json
from pipelines.config import (
    ActorOptions,
    AssociateOptions,
    BaselineOptions,
    EncodeOptions,
    ExtractOptions,
    TrainOptions,
)
from pipelines.errors import UsageError
from pipelines.external.vectors import load_vectors_location, refuse_changed_of_codes
from pipelines.genes import recorded_genes
from pipelines.inputs import load_model_location, no_model, refuse_missing
from pipelines.moved_data import record_if_same, record_new_place
from pipelines.runtime.checks import check_before_work
from pipelines.runtime.cluster import one_ray_session
from pipelines.runtime.progress import progress_bar, stderr_console
from pipelines.runtime.stage import Clock, StageResult
from pipelines.training_loop import (
    commit_sae,
    create_sae_run,
    evaluation_constants,
    figures_of,
    held_out,
    held_out_batches,
    is_complete,
    select_probe,
    shown_figures,
)


def chain_of_sae(layout: Layout, info: RunInfo, *, option: str) -> RunChain:
    """Return the chain of runs behind the associations of an SAE. UsageError if they belong to a control."""
    chain = RunChain.of(layout, info.run)
    if control := chain.associations.control_of:
        raise UsageError(f"{option} was {info.run!r}, a control itself ({control}); name the associations of an SAE")
    return chain


def baseline(options: BaselineOptions, store: Path, *, address: str | None = None) -> list[StageResult]:
    """Make the baselines that the options name, up to their associations; calling it again resumes.

    Raises:
        NotFoundError: the SAE has no associations, or a run that they were made from is missing.
        UsageError: the run is a baseline itself, the gene sets are not those of its associations, or random-model is
            wanted of an imported SAE or of activations whose model is not here; or given vectors moved or changed.
        ConfigError: a baseline has fewer features than the SAE has active ones.
    """
    layout = Layout(store)
    check_before_work(layout, address=address)
    info = resolve_run(layout, "associations", options.associations, option="--associations")
    chain = chain_of_sae(layout, info, option="--associations")
    _check_gene_sets(options, chain)
    _check_kinds(options, chain)
    if RANDOM_MODEL in options.kind and (reason := no_model(chain.activations_run)):
        raise UsageError(f"--kind was {RANDOM_MODEL}, but {reason}; leave that kind out")
    if not (options.data and record_if_same(layout, chain.codes.dataset, options.data)):
        # codes of other data than the SAE's: either may have moved
        record_new_place(layout, chain.activations.dataset, options.data)
    refuse_changed_of_codes(layout, chain, stage="baseline")
    with one_ray_session():
        return list(_stages(options, store, chain, address))


def _stages(options: BaselineOptions, store: Path, chain: RunChain, address: str | None) -> Iterator[StageResult]:
    from pipelines.associate import associate_with
    from pipelines.encode import encode

    kinds = tuple(dict.fromkeys(options.kind))
    for number, kind in enumerate(kinds, start=1):
        stderr_console().print(f"baseline {number} of {len(kinds)}: {kind}")
        make: Callable[..., Iterator[StageResult]] = _random_model if kind == RANDOM_MODEL else _fitted
        sae = None
        for made in make(kind, options, store, chain, address):
            sae = made
            yield made
        assert sae is not None
        again = encode_options(Layout(store), chain, sae.run, options)
        codes = encode(again, store, address=address, dataset=chain.codes.dataset)
        yield codes
        own = {name: getattr(options, name) for name in ActorOptions.model_fields}
        sets = gene_sets_of(Layout(store), chain)
        yield associate_with(AssociateOptions(codes=codes.run, **own), sets, store, address=address)


def _fitted(
    kind: str, options: BaselineOptions, store: Path, chain: RunChain, address: str | None
) -> Iterator[StageResult]:
    """Fit a baseline to the SAE's activations and commit it."""
    import torch

    from sae_core.sae import BASELINES, fit_baseline

    clock, layout = Clock(), Layout(store)
    of_sae, activations = chain.sae, chain.activations_run
    wanted = SAEPlan(
        control_of=kind,
        activations=of_sae.activations,
        dataset=of_sae.dataset,
        model=of_sae.model,
        model_digest=of_sae.model_digest,
        site=of_sae.site,
        sae={},
        train={},
        baseline=BaselineFit(
            kind=kind,
            d_model=of_sae.d_model,
            k=of_sae.k,
            n_features=of_sae.n_features if BASELINES[kind].needs_width else None,
            fit_tokens=options.fit_tokens,
            seed=of_sae.seed,
        ),
        imported=None,
        n_ranks=1,
        recovery_cells=of_sae.recovery_cells,
        evaluation=as_json(evaluation_constants()),
    )
    folder, seed = layout.saes_dir(wanted.id), of_sae.seed
    done = is_complete(folder)
    if not done:
        reader = ActivationReader(activations)
        split = read_split_numbers(layout.cells_dir(of_sae.dataset))
        with commit.exclusive(folder), progress_bar(f"baseline {kind}", 1, "fits") as report:
            train = list(sample_tokens(reader, split == TRAIN, n_tokens=options.fit_tokens, seed=seed))
            batches = torch.split(held_out(reader, split == SELECT, seed=seed), 4096)
            reported = held_out_batches(reader, split, seed=seed, device="cpu")
            fitted = fit_baseline(
                kind,
                torch.from_numpy(np.concatenate(train)),
                batches,
                k=of_sae.k,
                n_features=of_sae.n_features,
                seed=seed,
            )
            measured = select_probe(
                activations, str(layout.root.resolve()), split, n_cells=of_sae.recovery_cells, seed=seed, device="cpu"
            )
            create_sae_run(layout, replace(wanted, sae=fitted.sae.config.to_dict()))
            commit_sae(folder, fitted.sae, {**fitted.notes, **figures_of(fitted.sae, batches, reported, measured)})
            report(1)
    run = commit.Run.open(folder)
    run.finalize()
    summary = shown_figures(run.read_json(SUMMARY))
    summary.pop("findings")
    yield StageResult(
        kind="saes",
        run=run.path.name,
        path=run.path,
        done=0 if done else 1,
        reused=1 if done else 0,
        seconds=clock.seconds,
        facts={"control": kind, "features": SAEPlan.of(run).n_features, **summary},
    )


def _random_model(
    kind: str, options: BaselineOptions, store: Path, chain: RunChain, address: str | None
) -> Iterator[StageResult]:
    """Extract activations of the model with random weights and train an SAE on them, with the original options."""
    from pipelines.extract import extract
    from pipelines.train import train

    layout = Layout(store)
    (extracted,) = extract(
        extract_options(layout, chain, options),
        store,
        address=address,
        dataset=chain.activations.dataset,
        genes=recorded_genes(chain.activations_run),
    )
    yield extracted
    yield train(train_options(chain, extracted.run), store, address=address)


def encode_options(layout: Layout, chain: RunChain, sae: str, options: ActorOptions) -> EncodeOptions:
    """Return the options that encode the cells of the chain's codes with `sae`, in the same way."""
    plan, own = chain.codes, chain.activations.dataset
    shared: dict[str, Any] = {"sae": sae, "pooling": plan.pooling, "level": plan.level}
    shared |= {**_actors(options), **({} if plan.keep is None else {"keep": plan.keep})}
    if plan.fused is None:
        return EncodeOptions(**shared)
    cut: dict[str, Any] = {"tokens_per_cell": plan.fused.tokens_per_cell, "shard_cells": plan.cut.panel_cells}
    other = {} if plan.dataset == own else _data_of(layout, plan.dataset)
    if chain.activations.origin == "vectors":
        other["vectors"] = load_vectors_location(layout.codes_dir(chain.associations.codes)).vectors
    return EncodeOptions(**shared, **cut, **other, fused="data" not in other)


def extract_options(layout: Layout, chain: RunChain, options: ActorOptions) -> ExtractOptions:
    """Return the options that extract the chain's activations again, from the model with random weights."""
    plan, place = chain.activations, load_model_location(chain.activations_run)
    same = ("dtype", "precision", "tokens_per_cell", "readout", "seed", "shard_cells")
    return ExtractOptions(
        **_data_of(layout, plan.dataset),
        **{name: getattr(plan, name) for name in same},
        **_actors(options),
        layer=(plan.site,),
        cells=None if plan.cells is None else plan.n_cells,
        model_option=tuple(f"{name}={value}" for name, value in place.model_options.items()),
        model=place.model,
        random_init=True,
        # the data set was accepted when its activations were extracted
        min_matched_share=0,
    )


def train_options(chain: RunChain, activations: str) -> TrainOptions:
    """Return the options that train the chain's SAE again, on other activations."""
    sae, train, n_ranks = chain.sae.sae, chain.sae.train, chain.sae.n_ranks
    names = ("arch", "k", "l1_coefficient", "orthogonality_coefficient", "groups", "n_features")
    # an SAE of a version before the penalty has no such field
    same = {name: sae[name] for name in names if name in sae}
    how = {name: value for name, value in train.items() if name in TrainOptions.model_fields}
    return TrainOptions(
        **same,
        **how,
        activations=activations,
        recovery_cells=chain.sae.recovery_cells,
        # training in this process gives the same bytes as one worker
        num_workers=0 if n_ranks == 1 else n_ranks,
    )


def _data_of(layout: Layout, dataset: str) -> dict[str, Any]:
    """Return the options that name the files of a data set; its tables are in the store."""
    refuse_missing(layout, dataset, stage="baseline")
    where = load_source_location(layout, dataset)
    return {"data": where["path"], "matrix": where["matrix"], "where": where["where"]}


def _actors(options: ActorOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ActorOptions.model_fields}


def gene_sets_of(layout: Layout, chain: RunChain) -> tuple[GeneSets, ...]:
    """Return the gene sets that the chain's features were associated with, from its table `gene_sets`."""
    sets = sets_of_table(commit.read_table(layout.associations_dir(chain.run) / "gene_sets"))
    if _files_of(sets) != chain.associations.gene_sets:
        raise IntegrityError(
            f"the table gene_sets of associations/{chain.run} does not hold the sets of its plan; "
            f"`scsae verify {chain.run} {layout.store_option}` names damaged files"
        )
    return sets


def _check_gene_sets(options: BaselineOptions, chain: RunChain) -> None:
    """Raise UsageError if gene-set files are given that differ from those of the chain's associations."""
    wanted = chain.associations.gene_sets
    given = _files_of(read_collections(options.gmt)) if options.gmt else wanted
    if given != wanted:
        names = {"--gmt": given, f"associations/{chain.run}": wanted}
        told = "; ".join(f"{name}: {', '.join(one.collection for one in found)}" for name, found in names.items())
        raise UsageError(
            f"the gene sets are not those of the SAE's associations ({told}); leave --gmt out to take these"
        )


def _check_kinds(options: BaselineOptions, chain: RunChain) -> None:
    """Raise UsageError if the training of an SAE is to be repeated that was not trained here."""
    if RANDOM_MODEL in options.kind and chain.sae.imported is not None:
        others = " ".join(f"--kind {kind}" for kind in options.kind if kind != RANDOM_MODEL) or "--kind neurons"
        raise UsageError(
            f"--kind was {RANDOM_MODEL!r}, which trains the same SAE on a model with random weights, but "
            f"saes/{chain.associations.sae} was imported from {chain.sae.imported.format}, and its training is not "
            f"known; give others: {others}"
        )


def _files_of(sets: Sequence[GeneSets]) -> tuple[GeneSetFile, ...]:
    return tuple(GeneSetFile(collection=one.collection, sha256=one.digest) for one in sets)
