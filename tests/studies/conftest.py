from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def lines_not_written(pytestconfig: pytest.Config) -> Callable[[str], list[str]]:
    """Lines of text that a study's page.py writes whole and that its page in docs does not have."""

    def find(study: str) -> list[str]:
        docs: Path = pytestconfig.rootpath / "docs"
        written = (docs / f"{study}.md").read_text()
        tree = ast.parse((docs / "studies" / f"{study}_study" / "page.py").read_text())
        texts = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value
        ]
        docstrings = {
            ast.get_docstring(node, clean=False)
            for node in ast.walk(tree)
            if hasattr(node, "body") and isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        }
        # the first and the last line of a piece go on in what is filled in
        lines = [line for text in texts if text not in docstrings for line in text.split("\n")[1:-1]]
        assert len(lines) > 10
        return [line for line in lines if line not in written]

    return find
