"""What the atlas may import and say: it reads a store through queries, makes no HTML from text, and its pages state
nothing but what the store holds.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import feature_store.atlas
from feature_store.associations.classes import CLASSES
from feature_store.atlas.page import SHARED, STATIC
from feature_store.query.steering import Role

ATLAS = Path(feature_store.atlas.__file__).parent
SCRIPTS = sorted(STATIC.rglob("*.js"))
PAGES = sorted((ATLAS / "pages").glob("*.py"))
ALLOWED = {
    "feature_store.associations",
    "feature_store.associations.claims",
    "feature_store.associations.held_out_units",
    "feature_store.associations.classes",
    "feature_store.associations.comparison",
    "feature_store.associations.inputs",
    "feature_store.associations.label_p_values",
    "feature_store.associations.matching",
    "feature_store.associations.multiple_testing",
    "feature_store.associations.ranks",
    "feature_store.cells",
    "feature_store.errors",
    "feature_store.query.edges",
    "feature_store.query.expression",
    "feature_store.query.probes",
    "feature_store.query.runs",
    "feature_store.query.metrics",
    "feature_store.query.panel",
    "feature_store.query.steering",
    "feature_store.query.store",
    "feature_store.storage.obs_columns",
    "feature_store.storage.plans",
    "feature_store.storage.schemas",
}
"""Modules of this project outside the atlas that it may import: queries, schemas, and the statistics of its pages."""
OURS = ("feature_store", "pipelines", "sae_core", "scsae")
TEXT = re.compile(r'"(?:\\.|[^"\\\n])*"|`(?:\\.|[^`\\])*`')
FIGURE = re.compile(r"\d[\d,]*(?:\.\d+)? %|\d+\.\d+|\d+ of \d+|\d+ (?:SAEs?|data ?sets?|seeds?|donors|cell lines)\b")
LINKED = {
    "links_out.js": {
        "https://www.ncbi.nlm.nih.gov/gene/",
        "https://www.ensembl.org/Multi/Search/Results",
        "https://www.proteinatlas.org/search/",
    }
}
"""Scripts with links to other sites, and where to."""
NAMESPACES = {
    "http://www.w3.org/2000/svg",
    "http://www.w3.org/1999/02/22-rdf-syntax-ns",
    "http://purl.org/dc/elements/1.1/",
}
"""Names of XML vocabularies, which nothing fetches."""
STATED = {"100 %", "0.05", "0.5", "95 %", "0.1 %", "1 %", "10 %"}
"""Figures that a page may state: levels of significance, the ends of intervals and of facets, the AUROC of chance."""


def imported(tree: ast.AST) -> set[str]:
    """Every module that is imported, with the modules that `from package import module` names."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            inside = Path(*module.split("."))
            root = ATLAS.parents[1]
            modules = {
                a.name for a in node.names if any((root / inside / a.name).with_suffix(x).exists() for x in ("", ".py"))
            }
            found |= {f"{module}.{name}" for name in modules} or {module}
    return found


def figures(text: str) -> set[str]:
    """Figures in the sentences of a source file: in texts of at least three words, outside `${...}`."""
    found: set[str] = set()
    for literal in TEXT.findall(text):
        sentence = re.sub(r"\$?\{[^}]*\}", "", literal)
        if re.search(r"[A-Za-z]+ [a-z]+ [a-z]+", sentence):
            found |= set(FIGURE.findall(sentence))
    return found - STATED


def test_the_atlas_imports_the_modules_that_it_may_and_no_others() -> None:
    every = {name for path in ATLAS.rglob("*.py") for name in imported(ast.parse(path.read_text()))}
    ours = {name for name in every if name.split(".")[0] in OURS and not name.startswith("feature_store.atlas")}
    assert ours == ALLOWED


@pytest.mark.parametrize("path", [*SCRIPTS, *PAGES], ids=lambda path: path.name)
def test_no_page_states_a_figure_that_does_not_come_from_the_store(path: Path) -> None:
    assert figures(path.read_text()) == set()


@pytest.mark.parametrize(
    ("sentence", "found"),
    [
        ("ablating batch features raised batch mixing by 0.002 (best null 0.010)", {"0.002", "0.010"}),
        ("beyond every null in 0 of 3 SAEs of five cell lines", {"0 of 3"}),
        ("these tests gave a q of at most 0.05 in 1.5 % and 2 % of 200 data sets", {"1.5 %", "2 %", "200 data sets"}),
        ("grey where q is above 0.05, with the 95 % interval of ${fixed(0.125 * low)}", set()),
    ],
)
def test_figures_of_a_study_are_found_in_a_sentence(sentence: str, found: set[str]) -> None:
    assert figures(f"const text = `{sentence}`;") == found


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
    """One script has addresses of other sites, as links that a reader may follow; none is ever fetched."""
    for path in (*STATIC.rglob("*.*"), ATLAS / "templates" / "index.html"):
        found = set(
            re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w/.-]*", re.sub(r"^\s*//.*", "", path.read_text(), flags=re.M))
        )
        assert found <= {*NAMESPACES, "http://127.0.0.1"} | LINKED.get(path.name, set()), path.name
        assert not LINKED.get(path.name) or not re.search(r"fetch|import\(|src|url\(", path.read_text()), path.name


def test_scripts_import_one_another_only() -> None:
    for path in SCRIPTS:
        for name in re.findall(r"""(?:^import .*|import\()["']([^"'\n]+)["']""", path.read_text(), flags=re.M):
            assert name.startswith("."), (path.name, name)
            assert (path.parent / name).is_file(), (path.name, name)


def test_roles_and_classes_are_those_of_the_store() -> None:
    steering, colours = ((STATIC / "js" / name).read_text() for name in ("steering_run.js", "colour.js"))
    (roles,) = re.findall(r"const ROLE = Object.freeze\(\{(.*?)\}\)", steering, flags=re.S)
    assert dict(re.findall(r'(\w+): "(\w+)"', roles)) == {role.value: role.value for role in Role if role != Role.TREND}
    (classes,) = re.findall(r"const CLASS = \{(.*?)\}", colours, flags=re.S)
    coloured = {quoted or plain for quoted, plain in re.findall(r'(?:"([\w-]+)"|(\w+)): "#', classes)}
    assert coloured == set(CLASSES)


def test_the_scripts_that_the_page_names_first_are_there() -> None:
    assert all((STATIC / "js" / f"{name}.js").is_file() for name in SHARED)


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
