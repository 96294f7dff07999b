"""Checks the shapes and types that the signatures of a package promise, at every call.

The import hook of jaxtyping prepares every call for shapes, also of functions that name none, and decorates functions
inside functions anew at each call: with it the conformance tests take three times as long. Here functions of a module
or of a class, and dataclasses, have their shapes checked if their own annotations name one (`Float[Tensor, "B d"]`);
the other functions have their types checked by beartype alone. Functions inside functions are left alone.
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

TYPES = "__import__('beartype').beartype"
SHAPES = f"__import__('jaxtyping').jaxtyped(typechecker={TYPES})"


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
    """The tree of a module with its decorators."""
    tree = ast.parse(source, path)
    _Decorator(tree).decorate(tree.body)
    return ast.fix_missing_locations(tree)


class _Decorator:
    """Decorates the functions and classes of one module."""

    def __init__(self, tree: ast.Module) -> None:
        blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        imports = [n for block in blocks for n in ast.walk(block) if isinstance(n, ast.alias)]
        self._unknown = {(n.asname or n.name).split(".")[0] for n in imports}
        """Names that are not there when the program runs: jaxtyping passes over them, beartype does not."""

    def decorate(self, body: Sequence[ast.AST]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                arguments = [n.annotation for n in ast.walk(node.args) if isinstance(n, ast.arg)]
                is_jaxtyped = any(map(self._needs_jaxtyping, [node.returns, *arguments]))
                # the last decorator is the first to be applied: others may hide the annotations
                node.decorator_list.append(_parsed(SHAPES if is_jaxtyped else TYPES, node))
                continue
            fields = [n.annotation for n in ast.iter_child_nodes(node) if isinstance(n, ast.AnnAssign)]
            if isinstance(node, ast.ClassDef) and any(map(self._needs_jaxtyping, fields)):
                # applied to what @dataclass has made
                node.decorator_list.insert(0, _parsed(SHAPES, node))
            # the bodies of classes, and of `if` and `try`
            self.decorate(list(ast.iter_child_nodes(node)))

    def _needs_jaxtyping(self, annotation: ast.expr | None) -> bool:
        """Whether an annotation names a shape, or what beartype cannot find."""
        if annotation is None:
            return False
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        return any(
            (isinstance(n, ast.Subscript) and hasattr(jaxtyping, ast.unparse(n.value)))
            or (isinstance(n, ast.Name) and n.id in self._unknown)
            for n in ast.walk(annotation)
        )


def _parsed(decorator: str, node: ast.stmt) -> ast.expr:
    return ast.copy_location(ast.parse(decorator, mode="eval").body, node)
