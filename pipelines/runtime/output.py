"""The destination of an answer: stdout or a file, as a table, csv, json or parquet.

A table is for reading: it has three significant digits, and on stdout the first ROWS_SHOWN rows only. The other forms
hold every row and every digit. A destination is checked before the query runs.

In a table, and in csv and json on a terminal, control characters of a value are visible (`runtime.visible`); in a file
or a pipe, csv, json and parquet hold each value as it is.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table
from rich.text import Text

from pipelines.errors import UsageError
from pipelines.runtime.progress import PlainConsole, stderr_console
from pipelines.runtime.visible import visible

ROWS_SHOWN = 50
PLAIN_WIDTH = 160
FORMS = ("table", "csv", "json", "parquet")
FORM_OF_SUFFIX = {".txt": "table", ".csv": "csv", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The form of an answer and its file, or None for stdout; `choose` makes one."""

    form: str
    file: Path | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UsageError(f"--format was {self.form!r}; allowed: {', '.join(FORMS)}")
        if self.file is None and self.form == "parquet" and sys.stdout.isatty():
            raise UsageError("--format was 'parquet', which a terminal cannot show; add --output FILE.parquet")
        if self.file is not None and not self.file.absolute().parent.is_dir():
            raise UsageError(
                f"--output was {str(self.file)!r}: the folder {self.file.absolute().parent} does not exist; create it"
            )

    @property
    def is_printed_table(self) -> bool:
        """Whether the answer is printed as a table."""
        return self.form == "table" and self.file is None

    @classmethod
    def choose(cls, form: str | None, file: Path | None) -> "Destination":
        """Return the destination with the given form, else the form of the file's suffix, else a table.

        UsageError for an unknown form or suffix, a folder that does not exist, and bytes on a terminal.
        """
        if form is None and file is not None:
            form = FORM_OF_SUFFIX.get(file.suffix.lower())
            if form is None:
                raise UsageError(
                    f"--output was {str(file)!r}, whose suffix is not a known form; use one of "
                    f"{', '.join(FORM_OF_SUFFIX)}, or add --format {'|'.join(FORMS)}"
                )
        return cls(form=form or "table", file=file)

    def write(self, frame: pl.DataFrame) -> None:
        """Write the answer. If the reader of stdout closes it, the command ends without a message."""
        if self.is_printed_table:
            print_frame(frame)
            return
        content = _bytes(frame, self.form)
        if self.file is not None:
            self.file.write_bytes(content)
            stderr_console().print(f"{frame.height} rows in {self.file}", soft_wrap=True)
            return
        if sys.stdout.isatty():
            content = visible(content.decode(), keep="\n\t").encode()
        sys.stdout.buffer.write(content)
        sys.stdout.flush()


def console() -> PlainConsole:
    """Return the console for results, as wide as the terminal, or PLAIN_WIDTH wide without one."""
    found = PlainConsole()
    return found if found.is_terminal else PlainConsole(width=PLAIN_WIDTH)


def print_frame(frame: pl.DataFrame, *, title: str | None = None, limit: int = ROWS_SHOWN) -> None:
    """Print the first rows of a frame as a table, and below it the number of rows left out."""
    out = console()
    out.print(_table(frame.head(limit), title))
    if frame.height > limit:
        out.print(f"{frame.height - limit} more rows; add LIMIT to the query, or --output FILE.csv for all rows")


def text_of(value: Any) -> str:
    """Return a value as text: a float with three significant digits, a list comma-separated."""
    match value:
        case None:
            return ""
        case bool() | int() | str():
            return str(value)
        case float():
            return f"{value:.3g}"
        case list() | tuple() | pl.Series():
            return ", ".join(text_of(item) for item in value)
    return str(value)


def _table(frame: pl.DataFrame, title: str | None) -> Table:
    table = Table(title=None if title is None else plain(title), title_justify="left", header_style="bold")
    for name, dtype in frame.schema.items():
        table.add_column(plain(name), justify="right" if dtype.is_numeric() else "left", overflow="fold")
    for row in frame.iter_rows():
        table.add_row(*(plain(text_of(value)) for value in row))
    return table


def plain(text: str) -> Text:
    """Return what a table prints for a text: rich would read markup such as [bold] in a str."""
    return Text(visible(text))


def _bytes(frame: pl.DataFrame, form: str) -> bytes:
    buffer = io.BytesIO()
    match form:
        case "csv":
            _flat(frame).write_csv(buffer)
        case "json":
            # NaN and infinities become null, as JSON has no such numbers
            frame.write_json(buffer)
            buffer.write(b"\n")
        case "parquet":
            frame.write_parquet(buffer)
        case _:
            text = io.StringIO()
            PlainConsole(file=text, width=PLAIN_WIDTH).print(_table(frame, None))
            buffer.write(text.getvalue().encode())
    return buffer.getvalue()


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the frame with its lists as text, for csv, which has no lists."""
    lists = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List)]
    return frame.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(",") for name in lists)
