"""The `scsae` program: all its commands, and how an error becomes a message and an exit code.

Exit codes: 0 the command has finished; 1 a run failed or was interrupted, and the same command resumes it; 2 the input
or the options are wrong, and nothing was written.

An error whose cause is known is one line on stderr with the next command. Any other error is a fault of scsae and keeps
its traceback, in plain text, for a report.
"""

import errno
import os
import signal
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from feature_store.credentials import without_credentials
from feature_store.storage.filesystem import n_writes
from pipelines.cli import models, queries, stages
from pipelines.cli.parameters import CommandGroup
from pipelines.config import plain_reason
from pipelines.errors import ON_PURPOSE, exit_code
from pipelines.runtime.failures import explained, root_cause, without_colours
from pipelines.runtime.progress import stderr_console
from pipelines.runtime.visible import visible

INTERRUPTED = 130
"""The exit code that typer gives to Ctrl-C."""

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Sparse autoencoders for single-cell foundation models: extract, train, encode, associate, steer, query.",
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        typer.echo(visible(f"scsae {version('scsae')}"))
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options of the program itself."""


app.add_typer(stages.commands)
app.add_typer(queries.commands)
app.add_typer(models.commands, name="models")


def main() -> None:
    """Run the command line and exit: with the code of the command, or with a message and the code of its error."""
    n_before = n_writes()
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except typer.Abort:
        code = 1
    except Exception as error:  # noqa: BLE001  every error becomes a message and an exit code
        _end_with(error, has_written=n_writes() > n_before)
    if code == INTERRUPTED:
        # careful: a second Ctrl-C while the interpreter ends would show a traceback
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stderr_console().print("interrupted; the same command resumes the run", style="yellow")
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _end_with(error: Exception, *, has_written: bool) -> NoReturn:
    """Print an error and exit with its code."""
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        # the reader of stdout has closed it; what is left in the buffer must not fail again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if hasattr(error, "show") and hasattr(error, "format_message"):
        # an error of typer in the options; its own text may hold the control characters or signature of an argument
        text = visible(without_credentials(plain_reason(error.format_message())), keep="\n")
        error.format_message = lambda: text
        error.show()
        sys.exit(getattr(error, "exit_code", 2))
    cause = explained(root_cause(error))
    console = stderr_console()
    if not isinstance(cause, ON_PURPOSE):
        lines = without_credentials(without_colours("".join(traceback.format_exception(cause)))).splitlines()
        console.print(*lines, sep="\n", soft_wrap=True)
        console.print("this is a fault of scsae; report it with the lines above", style="yellow", soft_wrap=True)
    console.print(without_credentials(f"error: {cause}"), style="red", soft_wrap=True)
    sys.exit(exit_code(cause, has_written=has_written))
