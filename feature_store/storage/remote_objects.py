"""Objects at an address, read in ranges, of one version: a range of another version is refused and never returned.

Every protocol answers three questions (`Objects`): which version of an object is there, the bytes [start, stop) of a
version, and which objects lie below a folder. The version is asked for with every range, so that the server itself
refuses one of a changed object:

    s3       the ETag; `If-Match` with each range
    gs       the generation, which names one version of an object; it is part of each request
    https    the ETag, `If-Match` with each range, and the ETag of each answer, because some servers ignore the
             condition; where the server gives no ETag, the time of the last change, else the size alone

Requests that fail for a moment are repeated TRIES times in all. Credentials, endpoints and proxies are those that the
packages of fsspec find in the environment. Cost: a request for each range, and one for the version when an object is
opened.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from feature_store.errors import InputError, NotFoundError
from feature_store.storage.addresses import PROTOCOLS, RemotePath

TRIES = 4
WAIT_S = 0.3
"""Wait before the second try; it doubles with each try."""
T = TypeVar("T")


class Version(NamedTuple):
    """One version of an object: its size, and the mark by which the server tells it from others.

    Attributes:
        size_bytes: its size.
        kind: "ETag", "generation", "last change" or "size".
        mark: the value of that kind; "" for the size.
    """

    size_bytes: int
    kind: str
    mark: str

    def __str__(self) -> str:
        return f"{self.kind} {self.mark}, {self.size_bytes:,} bytes" if self.mark else f"{self.size_bytes:,} bytes"


@dataclass(frozen=True)
class RemoteContent:
    """What stands for the content of a file or folder at an address, of which not every byte was read.

    Attributes:
        digest: sha256, 64 hex digits, of what tells the version from others.
        size_bytes: size of the file, or of all objects of the folder that are known.
        text: the version, in words.
    """

    digest: str
    size_bytes: int
    text: str


class Objects(Protocol):
    """The requests of one protocol."""

    def version(self, path: RemotePath) -> Version:
        """The version of an object that is there now. NotFoundError, InputError."""

    def read(self, path: RemotePath, version: Version, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of this version. InputError if another one is there."""

    def read_first(self, path: RemotePath) -> tuple[Version, bytes]:
        """The version of an object that is there now, and all of its bytes. NotFoundError, InputError."""

    def versions_below(self, path: RemotePath) -> Mapping[str, Version] | None:
        """The objects below a folder, by their names in it; None if the protocol has no listing."""


def content_of(path: RemotePath, version: Version) -> RemoteContent:
    """What stands for the content of one object.

    An ETag or a generation tells the content from others wherever it lies; a time or a size only together with the
    address.
    """
    is_strong = version.kind in ("ETag", "generation") and not version.mark.startswith("W/")
    parts = [version.kind, version.mark, str(version.size_bytes), *([] if is_strong else [path.place])]
    return RemoteContent(sha256_of(parts), version.size_bytes, str(version))


def sha256_of(parts: list[str]) -> str:
    """Sha256 of texts, each on a line."""
    return hashlib.sha256("".join(f"{one}\n" for one in parts).encode()).hexdigest()


def changed(path: RemotePath, how: str) -> InputError:
    """The error for an object that is not the version that was opened."""
    return InputError(
        f"{path} changed while it was in use ({how}); nothing of the new version was stored: run the command again, "
        "which makes another data set of it"
    )


class TryAgain(Exception):
    """A request failed in a way that may pass: the message says how."""


def repeated(path: RemotePath, request: Callable[[], T]) -> T:
    """The answer of a request, which is repeated while it raises `TryAgain`. InputError after the last try."""
    for number in range(TRIES):
        try:
            return request()
        except TryAgain as error:
            if number == TRIES - 1:
                raise InputError(
                    f"{path} cannot be reached ({error}, {TRIES} tries); check the address and the network, and run "
                    "the command again"
                ) from error
        time.sleep(WAIT_S * 2**number)
    raise AssertionError("the last try returns or raises")


def not_found(path: RemotePath) -> NotFoundError:
    """The error for an address at which nothing is."""
    return NotFoundError(f"there is nothing at {path}; check the address")


def not_permitted(path: RemotePath, reason: object) -> InputError:
    """The error for an object that may not be read."""
    return InputError(f"{path} may not be read ({reason}); {PROTOCOLS[path.protocol].credentials}")
