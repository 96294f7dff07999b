"""Whether the command line would take a command that is printed somewhere: its name, its options and their values, and
that no option excludes another. Nothing runs.
"""

from __future__ import annotations

import re
import shlex
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = re.compile(r"(?<![\w./-])(?:\.venv/bin/)?scsae (?=[a-z])")
FILLED_IN = re.compile(r"[A-Z][A-Z_]+(?:\.[a-z0-9]+)?|X|N|…")
"""A word that stands for a value: LABEL, COLUMN, STORE."""


def commands_in(text: str) -> Iterator[str]:
    """What follows `scsae` wherever a command is quoted or stands in a block of code, to its end."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    quoted = re.findall(r"`(scsae [^`]+)`|\A(scsae [^`]+)\Z", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *(" ".join("".join(pair).split()) for pair in quoted)]:
        if found := COMMAND.search(line.partition("#")[0]):
            yield line.partition("#")[0][found.end() :]


@cache
def command_line() -> Any:
    import typer.main

    from pipelines.cli import app

    return typer.main.get_command(app)


def refusal(command: str) -> str | None:
    """Why `scsae` would refuse a command; None for one that it takes. Words in capitals stand for values."""
    from pipelines.cli.lookups import Lookup
    from pipelines.cli.parameters import given_options
    from pipelines.errors import UsageError
    from pipelines.plot import PlotRequest, check_request

    numbers = count(1)
    words = [_filled(word, numbers) for word in shlex.split(command) if word not in ("...", "…", "&&")]
    parser = command_line()
    words = words[1:] if words and Path(words[0]).name == "scsae" else words
    try:
        context = parser.make_context("scsae", words[:1], resilient_parsing=True)
        while getattr(parser, "commands", None) and words and words[0] in parser.commands:
            parser = parser.commands[words.pop(0)]
        if parser is command_line() or (getattr(parser, "commands", None) and words and not words[0].startswith("-")):
            return f"no command {words[0]!r}" if words else None
        context = parser.make_context(parser.name, words)
        given = context.params
        if (options := getattr(parser.callback, "options_class", None)) is not None:
            given_options(options, context)
        elif parser.name == "features":
            Lookup(**{name: given[name] for name in Lookup.__dataclass_fields__})
        elif parser.name == "plot":
            asked = {name: given[name] or () for name in ("feature", "label")}
            asked |= {name: given[name] for name in ("kind", "split", "n", "save", "steering", "gene", "dpi", "size")}
            check_request(PlotRequest(**asked), Path("store"))
        elif parser.name == "sql":
            from feature_store.query.statements import check_statement

            check_statement(given["query"])
    except (UsageError, ValueError) as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  typer brings an own copy of click, with its own errors
        if type(error).__name__ == "Exit":
            return None
        return f"{type(error).__name__}: {getattr(error, 'message', error)}"
    return None


def _filled(word: str, numbers: Any) -> str:
    return str(next(numbers)) if FILLED_IN.fullmatch(word) else word
