"""Which package may import which, that no imports go in a circle, what an import may cost, and what the wheel holds."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

ROOT = Path(__file__).parents[1]
PACKAGES = ("scsae", "pipelines", "sae_core", "feature_store")
HEAVY = ("torch", "ray", "mlflow", "polars", "pyarrow", "anndata", "scanpy", "matplotlib", "sklearn", "scipy", "pandas")


def loaded_by(statement: str) -> set[str]:
    """The modules in sys.modules after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys, json; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported_by(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports: at its top, inside functions, and for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from (name for name in ([inner] if inner in known else [node.module]) if name in known)


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of more than one module: two modules that reach each other share one."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set[str](), [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[start] = seen
    found = {frozenset(m for m in reached[name] if name in reached[m]) for name in graph if name in reached[name]}
    return [set(component) for component in found]


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, [{"b", "c"}]),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, [{"a", "b", "c"}]),
    ],
)
def test_modules_that_reach_each_other_are_a_circle(graph, expected):
    assert circles(graph) == expected


def test_no_imports_go_in_a_circle_not_even_for_types():
    known = modules()
    graph = {name: set(imported_by(path, known)) - {name} for name, path in known.items()}
    assert circles(graph) == []


def test_imports_only_point_down():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_of_the_command_line_imports_nothing_heavy():
    assert loaded_by("import pipelines.cli").isdisjoint(HEAVY)


def test_a_look_up_imports_nothing_that_computes_statistics_draws_or_trains():
    # scipy alone takes as long to import as all that a look-up needs
    loaded = loaded_by("import pipelines.cli.lookups")
    needless = {
        "torch",
        "ray",
        "mlflow",
        "anndata",
        "matplotlib",
        "sklearn",
        "pandas",
        "scipy",
        "pyarrow.dataset",
    }
    assert loaded.isdisjoint(needless)


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_needs_no_framework_of_another_floor(package):
    loaded = loaded_by(f"import {package}")
    foreign = {
        "scsae": {*HEAVY, "numpy", "pydantic", "typer", "rich"},
        "sae_core": {"ray", "mlflow", "anndata", "polars", "pyarrow", "pandas"},
        "feature_store": {"torch", "ray", "mlflow", "matplotlib"},
        "pipelines": set(HEAVY),
    }
    assert loaded.isdisjoint(foreign[package])


def test_the_wheel_holds_exactly_the_four_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = project["tool"]["setuptools"]["packages"]["find"]
    assert {name.split(".")[0] for name in find_namespace_packages(str(ROOT), **found)} == set(PACKAGES)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(PACKAGES)


def test_the_type_checker_and_the_contracts_of_imports_cover_every_package():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert set(tool["mypy"]["packages"]) == set(tool["importlinter"]["root_packages"]) == set(PACKAGES)
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_uses_eval_pickle_or_a_global_generator(package):
    forbidden = {"eval", "exec"}
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in forbidden, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                assert call not in {"np.random.seed", "torch.manual_seed", "random.seed", "pickle.load"}, (
                    f"{path}:{node.lineno} {call}"
                )
                if call == "torch.load":
                    assert any(key.arg == "weights_only" for key in node.keywords), f"{path}:{node.lineno}"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_store_in_a_printed_command_is_quoted_for_the_shell(package):
    quoted = {"shlex.quote(store)", "shlex.quote(str(self.root))"}
    for path in (ROOT / package).rglob("*.py"):
        found = set(re.findall(r"--store \{([^}]*)\}", path.read_text()))
        assert found <= quoted, f"{path}: use Layout.store_option"
