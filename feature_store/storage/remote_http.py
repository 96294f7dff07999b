"""Objects at `https://` and `http://`: ranges by the session of fsspec, with the condition and its check (`Objects`).

A server that does not answer ranges is refused: each block would be the whole file. The first byte of an object tells
its version, because an address with a signature in it may be for GET alone. ~/.netrc and the proxies of the environment
are used.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import aiohttp
import fsspec
from fsspec.asyn import sync
from yarl import URL

from feature_store.errors import InputError
from feature_store.storage.addresses import RemotePath
from feature_store.storage.remote_objects import TryAgain, Version, changed, not_found, not_permitted, repeated

_PARTIAL, _NONE_SUCH, _CONDITION, _RANGE = 206, (404, 410), 412, 416
_REFUSED = (401, 403, 407)
_LATER = (408, 425, 429, 500, 502, 503, 504)
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    content: bytes


class HttpObjects:
    """`Objects` of the web."""

    def __init__(self) -> None:
        self._fs: Any = fsspec.filesystem("https", client_kwargs={"trust_env": True})

    def version(self, path: RemotePath) -> Version:
        """See `Objects`."""
        answer = self._answer(path, 0, 1, {})
        if answer.status == _RANGE:
            raise InputError(f"{path} is empty (0 bytes); fetch it again")
        return _version_of(path, answer)

    def read(self, path: RemotePath, version: Version, start: int, stop: int) -> bytes:
        """See `Objects`."""
        is_strong = version.kind == "ETag" and not version.mark.startswith("W/")
        condition = {"If-Match": version.mark} if is_strong else {}
        answer = self._answer(path, start, stop, condition)
        if answer.status in (_CONDITION, _RANGE):
            raise changed(path, f"it was {version}")
        now = _version_of(path, answer)
        if now != version:
            raise changed(path, f"it was {version}, and is {now}")
        return answer.content

    def read_first(self, path: RemotePath) -> tuple[Version, bytes]:
        """See `Objects`; one request."""
        answer = self._answer(path, 0, None, {})
        if answer.status == _RANGE:
            raise InputError(f"{path} is empty (0 bytes); fetch it again")
        return _version_of(path, answer), answer.content

    def versions_below(self, path: RemotePath) -> None:
        """None: the web has no listing."""
        return

    def _answer(self, path: RemotePath, start: int, stop: int | None, condition: Mapping[str, str]) -> _Answer:
        end = "" if stop is None else stop - 1
        headers = {"Range": f"bytes={start}-{end}", "Accept-Encoding": "identity", **condition}
        answer: _Answer = repeated(path, partial(sync, self._fs.loop, self._get, path, headers))
        if answer.status in _NONE_SUCH:
            raise not_found(path)
        if answer.status in _REFUSED:
            raise not_permitted(path, f"the server answers {answer.status}")
        if answer.status == 200:
            is_page = answer.headers.get("Content-Type", "").startswith("text/html")
            raise InputError(
                f"the server answers {path} with a web page; give the address of the file itself"
                if is_page
                else f"the server of {path} does not answer requests for a range of bytes, so that every read would "
                "fetch the whole file; download it, and give its path"
            )
        if answer.status not in (_PARTIAL, _CONDITION, _RANGE):
            raise InputError(f"the server answers {answer.status} for {path}; check the address")
        return answer

    async def _get(self, path: RemotePath, headers: Mapping[str, str]) -> _Answer:
        session = await self._fs.set_session()
        url = URL(path.address, encoded="%" in path.address)
        try:
            async with session.get(url, headers=headers, timeout=_TIMEOUT) as answer:
                if answer.status in _LATER:
                    raise TryAgain(f"the server answers {answer.status}")
                # careful: the whole file would come where the range is ignored
                content = await answer.read() if answer.status == _PARTIAL else b""
                return _Answer(answer.status, answer.headers.copy(), content)
        except (aiohttp.InvalidURL, aiohttp.TooManyRedirects) as error:
            # careful: the text of these errors is the address, with its signature
            raise InputError(f"the address {path} cannot be asked ({type(error).__name__}); check it") from None
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise TryAgain(str(error) or type(error).__name__) from error


def _version_of(path: RemotePath, answer: _Answer) -> Version:
    size = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if size is None:
        raise InputError(f"the server of {path} does not say its size; download it, and give its path")
    for kind, header in (("ETag", "ETag"), ("last change", "Last-Modified")):
        if mark := answer.headers.get(header):
            return Version(int(size[1]), kind, mark)
    return Version(int(size[1]), "size", "")
