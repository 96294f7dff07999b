"""One kind of resource of the atlas: a pattern of paths, and the function that makes the bytes of such a path.

`features/{id}.json`, for example, is made from the id of a feature, and its route lists all ids. Paths are matched
against patterns and never touch a file system, so no path leads out of the store. Where the store lacks a table, the
resource is `AtlasData.missing(...)`: the name of the table, and the command that makes it.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from feature_store.atlas import columns
from feature_store.atlas.data import AtlasData

JSON = "application/json"
_PLACE = re.compile(r"\{(\w+)\}")


class Resource(NamedTuple):
    """The bytes at a path, and their media type."""

    body: bytes
    media_type: str


@dataclass(frozen=True, kw_only=True)
class Route:
    """One kind of resource.

    `pattern` has places like `{id}`, each of which takes letters, digits, '.', '_' and '-'. `make(data, *places)` makes
    the bytes and raises NoSuchResource where there is no resource of that name. `names` lists the places of all
    resources that there are, in order; it is None where the pattern has no place.
    """

    pattern: str
    make: Callable[..., bytes]
    names: Callable[[AtlasData], Iterable[tuple[str, ...]]] | None = None
    _regex: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = _PLACE.split(self.pattern)
        regex = "".join(r"([A-Za-z0-9._-]+)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
        object.__setattr__(self, "_regex", re.compile(regex))

    @property
    def media_type(self) -> str:
        """The media type, which the suffix of the pattern determines."""
        return JSON if self.pattern.endswith(".json") else columns.MEDIA_TYPE

    def places(self, path: str) -> tuple[str, ...] | None:
        """The texts at the places of a path; None for a path of another kind."""
        found = self._regex.fullmatch(path)
        return None if found is None else found.groups()

    def paths(self, data: AtlasData) -> Iterator[str]:
        """The paths of all resources of this kind."""
        for places in [()] if self.names is None else self.names(data):
            filled = iter(places)
            yield _PLACE.sub(lambda _: next(filled), self.pattern)  # noqa: B023  used before the next round


def json_bytes(value: Any) -> bytes:
    """A value as JSON that a browser reads: numbers are not rounded, NaN and infinities are null."""
    try:
        return _dumps(value)
    except ValueError:
        return _dumps(_finite(value))


def _dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
