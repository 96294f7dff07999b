"""Association: Ray actors relate codes to labels and expression, and write the tables that annotate features.

`feature_store.associations` computes the statistics, which are of the panel's cells. This module gives them their
inputs: the cell table with its splits, the expression of the data set by gene (written once per data set), and the cell
codes and token counts of each range of features. The statistics of each range are committed, so an association resumes
after a kill; this process assembles the tables from them at the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from feature_store.associations import (
    AssociationConfig,
    CellInputs,
    FeatureRange,
    GeneTiles,
    Labels,
    MeasuredRun,
    Numbers,
    assemble_measured,
    feature_ranges,
    measure,
    token_statistics,
)
from feature_store.associations.claims import NAMED_AT
from feature_store.associations.constants import association_constants
from feature_store.associations.gene_sets import (
    GeneSets,
    read_collections,
    refuse_without_shared_genes,
    without_shared_genes,
)
from feature_store.associations.held_out_units import unit_column
from feature_store.cells import (
    ExpressionReader,
    open_source,
    plan_expression,
    read_panel,
    read_panel_cells,
    write_expression_part,
)
from feature_store.codes import (
    CodesRun,
    load_feature_codes,
    load_token_counts,
    load_top_tokens,
    panel_firing,
    panel_with_tokens,
)
from feature_store.errors import NotFoundError
from feature_store.query.runs import newest_run_of, resolve_run
from feature_store.storage import commit
from feature_store.storage.addresses import RemotePath
from feature_store.storage.layout import ASSOCIATION_TABLES, Layout, RunInfo, as_path
from feature_store.storage.obs_columns import column_of
from feature_store.storage.plans import AssociationsPlan, CellsPlan, GeneSetFile, as_json
from pipelines.config import ActorOptions, AssociateOptions, CellOptions, EncodeOptions, parse_size
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.inputs import load_recorded_source, load_token_of_gene, tokenless_fact, warn_of_samples
from pipelines.moved_data import record_if_same, record_new_place
from pipelines.runtime.actor_pool import do_shards
from pipelines.runtime.checks import check_before_work
from pipelines.runtime.cluster import one_ray_session
from pipelines.runtime.progress import stderr_console
from pipelines.runtime.stage import Clock, StageResult

MEASURED = "measured"


@dataclass(frozen=True, kw_only=True)
class ExpressionJob:
    """The files of a data set, its panel, and the run that holds its expression by gene."""

    data: tuple[str | RemotePath, ...]
    matrix: str
    where: str | None
    rows: tuple[str, ...]
    run: str
    cells: str


class ExpressionWriter:
    """Computes shards of an `ExpressionJob`; it is the body of an actor and can be called without Ray."""

    def __init__(self, job: ExpressionJob) -> None:
        self.source = open_source(job.data, matrix=job.matrix, where=job.where, rows=job.rows)
        self.run = commit.Run.open(job.run)
        self.panel = read_panel(job.cells)

    def shard(self, number: int) -> dict[str, int]:
        """Transpose and commit the cells of shard `number` unless they are committed; return the progress counts."""
        if self.run.committed(number):
            return {"nonzeros": 0}
        return {"nonzeros": write_expression_part(self.run, number, self.source, self.panel)}


@dataclass(frozen=True, kw_only=True)
class MeasureJob:
    """Everything an actor needs to measure any range of features; it holds plain values, so it can be pickled."""

    store: str
    codes: str
    measured: str
    gene_sets: tuple[GeneSets, ...]
    config: AssociationConfig


class Measurer:
    """Measures ranges of a `MeasureJob`; it is the body of an actor and can be called without Ray."""

    def __init__(self, job: MeasureJob) -> None:
        layout = Layout(as_path(job.store))
        self.codes = CodesRun.open(layout.codes_dir(job.codes))
        self.measured = MeasuredRun.open(job.measured)
        self.config = job.config
        self.genes = load_token_of_gene(layout, self.codes)
        self.panel = read_panel(layout.cells_dir(self.codes.plan.dataset))
        self.cells = cell_inputs(layout, self.codes, job.gene_sets)
        folder = expression_dir(layout, self.codes.plan.dataset)
        expression = ExpressionReader(commit.Run.open(folder), self.panel)
        self.tiles = GeneTiles(expression.read, expression.bounds, self.cells.blocks())

    def shard(self, number: int) -> dict[str, int]:
        """Measure and commit range `number` unless it is committed; return the counts for the progress display."""
        start, stop = self.measured.bounds[number], self.measured.bounds[number + 1]
        counts = {"features": stop - start, "bytes": 0}
        if self.measured.is_committed(number):
            return counts
        found = measure(self._features(start, stop), self.cells, self.tiles, self.config)
        size = self.measured.commit(number, found)
        return counts | {"bytes": size}

    def _features(self, start: int, stop: int) -> FeatureRange:
        """Return the codes and token counts of the features [start, stop)."""
        counts = load_token_counts(self.codes, start, stop)
        symbols = dict(self.genes.select("gene_id", "symbol").drop_nulls().iter_rows())
        return FeatureRange(
            first=start,
            codes=load_feature_codes(self.codes, self.panel, start, stop),
            tokens=token_statistics(
                counts.feature_gene.with_columns(pl.col("feature_id") - start),
                counts.gene,
                gene_id=self.genes["gene_id"].to_list(),
                n_features=stop - start,
            ),
            top_tokens=load_top_tokens(self.codes, start, stop)
            .with_columns(gene=pl.col("gene_id").replace_strict(symbols, default=None, return_dtype=pl.String))
            .drop("gene_id"),
        )


def associate(options: AssociateOptions, store: Path, *, address: str | None = None) -> StageResult:
    """Compute the association tables of a codes run; committed ranges and tables are not computed again.

    With `data`, the newest SAE (or `sae`) encodes that data set first. It raises what `associate_all` raises.
    """
    return associate_all(options, store, address=address)[-1]


def associate_all(options: AssociateOptions, store: Path, *, address: str | None = None) -> list[StageResult]:
    """Return the results of the association, preceded by that of the encoding of `data` if `data` is given.

    Raises:
        NotFoundError: there are no codes, or a gene-set file is missing.
        UsageError, InputError: a gene-set file is malformed, or none of its sets shares a gene with the data; or the
            data set changed before its expression was read.
    """
    layout = Layout(store)
    check_before_work(layout, address=address)
    sets = read_collections(options.gmt)
    with one_ray_session():
        encoded, of_codes = [], options.model_copy(update={"data": ()})
        if options.data and not _is_of_moved_data(options, layout):
            given = {name: getattr(options, name) for name in EncodeOptions.model_fields if hasattr(options, name)}
            encoded = [encode(EncodeOptions(**given), store, address=address)]
            of_codes = of_codes.model_copy(update={"codes": encoded[0].run})
        found = associate_with(of_codes, sets, store, address=address)
    warn_of_samples(layout, str(found.facts["dataset"]))
    return [*encoded, found]


def _is_of_moved_data(options: AssociateOptions, layout: Layout) -> bool:
    """Return whether `data` are those of the codes at a new place, which is then recorded.

    Raises:
        UsageError: `codes` names codes of other data.
    """
    if options.codes is not None:
        run = resolve_run(layout, "codes", options.codes, option="--codes")
        record_new_place(layout, CodesRun.open(run.path).plan.dataset, options.data)
        return True
    fields = AssociateOptions.model_fields
    columns = ("matrix", "vectors", *CellOptions.model_fields)
    if options.sae is not None or any(getattr(options, name) != fields[name].default for name in columns):
        return False
    try:
        run = resolve_run(layout, "codes", None, option="--codes")
    except NotFoundError:
        return False
    return record_if_same(layout, CodesRun.open(run.path).plan.dataset, options.data)


def associate_with(
    options: AssociateOptions, sets: tuple[GeneSets, ...], store: Path, *, address: str | None = None
) -> StageResult:
    """Associate the codes run that the options name with these gene sets, whatever files the options name.

    Sets that share no gene with the data are named in a warning.
    """
    clock = Clock()
    layout = Layout(store)
    codes = CodesRun.open(resolve_run(layout, "codes", options.codes, option="--codes").path)
    genes = load_token_of_gene(layout, codes)["symbol"].to_list()
    if options.gmt:
        refuse_without_shared_genes(sets, genes)
    for text in without_shared_genes(sets, genes):
        stderr_console().print(f"warning: {text}", style="yellow", soft_wrap=True)
    config = AssociationConfig()
    plan = AssociationsPlan(
        control_of=codes.plan.control_of,
        codes=codes.folder.name,
        codes_manifest=codes.by_cell.manifest().sha,
        sae=codes.plan.sae,
        dataset=codes.plan.dataset,
        gene_sets=tuple(GeneSetFile(collection=one.collection, sha256=one.digest) for one in sets),
        config=as_json(config),
        constants=as_json(association_constants()),
    )
    folder = layout.associations_dir(plan.id)
    bounds = feature_ranges(
        panel_firing(codes), len(genes), range_bytes=parse_size(options.range_size), bounds=codes.bounds
    )
    missing = [name for name in ASSOCIATION_TABLES if not commit.is_intact(folder / name)]
    pending: list[int] = []
    is_measured = all(commit.is_intact(path) for path in MeasuredRun.folders(folder / MEASURED))
    if not is_measured or layout.is_present(expression_dir(layout, codes.plan.dataset)):
        # this precedes every write, because the data set may have changed; damaged expression is made anew in any case
        write_expression_by_gene(layout, codes.plan.dataset, options, address=address)
    if missing or not is_measured:
        with commit.exclusive(folder):
            measured = MeasuredRun.create(folder / MEASURED, plan, bounds=bounds)
            pending = measured.pending()
            job = MeasureJob(
                store=str(layout.root.resolve()),
                codes=codes.folder.name,
                measured=str(measured.folder.resolve()),
                gene_sets=sets,
                config=config,
            )
            do_shards(Measurer, job, pending, options, title="associate", note=_features_done, address=address)
            measured.finalize()
            if missing:
                _assemble(folder, plan, measured, genes, sets, config)
    n_units = len(MeasuredRun.open(folder / MEASURED).bounds) - 1 + len(ASSOCIATION_TABLES)
    features = commit.read_table(folder / "features", ["dead", "class", "top_label"])
    numbers = number_columns(layout, codes.plan.dataset, read_panel_cells(layout.cells_dir(codes.plan.dataset)))
    return StageResult(
        kind="associations",
        run=folder.name,
        path=folder,
        done=len(missing) + len(pending),
        reused=n_units - len(missing) - len(pending),
        seconds=clock.seconds,
        facts={
            "sae": codes.plan.sae,
            "dataset": codes.plan.dataset,
            "features": features.height,
            "dead": int(features["dead"].sum()),
            **tokenless_fact(codes),
            "with a label": f"{features['top_label'].count()} at {NAMED_AT} on test cells",
            **({"measured as numbers": ", ".join(numbers)} if numbers else {}),
            **{f"class {name}": n for name, n in features["class"].value_counts(sort=True).iter_rows()},
        },
    )


def _assemble(
    folder: Path,
    plan: AssociationsPlan,
    measured: MeasuredRun,
    genes: Sequence[str],
    sets: Sequence[GeneSets],
    config: AssociationConfig,
) -> None:
    """Write the tables, except those that are intact. feature_gene has one part per range."""
    bounds = measured.bounds
    pairs = commit.Run.create(
        folder / "feature_gene", plan.table("feature_gene", n_shards=len(bounds) - 1, bounds=bounds)
    )

    def keep(number: int, rows: pl.DataFrame) -> None:
        write = partial(commit.write_frame, frame=rows)
        pairs.commit_shard(number, write, start=bounds[number], stop=bounds[number + 1])

    for name, table in assemble_measured(measured, genes, sets, config, keep_pairs=keep).items():
        commit.write_table(folder / name, table, plan.table(name))
    pairs.finalize()


def write_expression_by_gene(
    layout: Layout, dataset: str, options: ActorOptions, *, address: str | None = None
) -> commit.Run:
    """Write the expression of a data set by gene; a complete run is reused without reading the data set's files.

    Raises:
        UsageError, InputError: the data set changed or moved since it was extracted.
    """
    folder = expression_dir(layout, dataset)
    if commit.is_intact(folder):
        return commit.Run.open(folder)
    with load_recorded_source(layout, dataset) as source:
        genes, cells = commit.read_table(layout.genes_dir(dataset)), layout.cells_dir(dataset)
        plan = plan_expression(dataset, source, genes, read_panel(cells))
        job = ExpressionJob(
            data=source.places,
            matrix=source.matrix,
            where=source.where,
            rows=source.rows,
            run=str(folder.resolve()),
            cells=str(cells.resolve()),
        )
    run = commit.Run.create(folder, plan.table("expression", n_shards=plan.n_shards))
    if pending := run.pending():
        with run.exclusive():
            do_shards(ExpressionWriter, job, pending, options, title="expression", note=_nonzeros_done, address=address)
    run.finalize()
    return run


def cell_inputs(layout: Layout, codes: CodesRun, sets: Sequence[GeneSets]) -> CellInputs:
    """Return the panel's cells with their labels, the genes of a codes run and the gene sets."""
    dataset = codes.plan.dataset
    cells = read_panel_cells(layout.cells_dir(dataset))
    kinds, numbers = label_kinds(layout, dataset, cells), number_columns(layout, dataset, cells)
    has_tokens = panel_with_tokens(codes, cells["cell_idx"].to_numpy())
    units = unit_column(cells)
    return CellInputs(
        split=[split if known else None for split, known in zip(cells["split"], has_tokens.tolist(), strict=True)],
        genes=load_token_of_gene(layout, codes)["symbol"].to_list(),
        labels=[Labels.from_values(kind, cells[kind]) for kind in kinds],
        numbers=[
            Numbers.from_values(name, cells[name].cast(pl.Float64).fill_null(float("nan")).to_numpy())
            for name in numbers
        ],
        units=None if units is None else Labels.from_values(units, cells[units]),
        gene_sets=sets,
    )


def label_kinds(layout: Layout, dataset: str, cells: pl.DataFrame) -> list[str]:
    """Return the cell-table columns whose labels features are associated with: cell_type, batch, and those named by
    --label that group the cells.

    They are named as in the table (`obs_columns.column_of`).
    """
    plan = CellsPlan.of(commit.Run.open(layout.cells_dir(dataset)))
    named = [column for label, column in _label_columns(plan).items() if label not in plan.numbers]
    return [kind for kind in dict.fromkeys(("cell_type", "batch", *named)) if cells[kind].null_count() < cells.height]


def number_columns(layout: Layout, dataset: str, cells: pl.DataFrame) -> list[str]:
    """Return the cell-table columns that --label named and that are measured as numbers."""
    plan = CellsPlan.of(commit.Run.open(layout.cells_dir(dataset)))
    named = [column for label, column in _label_columns(plan).items() if label in plan.numbers]
    return [name for name in named if cells[name].null_count() < cells.height]


def _label_columns(plan: CellsPlan) -> dict[str, str]:
    """Return the cell-table column of each obs column that --label named."""
    own = {"donor": plan.donor, "batch": plan.batch, "cell_type": plan.cell_type}
    return {label: label if own.get(label) == label else column_of(label) for label in plan.labels}


def associations_of(layout: Layout, sae: str | None, *, option: str = "--sae") -> RunInfo:
    """The newest associations of the SAE that an option names, or of any.

    Raises:
        UsageError: the SAE has no associations.
        NotFoundError: there is no such SAE, or there are no associations.
    """
    if sae is None:
        return resolve_run(layout, "associations", None, option=option)
    run = resolve_run(layout, "saes", sae, option=option).run
    found = newest_run_of(layout, "associations", {"sae": run})
    if found is None:
        raise UsageError(
            f"{option} was {sae!r}, which has no associations; make them with `scsae encode --sae {run} "
            f"{layout.store_option}` and `{layout.command_for('associations')}`"
        )
    return found


def expression_dir(layout: Layout, dataset: str) -> Path:
    """Return the folder of the expression of a data set by gene."""
    return layout.expression_dir(dataset)


def _features_done(total: Mapping[str, int], seconds: float) -> str:
    return f"{total['features']:,} features, {total['features'] / max(seconds, 1e-9):,.1f} a second"


def _nonzeros_done(total: Mapping[str, int], seconds: float) -> str:
    return f"{total['nonzeros'] / 1e6:,.1f} M values"
