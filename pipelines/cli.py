"""The command line. `scsae --help` answers in under a second: a command imports its stage when it is called.

The options of a stage's command are the fields of its options class: their docstrings are the help. Exit codes: 0 done,
1 a run failed or was interrupted and can be resumed, 2 the input or the options are wrong and nothing was written.
"""

import inspect
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from feature_store.errors import StoreError
from feature_store.storage.layout import as_path
from pipelines.config import (
    DEFAULT_STORE,
    AssociateOptions,
    BaselineOptions,
    DataOptions,
    EncodeOptions,
    ExtractOptions,
    MatchOptions,
    Options,
    SteerOptions,
    TrainOptions,
    check,
    load_recipe,
)
from pipelines.errors import ON_PURPOSE, exit_code, root_cause
from pipelines.plot import KINDS
from pipelines.runtime.progress import stderr_console

if TYPE_CHECKING:
    from pipelines.runtime.output import Destination

HOST, PORT = "127.0.0.1", 8300
"""Where the atlas is served unless another address is named."""
INTERRUPTED = 130
"""What typer makes of Ctrl-C."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Sparse autoencoders for single-cell foundation models: extract, train, encode, associate, steer, query.",
)
models_app = typer.Typer(invoke_without_command=True, help="Registry look-ups: versions, aliases, metrics, lineage.")
app.add_typer(models_app, name="models")


def _store(text: str) -> Path:
    """A root of typer's, with the error as typer says it."""
    try:
        return as_path(text)
    except StoreError as error:
        raise typer.BadParameter(str(error)) from error


WHERE = "Folder of the store, or s3://BUCKET/PREFIX."
StoreOption = typer.Option("--store", envvar="SCSAE_STORE", help=WHERE, parser=_store, metavar="ROOT")
Store = Annotated[Path, StoreOption]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster to use, e.g. ray://HEAD:10001; default: this machine.")
]


class Format(StrEnum):
    """How rows are written."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


Form = Annotated[
    Format | None,
    typer.Option("--format", help="Form of the answer; default: by the suffix of --output, else a table."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="File to write the answer to: .csv, .json, .parquet, .txt; default: stdout."),
]
Associations = Annotated[
    str | None, typer.Option("--associations", help="Associations run to read; default: the newest.")
]
Codes = Annotated[
    str | None,
    typer.Option("--codes", help="Codes run to read, with its associations; default: the codes of the associations."),
]


def main() -> None:
    """Run the command line; turn errors raised on purpose into one message and an exit code."""
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        if ended.code != INTERRUPTED:
            raise
        stderr_console().print("interrupted; the same command resumes", style="yellow")
        sys.exit(1)
    except Exception as error:  # noqa: BLE001  every error ends as a message and an exit code
        cause = root_cause(error)
        console = stderr_console()
        if not isinstance(cause, (*ON_PURPOSE, OSError)):
            console.print_exception(max_frames=8)
        console.print(f"error: {cause}", style="red", markup=False, soft_wrap=True)
        sys.exit(exit_code(cause))


def stage_command(cls: type[Options], *, argument: str | None = None) -> Callable[[Callable[..., None]], None]:
    """Register `body(options, store[, address][, to])` as a command whose options are the fields of `cls`.

    The field `argument` becomes the positional argument, which may be given several times. `to` is where the result
    goes: --format and --output.
    """

    def register(body: Callable[..., None]) -> None:
        name = body.__name__.removesuffix("_command")

        def command(**given: Any) -> None:
            where: dict[str, Any] = {key: given.pop(key) for key in ("store", "address") if key in given}
            if "form" in given:
                where["to"] = _destination(given.pop("form"), given.pop("output"))
            values = {key: value for key, value in given.items() if value is not None and value != []}
            body(check(cls, values, f"scsae {name}"), **where)

        parameters = [_parameter(cls, field, positional=field == argument) for field in cls.model_fields]
        parameters.append(_keyword("store", Store, DEFAULT_STORE))
        if "address" in inspect.signature(body).parameters:
            parameters.append(_keyword("address", Address, None))
        if "to" in inspect.signature(body).parameters:
            parameters += [_keyword("form", Form, None), _keyword("output", Output, None)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name, help=cls.__doc__)(command)

    return register


def _destination(form: Format | None, output: Path | None) -> "Destination":
    from pipelines.runtime.output import Destination

    return Destination.choose(form, output)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(cls: type[Options], field: str, *, positional: bool) -> inspect.Parameter:
    """The command-line parameter of one field."""
    info = cls.model_fields[field]
    if positional:
        return _keyword(field, Annotated[list[Path], typer.Argument(help=info.description)], inspect.Parameter.empty)
    kind = _cli_type(info.annotation)
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    if isinstance(default, tuple):
        default = [str(item) for item in default]
    flag = f"--{field.replace('_', '-')}"
    choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    text = f"{info.description} One of: {', '.join(choices)}." if choices else info.description
    return _keyword(field, Annotated[kind, typer.Option(flag, help=text)], default)


def _cli_type(annotation: Any) -> Any:
    """What typer is told: choices as text (the options class checks them), tuples as repeated options."""
    text = str(annotation)
    if text.startswith("tuple["):
        return list[str]
    for kind in (bool, float, int):
        if annotation is kind or text.startswith(f"{kind.__name__} |"):
            return kind | None
    return str | None


@stage_command(ExtractOptions, argument="data")
def extract_command(options: ExtractOptions, store: Path, address: str | None) -> None:
    """See ExtractOptions."""
    from pipelines.extract import extract
    from pipelines.runtime.reports import print_results

    print_results(extract(options, store, address=address), store)


@stage_command(TrainOptions)
def train_command(options: TrainOptions, store: Path, address: str | None) -> None:
    """See TrainOptions."""
    from pipelines.runtime.reports import print_results
    from pipelines.train import train_all

    print_results(train_all(options, store, address=address), store)


@stage_command(EncodeOptions)
def encode_command(options: EncodeOptions, store: Path, address: str | None) -> None:
    """See EncodeOptions."""
    from pipelines.encode import encode
    from pipelines.runtime.reports import print_results

    print_results([encode(options, store, address=address)], store)


@stage_command(AssociateOptions)
def associate_command(options: AssociateOptions, store: Path, address: str | None, to: "Destination") -> None:
    """See AssociateOptions."""
    from pipelines.associate import associate_all
    from pipelines.runtime.reports import print_excess, print_results, results_frame

    results = associate_all(options, store, address=address)
    if not to.is_printed_table:
        to.write(results_frame(results))
        return
    print_results(results, store)
    print_excess(store, results[-1].run)


@stage_command(MatchOptions)
def match_command(options: MatchOptions, store: Path) -> None:
    """See MatchOptions."""
    from pipelines.match import match
    from pipelines.runtime.reports import print_results

    print_results(match(options, store), store)


@stage_command(BaselineOptions)
def baseline_command(options: BaselineOptions, store: Path, address: str | None) -> None:
    """See BaselineOptions."""
    from pipelines.baseline import baseline
    from pipelines.compare import compare_with_baselines
    from pipelines.runtime.reports import print_comparison, print_made

    print_made(baseline(options, store, address=address))
    print_comparison(compare_with_baselines(store, options.associations))


@app.command()
def compare(
    associations: Annotated[
        str | None, typer.Option("--associations", help="Associations run of the SAE; default: the newest.")
    ] = None,
    store: Store = DEFAULT_STORE,
    form: Form = None,
    output: Output = None,
) -> None:
    """What an SAE has above its baselines, target by target; needs `scsae baseline`."""
    from pipelines.compare import compare_with_baselines
    from pipelines.runtime.reports import print_comparison

    to = _destination(form, output)
    found = compare_with_baselines(store, associations)
    if to.is_printed_table:
        print_comparison(found)
    else:
        to.write(found.comparison)


@stage_command(SteerOptions)
def steer_command(options: SteerOptions, store: Path, address: str | None) -> None:
    """See SteerOptions."""
    from pipelines.runtime.reports import print_results, print_steering
    from pipelines.steering.run import steer

    result = steer(options, store, address=address)
    print_results([result], store)
    print_steering(store, result.run)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file: stages and their options.")],
    store: Annotated[Path | None, StoreOption] = None,
    address: Address = None,
) -> None:
    """Run the stages of a recipe in order; resumed by running it again."""
    from pipelines.recipe import run_recipe
    from pipelines.runtime.reports import print_results

    checked = load_recipe(recipe)
    target = store or as_path(checked.store or DEFAULT_STORE)
    print_results(run_recipe(checked, target, address=address), target)


@app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(help="YAML file: stages and their options.")],
    address: Annotated[str, typer.Option("--address", help="Ray dashboard of the cluster, e.g. http://HEAD:8265.")],
    store: Annotated[str | None, typer.Option("--store", envvar="SCSAE_STORE", help=WHERE, metavar="ROOT")] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", help="NAME=VALUE, or NAME, for the job; repeatable.")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's id instead of following it.")] = False,
) -> None:
    """Run a recipe as a Ray job: the log is followed and the job's outcome is the exit code."""
    from pipelines.runtime.job_submission import submit_recipe

    raise typer.Exit(submit_recipe(recipe, store=store, address=address, env=env or (), wait=not no_wait))


@app.command()
def demo(
    store: Store = DEFAULT_STORE,
    data: Annotated[Path | None, typer.Option("--data", help="Cells to use instead of the embedded PBMC.")] = None,
    donor: Annotated[str | None, typer.Option("--donor", help="With --data: obs column of the donor.")] = None,
    batch: Annotated[str | None, typer.Option("--batch", help="With --data: obs column of the batch.")] = None,
    cell_type: Annotated[str | None, typer.Option("--cell-type", help="With --data: obs column of the type.")] = None,
) -> None:
    """The whole job on real cells with the mini model, a summary and where to look next."""
    from pipelines.demo import run_demo

    run_demo(store, data=data, donor=donor, batch=batch, cell_type=cell_type)


@app.command("inspect")
def inspect_command(
    data: Annotated[list[Path], typer.Argument(help=DataOptions.model_fields["data"].description)],
    model: Annotated[str, typer.Option("--model", help=DataOptions.model_fields["model"].description)] = "mini",
    matrix: Annotated[str | None, typer.Option("--matrix", help=DataOptions.model_fields["matrix"].description)] = None,
) -> None:
    """Genes matched, counts or not, tokens per cell, bytes and time expected; writes nothing."""
    from pipelines.runtime.reports import inspect_data, print_facts

    values = {"data": data, "model": model, "matrix": matrix}
    print_facts(inspect_data(check(DataOptions, values, "scsae inspect")))


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="SQL over the tables of the store.")],
    store: Store = DEFAULT_STORE,
    associations: Associations = None,
    codes: Codes = None,
    form: Form = None,
    output: Output = None,
) -> None:
    """Ask the store in SQL: cells, codes, features, feature_label, feature_gene, feature_geneset, ..."""
    from feature_store import FeatureStore
    from pipelines.runtime.reports import ask

    to = _destination(form, output)
    to.write(ask(FeatureStore.open(store, associations=associations, codes=codes), query))


@app.command()
def features(
    gene: Annotated[str | None, typer.Option("--gene", help="Features that read this gene.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="Features that mean this label.")] = None,
    gene_set: Annotated[str | None, typer.Option("--gene-set", help="Features that match this gene set.")] = None,
    cell: Annotated[
        str | None, typer.Option("--cell", help="Features active in the cell of this cell_idx or cell_id.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--kind", help="Kind of the label, collection of the gene set, where two have one name."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Rows at most.")] = 20,
    store: Store = DEFAULT_STORE,
    associations: Associations = None,
    codes: Codes = None,
    form: Form = None,
    output: Output = None,
) -> None:
    """The everyday look-ups without SQL."""
    from feature_store import FeatureStore
    from pipelines.runtime.reports import Lookup, write_lookup

    asked = Lookup(gene=gene, label=label, gene_set=gene_set, cell=cell, kind=kind, n=n)
    to = _destination(form, output)
    write_lookup(asked, FeatureStore.open(store, associations=associations, codes=codes), to)


@app.command("plot")
def plot_command(
    kind: Annotated[
        str, typer.Argument(help="; ".join(f"{name}: {found.about}" for name, found in KINDS.items()) + ".")
    ],
    save: Annotated[Path, typer.Option("--save", help="Picture (.png, .pdf, .svg), or a folder for steering-all.")],
    feature: Annotated[list[int] | None, typer.Option("--feature", help="Feature id; repeatable.")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="Column of the cell table, such as cell_type; repeatable.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Cells to show: test (default), select, train; all on maps, violins.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Bars, or named genes, at most.")] = None,
    steering: Annotated[str | None, typer.Option("--steering", help="Steering run; default: the newest.")] = None,
    store: Store = DEFAULT_STORE,
) -> None:
    """Draw a plot of the store into a file; steering-all draws several into a folder."""
    from pipelines.plot import PlotRequest, plot

    plot(
        kind,
        PlotRequest(feature=feature or (), label=label or (), split=split, n=n, save=save, steering=steering),
        store,
    )
    typer.echo(save)


@app.command()
def serve(
    store: Store = DEFAULT_STORE,
    associations: Associations = None,
    codes: Codes = None,
    host: Annotated[str, typer.Option("--host", help="Address to answer at; 0.0.0.0: all of this machine.")] = HOST,
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="Port; 0: any that is free.")] = PORT,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Whether to open a web browser at it.")
    ] = False,
) -> None:
    """Look at the features of a store in a web browser: the atlas. Makes the maps that the store lacks first."""
    from pipelines.atlas import serve_atlas

    serve_atlas(store, associations=associations, codes=codes, host=host, port=port, open_browser=open_browser)


@app.command("export-atlas")
def export_atlas_command(
    folder: Annotated[Path, typer.Argument(help="Folder to write, new, empty or an earlier export.", metavar="DIR")],
    store: Store = DEFAULT_STORE,
    associations: Associations = None,
    codes: Codes = None,
) -> None:
    """Write the atlas of a store as static files, for any web host."""
    from pipelines.atlas import export_atlas

    export_atlas(store, folder, associations=associations, codes=codes)


@app.command()
def verify(
    run: Annotated[str, typer.Argument(help="Run id, or the beginning of one.")], store: Store = DEFAULT_STORE
) -> None:
    """Check every hash of a run; exit code 1 names what is damaged."""
    from pipelines.verify import verify_run

    raise typer.Exit(verify_run(run, store))


@models_app.callback()
def models(ctx: typer.Context, store: Store = DEFAULT_STORE, form: Form = None, output: Output = None) -> None:
    """Registered SAEs: versions, aliases, metrics, lineage."""
    if ctx.invoked_subcommand is None:
        from pipelines.models import for_people, versions_frame

        to, versions = _destination(form, output), versions_frame(store)
        to.write(for_people(versions) if to.is_printed_table else versions)


@models_app.command()
def show(
    name: Annotated[str, typer.Argument(help="Registered name.")],
    version: Annotated[int, typer.Argument(help="Version to show.")],
    store: Store = DEFAULT_STORE,
    form: Form = None,
    output: Output = None,
) -> None:
    """One version: what it came from, down to data files, foundation model and code, and all its evaluations."""
    from pipelines.models import version_facts, write_version

    to = _destination(form, output)
    write_version(version_facts(store, name, version), to)


@models_app.command()
def promote(
    name: Annotated[str, typer.Argument(help="Registered name.")],
    version: Annotated[int, typer.Argument(help="Version to make the champion.")],
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="Figure that must not be worse: one of steering, as `scsae models` names it, test_fvu or select_fvu. "
            "Default: the steering figure that both have, else test_fvu, else select_fvu.",
        ),
    ] = None,
    store: Store = DEFAULT_STORE,
) -> None:
    """Give the alias champion to a version, unless it is worse than the champion in a figure of test cells.

    Test cells are for reporting: promoting by them again and again selects on them and flatters the champion.
    """
    from feature_store.storage.layout import Layout
    from pipelines.models import promotion_facts
    from pipelines.runtime.reports import print_facts
    from pipelines.tracking import Tracking
    from pipelines.tracking import promote as move

    tracking = Tracking.existing(Layout(store))
    print_facts(promotion_facts(move(tracking, name, version, metric=metric)))


if __name__ == "__main__":
    main()
