"""The parameters that commands share, and the command made from an options class."""

import importlib
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from feature_store.errors import StoreError
from feature_store.storage.layout import as_path
from pipelines.config import ADDRESS_HELP, DEFAULT_STORE, STORE_HELP, Options, check, option_help
from pipelines.runtime.progress import activity

if TYPE_CHECKING:
    from pipelines.runtime.output import Destination

T = TypeVar("T", bound=Options)
LOADING_SHOWN_AFTER_S = 0.5
"""The time from which a command says that it loads its libraries: it is the first that it says."""


def _store(text: str) -> Path:
    """Return the root of a store; raise the error that typer shows if it is none."""
    try:
        return as_path(text)
    except StoreError as error:
        raise typer.BadParameter(str(error)) from error


StoreOption = typer.Option("--store", envvar="SCSAE_STORE", help=STORE_HELP, parser=_store, metavar="ROOT")
Store = Annotated[Path, StoreOption]
Address = Annotated[str | None, typer.Option("--address", help=ADDRESS_HELP)]


class QueryCommand(TyperCommand):
    """A command whose argument is an SQL statement, which may begin with a comment: `-- why`, a new line, SELECT ..."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the statement behind the options, where what begins with two dashes is no option."""
        statements = [arg for arg in args if arg.startswith("--") and "\n" in arg]
        if statements:
            args = [*(arg for arg in args if arg not in statements), "--", *statements]
        return super().parse_args(ctx, args)


class CommandGroup(TyperGroup):
    """A group whose help shows the first sentence of each command whole; that of typer cuts it where a line ends."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        found = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        rows = [(name, first_sentence(command.help or "")) for name, command in found if not command.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def first_sentence(help_text: str) -> str:
    """Return the first paragraph of a help text on one line, without the full stop at its end."""
    return " ".join(help_text.strip().partition("\n\n")[0].split()).removesuffix(".")


class Format(StrEnum):
    """The form in which rows are written."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


Form = Annotated[
    Format | None,
    typer.Option("--format", help="Form of the answer; default: the one of the suffix of --output, else a table."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="File for the answer: .csv, .json, .parquet or .txt; default: stdout."),
]
Associations = Annotated[
    str | None, typer.Option("--associations", help="Associations run to read; default: the newest.")
]
Codes = Annotated[
    str | None,
    typer.Option("--codes", help="Codes run to read, with its associations; default: the codes of the associations."),
]


def load_stage(name: str, module: str) -> None:
    """Import the module of a stage, which takes seconds on a busy machine, and say so meanwhile."""
    with activity(name, "loads its libraries", first_s=LOADING_SHOWN_AFTER_S):
        importlib.import_module(module)


def stage_command(
    commands: typer.Typer, cls: type[Options], module: str, *, argument: str | None = None
) -> Callable[[Callable[..., None]], None]:
    """Register `body(options, store[, address][, to])` as a command whose options are the fields of `cls`.

    `module` is that of the stage, which is imported once the options were found right. The field `argument` becomes the
    positional argument, which may be given several times if the field takes several values. `to` is the destination of
    the result, which --format and --output choose.
    """

    def register(body: Callable[..., None]) -> None:
        name = body.__name__.removesuffix("_command").replace("_", "-")

        def command(context: typer.Context, **given: Any) -> None:
            where: dict[str, Any] = {key: given.pop(key) for key in ("store", "address") if key in given}
            if "form" in given:
                where["to"] = destination(given.pop("form"), given.pop("output"))
            options = given_options(cls, context)
            load_stage(name, module)
            body(options, **where)

        parameters = [_keyword("context", typer.Context, inspect.Parameter.empty)]
        parameters += [_parameter(cls, field, positional=field == argument) for field in cls.model_fields]
        parameters.append(_keyword("store", Store, DEFAULT_STORE))
        if "address" in inspect.signature(body).parameters:
            parameters.append(_keyword("address", Address, None))
        if "to" in inspect.signature(body).parameters:
            parameters += [_keyword("form", Form, None), _keyword("output", Output, None)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.options_class = cls  # type: ignore[attr-defined]
        commands.command(name, help=cls.__doc__)(command)

    return register


def given_options(cls: type[T], context: typer.Context) -> T:
    """The options of a command line, of those alone that were given: a default excludes no other option."""
    values = {
        field: context.params[field]
        for field in cls.model_fields
        if (source := context.get_parameter_source(field)) is not None and source.name != "DEFAULT"
    }
    return check(cls, values, f"scsae {context.info_name}")


def destination(form: Format | None, output: Path | None) -> "Destination":
    """Return the destination of an answer that --format and --output choose."""
    from pipelines.runtime.output import Destination

    return Destination.choose(form, output)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(cls: type[Options], field: str, *, positional: bool) -> inspect.Parameter:
    """Return the command-line parameter of one field."""
    info = cls.model_fields[field]
    if positional:
        several = str(info.annotation).startswith("tuple[")
        # careful: a path of pathlib would lose a slash of an address
        given: Any = list[str] if several else Path
        return _keyword(field, Annotated[given, typer.Argument(help=option_help(cls, field))], inspect.Parameter.empty)
    kind = _cli_type(info.annotation)
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    if isinstance(default, tuple):
        default = [str(item) for item in default]
    flag = f"--{field.replace('_', '-')}"
    return _keyword(field, Annotated[kind, typer.Option(flag, help=option_help(cls, field))], default)


def _cli_type(annotation: Any) -> Any:
    """Return the type for typer: text for choices, which the options class checks, and a list for a repeated option."""
    text = str(annotation)
    if text.startswith("tuple["):
        return list[str]
    for kind in (bool, float, int):
        if annotation is kind or text.startswith(f"{kind.__name__} |"):
            return kind | None
    return str | None
