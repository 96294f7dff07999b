"""Which SQL statements a store answers: those that read its tables and nothing else.

The SQL of Polars has functions in place of a table that read any file (`read_csv`, `read_parquet`, `read_ipc`,
`read_json`, `read_ndjson` in version 2.1) and no option to leave them out, and its parser cannot be asked. A statement
is therefore taken apart here into the tokens that Polars finds (sqlparser, generic dialect): white space, comments
(`--` to the end of the line, `/* */` nested), texts in '', names in "" or ``, words, numbers and operators. What that
dialect reads in a special way, so that the two could disagree on where a token ends, is refused: `$...$`, E'' and other
texts with a prefix, `/*!`, `/*+` and backslashes outside a text or name.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from feature_store.errors import QueryError

FIRST_WORDS = ("SELECT", "WITH", "FROM", "VALUES", "SHOW", "EXPLAIN")
"""The words that a statement may begin with."""
_READERS = ("read_", "scan_", "sink_", "write_")
"""What the names of functions that reach files begin with; no other function of Polars' SQL is called like this."""
_SPACE = re.compile(r"\s+")
_LINE_COMMENT = re.compile(r"--[^\n]*")
_COMMENT_MARK = re.compile(r"/\*|\*/")
_PREFIXED = re.compile(r"[\w@#]+['\"]|u&['\"]", re.IGNORECASE)
_WORD = re.compile(r"[\w@#]+")
_OPERATORS = frozenset("(),.;*+-/%=<>!|&^~:[]{}?")
_QUOTES = {"'": "text", '"': "name", "`": "name"}


class Token(NamedTuple):
    """A token of a statement; `kind` is word, name (in quotation marks), text or operator."""

    kind: str
    text: str


def check_statement(query: str) -> None:
    """Raise QueryError unless a statement reads tables alone, as far as its tokens tell."""
    tokens = list(tokens_of(query))
    first = next((token for token in tokens if token.text != "("), None)
    if first is None or first.kind != "word" or first.text.upper() not in FIRST_WORDS:
        raise QueryError(
            f"a query begins with one of {', '.join(FIRST_WORDS)} and reads the tables of the store; got {query!r}; "
            "`SHOW TABLES` lists the tables"
        )
    for token, after in pairwise(tokens):
        is_called = token.kind in ("word", "name") and after == Token("operator", "(")
        if is_called and token.text.lower().startswith(_READERS):
            raise QueryError(
                f"{token.text!r} reaches files, and a query reads only the tables of the store; name one of those that "
                "`SHOW TABLES` lists"
            )


def tokens_of(query: str) -> Iterator[Token]:
    """The tokens of a statement without white space and comments. QueryError for what cannot be told apart."""
    at = 0
    while at < len(query):
        if found := _SPACE.match(query, at) or _LINE_COMMENT.match(query, at):
            if "\r" in found[0].strip():
                raise _refusal(query, at, "a carriage return in a comment")
            at = found.end()
        elif query.startswith("/*", at):
            at = _end_of_comment(query, at)
        elif query[at] in _QUOTES:
            end = _end_of_quotation(query, at)
            mark = query[at]
            yield Token(_QUOTES[mark], query[at + 1 : end - 1].replace(mark * 2, mark))
            at = end
        elif found := _WORD.match(query, at):
            at = found.end()
            if _PREFIXED.match(query, found.start()):
                raise _refusal(query, found.start(), "a text with a prefix")
            yield Token("word", found[0])
        elif query[at] in _OPERATORS:
            yield Token("operator", query[at])
            at += 1
        else:
            raise _refusal(query, at, f"the character {query[at]!r}")


def _end_of_comment(query: str, start: int) -> int:
    """The end of a comment, which may hold others."""
    if query[start + 2 : start + 3] in ("!", "+"):
        raise _refusal(query, start, "a comment with instructions")
    depth = 0
    for mark in _COMMENT_MARK.finditer(query, start):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0:
            return mark.end()
    raise _refusal(query, start, "a comment without an end")


def _end_of_quotation(query: str, start: int) -> int:
    """The end of a text or a name in quotation marks, in which a doubled mark stands for itself."""
    mark, at = query[start], start + 1
    while (end := query.find(mark, at)) >= 0:
        if query[end + 1 : end + 2] != mark:
            return end + 1
        at = end + 2
    raise _refusal(query, start, f"a {_QUOTES[mark]} in {mark} without an end")


def _refusal(query: str, at: int, what: str) -> QueryError:
    return QueryError(
        f"the query has {what} at character {at + 1} ({query[at : at + 20]!r}), which is not allowed; write texts as "
        "'text' and names as \"name\""
    )
