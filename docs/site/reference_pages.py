"""The pages of the reference, made of the program itself: its commands, its Python functions and its tables.

Nothing of them is written by hand: the help of the options, the docstrings and the descriptions of columns are their
only home.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import polars as pl
import typer.main

import scsae
from feature_store import FeatureStore
from feature_store.query.described import described_columns, described_tables
from pipelines.cli import app

_CODE = re.compile(r"(`[^`]*`)")
_NAMED_LINE = re.compile(r"^(\w[\w, ]*): (.*)$")


def commands_page() -> str:
    """Every command with its arguments and options, as `--help` shows them."""
    program = typer.main.get_command(app)
    parts = [
        "# Commands",
        "The same texts as those of `scsae COMMAND --help`. `scsae --install-completion` teaches the shell to complete "
        "them.",
    ]
    parts += [part for name, command in _commands(program, "scsae") for part in _command(name, command)]
    return "\n\n".join(parts) + "\n"


def python_page() -> str:
    """Every public function and class with its signature and docstring, and every look-up and plot."""
    parts = [
        "# Python",
        "`import scsae` takes milliseconds; each name is loaded when it is first used. A stage takes the options of "
        "its command by the same names: `scsae.train(k=32)` is `scsae train --k 32`.",
    ]
    stages = [name for name in scsae.__all__ if name not in ("FeatureStore", "plots")]
    for name in stages:
        parts += _documented(f"scsae.{name}", getattr(scsae, name), level=2)
    parts += _documented("scsae.FeatureStore", FeatureStore, level=2)
    for name, member in inspect.getmembers(FeatureStore):
        if not name.startswith("_") and name != "open" and inspect.getdoc(member):
            parts += _documented(f"FeatureStore.{name}", member, level=3)
    parts += [
        "## scsae.plots",
        "Each plot returns a figure; `save=FILE` writes it (`scsae plot umap --save FILE.png`).",
    ]
    for name in scsae.plots.__all__:
        if callable(member := getattr(scsae.plots, name)):
            parts += _documented(f"scsae.plots.{name}", member, level=3)
    return "\n\n".join(parts) + "\n"


def tables_page() -> str:
    """Every table that SQL can ask for, with the type, unit and meaning of each column."""
    tables = described_tables()
    parts = [
        "# Tables",
        "What `scsae sql`, `FeatureStore.sql` and `FeatureStore.frame` read. `scsae describe TABLE` prints the columns "
        "that a table has in a store, with those of obs.",
        _table(
            tables.select(
                pl.format("[{}](#{})", "table", "table").alias("table"),
                pl.col("row").alias("a row is"),
                pl.format("`{}`", "made_by").alias("made by"),
            )
        ),
    ]
    for name, row, measured_on, made_by in tables.iter_rows():
        columns = described_columns(name).with_columns(pl.format("`{}`", "column").alias("column"))
        parts += [
            f"## {name}",
            f"A row is {row}. Measured on: {measured_on}. Made by `{made_by}`.",
            _table(columns),
        ]
    return "\n\n".join(parts) + "\n"


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The commands below a command with their whole names; a group that does something itself comes first."""
    for below, inner in command.commands.items():
        whole = f"{name} {below}"
        if not hasattr(inner, "commands") or inner.invoke_without_command:
            yield whole, inner
        if hasattr(inner, "commands"):
            yield from _commands(inner, whole)


def _command(name: str, command: Any) -> Iterator[str]:
    context = typer.Context(command, info_name=name)
    yield f"## {name}"
    yield f"```\n{name} {' '.join(command.collect_usage_pieces(context))}\n```"
    yield from _escaped(command.help or "").split("\n\n")
    records = [record for one in command.params if (record := one.get_help_record(context)) is not None]
    rows = [(f"`{names}`", " ".join(text.split())) for names, text in records]
    if rows:
        yield _table(pl.DataFrame(rows, schema=["option", "what it does"], orient="row"))


def _documented(name: str, member: Any, *, level: int) -> Iterator[str]:
    yield f"{'#' * level} {name}"
    if callable(member):
        yield f"```python\n{_call(name, member)}\n```"
    yield from _markdown(inspect.getdoc(member) or "")


def _call(name: str, member: Any) -> str:
    """A call with its parameters, one a line where they do not fit on one."""
    parameters = [
        re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", str(parameter))
        for parameter in inspect.signature(member).parameters.values()
        if parameter.name != "self"
    ]
    if any("=" in one or ":" in one for one in parameters) and len(", ".join(parameters)) > 70:
        return f"{name}(\n" + "".join(f"    {one},\n" for one in parameters) + ")"
    return f"{name}({', '.join(parameters)})"


def _markdown(docstring: str) -> Iterator[str]:
    """A docstring as Markdown: examples as code, the lists below `Args:`, `Raises:` and `Options` as lists."""
    for block in docstring.split("\n\n"):
        lines = block.splitlines()
        if lines and lines[0].startswith(">>> "):
            yield "```python\n" + "\n".join(lines) + "\n```"
        elif len(lines) > 1 and lines[0].rstrip().endswith(":") and lines[1].startswith("    "):
            yield _escaped(lines[0])
            yield _list(lines[1:])
        elif lines and all(line.startswith("    ") for line in lines):
            yield "```\n" + inspect.cleandoc(block) + "\n```"
        else:
            yield _escaped(block)


def _list(lines: list[str]) -> str:
    """Lines of `name: text`, those that go on indented further, as a list."""
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    found: list[str] = []
    for line in lines:
        text = line[indent:]
        if text.startswith(" ") and found:
            found[-1] += f" {text.strip()}"
        elif text.strip():
            found.append(text)
    named = [_NAMED_LINE.match(one) for one in found]
    return "\n".join(
        f"- `{name[1]}`: {_escaped(name[2])}" if name else f"- {_escaped(one)}"
        for one, name in zip(found, named, strict=True)
    )


def _table(frame: pl.DataFrame) -> str:
    rows = [frame.columns, ["---"] * frame.width, *frame.iter_rows()]
    return "\n".join("| " + " | ".join(_cell(str(value)) for value in row) + " |" for row in rows)


def _cell(text: str) -> str:
    # careful: in code, a bar needs no escape, and the escape would be shown
    return "".join(part if part.startswith("`") else part.replace("|", "\\|") for part in _CODE.split(_escaped(text)))


def _escaped(text: str) -> str:
    """A text whose angle brackets and stars, outside of code, are shown and not read as markup."""
    parts = _CODE.split(text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([<>*])", r"\\\1", part).replace("__", r"\_\_") for part in parts
    )
