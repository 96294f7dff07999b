"""The `scsae` program: all its commands, and how an error becomes a message and an exit code.

Exit codes: 0 the command has finished; 1 a run failed or was interrupted, and the same command resumes it; 2 the input
or the options are wrong, and nothing was written.
"""

import sys

import typer

from pipelines.cli import models, queries, stages
from pipelines.errors import ON_PURPOSE, exit_code, root_cause
from pipelines.runtime.progress import stderr_console

INTERRUPTED = 130
"""The exit code that typer gives to Ctrl-C."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Sparse autoencoders for single-cell foundation models: extract, train, encode, associate, steer, query.",
)
app.add_typer(stages.commands)
app.add_typer(queries.commands)
app.add_typer(models.commands, name="models")


def main() -> None:
    """Run the command line; print an error that was raised on purpose as one message, and exit with its code."""
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        if ended.code != INTERRUPTED:
            raise
        stderr_console().print("interrupted; the same command resumes the run", style="yellow")
        sys.exit(1)
    except Exception as error:  # noqa: BLE001  every error becomes a message and an exit code
        cause = root_cause(error)
        console = stderr_console()
        if not isinstance(cause, (*ON_PURPOSE, OSError)):
            console.print_exception(max_frames=8)
        console.print(f"error: {cause}", style="red", markup=False, soft_wrap=True)
        sys.exit(exit_code(cause))
