"""An object at an address as a file that can be sought, for readers of a format that read here and there, as HDF5 does.

The bytes come in blocks, of which the last `CACHED_BLOCKS` are kept. A read of a block that follows one that is kept
fetches twice as many blocks as that one came with, up to `MOST_BLOCKS` in one request, so that the arrays of a matrix,
each read from its beginning to its end and all of them in turns, are fetched in few requests and once, and what lies
alone costs one block. Memory: CACHED_BLOCKS x BLOCK_BYTES, 48 MB a file. While such a file is open, Python's cyclic
collection is held (`feature_store.storage.collection` says why).
"""

import io
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from feature_store.storage.addresses import RemotePath
from feature_store.storage.collection import hold_collection, release_collection
from feature_store.storage.remote_objects import RemoteContent, content_of
from feature_store.storage.remote_protocols import checked_content, objects_at, read_range

BLOCK_BYTES = 1 << 16
MOST_BLOCKS = 64
CACHED_BLOCKS = 768


class RangeFile(io.RawIOBase):
    """A file of `size` bytes, of which `fetch(start, stop)` gives the bytes [start, stop); made by `open_object`.

    Cyclic collection is held until it is closed, or nobody refers to it.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        hold_collection()
        self._release = weakref.finalize(self, release_collection)
        self._fetch, self._size, self._at = fetch, size, 0
        # a block, and the number of blocks that came with it
        self._blocks: OrderedDict[int, tuple[bytes, int]] = OrderedDict()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._release()
        super().close()

    def tell(self) -> int:
        """The present place."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, counted from the beginning, the present place or the end; return it."""
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the present place, and return the number of bytes: fewer at the end of the file alone.

        InputError as from `Objects.read`.
        """
        view = memoryview(buffer).cast("B")
        start, stop = self._at, min(self._at + len(view), self._size)
        last = (stop - 1) // BLOCK_BYTES
        while self._at < stop:
            number, offset = divmod(self._at, BLOCK_BYTES)
            part = memoryview(self._block(number, last))[offset : offset + stop - self._at]
            view[self._at - start : self._at - start + len(part)] = part
            self._at += len(part)
        return max(stop - start, 0)

    def _block(self, number: int, last: int) -> bytes:
        """A block, of which those up to `last` are needed next."""
        if number not in self._blocks:
            before = self._blocks.get(number - 1)
            self._fetch_blocks(number, max(last + 1 - number, 1 if before is None else 2 * before[1]))
        self._blocks.move_to_end(number)
        return self._blocks[number][0]

    def _fetch_blocks(self, first: int, wanted: int) -> None:
        """Fetch this number of blocks, or fewer: up to MOST_BLOCKS, the end of the file, or a block that is there."""
        end = min(first + min(wanted, MOST_BLOCKS, CACHED_BLOCKS), -(-self._size // BLOCK_BYTES))
        end = next((number for number in range(first + 1, end) if number in self._blocks), end)
        start = first * BLOCK_BYTES
        content = memoryview(self._fetch(start, min(end * BLOCK_BYTES, self._size)))
        for number in range(first, end):
            low = number * BLOCK_BYTES - start
            self._blocks[number] = bytes(content[low : low + BLOCK_BYTES]), end - first
        while len(self._blocks) > CACHED_BLOCKS:
            self._blocks.popitem(last=False)


def open_object(path: RemotePath) -> tuple[RangeFile, RemoteContent]:
    """The object at an address as a file, and what stands for its content.

    Raises:
        NotFoundError: there is none.
        InputError: a package is missing, the object may not be read or cannot be reached, its server answers no ranges,
            or it is not the version that the path means. A later read raises it if the object has changed.
    """
    objects = objects_at(path)
    hold_collection()
    try:
        # the answer to this request shows that the thread of requests is in no collection that began before
        version = objects.version(path)
        content = checked_content(path, content_of(path, version))
        return RangeFile(partial(read_range, objects, path, version), version.size_bytes), content
    finally:
        release_collection()
