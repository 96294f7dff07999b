"""What the atlas's own files may do: read through the questions of a store, and make no HTML from text."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import feature_store.atlas
from feature_store.atlas.page import SHARED, STATIC

ATLAS = Path(feature_store.atlas.__file__).parent
BYTES = {"activations", "codes", "commit", "files", "ingest", "layout", "lineage", "matrices", "objects", "tables"}
SCRIPTS = sorted(STATIC.rglob("*.js"))


@pytest.mark.parametrize("path", sorted(ATLAS.rglob("*.py")), ids=lambda path: path.name)
def test_the_atlas_reads_a_store_through_its_questions_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("feature_store."):
            assert (node.module or "").split(".")[1] not in BYTES, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "feature_store":
            assert BYTES.isdisjoint(alias.name for alias in node.names), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_makes_html_or_code_of_text(path: Path) -> None:
    text = path.read_text()
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "srcdoc",
    ):
        assert forbidden not in re.sub(r"//.*", "", text), forbidden
    assert "console." not in text


def test_nothing_is_asked_of_another_host() -> None:
    for path in (*STATIC.rglob("*.*"), ATLAS / "templates" / "index.html"):
        found = set(
            re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w/.-]*", re.sub(r"^\s*//.*", "", path.read_text(), flags=re.M))
        )
        assert found <= {"http://www.w3.org/2000/svg"}, path.name


def test_scripts_import_one_another_only() -> None:
    for path in SCRIPTS:
        for name in re.findall(r"""(?:^import .*|import\()["']([^"'\n]+)["']""", path.read_text(), flags=re.M):
            assert name.startswith("."), (path.name, name)
            assert (path.parent / name).is_file(), (path.name, name)


def test_the_scripts_that_the_page_names_first_are_there() -> None:
    assert all((STATIC / "js" / f"{name}.js").is_file() for name in SHARED)


def test_what_the_batch_page_tells_to_expect_is_what_was_measured() -> None:
    page = (STATIC / "js" / "pages" / "batch.js").read_text()
    measured = (ATLAS.parents[1] / "docs" / "steering.md").read_text()
    told = re.findall(r"by (0\.\d+) \(best null (0\.\d+)", page)
    assert len(told) == 2
    for effect, null in told:
        assert f"`batch_mixing` rises by +{effect} (the best null: +{null})" in measured


def test_the_sheet_of_a_page_changes_no_other_page() -> None:
    """A class that two pages style would be styled by whichever sheet comes last."""
    owners: dict[str, set[str]] = {}
    for path in STATIC.rglob("*.css"):
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
        for selector in re.findall(r"[^{}@;]+(?=\{)", text):
            for part in selector.split(","):
                first = part.strip().split(" ")[0]
                if path.name != "atlas.css" and not first.startswith(".page-"):
                    for name in re.findall(r"\.([\w-]+)", first)[:1]:
                        owners.setdefault(name, set()).add(path.name)
    assert {name: sheets for name, sheets in owners.items() if len(sheets) > 1} == {}
