"""What the documentation names has to exist: commands and their options, modules, paths, links."""

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import polars as pl
import pytest
from printed_commands import commands_in, refusal

import scsae
from feature_store.query.described import SQL_TABLES, described_columns
from sae_core.scfm.families import GROUP

ROOT = Path(__file__).parents[1]
PACKAGES = ("scsae", "pipelines", "sae_core", "feature_store")
PAGES = sorted(
    [
        *(ROOT / "README.md", ROOT / "infra" / "README.md"),
        *(page for pattern in ("docs/*.md", "docs/tutorials/*.py", "sae_core/**/*.md") for page in ROOT.glob(pattern)),
    ]
)
SOURCES = sorted({path for folder in (*PACKAGES, "docs") for path in (ROOT / folder).rglob("*.py")} - {*PAGES})
SCRIPTS = sorted((ROOT / "feature_store" / "atlas").rglob("*.js"))
"""The scripts of the atlas, which print commands too."""
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOTTED = re.compile(rf"(?<![\w./-])(?:{'|'.join(PACKAGES[1:])})(?:\.\w+)+(?![\w/-])")
PLACES = re.compile(rf"(?<![\w./-])(?:{'|'.join((*PACKAGES, 'docs', 'tests', 'infra'))})/[\w./*-]*\w")
LINK = re.compile(r"\]\(([^)\s]+)\)")
NO_MODULES = ("__file__", "__path__", "py", "md", "png", "json", "yaml", "h5ad", "npz", "toml")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def members(path: Path) -> dict[str, set[str]]:
    """The names that a module defines or imports, each with its own: those of a class, none of anything else."""
    found: dict[str, set[str]] = {}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found.setdefault(node.name, set()).update(names_in(node))
    return {**{name: set() for name in names_in(tree)}, **found}


def names_in(tree: ast.AST) -> Iterator[str]:
    """Names bound directly in a module or class, and attributes that the class's methods set."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module of ours, or something in one."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:n])
        file = next((f for f in (folder / "__init__.py", folder.with_suffix(".py")) if f.exists()), None)
        if file is not None:
            inside = members(file)
            return n == len(parts) or (parts[n] in inside and (n + 1 == len(parts) or parts[n + 1] in inside[parts[n]]))
    return False


def test_a_dotted_name_is_found_where_it_is_and_nowhere_else():
    assert exists("pipelines.config.train.TrainOptions.k")
    assert exists("feature_store.storage")
    assert not exists("pipelines.config.train.TrainOptions.kk")
    assert not exists("feature_store.ingest")


def missing(said: dict[Path, set[str]], is_there: Callable[[str], bool]) -> dict[str, list[str]]:
    """What a file names and what is not there, by the file's path."""
    absent = {named(path): sorted(name for name in names if not is_there(name)) for path, names in said.items()}
    return {path: names for path, names in absent.items() if names}


def test_every_module_that_is_named_exists():
    said = {
        path: {name for text in texts_of(path) for name in DOTTED.findall(text)} for path in (*PAGES, *SOURCES, *TESTS)
    }
    said.pop(Path(__file__))
    assert missing(said, lambda name: {"X", *NO_MODULES} & set(name.split(".")) != set() or exists(name)) == {}


def test_every_path_that_is_named_exists():
    said = {path: set(PLACES.findall(path.read_text())) for path in (*PAGES, *SOURCES, *TESTS)}
    assert missing(said, lambda place: "NAME" in place or bool(list(ROOT.glob(place)))) == {}


def test_every_entry_of_the_layout_in_the_readme_exists():
    block = (ROOT / "README.md").read_text().partition("## Where things are")[2].split("```")[1]
    package, seen = ROOT, []
    for line in block.strip().splitlines():
        indent, names = len(line) - len(line.lstrip()), re.split(r" {2,}", line.strip())[0].split()
        package = ROOT / names[0] if not indent else package
        seen += [package / name if indent else package for name in names]
    assert [str(path) for path in seen if not (path.is_dir() or path.with_suffix(".py").is_file())] == []
    rooms = {path.parent for name in PACKAGES for path in (ROOT / name).glob("*/__init__.py")}
    assert sorted(str(room) for room in rooms - set(seen)) == []


def test_every_look_up_and_plot_that_the_examples_call_exists():
    files = (*PAGES, ROOT / "scsae" / "__init__.py", ROOT / "pipelines" / "functions.py")
    methods = {path: set(re.findall(r"\bstore\.(\w+)\(", path.read_text())) for path in files}
    assert missing(methods, members(ROOT / "feature_store" / "query" / "store.py")["FeatureStore"].__contains__) == {}
    plots = {path: set(re.findall(r"\bplots\.(\w+)\(", path.read_text())) for path in files}
    assert missing(plots, scsae.plots.__all__.__contains__) == {}


def test_every_script_that_a_page_names_exists():
    said = {path: set(re.findall(r"(?<![\w./])(\w+\.py)\b", path.read_text())) for path in PAGES}
    assert (
        missing(said, lambda name: name == "NAME.py" or any(path.name == name for path in (*SOURCES, *TESTS, *PAGES)))
        == {}
    )


def test_every_class_and_function_that_a_page_names_in_code_exists():
    inside: dict[str, set[str]] = {}
    for source in SOURCES:
        for owner, names in {source.stem: set(members(source)), **members(source)}.items():
            inside.setdefault(owner, set()).update(names)
    code = re.compile(r"`((?:\w+\.)+\w+)(?:\([^`]*\))?`")
    said = {path: {name for name in code.findall(path.read_text()) if inside.get(owner_of(name))} for path in PAGES}
    is_file = re.compile(r"\.(py|json|yaml|csv|h5ad|safetensors|pt|models|ckpt|sbatch|data|gz|embed|txt)$")
    known = missing(said, lambda name: bool(is_file.search(name)) or name.rpartition(".")[2] in inside[owner_of(name)])
    assert known == {}


def owner_of(dotted: str) -> str:
    """What the last part of a dotted name is said to be in."""
    return dotted.split(".")[-2]


def test_every_name_of_the_door_that_is_named_exists():
    files = (*PAGES, ROOT / "scsae" / "__init__.py", ROOT / "pipelines" / "functions.py")
    said = {path: set(re.findall(r"(?<![\w./-])scsae\.(\w+)", path.read_text())) for path in files}
    no_names = {GROUP.partition(".")[2], *(room.parent.name for room in (ROOT / "scsae").glob("*/__init__.py"))}
    assert missing(said, {*scsae.__all__, *no_names}.__contains__) == {}


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_every_link_of_a_page_leads_somewhere(path):
    for link in LINK.findall(path.read_text()):
        if "://" in link:
            continue
        file, _, heading = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if heading:
            titles = re.findall(r"(?m)^#+ (.+)$", target.read_text())
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link


@cache
def texts_of(path: Path) -> list[str]:
    """The text of a page; the strings of a module or script, with X for what is filled in."""
    if path.suffix == ".js":
        texts = re.findall(r"\"((?:[^\"\\\n]|\\.)*)\"|`((?:[^`\\]|\\.)*)`", path.read_text())
        found = [re.sub(r"\$\{[^}]*\}", "X", quoted or template) for quoted, template in texts]
        return [text for text in found if text != "scsae atlas"]
    if path in PAGES:
        return [path.read_text()]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def is_taken(words: str) -> bool:
    """Whether `scsae` takes a command, or would once the arguments are given that a text leaves out."""
    # what is filled in may be a word, or further options
    first = words.partition("&&")[0]
    refusals = [refusal(first), refusal(re.sub(r" X(?!\S)", "", first))]
    return any(why is None or why.startswith(("MissingParameter", "BadOptionUsage")) for why in refusals)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("scsae trian --k 3", "'trian'"),
        ("scsae train --kk 3", "NoSuchOption"),
        ("scsae train --k three", "k was"),
        ("scsae steer --feature 3 --n-features 5", "feature and n_features"),
        ("scsae features --cell A --cell-idx 3", "--cell and --cell-idx"),
        ("scsae associate --codes RUN --sae RUN", "codes was"),
        ("scsae plot violin --save FILE.png", "1 feature"),
        ("scsae sql \"SELECT * FROM read_csv('x')\"", "'read_csv'"),
        ("scsae models shw NAME 1", "'shw'"),
    ],
)
def test_a_command_that_would_be_refused_is_found(command, why):
    assert why in str(refusal(command))
    (words,) = commands_in(f"```\n.venv/bin/{command}\n```")
    assert not is_taken(words)


@cache
def named_commands() -> dict[Path, set[str]]:
    """The commands that pages, messages, docstrings and the atlas name, by file."""
    files = (*PAGES, *SOURCES, *SCRIPTS)
    return {path: {words for text in texts_of(path) for words in commands_in(text)} for path in files}


def test_every_command_that_is_named_is_taken_with_its_options():
    assert sum(map(len, named_commands().values())) > 100
    assert any(named_commands()[path] for path in SCRIPTS)
    assert missing(named_commands(), is_taken) == {}


@cache
def empty_tables() -> pl.SQLContext:
    """Every table that SQL can ask for, without rows; columns of obs are those that the pages name."""
    types = {"Boolean": pl.Boolean, "String": pl.String, "Int32": pl.Int32, "Int64": pl.Int64}
    obs = {"cells": dict.fromkeys(("condition", "disease"), pl.String)}
    tables = {
        table: {name: types.get(dtype, pl.Float64) for name, dtype in described_columns(table)["column", "type"].rows()}
        | {"run": pl.String, **obs.get(table, {})}
        for table in SQL_TABLES
    }
    return pl.SQLContext({table: pl.LazyFrame(schema=columns) for table, columns in tables.items()}, eager=True)


def statements(words: str) -> Iterator[str]:
    """The SQL of a command `scsae sql`."""
    if words.startswith("sql "):
        yield from shlex.split(words)[1:2]


def test_every_sql_statement_that_is_named_finds_its_tables_and_columns():
    call = re.compile(r"\.sql\(\s*((?:\"[^\"]*\"\s*)+)")
    asked: dict[Path, set[str]] = {}
    for path in (*PAGES, *SOURCES):
        texts = texts_of(path)
        calls = {"".join(re.findall(r'"([^"]*)"', found)) for text in texts for found in call.findall(text)}
        asked[path] = calls | {sql for words in named_commands()[path] for sql in statements(words)}
    asked = {path: {sql for sql in found if not re.search(r"\.\.\.|\bX\b", sql)} for path, found in asked.items()}
    assert sum(map(len, asked.values())) > 12
    failed = {}
    for path, sql in ((path, sql) for path, found in asked.items() for sql in found):
        try:
            empty_tables().execute(sql)
        except pl.exceptions.PolarsError as error:
            failed[f"{named(path)}: {sql}"] = str(error).splitlines()[0]
    assert failed == {}
