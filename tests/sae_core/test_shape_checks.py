"""The checks of shapes and types that every test runs under: what is promised is checked, wherever it is."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
import shape_checks
import torch
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import TypeCheckError

import sae_core
from sae_core.sae.reductions.largest import largest_of_each

MODULE = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING
from jaxtyping import Float
from torch import Tensor
if TYPE_CHECKING:
    from fractions import Fraction

def unknown(a: Fraction, n: int) -> int:
    return n

def same(a: Float[Tensor, "B d"], b: Float[Tensor, "B d"]) -> int:
    return 1

def quoted(a: "Float[Tensor, 'B d']") -> int:
    return 1

def returned(a: Tensor) -> Float[Tensor, "B d"]:
    return a

def plain(a: Tensor) -> Tensor:
    def inner(b: Float[Tensor, "B d"]) -> Tensor:
        return b
    return inner(a)

class Methods:
    def of_self(self, a: Float[Tensor, "B d"]) -> int:
        return 1

    @staticmethod
    def of_none(a: Float[Tensor, "B d"]) -> int:
        return 1

    @classmethod
    def of_class(cls, a: Float[Tensor, "B d"]) -> int:
        return 1

    @property
    def value(self) -> Float[Tensor, "B d"]:
        import torch
        return torch.zeros(3)

@dataclass(frozen=True)
class Pair:
    a: Float[Tensor, "B d"]
    b: Float[Tensor, "B d"]

if True:
    def conditional(a: Float[Tensor, "B d"]) -> int:
        return 1
"""
SHAPE = re.compile(r"\w+\[[\w.]+, ['\"]")
"""As it is written: the kind of number, then the kind of array, then a text."""
DECORATORS = [shape_checks.SHAPES, shape_checks.TYPES]
ROW, MATRIX = torch.zeros(3), torch.zeros(2, 3)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of a package of its own, imported as sae_core is."""
    (tmp_path / "promises.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    shape_checks.check_shapes("promises")
    yield importlib.import_module("promises")
    del sys.modules["promises"]


def test_a_package_that_was_imported_before_is_refused(module):
    with pytest.raises(RuntimeError, match="promises"):
        shape_checks.check_shapes("promises")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: m.same(MATRIX, MATRIX.T),
        lambda m: m.quoted(ROW),
        lambda m: m.returned(ROW),
        lambda m: m.Methods().of_self(ROW),
        lambda m: m.Methods.of_none(ROW),
        lambda m: m.Methods.of_class(ROW),
        lambda m: m.Methods().value,
        lambda m: m.Pair(MATRIX, MATRIX.T),
        lambda m: m.conditional(ROW),
    ],
    ids=["same", "quoted", "returned", "self", "static", "class", "property", "dataclass", "conditional"],
)
def test_a_wrong_shape_is_refused_wherever_it_is_promised(module, wrong):
    with pytest.raises(TypeCheckError):
        wrong(module)


def test_a_wrong_type_is_refused_where_no_shape_is_named(module):
    with pytest.raises(BeartypeCallHintParamViolation):
        module.plain([0.0])
    # beside the name of a type that is imported for type checkers alone
    assert module.unknown(1, 2) == 2
    with pytest.raises(TypeCheckError):
        module.unknown(1, "2")


def test_right_shapes_pass_and_what_is_made_at_each_call_is_left_alone(module):
    assert module.same(MATRIX, MATRIX) == module.quoted(MATRIX) == module.Methods().of_self(MATRIX) == 1
    assert module.Pair(MATRIX, MATRIX).a is MATRIX
    assert module.plain(ROW) is ROW


def test_every_signature_of_sae_core_that_names_a_shape_is_checked():
    n = 0
    for path in Path(sae_core.__file__).parent.rglob("*.py"):
        tree = shape_checks.decorated(path.read_text(), str(path))
        inner = {id(g) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for g in ast.walk(f) if g is not f}
        for f in ast.walk(tree):
            if isinstance(f, ast.FunctionDef) and id(f) not in inner:
                signature = ast.unparse(f.args) + (ast.unparse(f.returns) if f.returns else "")
                promised = SHAPE.search(signature)
                own = ast.unparse(f.decorator_list[-1])
                assert own in ([shape_checks.SHAPES] if promised else DECORATORS), f"{path}: {f.name}"
                n += bool(promised)
    assert n > 250


def test_the_functions_of_this_process_are_checked():
    with pytest.raises(TypeCheckError):
        largest_of_each(torch.zeros(5), 2)
