r"""Text from outside, made visible: the one function through which every name, path, label and error is printed.

Names in a file and messages of a library may hold anything: an escape sequence that rewrites the terminal, a newline
that forges a line, a bidirectional override that reverses what is read. All of these are shown as Python writes them
(`\x1b`, `\n`, `\u202e`), in tables, errors, progress and logs. Files and pipes are for programs: in csv, json and
parquet there a value keeps every character.
"""

import unicodedata

_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode's categories of control and format characters, lone surrogates, and line and paragraph separators."""


def visible(text: str, *, keep: str = "") -> str:
    """Return the text with every control and format character, except those in `keep`, as its escape sequence."""
    if text.isprintable():
        return text
    return "".join(
        one if one in keep or unicodedata.category(one) not in _HIDDEN else one.encode("unicode_escape").decode()
        for one in text
    )
