"""Checks the shapes and types that the signatures of a package promise, at every call.

The import hook of jaxtyping decorates every function, also those without a shape and those that are made anew at each
call: with it the conformance tests take three times as long. Here a function or a dataclass of a module or of a class
is decorated if its own annotations name a shape (`Float[Tensor, "B d"]`).
"""

from __future__ import annotations

import ast
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import TYPE_CHECKING, Any

import jaxtyping

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType

DECORATOR = "__import__('jaxtyping').jaxtyped(typechecker=__import__('beartype').beartype)"


def check_shapes(package: str) -> None:
    """Check the signatures of every module of `package` that is imported from now on."""
    imported = [name for name in sys.modules if name.split(".")[0] == package]
    if imported:
        raise RuntimeError(f"imported before its shapes could be checked: {', '.join(imported)}")
    sys.meta_path.insert(0, _Finder(package))


class _Finder:
    """Finds the modules of one package, to be loaded with their shapes checked."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] != self._package:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Compiles a module with its decorators; nothing is written to or read from __pycache__."""

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        return compile(decorated(self.get_data(path).decode(), path), path, "exec", dont_inherit=True)


def decorated(source: str, path: str = "<source>") -> ast.Module:
    """The tree of a module in which all that names a shape is checked."""
    tree = ast.parse(source, path)
    _decorate(tree.body)
    return ast.fix_missing_locations(tree)


def _decorate(body: Sequence[ast.stmt]) -> None:
    for node in body:
        if isinstance(node, ast.FunctionDef):
            arguments = ast.walk(node.args)
            annotations = [node.returns, *(n.annotation for n in arguments if isinstance(n, ast.arg))]
            if _names_shape(annotations):
                # the last decorator is the first to be applied: others may hide the annotations
                node.decorator_list.append(_decorator(node))
        elif isinstance(node, ast.ClassDef):
            _decorate(node.body)
            if _names_shape([n.annotation for n in node.body if isinstance(n, ast.AnnAssign)]):
                # applied to what @dataclass has made
                node.decorator_list.insert(0, _decorator(node))


def _names_shape(annotations: Sequence[ast.expr | None]) -> bool:
    nodes = [node for annotation in annotations if annotation is not None for node in ast.walk(annotation)]
    return any(isinstance(n, ast.Subscript) and hasattr(jaxtyping, ast.unparse(n.value)) for n in nodes)


def _decorator(node: ast.stmt) -> ast.expr:
    return ast.copy_location(ast.parse(DECORATOR, mode="eval").body, node)
