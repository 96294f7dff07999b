"""The directions of the house, and what an import may cost."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sae_core", "feature_store", "pipelines")
HEAVY = ("torch", "ray", "mlflow", "polars", "pyarrow", "anndata", "scanpy", "matplotlib", "sklearn", "scipy", "pandas")


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in sys.modules after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys, json; print(json.dumps([m for m in sys.modules if '.' not in m]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_arrows_only_point_down():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_of_the_command_line_imports_nothing_heavy():
    assert loaded_by("import pipelines.cli").isdisjoint(HEAVY)


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_needs_no_framework_of_another_floor(package):
    loaded = loaded_by(f"import {package}")
    foreign = {
        "sae_core": {"ray", "mlflow", "anndata", "polars", "pyarrow", "pandas"},
        "feature_store": {"torch", "ray", "mlflow", "matplotlib"},
        "pipelines": set(HEAVY),
    }
    assert loaded.isdisjoint(foreign[package])


def test_wheel_holds_exactly_the_three_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == [f"{name}*" for name in PACKAGES]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(PACKAGES)


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
