"""Exchange of SAEs with other libraries: `import_sae` makes a run of one of theirs, `export_sae` writes one for them.

An imported SAE is a run of kind `saes` like a trained one. Its weights and thresholds are those of the files, which
take raw activations here (`sae_core.sae.interop` has the equations); nothing is rescaled unless --input-scale says by
how much, and the run keeps what was assumed and why. Its figures are measured as those of a trained SAE are, on tokens
of `select` and `test` cells of the store. The files say nothing of the cells of its training, which may be among these.

Many files do not state k. It is then the number of active features of a `select` token, to which baselines are matched.

Site and model that the files name are compared with those of the activations, because an SAE of another site gives
codes that look like codes. The width is compared as well. An SAE that reconstructs worse than the mean is a warning.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from feature_store.activations import ActivationReader, sample_tokens
from feature_store.cells import SELECT, TRAIN, read_split_numbers
from feature_store.errors import StoreWriteError
from feature_store.query.runs import resolve_run
from feature_store.storage import commit
from feature_store.storage.layout import SUMMARY, Layout
from feature_store.storage.plans import ActivationsPlan, ImportedSAE, SAEPlan, as_json
from pipelines.config import ExportSAEOptions, ImportSAEOptions
from pipelines.errors import UsageError
from pipelines.inputs import load_stored_sae
from pipelines.moved_data import record_new_place
from pipelines.runtime.checks import check_before_work, check_tracking
from pipelines.runtime.progress import progress_bar, stderr_console
from pipelines.runtime.stage import Clock, StageResult
from pipelines.site_names import site_named
from pipelines.tracking.registration import register_sae
from pipelines.training_loop import (
    HELD_OUT_TOKENS,
    Finding,
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

if TYPE_CHECKING:
    from sae_core.sae import ForeignFolder, ForeignSAE, Origin, SparseAutoencoder

POOR_FVU = 1.0
"""An SAE with this FVU or more reconstructs no better than the mean activation does."""
MANY_DEAD = 0.9
"""Share of silent features above which an SAE was most likely made for other activations."""


@dataclass(frozen=True, kw_only=True)
class _Import:
    """What is imported: the folder and the SAE in it, and the plan of its run without the configuration."""

    folder: "ForeignFolder"
    foreign: "ForeignSAE"
    activations: commit.Run
    wanted: SAEPlan


def import_sae(options: ImportSAEOptions, store: Path) -> StageResult:
    """Make a run of the SAE in a folder of another library, measure it and register it; calling it again resumes.

    Raises:
        NotFoundError: there are no activations.
        CheckpointError: the folder holds no SAE, or several, or one that has no exact counterpart here.
        UsageError: the SAE has another width than the activations, its files name another site or model, or they do not
            hold the scale of its input. Nothing is written in any of these cases.
    """
    clock, layout = Clock(), Layout(store)
    check_before_work(layout)
    what = _read(options, layout)
    record_new_place(layout, what.wanted.dataset, options.data)
    check_tracking(layout)
    folder = layout.saes_dir(what.wanted.id)
    done = is_complete(folder)
    if not done:
        with commit.exclusive(folder), progress_bar("import-sae", 1, "SAEs") as report:
            _make(what, layout, folder)
            report(1)
    run = commit.Run.open(folder)
    run.finalize()
    plan, summary = SAEPlan.of(run), shown_figures(run.read_json(SUMMARY))
    imported, findings = summary.pop("imported"), summary.pop("findings")
    for found in findings if not done else ():
        stderr_console().print(f"warning: saes/{folder.name}: {found['message']}", style="yellow", soft_wrap=True)
    k = f"{plan.k} ({'stated' if what.foreign.k_is_stated else 'measured'})"
    return StageResult(
        kind="saes",
        run=folder.name,
        path=folder,
        done=int(not done),
        reused=int(done),
        seconds=clock.seconds,
        facts={
            "imported from": f"{what.folder.folder} ({what.folder.format})",
            "made for": _stated(what.foreign.origin),
            "input": imported["input"],
            "arch": plan.arch,
            "k": k,
            "features": plan.n_features,
            **summary,
            **{found["kind"]: found["message"] for found in findings},
            "registered": register_sae(layout, run, name=options.name),
        },
    )


def check_folder(options: ImportSAEOptions) -> None:
    """Raise CheckpointError unless the folder holds an SAE that can be imported, whatever it is to read."""
    from sae_core.errors import UnknownScaleError
    from sae_core.sae import find_foreign

    # what scale its input has is told with the activations
    with suppress(UnknownScaleError):
        find_foreign(options.folder, format=options.format, pick=options.pick).read(input_scale=options.input_scale)


def export_sae(options: ExportSAEOptions, store: Path) -> StageResult:
    """Write an SAE of the store into a folder as another library reads it; the path of the result is that folder.

    Raises:
        NotFoundError: there is no such SAE.
        UsageError: the folder holds something already.
        CheckpointError: the library has no counterpart of the architecture. Nothing is written in any of these cases.
        StoreWriteError: the folder cannot be written.
    """
    clock, layout = Clock(), Layout(store)
    run = commit.Run.open(resolve_run(layout, "saes", options.sae, option="--sae").path)
    plan, folder = SAEPlan.of(run), options.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and is no empty folder; nothing is overwritten: give a new folder")
    # not above: the SAE and the folder are looked up before torch is imported
    from sae_core.sae import FOREIGN_FORMATS, Origin

    target = FOREIGN_FORMATS[options.to]
    origin = Origin(model=plan.model, site=plan.site, model_digest=plan.model_digest)
    try:
        target.write(load_stored_sae(run.path), folder, origin=origin)
    except OSError as error:
        raise StoreWriteError(
            f"cannot write {folder}: {error.strerror or error}; free the disk, fix the permissions or give another one"
        ) from error
    return StageResult(
        kind="saes",
        run=run.path.name,
        path=folder,
        done=1,
        reused=0,
        seconds=clock.seconds,
        facts={
            "format": options.to,
            "arch": plan.arch,
            "input": "raw activations, as they are stored",
            "files": ", ".join(target.files),
            "load it with": target.loaded_by.format(str(folder)),
        },
    )


def _read(options: ImportSAEOptions, layout: Layout) -> _Import:
    """Read the SAE and check that it is one of the activations; nothing is written."""
    parent = commit.Run.open(resolve_run(layout, "activations", options.activations, option="--activations").path)
    # damaged activations are reported even if the SAE was imported before
    parent.manifest()
    source = ActivationsPlan.of(parent)
    # not above: the activations are looked up before torch is imported
    from sae_core.errors import UnknownScaleError
    from sae_core.sae import find_foreign

    found = find_foreign(options.folder, format=options.format, pick=options.pick)
    try:
        foreign = found.read(input_scale=options.input_scale)
    except UnknownScaleError as error:
        raise UsageError(f"{error}; {_scale_advice(layout, parent, source, options.seed)}") from error
    _check_width(found, foreign, parent, source)
    if not options.other_site:
        _check_origin(found, foreign.origin, parent, source)
    wanted = SAEPlan(
        control_of=source.control_of,
        activations=parent.path.name,
        dataset=source.dataset,
        model=source.model,
        model_digest=source.model_digest,
        site=source.site,
        sae={},
        train={},
        baseline=None,
        imported=ImportedSAE(
            format=found.format,
            sha256=found.sha256,
            input_scale=options.input_scale,
            model=foreign.origin.model,
            site=foreign.origin.site,
            seed=options.seed,
        ),
        n_ranks=1,
        recovery_cells=options.recovery_cells,
        evaluation=as_json({**evaluation_constants(), "poor_fvu": POOR_FVU, "many_dead": MANY_DEAD}),
    )
    return _Import(folder=found, foreign=foreign, activations=parent, wanted=wanted)


def _make(what: _Import, layout: Layout, folder: Path) -> None:
    """Measure the SAE on tokens of the store, create its run and commit it."""
    import torch

    plan, reader = what.wanted, ActivationReader(what.activations)
    split = read_split_numbers(layout.cells_dir(plan.dataset))
    batches = torch.split(held_out(reader, split == SELECT, seed=plan.seed), 4096)
    reported = held_out_batches(reader, split, seed=plan.seed, device="cpu")
    measured = select_probe(
        what.activations,
        str(layout.root.resolve()),
        split,
        n_cells=plan.recovery_cells,
        seed=plan.seed,
        device="cpu",
    )
    figures = figures_of(what.foreign.sae, batches, reported, measured)
    sae = _with_k(what.foreign, figures["select_l0"])
    create_sae_run(layout, replace(plan, sae=sae.config.to_dict()))
    summary = {**figures, "imported": {"input": _input(what), "k_is_stated": what.foreign.k_is_stated}}
    commit_sae(folder, sae, summary, findings=_findings(figures))


def _with_k(foreign: "ForeignSAE", l0: float) -> "SparseAutoencoder":
    """Return the SAE, with the active features per token as k where its files state none."""
    sae = foreign.sae
    if not foreign.k_is_stated:
        sae.config = replace(sae.config, k=min(max(1, round(l0)), sae.config.n_features))
    return sae


def _input(what: _Import) -> str:
    """Return what the SAE takes, and why."""
    assert what.wanted.imported is not None
    scale = what.wanted.imported.input_scale
    if scale is None:
        return f"raw activations ({what.foreign.input})"
    return f"raw activations, multiplied by {scale:g} inside its weights (--input-scale; {what.foreign.input})"


def _stated(origin: "Origin") -> str:
    """Return what the files say of model and site, in words."""
    if origin.model is None and origin.site is None:
        return "its files name neither model nor site"
    return f"{origin.site or 'a site not named'} of {origin.model or 'a model not named'}, as its files say"


def _findings(figures: dict[str, Any]) -> list[Finding]:
    """Return the warnings about an SAE that does not fit the activations."""
    found: list[Finding] = []
    fvu, dead = figures["select_fvu"], figures["select_dead_fraction"]
    advice = "see that --activations are of the site and model of its training, and whether they were scaled there "
    advice += "(--input-scale)"
    if fvu >= POOR_FVU:
        message = f"the SAE reconstructs these activations no better than their mean does (FVU {fvu:.3g}); {advice}"
        found.append({"kind": "poor_reconstruction", "step": 0, "value": fvu, "message": message})
    if dead > MANY_DEAD:
        message = f"{dead:.1%} of its features fire on none of the `select` tokens; {advice}"
        found.append({"kind": "many_dead", "step": 0, "value": dead, "message": message})
    return found


def _check_width(found: "ForeignFolder", foreign: "ForeignSAE", parent: commit.Run, source: ActivationsPlan) -> None:
    """Raise UsageError if the SAE has another width than the activations."""
    width = foreign.sae.config.d_model
    if width != source.d_model:
        raise UsageError(
            f"the SAE in {found.folder} reads activations of width {width}, and activations/{parent.path.name} "
            f"({source.site} of {source.model}) have width {source.d_model}; name those of its model with --activations"
        )


def _check_origin(found: "ForeignFolder", origin: "Origin", parent: commit.Run, source: ActivationsPlan) -> None:
    """Raise UsageError if the files name another site, or the digest of another model."""
    named = None if origin.site is None else site_named(origin.site)
    differences = []
    if named is not None and str(named) != source.site:
        differences.append(f"the site {origin.site!r}, not {source.site}")
    # the digest of given vectors is that of the vectors, which other cells of the same model do not share
    is_other_vectors = source.origin == "vectors" and origin.model == source.model
    if origin.model_digest is not None and origin.model_digest != source.model_digest and not is_other_vectors:
        differences.append(
            f"the model {origin.model!r} with digest {origin.model_digest[:12]}, not {source.model!r} with "
            f"{source.model_digest[:12]}"
        )
    if differences:
        raise UsageError(
            f"the files of the SAE in {found.folder} name {' and '.join(differences)}, which activations/"
            f"{parent.path.name} are of; name others with --activations, or take the SAE all the same with --other-site"
        )


def _scale_advice(layout: Layout, parent: commit.Run, source: ActivationsPlan, seed: int) -> str:
    """Return the number that these activations would be multiplied by, as an option to type."""
    split = read_split_numbers(layout.cells_dir(source.dataset)) == TRAIN
    blocks = list(sample_tokens(ActivationReader(parent), split, n_tokens=HELD_OUT_TOKENS, seed=seed))
    if not blocks:
        return f"activations/{parent.path.name} hold no token of a `train` cell to estimate it from"
    lengths = np.concatenate([np.linalg.norm(block.astype(np.float64), axis=1) for block in blocks])
    scale = np.sqrt(source.d_model) / lengths.mean()
    return (
        f"if it was trained on activations such as activations/{parent.path.name}, that is about --input-scale "
        f"{scale:.6g} ({len(lengths):,} tokens of `train` cells)"
    )
