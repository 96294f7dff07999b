"""Objects at `s3://`, by s3fs: each range with `If-Match` (`remote_objects.Objects`)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import s3fs
from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError, ProfileNotFound
from fsspec.asyn import sync

from feature_store.errors import InputError
from feature_store.storage import object_storage
from feature_store.storage.addresses import RemotePath
from feature_store.storage.remote_objects import TryAgain, Version, changed, not_found, not_permitted, repeated

_REFUSED, _CONDITION, _RANGE, _FAILED = (401, 403), 412, 416, 500
T = TypeVar("T")


class S3Objects:
    """`Objects` of S3 and what has its interface."""

    def __init__(self) -> None:
        # careful: fsspec caches listings, and the objects may change
        self._fs: Any = s3fs.S3FileSystem(use_listings_cache=False)

    def version(self, path: RemotePath) -> Version:
        """See `Objects`."""
        answer = self._ask(path, partial(self._fs.call_s3, "head_object", **self._names(path)))
        if answer["ContentLength"] == 0:
            raise InputError(f"{path} is empty (0 bytes); fetch it again")
        return Version(int(answer["ContentLength"]), "ETag", str(answer["ETag"]))

    def read(self, path: RemotePath, version: Version, start: int, stop: int) -> bytes:
        """See `Objects`."""
        found: bytes = self._ask(path, partial(self._get, path, version, start, stop), version)
        return found

    def read_first(self, path: RemotePath) -> tuple[Version, bytes]:
        """See `Objects`."""
        version = self.version(path)
        return version, self.read(path, version, 0, version.size_bytes)

    def versions_below(self, path: RemotePath) -> Mapping[str, Version]:
        """See `Objects`."""
        folder = path.address.partition("://")[2]
        found = self._ask(path, partial(self._fs.find, folder, detail=True))
        return {
            name.removeprefix(f"{folder}/"): Version(int(one["size"]), "ETag", str(one["ETag"]))
            for name, one in found.items()
        }

    def _names(self, path: RemotePath) -> dict[str, str]:
        return {"Bucket": path.parts[0], "Key": path.address.partition("://")[2].partition("/")[2]}

    def _get(self, path: RemotePath, version: Version, start: int, stop: int) -> bytes:
        answer = self._fs.call_s3(
            "get_object", **self._names(path), Range=f"bytes={start}-{stop - 1}", IfMatch=version.mark
        )
        try:
            content: bytes = sync(self._fs.loop, answer["Body"].read)
        finally:
            answer["Body"].close()
        # careful: some stores ignore the condition
        if answer["ETag"] != version.mark:
            raise changed(path, f"it was {version}, and is ETag {answer['ETag']}")
        return content

    def _ask(self, path: RemotePath, request: Callable[[], T], version: Version | None = None) -> T:
        def asked() -> T:
            try:
                return request()
            except FileNotFoundError as error:
                raise not_found(path) if version is None else changed(path, "it is not there any more") from error
            except (NoCredentialsError, PartialCredentialsError, ProfileNotFound, PermissionError) as error:
                raise not_permitted(path, error) from error
            except (BotoCoreError, OSError) as error:
                status = object_storage.status_of(error)
                if status in (_CONDITION, _RANGE) and version is not None:
                    raise changed(path, f"it was {version}") from error
                if status in _REFUSED:
                    raise not_permitted(path, error) from error
                if status is not None and status < _FAILED:
                    raise InputError(f"{path} cannot be read ({error}); check the address") from error
                raise TryAgain(str(error)) from error

        return repeated(path, asked)
