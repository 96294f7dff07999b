"""Plans of runs that tests make by hand: what a test names, and something plain for every other field."""

from __future__ import annotations

import types
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from feature_store.storage.plans import Plan

P = TypeVar("P", bound="Plan")


def toy_plan(record: type[P], **given: Any) -> P:
    """A plan with the fields that are given; text is "", numbers are 1, what may be None is None, the rest is empty."""
    return _filled(record, given)


def toy_table(record: type[Plan], **given: Any) -> dict[str, Any]:
    """The plan.json of a table of such a run."""
    return toy_plan(record, **given).table("toy")


def _filled(record: Any, given: dict[str, Any]) -> Any:
    hints = get_type_hints(record)
    names = [field.name for field in fields(record) if field.default is MISSING and field.default_factory is MISSING]
    return record(**{**{name: _plain(hints[name]) for name in names}, **given})


def _plain(hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType) and type(None) in arguments:
        return None
    if origin is Literal:
        return arguments[0]
    if origin is tuple:
        return () if len(arguments) == 2 and arguments[1] is Ellipsis else tuple(map(_plain, arguments))
    if is_dataclass(hint):
        return _filled(hint, {})
    return {str: "", int: 1, float: 1.0, bool: False}.get(hint, {})
