"""Objects at `gs://`, by gcsfs: each request names the generation, which is one version (`remote_objects.Objects`)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import fsspec

from feature_store.errors import InputError
from feature_store.storage.addresses import RemotePath
from feature_store.storage.remote_objects import TryAgain, Version, changed, not_found, not_permitted, repeated

T = TypeVar("T")


class GSObjects:
    """`Objects` of Google Cloud Storage."""

    def __init__(self) -> None:
        # careful: fsspec caches listings, and the objects may change
        self._fs: Any = fsspec.filesystem("gs", use_listings_cache=False, version_aware=True)

    def version(self, path: RemotePath) -> Version:
        """See `Objects`."""
        found = self._ask(path, partial(self._fs.info, path.address))
        if found["type"] == "directory":
            raise not_found(path)
        if int(found["size"]) == 0:
            raise InputError(f"{path} is empty (0 bytes); fetch it again")
        return _version_of(found)

    def read(self, path: RemotePath, version: Version, start: int, stop: int) -> bytes:
        """See `Objects`."""
        name = f"{path.address}#{version.mark}"
        found: bytes = self._ask(path, partial(self._fs.cat_file, name, start=start, end=stop), version)
        return found

    def read_first(self, path: RemotePath) -> tuple[Version, bytes]:
        """See `Objects`."""
        version = self.version(path)
        return version, self.read(path, version, 0, version.size_bytes)

    def versions_below(self, path: RemotePath) -> Mapping[str, Version]:
        """See `Objects`."""
        folder = path.address.partition("://")[2]
        found = self._ask(path, partial(self._fs.find, folder, detail=True))
        return {name.removeprefix(f"{folder}/"): _version_of(one) for name, one in found.items()}

    def _ask(self, path: RemotePath, request: Callable[[], T], version: Version | None = None) -> T:
        def asked() -> T:
            try:
                return request()
            except FileNotFoundError as error:
                raise not_found(path) if version is None else changed(path, f"it was {version}") from error
            except PermissionError as error:
                raise not_permitted(path, error) from error
            except Exception as error:
                raise _explained(path, error) from error

        return repeated(path, asked)


def _version_of(found: Mapping[str, Any]) -> Version:
    return Version(int(found["size"]), "generation", str(found["generation"]))


def _explained(path: RemotePath, error: Exception) -> Exception:
    """The error for one of gcsfs, google.auth or aiohttp, whose classes have no common base."""
    place = type(error).__module__.partition(".")[0]
    # gcsfs has no class for it
    if place == "google" or (isinstance(error, OSError) and str(error).startswith("Forbidden")):
        return not_permitted(path, error)
    if place == "aiohttp" or isinstance(error, OSError):
        return TryAgain(str(error) or type(error).__name__)
    code = getattr(error, "code", None)
    if place == "gcsfs" and code is not None:
        return not_permitted(path, error) if int(code) in (401, 403) else InputError(f"{path} cannot be read ({error})")
    return error
