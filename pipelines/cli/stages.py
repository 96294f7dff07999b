"""The commands that compute: one for each stage, and those that run several stages."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from feature_store.storage.addresses import data_path
from feature_store.storage.layout import as_path
from pipelines.cli.parameters import Address, Form, Output, Store, StoreOption, destination, load_stage, stage_command
from pipelines.config import (
    DEFAULT_STORE,
    STORE_HELP,
    AssociateOptions,
    BaselineOptions,
    CircuitOptions,
    EffectsOptions,
    EncodeOptions,
    ExportSAEOptions,
    ExtractOptions,
    ImportSAEOptions,
    InputsOptions,
    MatchOptions,
    ModulesOptions,
    ProbeOptions,
    SteerOptions,
    TrainOptions,
    load_recipe,
    recipe_text,
    refuse_signed_addresses,
)

if TYPE_CHECKING:
    from pipelines.runtime.output import Destination

commands = typer.Typer()


@stage_command(commands, ExtractOptions, "pipelines.extract", argument="data")
def extract_command(options: ExtractOptions, store: Path, address: str | None) -> None:
    """Run the extraction and print its results."""
    from pipelines.extract import extract
    from pipelines.runtime.reports import print_results

    print_results(extract(options, store, address=address), store)


@stage_command(commands, TrainOptions, "pipelines.train")
def train_command(options: TrainOptions, store: Path, address: str | None) -> None:
    """Train, and print the results."""
    from pipelines.runtime.reports import print_results
    from pipelines.train import train_all

    print_results(train_all(options, store, address=address), store)


@stage_command(commands, ImportSAEOptions, "pipelines.exchange", argument="folder")
def import_sae_command(options: ImportSAEOptions, store: Path) -> None:
    """Import an SAE, and print the result."""
    from pipelines.exchange import import_sae
    from pipelines.runtime.reports import print_results

    print_results([import_sae(options, store)], store)


@stage_command(commands, ExportSAEOptions, "pipelines.exchange", argument="folder")
def export_sae_command(options: ExportSAEOptions, store: Path) -> None:
    """Export an SAE, and print where it is."""
    from pipelines.exchange import export_sae
    from pipelines.runtime.reports import print_facts

    result = export_sae(options, store)
    print_facts({"sae": f"saes/{result.run}", "folder": result.path, **result.facts})


@stage_command(commands, EncodeOptions, "pipelines.encode")
def encode_command(options: EncodeOptions, store: Path, address: str | None) -> None:
    """Encode, and print the result."""
    from pipelines.encode import encode
    from pipelines.runtime.reports import print_results

    print_results([encode(options, store, address=address)], store)


@stage_command(commands, AssociateOptions, "pipelines.associate")
def associate_command(options: AssociateOptions, store: Path, address: str | None, to: "Destination") -> None:
    """Compute the associations, print the results and compare them with baselines."""
    from pipelines.associate import associate_all
    from pipelines.runtime.reports import print_excess, print_results, results_frame

    results = associate_all(options, store, address=address)
    if not to.is_printed_table:
        to.write(results_frame(results))
        return
    print_results(results, store)
    print_excess(store, results[-1].run)


@stage_command(commands, MatchOptions, "pipelines.match")
def match_command(options: MatchOptions, store: Path) -> None:
    """Match, and print the results."""
    from pipelines.match import match
    from pipelines.runtime.reports import print_results

    print_results(match(options, store), store)


@stage_command(commands, EffectsOptions, "pipelines.effects")
def effects_command(options: EffectsOptions, store: Path, address: str | None) -> None:
    """Measure, and print the result."""
    from pipelines.effects import effects
    from pipelines.runtime.reports import print_results

    print_results([effects(options, store, address=address)], store)


@stage_command(commands, CircuitOptions, "pipelines.circuit")
def circuit_command(options: CircuitOptions, store: Path, address: str | None) -> None:
    """Measure, and print the result."""
    from pipelines.circuit import circuit
    from pipelines.runtime.reports import print_results

    print_results([circuit(options, store, address=address)], store)


@stage_command(commands, InputsOptions, "pipelines.feature_inputs")
def inputs_command(options: InputsOptions, store: Path, address: str | None) -> None:
    """Measure, and print the result."""
    from pipelines.feature_inputs import inputs
    from pipelines.runtime.reports import print_results

    print_results([inputs(options, store, address=address)], store)


@stage_command(commands, ProbeOptions, "pipelines.probe")
def probe_command(options: ProbeOptions, store: Path, address: str | None) -> None:
    """Probe, and print the result."""
    from pipelines.probe import probe_labels
    from pipelines.runtime.reports import print_results

    print_results([probe_labels(options, store, address=address)], store)


@stage_command(commands, ModulesOptions, "pipelines.modules")
def modules_command(options: ModulesOptions, store: Path) -> None:
    """Find the modules, and print the result."""
    from pipelines.modules import modules
    from pipelines.runtime.reports import print_results

    print_results([modules(options, store)], store)


@stage_command(commands, BaselineOptions, "pipelines.baseline")
def baseline_command(options: BaselineOptions, store: Path, address: str | None) -> None:
    """Make the baselines and print the comparison with them."""
    from pipelines.baseline import baseline
    from pipelines.compare import compare_with_baselines
    from pipelines.runtime.reports import print_comparison, print_made

    print_made(baseline(options, store, address=address))
    print_comparison(compare_with_baselines(store, options.associations))


@commands.command()
def compare(
    associations: Annotated[
        str | None, typer.Option("--associations", help="Associations run of the SAE; default: the newest.")
    ] = None,
    store: Store = DEFAULT_STORE,
    form: Form = None,
    output: Output = None,
) -> None:
    """Compare an SAE with its baselines, target by target.

    `scsae baseline` makes the baselines and has to be run before.
    """
    from pipelines.compare import compare_with_baselines
    from pipelines.runtime.reports import print_comparison

    to = destination(form, output)
    found = compare_with_baselines(store, associations)
    if to.is_printed_table:
        print_comparison(found)
    else:
        to.write(found.comparison)


@stage_command(commands, SteerOptions, "pipelines.steering.run")
def steer_command(options: SteerOptions, store: Path, address: str | None) -> None:
    """Steer, and print the effects."""
    from pipelines.runtime.reports import print_results, print_steering
    from pipelines.steering.run import steer

    result = steer(options, store, address=address)
    print_results([result], store)
    print_steering(store, result.run)


@commands.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file with the options of each stage.")],
    store: Annotated[Path | None, StoreOption] = None,
    address: Address = None,
) -> None:
    """Run the stages of a recipe in order.

    The same command resumes a recipe that was interrupted.
    """
    load_stage("run", "pipelines.recipe")
    from pipelines.recipe import run_recipe
    from pipelines.runtime.reports import print_results

    checked = load_recipe(recipe)
    target = store or as_path(checked.store or DEFAULT_STORE)
    print_results(run_recipe(checked, target, address=address), target)


@commands.command()
def submit(
    recipe: Annotated[Path, typer.Argument(help="YAML file with the options of each stage.")],
    address: Annotated[
        str, typer.Option("--address", help="Address of the Ray dashboard of the cluster, e.g. http://HEAD:8265.")
    ],
    store: Annotated[str | None, typer.Option("--store", envvar="SCSAE_STORE", help=STORE_HELP, metavar="ROOT")] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", help="Variable for the job, as NAME=VALUE or NAME; may be repeated.")
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Print the id of the job instead of following its log.")
    ] = False,
) -> None:
    """Run a recipe as a Ray job on a cluster.

    The log of the job is followed, and the outcome of the job is the exit code.
    """
    from pipelines.runtime.job_submission import submit_recipe

    refuse_signed_addresses(recipe_text(recipe))
    raise typer.Exit(submit_recipe(recipe, store=store, address=address, env=env or (), wait=not no_wait))


@commands.command()
def demo(
    store: Store = DEFAULT_STORE,
    data: Annotated[
        str | None, typer.Option("--data", help="File of cells to use instead of the 700 PBMC of the project.")
    ] = None,
    donor: Annotated[str | None, typer.Option("--donor", help="obs column of the donor; needs --data.")] = None,
    batch: Annotated[str | None, typer.Option("--batch", help="obs column of the batch; needs --data.")] = None,
    cell_type: Annotated[
        str | None, typer.Option("--cell-type", help="obs column of the cell type; needs --data.")
    ] = None,
) -> None:
    """Run every stage on real cells with the mini model.

    The command prints a summary, draws plots and says which commands to type next.
    """
    load_stage("demo", "pipelines.demo")
    from pipelines.demo import run_demo

    run_demo(store, data=None if data is None else data_path(data), donor=donor, batch=batch, cell_type=cell_type)
