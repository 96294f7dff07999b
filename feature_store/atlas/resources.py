"""What an atlas consists of: resources, each a path and a function of the open store that makes its bytes.

The server makes a resource when it is asked for, an export writes all of them to files of the same paths, so both are
the same page. Paths are matched against patterns and never touch a file system, so none leads out of the store.

A `Route` says what one kind of resource is: `features/{id}.json`, say, made from an id, with all the ids that there
are. Where the store lacks a table, a resource is `missing(...)`: the table and the command that makes it.
"""

import contextlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import polars as pl

from feature_store.atlas import columns
from feature_store.atlas.opened import NoSuchResource, Opened
from feature_store.errors import StoreError
from feature_store.query.store import FeatureStore

JSON = "application/json"
_NEEDED_FIRST = ("atlas.json", "features.cols", "cells.cols", "names.json", "labels/0.cols")
_PLACE = re.compile(r"\{(\w+)\}")


class Resource(NamedTuple):
    """What a path holds."""

    body: bytes
    media_type: str


@dataclass(frozen=True, kw_only=True)
class Route:
    """One kind of resource.

    `pattern` has places like `{id}`, each of which takes letters, digits, '.', '_' and '-'. `make(opened, *places)`
    makes the bytes; NoSuchResource (of `opened`) says that there is none of that name. `names` lists the places of all
    that there are, in order; None where the pattern has no place.
    """

    pattern: str
    make: Callable[..., bytes]
    names: Callable[[Opened], Iterable[tuple[str, ...]]] | None = None
    _regex: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = _PLACE.split(self.pattern)
        regex = "".join(r"([A-Za-z0-9._-]+)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
        object.__setattr__(self, "_regex", re.compile(regex))

    @property
    def media_type(self) -> str:
        """By the suffix of the pattern."""
        return JSON if self.pattern.endswith(".json") else columns.MEDIA_TYPE

    def places(self, path: str) -> tuple[str, ...] | None:
        """What stands at the places of a path that is of this kind."""
        found = self._regex.fullmatch(path)
        return None if found is None else found.groups()

    def paths(self, opened: Opened) -> Iterator[str]:
        """The paths of all resources of this kind."""
        for places in [()] if self.names is None else self.names(opened):
            filled = iter(places)
            yield _PLACE.sub(lambda _: next(filled), self.pattern)  # noqa: B023  used before the next round


class Resources:
    """All resources of one store.

    One is made at a time: the tables that they share are read once, and Polars uses all cores for one.
    """

    def __init__(self, store: FeatureStore) -> None:
        from feature_store.atlas.pages import ROUTES

        self.opened = Opened(store)
        self.routes: Sequence[Route] = ROUTES
        self._lock = threading.Lock()

    def get(self, path: str) -> Resource | None:
        """The resource of a path; None where there is none. IntegrityError for a damaged store."""
        for route in self.routes:
            places = route.places(path)
            if places is not None:
                with self._lock:
                    try:
                        return Resource(route.make(self.opened, *places), route.media_type)
                    except NoSuchResource:
                        return None
                    except (OSError, pl.exceptions.PolarsError) as error:
                        self.opened.store.refuse_damage(error)
                        raise
        return None

    def warm(self) -> None:
        """Read what most pages need, so that the first of them is as fast as the next."""
        for path in _NEEDED_FIRST:
            with contextlib.suppress(StoreError):
                # careful: whoever asks for it is told
                self.get(path)

    def paths(self) -> Iterator[str]:
        """The paths of all resources."""
        for route in self.routes:
            yield from route.paths(self.opened)


def json_bytes(value: Any) -> bytes:
    """JSON as a browser reads it: numbers unrounded, NaN and infinities as null."""
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
