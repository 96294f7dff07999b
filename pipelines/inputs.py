"""Loading of a data set with a model: both are opened and matched before anything is written; later stages reload them.

A run's id does not depend on file locations, so moving a file does not make another run. The present locations are
written beside the runs (`source.json` by the cells, `model.json` by the activations) and checked by digest when loaded
(`feature_store.cells.file_places`).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl

from feature_store.associations.held_out_units import UNITS, confounded_labels, limit_of_claims
from feature_store.cells import (
    KnownDigest,
    Source,
    SourceLocation,
    StoredObs,
    changed_files,
    cost_of_turning,
    missing_files,
    no_known_digest,
    open_recorded,
    open_source,
    read_panel_cells,
    refuse_unknown_columns,
    source_location,
    turn_matrices,
    what_changed,
    write_source_location,
)
from feature_store.codes import CodesRun, n_without_tokens
from feature_store.errors import InputError, StoreWriteError
from feature_store.storage import commit, filesystem
from feature_store.storage.hashing import sealed
from feature_store.storage.layout import MODEL_FILE, Layout
from feature_store.storage.obs_columns import column_of
from feature_store.storage.plans import ActivationsPlan, CellsPlan, TokenOfGenePlan
from pipelines.cell_tokens import tokens_of_cells
from pipelines.config import CellOptions, DataOptions, EncodeOptions
from pipelines.errors import UsageError
from pipelines.forward import autocast_of
from pipelines.runtime.progress import delayed_progress_bar, stderr_console
from pipelines.schema_columns import named_columns
from sae_core.errors import VocabularyError

if TYPE_CHECKING:
    from feature_store.cells import ColumnMatrix
    from sae_core.sae import SparseAutoencoder
    from sae_core.scfm import Coverage, FoundationModel, GeneMatch, Site

PROBE_CELLS = 512
GENES_TABLE = "genes"
TOKENLESS = (
    "they have none of the genes that go into the model, as empty droplets do: remove them, or see `scsae inspect`"
)


@dataclass(frozen=True, kw_only=True)
class LoadedInputs:
    """A data set and a model whose genes are matched."""

    source: Source
    model: "FoundationModel"
    match: "GeneMatch"
    coverage: "Coverage"
    """Coverage of the probe: the first cells of the data set, equally many of each file."""
    mean_tokens: float
    """Mean number of gene tokens per cell of the probe."""
    stored_obs: StoredObs | None
    """Where columns of obs are read that the model needs; None: in the data."""


def open_data(
    options: DataOptions | EncodeOptions,
    columns: CellOptions | None = None,
    *,
    known_digest: KnownDigest = no_known_digest,
) -> Source:
    """Open the files that the options name; nothing heavy is imported, so that a misspelt name is told at once.

    Raises:
        InputError: as `open_source`, and for a name in `columns` that is not a column of obs.
    """
    source = open_source(
        options.data,
        matrix=options.matrix,
        where=options.where,
        progress=delayed_progress_bar,
        known_digest=known_digest,
        obs=options.obs,
    )
    if columns is not None:
        refuse_unknown_columns(source, named_columns(columns))
    return source


def load_named_model(options: DataOptions) -> "FoundationModel":
    """Load the foundation model that the options name. CheckpointError, ConfigError: see `load_model`."""
    # careful: this imports torch, which takes a second or two
    from sae_core.scfm import load_model

    return load_model(
        options.model,
        autocast=autocast_of(options.precision),
        random_init=options.random_init,
        options=absolute_model_options(options),
    )


def load_inputs(options: DataOptions) -> LoadedInputs:
    """Open data and model and match their genes; nothing is written. It raises the input errors of both."""
    return match_inputs(open_data(options), load_named_model(options))


def match_inputs(source: Source, model: "FoundationModel", stored_obs: StoredObs | None = None) -> LoadedInputs:
    """Match the genes of data and model and probe the first cells; nothing is written.

    Raises:
        VocabularyError: no gene of the data is one of the model.
        UsageError: none is, because the rows of the data are genes.
    """
    try:
        match = model.match_genes(source.gene_symbols, source.ensembl_ids)
    except VocabularyError as error:
        refuse_genes_as_rows(source, model, error)
        raise
    rows = source.read_cells(source.first_cells(PROBE_CELLS))
    mean_tokens = _mean_tokens(model, source, match, stored_obs)
    return LoadedInputs(
        source=source,
        model=model,
        match=match,
        coverage=model.coverage(rows.indptr, rows.indices, rows.data, match),
        mean_tokens=mean_tokens,
        stored_obs=stored_obs,
    )


def only_tokens(inputs: LoadedInputs, tokens: Sequence[int]) -> LoadedInputs:
    """Return the inputs with a match in which the genes of these tokens of the model alone go in."""
    match = inputs.match.only(np.array(tokens, dtype=np.int64))
    mean_tokens = _mean_tokens(inputs.model, inputs.source, match, inputs.stored_obs)
    return replace(inputs, match=match, mean_tokens=mean_tokens)


def _mean_tokens(model: "FoundationModel", source: Source, match: "GeneMatch", stored: StoredObs | None) -> float:
    tokens = tokens_of_cells(model, source, match, source.first_cells(PROBE_CELLS), seed=0, stored=stored)
    return float(np.bincount(tokens.cell_of_token()[~tokens.is_special], minlength=tokens.n_cells).mean())


def refuse_genes_as_rows(source: Source, model: "FoundationModel", error: VocabularyError) -> None:
    """Raise UsageError from the error if most of the first names of cells are those of genes that the model knows."""
    names = source.obs_names(0, min(source.n_cells, PROBE_CELLS)).to_list()
    try:
        n = model.match_genes(names).n_matched
    except VocabularyError:
        return
    if 2 * n > len(names):
        raise UsageError(
            f"the rows of {', '.join(map(str, source.paths))} are genes ({', '.join(names[:3])}, ...), and no column "
            f"({', '.join(source.gene_symbols[:2])}, ...) is; write the data with a row for each cell, as `adata.T`"
        ) from error


def few_matched(inputs: LoadedInputs, min_share: float, *, see: str = "") -> str | None:
    """Return why data are refused whose counts lie in other genes than the model's; None if enough do, or all are 0.

    see: where to look, before what to type.
    """
    from sae_core.scfm import likely_mismatch

    source, model, seen = inputs.source, inputs.model, inputs.coverage
    if seen.share_of_counts >= min_share or (seen.share_of_counts == 0 and not seen.unmatched.any()):
        return None
    reason = likely_mismatch(source.gene_symbols, source.ensembl_ids)
    of_model = ", ".join([token for token in model.vocabulary.tokens if token not in model.vocabulary.special][:3])
    accepted = f"{int(seen.share_of_counts * 1000) / 1000:g}"
    return (
        f"only {seen.share_of_counts:.1%} of the counts of {', '.join(map(str, source.paths))} lie in genes that "
        f"{model.name} knows ({seen.n_matched:,} of {seen.n_genes:,} genes), and {min_share:.0%} are needed; "
        f"{reason or 'the genes of the data are ' + ', '.join(source.gene_symbols[:3]) + ', ...'}; the model has "
        f"{of_model}, ...; {see}take these genes as they are with --min-matched-share {accepted}"
    )


def refuse_few_matched(inputs: LoadedInputs, min_share: float) -> None:
    """Raise UsageError if less than this share of the counts lies in genes that the model knows."""
    if reason := few_matched(inputs, min_share, see="see `scsae inspect`, or "):
        raise UsageError(reason)


def matrix_facts(source: Source, *, absent: str = "") -> dict[str, str]:
    """Return which matrix was taken and why, and the matrices and features that were not.

    Where there are none of these, `absent` is the fact, or, if it is empty, there is no such fact.
    """
    names = [f"{path.name}: " if len(source.paths) > 1 else "" for path in source.paths]
    found = list(zip(names, source.choices, strict=True))
    passed_over = [f"{file}{name} ({why})" for file, choice in found for name, why in choice.passed_over.items()]
    turned = [
        f"{file}turned once, in rows/{Path(folder).name} of the store" if folder else f"{file}{_to_turn(matrix)}"
        for file, folder, matrix in zip(names, source.rows, source.column_matrices, strict=True)
        if folder or matrix is not None
    ]
    facts = {
        "format": "; ".join(dict.fromkeys(source.formats)),
        "matrix": f"{source.matrix} ({source.value_kind})",
        "why this matrix": "; ".join(dict.fromkeys(f"{file}{choice.reason}" for file, choice in found)),
        "passed over": "; ".join(passed_over),
        "where": "" if source.where is None else f"{source.where}: {_taken(names, source)}",
        "not read": "; ".join(f"{file}{what}" for file, one in zip(names, source.ignored, strict=True) for what in one),
        "NOT STORED CELL BY CELL": "; ".join(turned),
        "obs table": "; ".join(source.obs_facts),
        "version": "; ".join(f"{file}{one}" for file, one in zip(names, source.versions, strict=True) if one),
        "features left out": ", ".join(f"{n:,} {kind}" for kind, n in source.left_out.items()),
    }
    optional = ("where", "not read", "obs table", "version", "NOT STORED CELL BY CELL")
    return {name: fact or absent for name, fact in facts.items() if fact or (absent and name not in optional)}


def _taken(names: Sequence[str], source: Source) -> str:
    return "; ".join(f"{file}{taken}" for file, taken in zip(names, source.filtered, strict=True))


def _to_turn(matrix: "ColumnMatrix | None") -> str:
    return "" if matrix is None else f"extract turns it once into the store, which {cost_of_turning(matrix)}"


def parse_sites(layers: tuple[str, ...], model: "FoundationModel") -> tuple["Site", ...]:
    """Return the sites that `--layer` names (a bare number is that layer's output), checked against the model."""
    from sae_core.scfm import Site

    if not layers:
        raise UsageError(f"no --layer was given; {model.name} has layers 0 to {model.n_layers - 1}, e.g. --layer 2")
    sites = []
    for text in layers:
        site = Site.parse(f"layer.{text}" if text.isdigit() else text)
        if site.index is not None and not 0 <= site.index < model.n_layers:
            raise UsageError(f"--layer was {text!r}; {model.name} has layers 0 to {model.n_layers - 1}")
        sites.append(site)
    return tuple(dict.fromkeys(sites))


def save_model_location(run: commit.Run, options: DataOptions, inputs: LoadedInputs) -> None:
    """Write beside an activations run the present location of the model and the token of each gene of the data set."""
    place = ModelLocation(
        model=absolute_model_path(options.model),
        random_init=options.random_init,
        precision=options.precision,
        digest=inputs.model.digest,
        model_options=absolute_model_options(options),
    )
    filesystem.replace_text(run.path / MODEL_FILE, sealed(place._asdict()))
    save_token_of_gene(run.path, token_of_gene(inputs), run.plan_sha)


def save_token_of_gene(folder: Path, genes: pl.DataFrame, plan_sha: str) -> None:
    """Write into the folder of a run the token of each gene of the data set, as `token_of_gene` makes it."""
    commit.write_table(folder / GENES_TABLE, genes, TokenOfGenePlan(beside=plan_sha).table("token_of_gene"))


def load_token_of_gene(layout: Layout, codes: CodesRun) -> pl.DataFrame:
    """Return the table of `save_token_of_gene`, from the codes of a fused encoding or from the activations."""
    fused = codes.plan.fused is not None
    folder = codes.folder if fused else layout.activations_dir(codes.plan.activations)
    return commit.read_table(folder / GENES_TABLE)


def token_of_gene(inputs: LoadedInputs) -> pl.DataFrame:
    """Return gene_idx, symbol and the model's token id (null for a gene that is no token) of each gene of the data.

    If the data name their genes only by Ensembl id, the symbol is the model's name of it, so that gene sets match.
    """
    matched, tokens = inputs.match.matched, inputs.model.vocabulary.tokens
    ensembl = inputs.source.ensembl_ids or [""] * inputs.source.n_genes
    symbols = [
        tokens[token] if known and own.partition(".")[0] == identifier else own
        for own, identifier, token, known in zip(
            inputs.source.gene_symbols, ensembl, inputs.match.token_id.tolist(), matched.tolist(), strict=True
        )
    ]
    frame = pl.DataFrame(
        {
            "gene_idx": np.arange(inputs.source.n_genes, dtype=np.int32),
            "symbol": symbols,
            "gene_id": inputs.match.token_id.astype(np.int32),
        }
    )
    return frame.with_columns(gene_id=pl.when(pl.Series(inputs.match.used)).then("gene_id"))


def genes_without_tokens(source: Source) -> pl.DataFrame:
    """Return the table of `token_of_gene` where a row of activations is a whole cell: no gene has a token."""
    return _genes_of(source).with_columns(gene_id=pl.lit(None, dtype=pl.Int32))


def genes_as_tokens(source: Source) -> pl.DataFrame:
    """Return the table of `token_of_gene` where the genes of the data are themselves the vocabulary."""
    return _genes_of(source).with_columns(gene_id="gene_idx")


def _genes_of(source: Source) -> pl.DataFrame:
    return pl.DataFrame({"gene_idx": np.arange(source.n_genes, dtype=np.int32), "symbol": source.gene_symbols})


def tokenless_fact(codes: CodesRun) -> dict[str, str]:
    """Return how many cells of a codes run have no token, or nothing if every cell has one."""
    n = n_without_tokens(codes)
    return (
        {}
        if n == 0
        else {"CELLS WITHOUT TOKENS": f"{n:,} of {codes.cut.n_cells:,}, left out of every statistic; {TOKENLESS}"}
    )


def warn_of_samples(layout: Layout, dataset: str) -> None:
    """Print a warning if the donors of the test cells are too few for a claim about other donors, and one if a batch
    determines a label.
    """
    folder = layout.cells_dir(dataset)
    kinds = _label_kinds(CellsPlan.of(commit.Run.open(folder)))
    cells = read_panel_cells(folder, ["split", *UNITS, *kinds])
    for text in (limit_of_claims(cells), confounded_labels(cells, kinds)):
        if text is not None:
            stderr_console().print(f"warning: {text}", style="yellow", soft_wrap=True)


def _label_kinds(plan: CellsPlan) -> list[str]:
    """The columns of the cell table with the cell type and the labels that are groups, but for donor and batch."""
    others = (*plan.numbers, plan.donor, plan.batch, plan.cell_type)
    return [
        *([] if plan.cell_type is None else ["cell_type"]),
        *(column_of(name) for name in plan.labels if name not in others),
    ]


def annotation_facts(layout: Layout, dataset: str, *, n_cells: int) -> dict[str, str]:
    """Return what the annotations of the panel's cells lack: values, labels that differ, ids of their own; ids are
    compared where the panel is all `n_cells` cells.
    """
    folder = layout.cells_dir(dataset)
    plan = CellsPlan.of(commit.Run.open(folder))
    kinds = _label_kinds(plan)
    named = [*(unit for unit in UNITS if getattr(plan, unit) is not None), *kinds]
    is_whole = plan.panel.n_cells == n_cells
    cells = read_panel_cells(folder, [*named, *(["cell_id"] if is_whole else [])])
    of = f"of {cells.height:,} cells" + ("" if is_whole else " of the panel")
    facts = {}
    if lacking := [f"{n:,} have no {name}" for name in named if (n := cells[name].null_count())]:
        facts["cells without a value"] = f"{of}, {', '.join(lacking)}"
    if same := [name for name in kinds if cells[name].drop_nulls().n_unique() == 1]:
        facts["labels with one value"] = f"{', '.join(same)}: nothing to tell apart, so no feature is tested for them"
    if is_whole and (n := int(cells["cell_id"].is_duplicated().sum())):
        facts["cell ids that are not unique"] = f"those of {n:,} cells; look these up by --cell-idx"
    return facts


def absolute_model_path(model: str) -> str:
    """Return `--model` in a form that other processes and machines can use: "mini", or an absolute path."""
    # the path may name a part of a checkpoint folder, so it need not exist itself
    return model if model == "mini" else str(Path(model).resolve())


def absolute_model_options(options: DataOptions) -> dict[str, str]:
    """Return `--model-option` in a form that other processes and machines can use: its paths are absolute."""
    from sae_core.scfm import FAMILIES

    paths = {option.name for family in FAMILIES for option in family.options if option.is_path}
    return {
        name: str(Path(value).resolve()) if name in paths else value for name, value in options.model_options.items()
    }


class ModelLocation(NamedTuple):
    """Location of a model when it was used, the options of its use, and its digest."""

    model: str
    random_init: bool
    precision: str
    digest: str
    model_options: Mapping[str, str]
    """Options of the model's family, with absolute paths."""


NO_MODEL = {
    "vectors": "are given vectors (extract --vectors), of which no model is here",
    "recorded": "were recorded by another program, whose model is not here",
}
"""By `ActivationsPlan.origin`: why the model of an activations run cannot be run."""


def no_model(run: commit.Run) -> str | None:
    """Return why the model of an activations run cannot be run, or None if scsae ran it itself."""
    plan = ActivationsPlan.of(run)
    return None if plan.origin == "model" else f"activations/{run.path.name} of {plan.model} {NO_MODEL[plan.origin]}"


def load_model_location(run: commit.Run) -> ModelLocation:
    """Return the location that `save_model_location` wrote beside an activations run.

    Raises:
        IntegrityError: it is missing or damaged.
        UsageError: the activations come from outside, so that there is no model to run.
    """
    if reason := no_model(run):
        raise UsageError(f"{reason}; extract from a model with `scsae extract DATA --model FOLDER --layer I`")
    return ModelLocation(**filesystem.read_required(run.path / MODEL_FILE))


def load_stored_sae(folder: Path, *, device: str = "cpu") -> "SparseAutoencoder":
    """Load the SAE of a run. IntegrityError if one of its files does not have the bytes that were committed."""
    from sae_core.sae import load_sae

    commit.Run.open(folder).checked_parts()
    with filesystem.local_folder(folder) as local:
        return load_sae(local, device=device)


def load_recorded_model(run: commit.Run, *, device: str = "cpu") -> "FoundationModel":
    """Load the model that made an activations run from its recorded location; UsageError if it changed."""
    from sae_core.scfm import load_model

    place = load_model_location(run)
    model = load_model(
        place.model,
        device=device,
        autocast=autocast_of(place.precision),
        random_init=place.random_init,
        options=place.model_options,
    )
    if model.digest != place.digest:
        raise UsageError(
            f"the checkpoint in {place.model} changed since {run.path.name} was extracted "
            f"(digest {model.digest[:12]}, was {place.digest[:12]}); extract again with `scsae extract`"
        )
    return model


def refuse_missing(layout: Layout, dataset: str, *, stage: str) -> None:
    """Raise UsageError, with the command that names the new place, if a file of the data set is not where it was."""
    if missing := missing_files(layout, dataset):
        raise UsageError(
            f"`scsae {stage}` reads the data set {dataset} again, but {missing[0]} is not there; if it was moved or "
            "renamed, name its new place (--data once for each file) with the other options as before: "
            f"scsae {stage} --data NEWPATH {layout.store_option}"
        )


def load_recorded_source(layout: Layout, dataset: str, *, stage: str = "associate") -> Source:
    """Open the data set at its recorded location, for a stage that reads it again; UsageError if a file moved or
    changed. A file whose state is the recorded one is not hashed.
    """
    where = source_location(layout, dataset)
    refuse_missing(layout, dataset, stage=stage)
    source = open_recorded(where, progress=delayed_progress_bar)
    refuse_changed_data(layout, dataset, source)
    turn_once(layout, source)
    return source


def refuse_changed_data(layout: Layout, dataset: str, source: Source) -> None:
    """Raise UsageError, with what changed, if the source is not that of the data set."""
    if change := _change(layout, dataset, source, source_location(layout, dataset)):
        raise UsageError(change)


def turn_once(layout: Layout, source: Source) -> None:
    """Turn the matrices that do not lie cell by cell, unless the store has them already, and say what it costs.

    InputError for an impossible value, BusyError: see `turn_matrices`.
    """
    turn_matrices(layout, source, lambda text: stderr_console().print(text, soft_wrap=True))


def data_problems(layout: Layout, dataset: str) -> list[str]:
    """Hash the files of a data set, whatever their state, and return how they changed."""
    where = source_location(layout, dataset)
    try:
        with open_source(where.paths, matrix=where.matrix, where=where.where, progress=delayed_progress_bar) as source:
            change = _change(layout, dataset, source, where)
    except InputError as error:
        return [str(error)]
    return [change] if change else []


def _change(layout: Layout, dataset: str, source: Source, where: SourceLocation) -> str | None:
    """Return the message about files that changed, with what changed; note the new state of files that did not."""
    changed = changed_files(source, where)
    if changed:
        return f"{'; '.join(changed)}: {what_changed(layout, dataset, source)}; extract it again with `scsae extract`"
    if source.states != where.states:
        with suppress(StoreWriteError), filesystem.clear_write_errors(layout.root):
            write_source_location(layout, dataset, where._replace(states=source.states))
    return None
