"""Which genes go into the model: all that it knows, the most variable ones (`--genes hvg:N`), or those of a list.

    <root>/activations/<run>/chosen_genes/          the chosen genes, beside the activations of their tokens
    <root>/cells/<dataset>/variable_genes/<id>/     the N most variable genes, where the same command finds them again
    <root>/matrices/<id>/{counts,clipped}/          what the two passes over a large matrix have made so far

A model of limited length takes a part of a long cell otherwise, mostly a random one. A choice is a set of the model's
own genes, so in other data the same genes are found, whatever their columns are called. What a family computes from the
whole cell (Geneformer's and scFoundation's totals) does not change; scGPT bins the chosen genes of a cell among each
other (docs/genes.md). Variable genes are chosen among those that the model knows (`feature_store.cells`), in this
process for one shard of cells (`shard_cells`) and else by actors, as the tables of a large matrix are.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells import (
    BatchSums,
    Source,
    TrainBatches,
    expected_counts,
    open_source,
    rank_genes,
    shard_cells,
    shard_range,
    standardised_variance,
    sums_of_cells,
    train_batches,
    variable_gene_constants,
)
from feature_store.errors import BusyError, IntegrityError
from feature_store.query.suggestions import closest_names
from feature_store.storage import commit, filesystem, schemas
from feature_store.storage.addresses import RemotePath
from feature_store.storage.layout import PLAN, Layout
from feature_store.storage.plans import ActivationsPlan, ChosenGenesPlan, GeneChoice, VariableGenesPlan
from feature_store.storage.text_files import read_text
from pipelines.config import ActorOptions, ExtractOptions
from pipelines.errors import UsageError
from pipelines.inputs import LoadedInputs, only_tokens
from pipelines.runtime.actor_pool import do_shards

if TYPE_CHECKING:
    from sae_core.scfm import FoundationModel, GeneMatch

CHOSEN = "chosen_genes"
COUNTS, CLIPPED = "counts", "clipped"
LEAST_FOUND = 0.5
"""Least share of the names of a list that data and model share: below it they are probably of another kind."""
SHOWN_NAMES = 5
MANY_LONG = 0.2
"""Least share of cells with more genes than fit that is told."""


@dataclass(frozen=True, kw_only=True)
class ChosenGenes:
    """The genes that may be tokens.

    Attributes:
        record: the choice, as the plan of the activations holds it.
        table: the table `chosen_genes`.
        fact: the choice in words.
    """

    record: GeneChoice
    table: pl.DataFrame
    fact: str

    @property
    def tokens(self) -> tuple[int, ...]:
        """Their ids in the model's vocabulary."""
        return tuple(self.table["gene_id"].to_list())


def checked_genes(options: ExtractOptions, inputs: LoadedInputs) -> ChosenGenes | None:
    """Return the genes of a list; None where all genes or the most variable ones are wanted. Nothing is written.

    Raises:
        UsageError: there are no counts to tell variable genes by, or not more genes than are wanted; too few names of
            the list are genes of data and model.
        NotFoundError, InputError: the list is not there, or is no text.
    """
    if options.genes is None:
        return None
    n, source, files = options.n_variable_genes, inputs.source, ", ".join(map(str, inputs.source.paths))
    if n is None:
        return _listed(Path(options.genes), inputs)
    if source.value_kind != "counts":
        raise UsageError(
            f"--genes was {options.genes!r}, and variable genes are told by counts, but {source.matrix} of {files} "
            "holds log-normalised values; name a matrix of counts with --matrix, or give a list with --genes FILE"
        )
    if inputs.match.n_matched <= n:
        raise UsageError(
            f"--genes was {options.genes!r}, but {inputs.model.name} knows {inputs.match.n_matched:,} genes of "
            f"{files}; leave --genes out, and all of them go in"
        )
    return None


def choose_variable_genes(
    layout: Layout, inputs: LoadedInputs, dataset: str, n: int, options: ActorOptions, *, address: str | None = None
) -> ChosenGenes:
    """Return the `n` most variable genes of the `train` cells of a data set, among those that the model knows.

    The choice is made once for a data set. InputError if there are too few `train` cells, or too few genes vary; and
    the errors of `do_shards`.
    """
    source = inputs.source
    considered = np.flatnonzero(inputs.match.matched).astype(np.int64)
    batches = train_batches(layout.cells_dir(dataset))
    plan = VariableGenesPlan(
        dataset=dataset,
        digest=source.digest,
        matrix=source.matrix,
        considered=sha256(considered.astype("<i8").tobytes()).hexdigest(),
        n=n,
        constants=variable_gene_constants(),
    )

    def ranked() -> pl.DataFrame:
        job = PassJob(
            data=source.places,
            matrix=source.matrix,
            where=source.where,
            rows=source.rows,
            cells=str(layout.cells_dir(dataset).resolve()),
            genes=considered,
            batches=batches,
        )
        found = rank_genes(_standardised_variance(layout, source, plan, job, options, address=address), n)
        first = found.order[:n]
        figures = {name: getattr(found, name)[first] for name in ("rank", "n_batches", "variance")}
        return schemas.conform("variable_genes", pl.DataFrame({"gene_idx": considered[first], **figures}))

    table = layout.variable_genes_dir(dataset, plan.id)
    commit.write_table(table, ranked, plan.table("variable_genes"))
    folder = layout.matrix_dir(plan.id)
    if filesystem.size_bytes(folder / COUNTS / PLAN) is not None:
        # another process that works on it removes it
        with suppress(BusyError), commit.exclusive(folder):
            filesystem.remove_folder(folder)
    chosen = _table(inputs, commit.read_table(table))
    fact = f"the {n:,} most variable of {len(considered):,} that {inputs.model.name} knows"
    fact += f", on {sum(batches.n_cells):,} `train` cells"
    fact += f" of {len(batches.n_cells)} batches" if batches.names else ""
    fact += f"; {batches.n_left_out} batches have too few `train` cells to count" if batches.n_left_out else ""
    return ChosenGenes(record=_record(f"hvg:{n}", chosen), table=chosen, fact=fact)


def _standardised_variance(
    layout: Layout,
    source: Source,
    plan: VariableGenesPlan,
    job: "PassJob",
    options: ActorOptions,
    *,
    address: str | None,
) -> npt.NDArray[np.float64]:
    """Pass over the counts twice, in this process or by actors; return a row for each batch, a column for each gene."""
    batches, n_batches = job.batches, len(job.batches.n_cells)
    n_shards = -(-source.n_cells // shard_cells(source.n_cells))
    if n_shards == 1:
        batch = batches.of_cells(job.cells, 0, source.n_cells)

        def here(title: str, clip: npt.NDArray[np.float64] | None = None) -> BatchSums:
            with source.progress(title, source.n_cells, "cells") as update:
                return sums_of_cells(source, 0, batch, job.genes, n_batches, clip=clip, update=update)

        of = expected_counts(here("variable genes"), batches.n_cells)
        return standardised_variance(here("clipped counts", of.clip), of)

    def by_actors(name: str, title: str, clip: npt.NDArray[np.float64] | None = None) -> BatchSums:
        run = commit.Run.create(layout.matrix_dir(plan.id) / name, plan.table(name, n_shards=n_shards))
        # a pass over a matrix uses neither a GPU nor several threads
        one_core = ActorOptions(num_actors=options.num_actors)
        work = replace(job, clip=clip, run=str(run.path.resolve()))
        do_shards(PassReader, work, run.pending(), one_core, title=title, note=_cells_done, address=address)
        run.finalize()
        return BatchSums.of_frames(map(commit.read_part, run.checked_parts()), n_batches, len(job.genes))

    with commit.exclusive(layout.matrix_dir(plan.id)):
        of = expected_counts(by_actors(COUNTS, "variable genes"), batches.n_cells)
        return standardised_variance(by_actors(CLIPPED, "clipped counts", of.clip), of)


@dataclass(frozen=True, kw_only=True)
class PassJob:
    """A pass over the counts of `train` cells; it can be pickled.

    Attributes:
        data, matrix, where: files of the data set, the matrix in them, and the condition by which cells are taken.
        rows: folders of those matrices that were turned (`Source.rows`).
        cells: folder of the cell table.
        genes: the genes by their places in the data [n_genes].
        batches: the batches of the `train` cells.
        clip: the largest value of each gene in each batch [n_batches n_genes]; None: values count as they are.
        run: folder in which each shard is committed; "" where it is not.
    """

    data: tuple[str | RemotePath, ...]
    matrix: str
    where: str | None
    rows: tuple[str, ...]
    cells: str
    genes: npt.NDArray[np.int64]
    batches: TrainBatches
    clip: npt.NDArray[np.float64] | None = None
    run: str = ""


class PassReader:
    """Computes shards of a `PassJob`; it is the body of an actor and can be called without Ray."""

    def __init__(self, job: PassJob) -> None:
        self.job = job
        self.source = open_source(job.data, matrix=job.matrix, where=job.where, rows=job.rows)
        self.run = commit.Run.open(job.run)
        self.shard_cells = shard_cells(self.source.n_cells)

    def shard(self, number: int) -> dict[str, int]:
        """Sum the cells of shard `number` and commit it unless it is committed; return the progress counts."""
        start, stop = shard_range(number, self.source.n_cells, self.shard_cells)
        if not self.run.committed(number):
            batch = self.job.batches.of_cells(self.job.cells, start, stop)
            n_batches = len(self.job.batches.n_cells)
            sums = sums_of_cells(self.source, start, batch, self.job.genes, n_batches, clip=self.job.clip)
            write = partial(commit.write_frame, frame=sums.to_frame())
            self.run.commit_shard(number, write, start=start, stop=stop)
        return {"cells": stop - start}


def _cells_done(total: Mapping[str, int], seconds: float) -> str:
    return f"{total['cells'] / max(seconds, 1e-9):,.0f} cells/s"


def _listed(path: Path, inputs: LoadedInputs) -> ChosenGenes:
    """Return the genes of a list: the symbols and Ensembl ids that name genes of the data which the model knows."""
    text = read_text(path, "the list of genes", wanted="a text file with a symbol or an Ensembl id a line, or hvg:N")
    names = list(dict.fromkeys(line.strip() for line in text.splitlines()))
    names = [name for name in names if name and not name.startswith("#")]
    if not names:
        raise UsageError(f"--genes {path} names no gene; give a file with a symbol or an Ensembl id a line, or hvg:N")
    of_model = dict(zip(names, _model_tokens(names, inputs), strict=True))
    token_of = _tokens_of_names(names, inputs, of_model)
    missing = [name for name in names if name not in token_of]
    if len(token_of) < max(LEAST_FOUND * len(names), 1):
        raise UsageError(_refusal(path, names, missing, inputs))
    chosen = _table(inputs, _columns_of(inputs, set(token_of.values())))
    fact = f"{len(token_of):,} of the {len(names):,} names in {path}, {chosen.height:,} genes of {inputs.model.name}"
    in_data = {*inputs.source.gene_symbols, *(inputs.source.ensembl_ids or ())}
    for reason, own in (
        ("unknown to the model", [name for name in missing if name in in_data]),
        ("not in the data", [name for name in missing if name not in in_data and of_model[name] is not None]),
        ("known to neither", [name for name in missing if name not in in_data and of_model[name] is None]),
    ):
        shown = ", ".join(own[:SHOWN_NAMES]) + (", ..." if len(own) > SHOWN_NAMES else "")
        fact += f"; {reason}: {len(own):,} ({shown})" if own else ""
    return ChosenGenes(record=_record("list", chosen), table=chosen, fact=fact)


def _tokens_of_names(names: Sequence[str], inputs: LoadedInputs, of_model: Mapping[str, int | None]) -> dict[str, int]:
    """Return the token of each name that names a gene of the data which the model knows.

    A name is that of a gene in the data, by symbol or Ensembl id, or, where it is none, the model's own or an alias.
    """
    match, source = inputs.match, inputs.source
    columns: dict[str, int] = {}
    for own in (source.gene_symbols, source.ensembl_ids or ()):
        for column in (place for place, name in enumerate(own) if name and match.matched[place]):
            columns.setdefault(own[column], int(match.token_id[column]))
    in_data = set(match.token_id[match.matched].tolist())
    found = {}
    for name in names:
        token = of_model[name]
        of_data = columns.get(name, columns.get(name.partition(".")[0]) if name.startswith("ENS") else None)
        if of_data is not None:
            found[name] = of_data
        elif token is not None and token in in_data:
            found[name] = token
    return found


def _model_tokens(names: Sequence[str], inputs: LoadedInputs) -> list[int | None]:
    """Return the model's token of each name, None for a name that it does not know."""
    from sae_core.errors import VocabularyError

    try:
        match = inputs.model.match_genes(names)
    except VocabularyError:
        return [None] * len(names)
    return [int(token) if known else None for token, known in zip(match.token_id, match.matched, strict=True)]


def _refusal(path: Path, names: Sequence[str], missing: Sequence[str], inputs: LoadedInputs) -> str:
    """Return why a list is refused, with some names and those nearest to them."""
    symbols = [name for name, known in zip(inputs.source.gene_symbols, inputs.match.matched, strict=True) if known]
    shown = ", ".join(
        f"{name!r}" + "".join(f" (did you mean {other!r}?)" for other in closest_names(name, symbols, n=1))
        for name in missing[:SHOWN_NAMES]
    )
    shown += ", ..." if len(missing) > SHOWN_NAMES else ""
    return (
        f"--genes {path} names {len(names):,} genes, of which {len(names) - len(missing):,} are genes of "
        f"{', '.join(map(str, inputs.source.paths))} that {inputs.model.name} knows, and at least {LEAST_FOUND:.0%} "
        f"have to be; not found are {shown}; give a symbol or an Ensembl id a line, or the most variable genes with "
        "--genes hvg:N"
    )


def _columns_of(inputs: LoadedInputs, tokens: set[int]) -> pl.DataFrame:
    """Return the table `variable_genes` of the columns of some tokens, without figures."""
    match = inputs.match
    columns = np.flatnonzero(match.matched & np.isin(match.token_id, list(tokens)))
    return pl.DataFrame({"gene_idx": columns.astype(np.int32)}).with_columns(
        rank=pl.lit(None, pl.Float64), n_batches=pl.lit(None, pl.Int64), variance=pl.lit(None, pl.Float64)
    )


def _table(inputs: LoadedInputs, genes: pl.DataFrame) -> pl.DataFrame:
    """Return the table `chosen_genes` of the genes of a table `variable_genes`: a row for each token."""
    column = genes["gene_idx"].to_numpy()
    token, names = inputs.match.token_id[column].astype(np.int32), inputs.model.vocabulary.tokens
    ensembl = inputs.source.ensembl_ids
    named = pl.DataFrame(
        {
            "gene_id": token,
            "token": [names[one] for one in token.tolist()],
            "symbol": [inputs.source.gene_symbols[place] for place in column.tolist()],
            "ensembl_id": [(ensembl[place] or None) if ensembl else None for place in column.tolist()],
        },
        schema_overrides={"ensembl_id": pl.String},
    )
    table = named.hstack(genes.drop("gene_idx")).unique("gene_id", keep="first", maintain_order=True)
    return schemas.conform("chosen_genes", table)


def _record(choice: str, table: pl.DataFrame) -> GeneChoice:
    names = "".join(f"{name}\n" for name in sorted(table["token"]))
    return GeneChoice(choice=choice, n_genes=table.height, sha256=sha256(names.encode()).hexdigest())


def save_genes(run: commit.Run, genes: ChosenGenes | None) -> None:
    """Write the chosen genes beside an activations run, if they were chosen."""
    if genes is not None:
        plan = ChosenGenesPlan(beside=run.plan_sha, sha256=genes.record.sha256)
        commit.write_table(run.path / CHOSEN, genes.table, plan.table(CHOSEN))


def recorded_genes(run: commit.Run) -> ChosenGenes | None:
    """Return the genes that an activations run was made of, or None if they were not chosen.

    Raises:
        NotFoundError, IntegrityError: the table of `save_genes` is gone or damaged.
    """
    record = ActivationsPlan.of(run).genes
    if record is None:
        return None
    genes = ChosenGenes(record=record, table=commit.read_table(run.path / CHOSEN), fact=f"as in {run.path.name}")
    if _record(record.choice, genes.table) != record:
        raise IntegrityError(
            f"{run.path / CHOSEN} does not hold the genes of the plan of its run; run `scsae extract` again, with the "
            "options that it was run with"
        )
    return genes


def recorded_match(run: commit.Run, model: "FoundationModel", source: Source) -> "GeneMatch":
    """Return the match of the genes of some data by the model of an activations run, narrowed to those chosen there."""
    match, genes = model.match_genes(source.gene_symbols, source.ensembl_ids), recorded_genes(run)
    return match if genes is None else match.only(np.array(genes.tokens, dtype=np.int64))


def with_genes(inputs: LoadedInputs, genes: ChosenGenes | None) -> LoadedInputs:
    """Return the inputs narrowed to the chosen genes. UsageError if the data have none of them."""
    if genes is None:
        return inputs
    narrowed = only_tokens(inputs, genes.tokens)
    if not narrowed.match.used.any():
        raise UsageError(
            f"{', '.join(map(str, inputs.source.paths))} has none of the {len(genes.tokens):,} genes that were chosen "
            f"(such as {', '.join(genes.table['token'].head(3))}); extract and train with other --genes, or without"
        )
    return narrowed


def found_genes(inputs: LoadedInputs, genes: ChosenGenes | None) -> dict[str, str]:
    """Return how many of the chosen genes some data have, or nothing if none were chosen."""
    if genes is None:
        return {}
    n = len(np.unique(inputs.match.token_id[inputs.match.used]))
    return {"genes chosen": f"{n:,} of the {len(genes.tokens):,} ({genes.record.choice}) are in these data"}


def tokens_that_go_in(inputs: LoadedInputs) -> tuple[int, ...] | None:
    """Return the tokens that the inputs are narrowed to; None if they are not."""
    match = inputs.match
    return None if match.chosen is None else tuple(np.unique(match.token_id[match.used]).tolist())


def long_cells(inputs: LoadedInputs) -> str | None:
    """Return what is lost where many cells of the probe have more genes than the model takes, and the option that
    chooses them instead; None where few have, or the genes are chosen already.
    """
    model, n_genes = inputs.model, inputs.coverage.genes_per_cell
    share = inputs.coverage.n_truncated(model.max_genes) / max(len(n_genes), 1)
    if model.max_genes is None or inputs.match.chosen is not None or share < MANY_LONG:
        return None
    instead = f"`--genes hvg:{model.max_genes}` of extract takes the most variable genes instead"
    if inputs.source.value_kind != "counts":
        instead = "`--genes FILE` of extract takes the genes of a list instead"
    return (
        f"{share:.0%} of the first {len(n_genes)} cells (the median cell has {np.median(n_genes):,.0f} genes that "
        f"the model knows, and {model.max_genes:,} fit); what goes in is {model.kept_of_long_cells}; {instead}"
    )
