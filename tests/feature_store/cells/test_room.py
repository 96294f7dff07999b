"""The room of cells has one way in: its `__init__`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from feature_store import cells

ROOT = Path(cells.__file__).parents[2]
SOURCES = [path for folder in ("feature_store", "pipelines", "docs") for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text()))
    return {
        name
        for node in tree
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }


def test_no_other_room_imports_the_modules_inside() -> None:
    outside = [path for path in SOURCES if Path(cells.__file__).parent not in path.parents]
    assert len(outside) > 100
    assert any("feature_store.cells" in imported_modules(path) for path in outside)
    for path in outside:
        inside = [name for name in imported_modules(path) if name.startswith("feature_store.cells.")]
        assert inside == [], path


@pytest.mark.parametrize("name", cells.__all__)
def test_every_exported_name_is_there(name: str) -> None:
    found = getattr(cells, name)
    assert isinstance(found, int) or found.__module__.startswith("feature_store.cells.")


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="open_sauce"):
        cells.open_sauce  # noqa: B018


def test_the_room_and_its_tables_are_imported_without_torch_ray_and_anndata() -> None:
    code = "import sys; from feature_store.cells import open_source, write_cells; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert {"torch", "ray", "anndata"}.isdisjoint(done.stdout.split())
    assert "feature_store.cells.cell_table" in done.stdout.split()
