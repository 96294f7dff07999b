"""Addresses of data files: `s3://`, `gs://`, `https://` and `http://`.

An address is no path of pathlib, which would make `https:/` of `https://`. `data_path` is the one place where what a
user gives becomes a `Path` or a `RemotePath`; the objects themselves are read by `remote_objects`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from feature_store.errors import InputError


class Protocol(NamedTuple):
    """What a protocol needs: a module, the extra of scsae that brings it, and where credentials come from."""

    module: str
    extra: str
    credentials: str


_HTTP = Protocol("aiohttp", "https", "put user and password into ~/.netrc, or take an address with a signature in it")
_S3 = Protocol(
    "s3fs",
    "s3",
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE; FSSPEC_S3_ANON=true for a public bucket), and "
    "AWS_ENDPOINT_URL for a store that is not AWS",
)
_GS = Protocol(
    "gcsfs",
    "gs",
    "set GOOGLE_APPLICATION_CREDENTIALS or run `gcloud auth application-default login` (FSSPEC_GS_TOKEN=anon for a "
    "public bucket)",
)
PROTOCOLS: Mapping[str, Protocol] = {"s3": _S3, "gs": _GS, "https": _HTTP, "http": _HTTP}
_ADDRESS = re.compile(r"([^/]+)://(.+)", re.DOTALL)


@dataclass(frozen=True, repr=False)
class RemotePath:
    """A file or folder at an address, with the part of the interface of pathlib that data files need.

    Its text and representation leave out the query of an address of the web, which may hold a signature.

    Attributes:
        address: the address.
        digest: that of the version that is meant (`remote_objects.RemoteContent`); None means the one that is there.
    """

    address: str
    digest: str | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __str__(self) -> str:
        return self.place if self.place == self.address else f"{self.place}?..."

    @property
    def protocol(self) -> str:
        """The protocol, a key of PROTOCOLS."""
        return self.address.partition("://")[0]

    @property
    def is_of_the_web(self) -> bool:
        """Whether the protocol is that of the web, whose addresses have queries and encoded names."""
        return self.protocol in ("http", "https")

    @property
    def place(self) -> str:
        """The address without its query, which differs between two signatures for the same object."""
        return self.address.partition("?")[0] if self.is_of_the_web else self.address

    @property
    def parts(self) -> tuple[str, ...]:
        """Host or bucket, and the names below it."""
        host, _, rest = self.place.partition("://")[2].partition("/")
        names = [name for name in rest.split("/") if name]
        return (host, *(map(unquote, names) if self.is_of_the_web else names))

    @property
    def name(self) -> str:
        """The last name of the address."""
        return self.parts[-1]

    @property
    def stem(self) -> str:
        """The last name without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The suffix of the last name."""
        return PurePosixPath(self.name).suffix

    def __truediv__(self, name: str) -> "RemotePath":
        query = self.address.removeprefix(self.place)
        return RemotePath(f"{self.place.rstrip('/')}/{name}{query}")

    def of_version(self, digest: str) -> "RemotePath":
        """The same address, of which this version alone is read."""
        return replace(self, digest=digest)


DataPath = Path | RemotePath
"""A file or folder of data: in a file system, or at an address."""


def is_address(text: str) -> bool:
    """Whether a text has the form of an address, PROTOCOL://REST."""
    return _ADDRESS.fullmatch(text) is not None


def data_path(given: str | DataPath) -> DataPath:
    """The address or path that a text names.

    InputError for an address of a protocol that is not in PROTOCOLS, without a host or bucket and a name, or with a
    user in it.
    """
    if not isinstance(given, str):
        return given
    found = _ADDRESS.fullmatch(given)
    if found is None:
        return Path(given)
    protocol, rest = found[1].lower(), found[2]
    if protocol not in PROTOCOLS:
        raise InputError(
            f"the address was {given!r}; data are read at {', '.join(f'{one}://' for one in PROTOCOLS)}, or from a "
            "file: download it, and give its path"
        )
    path = RemotePath(f"{protocol}://{rest}")
    if path.place == path.address:
        path = RemotePath(path.address.rstrip("/"))
    if path.is_of_the_web and "@" in urlsplit(path.address).netloc:
        raise InputError(
            f"the address of {path.name} holds a user, and the store would keep it; put user and password into ~/.netrc"
        )
    if len(path.parts) < 2 or not path.parts[0]:
        raise InputError(f"the address was {given!r}; give one with a host or bucket, and the name of a file in it")
    return path


def same_place(path: DataPath) -> DataPath:
    """What two names of one file have in common: the path without links, or the address without its query."""
    return RemotePath(path.place) if isinstance(path, RemotePath) else path.resolve()
