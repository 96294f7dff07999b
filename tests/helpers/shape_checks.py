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


def _decorate(body: Sequence[ast.AST]) -> None:
    for node in body:
        if isinstance(node, ast.FunctionDef):
            arguments = [n.annotation for n in ast.walk(node.args) if isinstance(n, ast.arg)]
            if any(map(_names_shape, [node.returns, *arguments])):
                # the last decorator is the first to be applied: others may hide the annotations
                node.decorator_list.append(_decorator(node))
            continue
        fields = [n.annotation for n in ast.iter_child_nodes(node) if isinstance(n, ast.AnnAssign)]
        if isinstance(node, ast.ClassDef) and any(map(_names_shape, fields)):
            # applied to what @dataclass has made
            node.decorator_list.insert(0, _decorator(node))
        # the bodies of classes, and of `if` and `try`
        _decorate(list(ast.iter_child_nodes(node)))


def _names_shape(annotation: ast.expr | None) -> bool:
    if annotation is None:
        return False
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    return any(isinstance(n, ast.Subscript) and hasattr(jaxtyping, ast.unparse(n.value)) for n in ast.walk(annotation))


def _decorator(node: ast.stmt) -> ast.expr:
    return ast.copy_location(ast.parse(DECORATOR, mode="eval").body, node)
