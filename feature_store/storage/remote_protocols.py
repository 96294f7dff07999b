"""The requests for an address, by its protocol, and the questions that are the same for all protocols.

A protocol's module, and the package that it needs, are imported with the first address of that protocol.
"""

import importlib.util
from functools import cache

from feature_store.errors import InputError, NotFoundError
from feature_store.storage.addresses import PROTOCOLS, DataPath, RemotePath
from feature_store.storage.remote_objects import Objects, RemoteContent, Version, changed, content_of


def objects_at(path: RemotePath) -> Objects:
    """The requests for the protocol of an address. InputError, naming the command, if a package is missing."""
    needs = PROTOCOLS[path.protocol]
    if importlib.util.find_spec("fsspec") is None or importlib.util.find_spec(needs.module) is None:
        raise InputError(f"{path} needs more packages: pip install 'scsae[{needs.extra}]'")
    return _objects(path.protocol)


@cache
def _objects(protocol: str) -> Objects:
    if protocol == "s3":
        from feature_store.storage.remote_s3 import S3Objects

        return S3Objects()
    if protocol == "gs":
        from feature_store.storage.remote_gs import GSObjects

        return GSObjects()
    from feature_store.storage.remote_http import HttpObjects

    return HttpObjects()


def checked_content(path: RemotePath, content: RemoteContent) -> RemoteContent:
    """The content, if it is the version that the path means. InputError for another one."""
    if path.digest not in (None, content.digest):
        raise changed(path, f"now it is {content.text}")
    return content


def read_range(objects: Objects, path: RemotePath, version: Version, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a version of an object, all of them. InputError as from `Objects.read`."""
    found = objects.read(path, version, start, stop)
    if len(found) != stop - start:
        raise InputError(
            f"the server of {path} answered {len(found):,} bytes of the {stop - start:,} from {start:,} on; run the "
            "command again, or download it"
        )
    return found


def is_there(path: DataPath) -> bool:
    """Whether there is a file or folder, or, at an address, an object or a group of zarr. InputError if the address
    does not answer.
    """
    if not isinstance(path, RemotePath):
        return path.exists()
    objects = objects_at(path)
    for one in (path, path / "zarr.json", path / ".zgroup"):
        try:
            objects.version(one)
        except NotFoundError:
            continue
        return True
    return False


def read_whole(path: RemotePath, *, most_bytes: int, part_bytes: int = 1 << 23) -> bytes:
    """All bytes of a small object. NotFoundError; InputError if it is larger, or changes meanwhile."""
    objects = objects_at(path)
    version = objects.version(path)
    checked_content(path, content_of(path, version))
    size = version.size_bytes
    if size > most_bytes:
        raise InputError(f"{path} has {size:,} bytes, more than {most_bytes:,}; give a smaller file")
    return b"".join(
        read_range(objects, path, version, low, min(low + part_bytes, size)) for low in range(0, size, part_bytes)
    )
