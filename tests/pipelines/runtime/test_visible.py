"""Names, labels and errors that hold control characters or markup are printed as visible text, wherever they are."""

import ast
import io
from pathlib import Path

import polars as pl
import pytest
from rich.progress import Progress

import pipelines
from pipelines.runtime import progress
from pipelines.runtime.output import Destination, console, print_frame
from pipelines.runtime.progress import PlainConsole, progress_bar, stderr_console
from pipelines.runtime.reports import print_facts
from pipelines.runtime.visible import visible

HOSTILE = "a\x1b[31mb\x07\r\n\x9b2J\u202egpj[bold]:dna:\udc80"
SEEN = r"a\x1b[31mb\x07\r\n\x9b2J\u202egpj[bold]:dna:\udc80"


def assert_visible(shown):
    assert SEEN in shown
    assert not any(character in shown for character in "\x1b\x07\r\x9b\u202e\udc80")


@pytest.mark.parametrize("text", ["CD8+ T-Zelle", "β-Catenin", "细胞", "Zelltyp 'a'", "a\u00a0b", "👩‍🔬"[:1]])
def test_ordinary_text_is_unchanged(text):
    assert visible(text) == text


def test_each_control_and_format_character_is_an_escape_sequence():
    assert visible(HOSTILE) == SEEN
    assert visible("\u2028\u2029\u200f\u2066\x7f") == r"\u2028\u2029\u200f\u2066\x7f"
    assert visible("a\n\tb", keep="\n") == "a\n\\tb"


@pytest.mark.parametrize(
    "show",
    [
        lambda text: print_frame(pl.DataFrame({"name": [text]})),
        lambda text: print_frame(pl.DataFrame({text: [1]})),
        lambda text: print_frame(pl.DataFrame({"x": [[text, "b"]]})),
        lambda text: print_frame(pl.DataFrame({"x" * 80: [1]}), title=text),
        lambda text: print_facts({text: 1}),
        lambda text: print_facts({"data": text}),
        lambda text: console().print(text, soft_wrap=True),
    ],
    ids=["cell", "column", "list", "title", "fact", "value", "line"],
)
def test_what_is_printed_on_stdout_is_visible(show, capsys):
    text = HOSTILE.replace("\udc80", "")
    show(text)
    shown = capsys.readouterr().out
    assert SEEN.removesuffix(r"\udc80") in shown
    assert not any(character in shown for character in "\x1b\x07\r\x9b\u202e")


def test_warnings_errors_and_progress_on_stderr_are_visible(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    stderr_console().print(HOSTILE, style="red", soft_wrap=True)
    with progress_bar(HOSTILE, 1, "shards") as report:
        report(1, HOSTILE)
    shown = capsys.readouterr().err
    assert shown.count(SEEN) == 3
    assert_visible(shown)


def test_a_progress_bar_on_a_terminal_shows_title_and_note_as_they_are(monkeypatch):
    drawn = io.StringIO()
    monkeypatch.setattr(progress, "stderr_console", lambda: PlainConsole(file=drawn, force_terminal=True, width=300))
    monkeypatch.setattr(progress, "Progress", lambda *columns, **options: Progress(*columns, **options))
    with progress_bar("a\x07[bold]", 2, "shards") as report:
        report(1, "b\u202e[red]")
    shown = drawn.getvalue()
    assert r"a\x07[bold]" in shown
    assert r"b\u202e[red]" in shown
    assert not {"\x07", "\u202e"} & set(shown)


def test_csv_and_json_are_visible_on_a_terminal_and_exact_in_a_file(tmp_path, capfdbinary, monkeypatch):
    frame = pl.DataFrame({"label": ["T\x1b[31m cell\u202e"]})
    Destination.choose(None, tmp_path / "a.csv").write(frame)
    assert pl.read_csv(tmp_path / "a.csv").equals(frame)
    capfdbinary.readouterr()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for form in ("csv", "json"):
        Destination.choose(form, None).write(frame)
        shown = capfdbinary.readouterr().out
        assert b"\\u202e" in shown
        assert b"\x1b" not in shown
        assert shown.endswith(b"\n")


def test_every_module_prints_through_the_consoles_that_make_text_visible():
    found = []
    for file in sorted(Path(pipelines.__file__).parent.rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            arguments = [ast.unparse(one) for one in call.args]
            if name in ("print", "Console", "sys.stderr.write", "traceback.print_exc"):
                found.append(f"{file.name}: {name}")
            if name == "typer.echo" and not arguments[0].startswith("visible("):
                found.append(f"{file.name}: {name}({arguments[0]})")
    assert found == []
