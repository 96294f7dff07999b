"""The commands of the model registry."""

from typing import Annotated

import typer

from pipelines.cli.parameters import CommandGroup, Form, Output, Store, destination
from pipelines.config import DEFAULT_STORE

commands = typer.Typer(
    cls=CommandGroup, invoke_without_command=True, help="List the registered SAEs, show one version, promote a version."
)


@commands.callback()
def models(ctx: typer.Context, store: Store = DEFAULT_STORE, form: Form = None, output: Output = None) -> None:
    """List the registered SAEs with their versions, aliases and metrics."""
    if ctx.invoked_subcommand is None:
        from pipelines.models import for_people, versions_frame

        to, versions = destination(form, output), versions_frame(store)
        to.write(for_people(versions) if to.is_printed_table else versions)


@commands.command()
def show(
    name: Annotated[str, typer.Argument(help="Name in the registry.")],
    version: Annotated[int, typer.Argument(help="Version to show.")],
    every: Annotated[bool, typer.Option("--all", help="Print every metric of each evaluation.")] = False,
    store: Store = DEFAULT_STORE,
    form: Form = None,
    output: Output = None,
) -> None:
    """Show one version of a registered SAE.

    Shown are its data files, foundation model, code and runs, and of each evaluation the metrics that compare versions.
    """
    from pipelines.models import version_facts, write_version

    to = destination(form, output)
    write_version(version_facts(store, name, version), to, every=every)


@commands.command()
def promote(
    name: Annotated[str, typer.Argument(help="Name in the registry.")],
    version: Annotated[int, typer.Argument(help="Version to make the champion.")],
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="Metric that must not be worse: a steering metric as `scsae models` names it, test_fvu or select_fvu. "
            "Default: the steering metric that both versions have, else test_fvu, else select_fvu.",
        ),
    ] = None,
    store: Store = DEFAULT_STORE,
) -> None:
    """Make a version the champion, unless it is worse than the present one.

    The two are compared in a metric of test cells. Repeated promotion by the same test cells selects on them, and the
    metric of the champion becomes too good.
    """
    from feature_store.storage.layout import Layout
    from pipelines.models import promotion_facts
    from pipelines.runtime.reports import print_facts
    from pipelines.tracking import Tracking
    from pipelines.tracking import promote as move

    tracking = Tracking.existing(Layout(store))
    print_facts(promotion_facts(move(tracking, name, version, metric=metric)))
