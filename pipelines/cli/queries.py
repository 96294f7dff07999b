"""The commands that look at data and at a store and compute no stage."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.parameters import Associations, Codes, Form, Output, QueryCommand, Store, destination, given_options
from pipelines.config import DEFAULT_STORE, DataOptions, InspectOptions, option_help
from pipelines.plot import KINDS
from pipelines.runtime.visible import visible

HOST, PORT = "127.0.0.1", 8300
"""The address at which the atlas is served by default."""

commands = typer.Typer()


@commands.command("inspect")
def inspect_command(
    context: typer.Context,
    data: Annotated[list[str], typer.Argument(help=option_help(DataOptions, "data"))],
    model: Annotated[str, typer.Option("--model", help=option_help(DataOptions, "model"))] = "mini",
    matrix: Annotated[str | None, typer.Option("--matrix", help=option_help(DataOptions, "matrix"))] = None,
    where: Annotated[str | None, typer.Option("--where", help=option_help(DataOptions, "where"))] = None,
    obs: Annotated[list[str] | None, typer.Option("--obs", help=option_help(DataOptions, "obs"))] = None,
    model_option: Annotated[
        list[str] | None, typer.Option("--model-option", help=option_help(DataOptions, "model_option"))
    ] = None,
    vectors: Annotated[str | None, typer.Option("--vectors", help=option_help(InspectOptions, "vectors"))] = None,
) -> None:
    """Report what the data and the model have in common, or what given vectors are.

    Shown are the genes matched, whether the values are counts, tokens per cell, and the bytes and time to expect; with
    --vectors their shape, how they are read and joined with the cells, and whether a sample of them is finite. Nothing
    is written.
    """
    from pipelines.inspection import inspect_data
    from pipelines.runtime.reports import print_facts, print_next

    facts = inspect_data(given_options(InspectOptions, context))
    command = facts.pop("next", None)
    print_facts(facts)
    if command is not None:
        print_next(command)


@commands.command("models-supported")
def models_supported(form: Form = None, output: Output = None) -> None:
    """List the families of foundation models that scsae reads, with their files, genes, lengths, licences and options.

    The sites of every model are embedding, attention.I, mlp.I and layer.I of each block I; `final` follows where the
    model has a norm after its last block.
    """
    from pipelines.supported_models import supported_models

    destination(form, output).write(supported_models())


@commands.command()
def runs(
    kind: Annotated[str | None, typer.Option("--kind", help="Only runs of this kind, e.g. saes.")] = None,
    store: Store = DEFAULT_STORE,
    form: Form = None,
    output: Output = None,
) -> None:
    """List what is in a store: every run with its kind, state, origin, time and size.

    A control (a baseline, a model with random weights) is taken only where it is named; the newest complete run of a
    kind that is no control is the default of later commands.
    """
    from feature_store.query.run_list import run_list
    from feature_store.query.store import no_runs
    from feature_store.query.suggestions import did_you_mean
    from feature_store.storage.layout import KINDS, Layout
    from pipelines.errors import UsageError

    if kind is not None and kind not in KINDS:
        raise UsageError(f"--kind was {kind!r}{did_you_mean(kind, KINDS)}; kinds are {', '.join(KINDS)}")
    layout = Layout(store)
    found = run_list(layout, kind)
    if found.is_empty():
        if kind is None or run_list(layout).is_empty():
            raise UsageError(no_runs(layout))
        raise UsageError(f"{layout.root} holds no run of kind {kind}; `{layout.command_for(kind)}` makes one")
    destination(form, output).write(found)


@commands.command(cls=QueryCommand)
def sql(
    query: Annotated[str, typer.Argument(help="SQL query over the tables of the store.")],
    store: Store = DEFAULT_STORE,
    associations: Associations = None,
    codes: Codes = None,
    form: Form = None,
    output: Output = None,
) -> None:
    """Query the tables of a store in SQL.

    The tables are cells, codes, features, feature_label, feature_gene, feature_geneset and others; `SHOW TABLES` lists
    them, and `scsae describe TABLE` says what the columns of one hold. Where the panel is not all cells, codes has the
    cells of the panel, and compact_codes the largest codes of every other cell.
    """
    from feature_store import FeatureStore
    from pipelines.cli.lookups import ask

    to = destination(form, output)
    to.write(ask(FeatureStore.open(store, associations=associations, codes=codes), query))


@commands.command()
def describe(
    table: Annotated[str | None, typer.Argument(help="Table to describe; without one, all tables are listed.")] = None,
    store: Store = DEFAULT_STORE,
    associations: Associations = None,
    codes: Codes = None,
    form: Form = None,
    output: Output = None,
) -> None:
    """Say what a table of the store holds: a row, its cells and splits, and each column with its unit.

    The columns are those that the table has in the store, and where the store does not have it those that it would
    have. No store is needed.
    """
    from pipelines.cli.lookups import write_description

    write_description(table, store, {"associations": associations, "codes": codes}, destination(form, output))


@commands.command()
def features(
    gene: Annotated[str | None, typer.Option("--gene", help="Show the features of this gene.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="Show the features of this label.")] = None,
    gene_set: Annotated[str | None, typer.Option("--gene-set", help="Show the features of this gene set.")] = None,
    cell: Annotated[str | None, typer.Option("--cell", help="Show the features active in the cell of this id.")] = None,
    cell_idx: Annotated[
        int | None, typer.Option("--cell-idx", min=0, help="Show the features active in the cell at this place.")
    ] = None,
    number: Annotated[
        str | None, typer.Option("--number", help="Show the features of this number of the cells, e.g. pct_mito.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--kind", help="Kind of the label, or collection of the gene set, if several have the same name."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of rows at most.")] = 20,
    store: Store = DEFAULT_STORE,
    associations: Associations = None,
    codes: Codes = None,
    form: Form = None,
    output: Output = None,
) -> None:
    """Look up features by gene, label, gene set, number of the cells, or cell.

    Without any of these, all features are shown, the densest first.
    """
    from feature_store import FeatureStore
    from pipelines.cli.lookups import Lookup, write_lookup

    names = {"gene": gene, "label": label, "gene_set": gene_set, "number": number}
    asked = Lookup(**names, cell=cell, cell_idx=cell_idx, kind=kind, n=n)
    to = destination(form, output)
    write_lookup(asked, FeatureStore.open(store, associations=associations, codes=codes), to)


@commands.command("plot")
def plot_command(
    kind: Annotated[
        str, typer.Argument(help="; ".join(f"{name}: {found.about}" for name, found in KINDS.items()) + ".")
    ],
    save: Annotated[
        Path, typer.Option("--save", help="File of the plot (.png, .pdf, .svg), or a folder for steering-all.")
    ],
    feature: Annotated[list[int] | None, typer.Option("--feature", help="Feature id; may be repeated.")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="Column of the cell table, such as cell_type; may be repeated.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", help="Cells to show: test, select or train, or all on maps and violins. Default: test."
        ),
    ] = None,
    gene: Annotated[
        str | None, typer.Option("--gene", help="Gene whose features are shown, by symbol, other name or Ensembl id.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Number of bars or of named genes at most.")] = None,
    dpi: Annotated[
        int | None, typer.Option("--dpi", min=30, max=1200, help="Pixels per inch of a .png. Default: 200.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", help="Width x height in inches, such as 8x5. Default: as large as what is shown."),
    ] = None,
    steering: Annotated[str | None, typer.Option("--steering", help="Steering run; default: the newest.")] = None,
    store: Store = DEFAULT_STORE,
    associations: Associations = None,
    codes: Codes = None,
) -> None:
    """Draw a plot of a store into a file.

    steering-all draws several plots into a folder.
    """
    from pipelines.plot import PlotRequest, plot

    given = {"feature": feature or (), "label": label or (), "split": split, "n": n, "steering": steering, "gene": gene}
    of_every_plot = {"save": save, "dpi": dpi, "size": size, "associations": associations, "codes": codes}
    plot(PlotRequest(kind=kind, **given, **of_every_plot), store)  # type: ignore[arg-type]
    typer.echo(visible(str(save)))


@commands.command()
def serve(
    store: Store = DEFAULT_STORE,
    associations: Associations = None,
    codes: Codes = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; 0.0.0.0 is every address of this machine.")
    ] = HOST,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65_535, help="Port to listen at; 0 takes any free port.")
    ] = PORT,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the atlas in a web browser.")] = False,
) -> None:
    """Show the atlas of a store in a web browser.

    Maps that the store lacks are computed first.
    """
    from pipelines.atlas import serve_atlas

    serve_atlas(store, associations=associations, codes=codes, host=host, port=port, open_browser=open_browser)


@commands.command("export-atlas")
def export_atlas_command(
    folder: Annotated[
        Path, typer.Argument(help="Folder to write to: a new or empty folder, or an earlier export.", metavar="DIR")
    ],
    store: Store = DEFAULT_STORE,
    associations: Associations = None,
    codes: Codes = None,
) -> None:
    """Write the atlas of a store as files for any web host."""
    from pipelines.atlas import export_atlas

    export_atlas(store, folder, associations=associations, codes=codes)


@commands.command()
def verify(run: Annotated[str, typer.Argument(help="Run id, or its beginning.")], store: Store = DEFAULT_STORE) -> None:
    """Read and hash every file of a run.

    Files that are damaged or gone are named, with the command that repairs them, and the exit code is then 1.
    """
    from pipelines.verify import verify_run

    raise typer.Exit(verify_run(run, store))


@commands.command()
def forget(
    run: Annotated[str, typer.Argument(help="Run id, or its beginning; KIND/ID where two kinds have it.")],
    store: Store = DEFAULT_STORE,
) -> None:
    """Forget a run that was deleted by hand.

    A store keeps a list of what was committed, so that a run that is gone is an error and no default comes from another
    run unnoticed. This takes the run off that list.
    """
    from pipelines.verify import forget_run

    forget_run(run, store)
