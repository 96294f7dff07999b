"""A small table of HTML, by which a notebook shows a store or a result."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def html_table(caption: str, rows: Iterable[Sequence[Any]], columns: Sequence[str] = ()) -> str:
    """A table with a caption and, where they are named, a row of column names; every text is escaped.

    >>> html_table("codes/3550e9", [("cells", 700)])
    """
    head = f"<thead>{_row('th', columns)}</thead>" if columns else ""
    body = "".join(_row("td", row) for row in rows)
    title = f'<caption style="caption-side: top; text-align: left"><b>{escape(caption)}</b></caption>'
    return f"<table>{title}{head}<tbody>{body}</tbody></table>"


def _row(tag: str, values: Iterable[Any]) -> str:
    cells = "".join(f'<{tag} style="text-align: left">{escape(_shown(value))}</{tag}>' for value in values)
    return f"<tr>{cells}</tr>"


def _shown(value: Any) -> str:
    """A value as text: whole numbers with commas, and nothing for None."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
