"""Checked reading of the fields of a JSON object, such as the configuration of a checkpoint.

An author's null stands for "not set": the default is taken and noted, so that it can be shown. A value of another type
is an error that names the file, the field and the value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sae_core.errors import CheckpointError

_TOO_LARGE = 2**31


class JsonFields:
    """The fields of one JSON object.

    Attributes:
        file: name of the file, for messages.
        notes: for each field that is null and has a default, what was taken.
    """

    def __init__(self, values: Mapping[str, Any], *, file: str) -> None:
        self.values, self.file = values, file
        self.notes: list[str] = []

    def whole(self, name: str, default: int | None = None, *, at_least: int = 1) -> int:
        """A whole number; a field without a default must be there."""
        value = self._value(name, default)
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if not is_whole or isinstance(value, bool) or not at_least <= value < _TOO_LARGE:
            raise self.wrong(name, f"a whole number of {at_least} or more")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; a field without a default must be there."""
        value = self._value(name, default)
        try:
            found = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
        except OverflowError:
            found = math.inf
        if not math.isfinite(found):
            raise self.wrong(name, "a finite number")
        return found

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false; a field without a default must be there."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def choice(self, name: str, default: str | None, allowed: Sequence[str]) -> str:
        """One of the allowed texts; a field without a default must be there."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.wrong(name, " or ".join(map(repr, allowed)))
        return value

    def table(self, name: str) -> dict[str, Any]:
        """A JSON object; empty where it is absent or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "a JSON object")
        return value or {}

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def wrong(self, name: str, allowed: str) -> CheckpointError:
        """The error for the value of a field."""
        found = repr(self.values.get(name))
        found = found if len(found) <= 60 else f"{found[:57]}..."
        return CheckpointError(f"{self.file} has {name} {found}; allowed: {allowed}")

    def _value(self, name: str, default: Any) -> Any:
        if self.has(name):
            return self.values[name]
        if default is None:
            state = f"has {name} null" if name in self.values else f"lacks {name}"
            raise CheckpointError(f"{self.file} {state}; write its value")
        if name in self.values:
            self.notes.append(f"{self.file} has {name} null: {default!r} was taken")
        return default
