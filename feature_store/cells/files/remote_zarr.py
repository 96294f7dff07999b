"""A zarr group at an address: a store of zarr that reads every object in the version that was there at the opening.

Where the protocol lists a folder (s3, gs), the listing at the opening gives the version of every object, and tells
which chunks are missing. The web has no listing: the group has to have consolidated metadata, which anndata writes,
and its version is that of these metadata, which are asked for again every CHECK_S seconds; of a chunk, the version is
the one of its first read.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from feature_store.errors import InputError, NotFoundError
from feature_store.storage.addresses import RemotePath
from feature_store.storage.remote_objects import RemoteContent, Version, changed, not_found, sha256_of
from feature_store.storage.remote_protocols import checked_content, objects_at, read_range

METADATA = (".zmetadata", "zarr.json")
"""The objects that may hold the metadata of a whole group: of versions 2 and 3."""
CHECK_S = 10.0


class RemoteStore(Store):
    """The objects below an address, for reading alone.

    InputError, as from `remote_objects.Objects`, where an object is not the version that was there at the opening.

    Attributes:
        content: what stands for the content of all objects.
    """

    supports_writes = False
    supports_deletes = False

    def __init__(self, path: RemotePath) -> None:
        super().__init__(read_only=True)
        self.path = path
        self._objects = objects_at(path)
        listed = self._objects.versions_below(path)
        self._is_listed = listed is not None
        self._versions: dict[str, Version] = dict(listed or {})
        self._required: list[str] = []
        self._checked_s = time.monotonic()
        self._metadata, self.content = ("", self._of_listing()) if self._is_listed else self._of_metadata()
        checked_content(path, self.content)

    def _of_listing(self) -> RemoteContent:
        if not any(name in self._versions for name in ("zarr.json", ".zgroup")):
            raise not_found(self.path)
        lines = [f"{name} {one.kind} {one.mark} {one.size_bytes}" for name, one in sorted(self._versions.items())]
        size = sum(one.size_bytes for one in self._versions.values())
        digest = sha256_of(lines)
        return RemoteContent(digest, size, f"{len(lines):,} objects with listing {digest[:12]}, {size:,} bytes")

    def _of_metadata(self) -> tuple[str, RemoteContent]:
        for name in METADATA:
            try:
                version = self._versions[name] = self._objects.version(self.path / name)
            except NotFoundError:
                continue
            # careful: two groups of one shape may have the same metadata
            parts = [name, version.kind, version.mark, str(version.size_bytes), self.path.place]
            return name, RemoteContent(sha256_of(parts), version.size_bytes, f"{name} with {version}")
        raise not_found(self.path)

    def require(self, array: str) -> None:
        """Refuse, from now on, a missing chunk of this array, which zarr takes for zeros."""
        self._required.append(f"{array.strip('/')}/")

    @property
    def supports_listing(self) -> bool:
        """Whether the protocol lists a folder."""
        return self._is_listed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteStore) and (self.path, self.content) == (other.path, other.content)

    __hash__ = None  # type: ignore[assignment]

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The bytes of an object, or those of a range; None if there is no such object."""
        content = await asyncio.to_thread(self._get, key, byte_range)
        return None if content is None else prototype.buffer.from_bytes(content)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """The bytes of several ranges."""
        return list(await asyncio.gather(*(self.get(key, prototype, one) for key, one in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Whether there is an object."""
        return await asyncio.to_thread(self._version, key) is not None

    async def list(self) -> AsyncIterator[str]:
        """The names of all objects."""
        for key in self._versions:
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """The names of the objects that begin with a prefix."""
        for key in self._versions:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """The names of what lies directly in a folder."""
        folder = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        inside = (key.removeprefix(folder) for key in self._versions if key.startswith(folder))
        for name in dict.fromkeys(key.partition("/")[0] for key in inside):
            yield name

    async def set(self, key: str, value: Buffer) -> None:
        """The store is for reading alone."""
        self._check_writable()

    async def delete(self, key: str) -> None:
        """The store is for reading alone."""
        self._check_writable()

    def _get(self, key: str, wanted: ByteRequest | None) -> bytes | None:
        if not self._is_listed and time.monotonic() - self._checked_s > CHECK_S:
            self._check_metadata()
        if wanted is None and key not in self._versions and not self._is_listed:
            content = self._first(key)
        elif (version := self._version(key)) is None:
            content = None
        else:
            start, stop = _bounds(wanted, version.size_bytes)
            content = b"" if start >= stop else read_range(self._objects, self.path / key, version, start, stop)
        if content is None and any(key.startswith(array) for array in self._required):
            raise InputError(
                f"{self.path}: the chunk {key} of its values is missing; the folder was copied in part: copy it again"
            )
        return content

    def _first(self, key: str) -> bytes | None:
        try:
            self._versions[key], content = self._objects.read_first(self.path / key)
        except NotFoundError:
            return None
        return content

    def _version(self, key: str) -> Version | None:
        if key not in self._versions and not self._is_listed:
            try:
                self._versions[key] = self._objects.version(self.path / key)
            except NotFoundError:
                return None
        return self._versions.get(key)

    def _check_metadata(self) -> None:
        now = self._objects.version(self.path / self._metadata)
        if now != self._versions[self._metadata]:
            raise changed(self.path, f"{self._metadata} was {self._versions[self._metadata]}, and is {now}")
        self._checked_s = time.monotonic()


def _bounds(wanted: ByteRequest | None, size: int) -> tuple[int, int]:
    """The bytes [start, stop) of an object that a request of zarr is for."""
    if isinstance(wanted, RangeByteRequest):
        return wanted.start, min(wanted.end, size)
    if isinstance(wanted, OffsetByteRequest):
        return wanted.offset, size
    return (max(size - wanted.suffix, 0), size) if isinstance(wanted, SuffixByteRequest) else (0, size)


def open_remote_group(path: RemotePath) -> tuple[Any, RemoteContent]:
    """The zarr group at an address, and what stands for its content.

    Raises:
        NotFoundError: there is no zarr group.
        InputError: it is damaged, may not be read, is not the version that the path means, or has no consolidated
            metadata where the protocol does not list a folder.
    """
    store = RemoteStore(path)
    try:
        group = zarr.open_group(store, mode="r")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is not a zarr group, or is damaged ({error}); copy the folder again") from error
    if not store.supports_listing and group.metadata.consolidated_metadata is None:
        raise InputError(
            f"{path} has no consolidated metadata, without which what is in it cannot be listed over "
            f'{path.protocol}; write them once where the folder is: python -c "import zarr; '
            f'zarr.consolidate_metadata({path.name!r})"'
        )
    return group, store.content
