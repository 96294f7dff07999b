"""Object storage with the S3 interface: the operations behind `feature_store.storage.filesystem` for S3 paths.

An object appears whole or not at all, and a reader sees the latest put, so a part needs no temporary name, no fsync and
no lock. In place of an exclusive link there is a conditional put (`If-None-Match: *`), which the store answers with 412
if the object exists; a store that ignores the condition is refused. AWS decides even between simultaneous puts; not
every store does (OpenStack Swift reports success to both and keeps the last). Nothing depends on it: plan, markers and
manifest have the same bytes whichever process puts them. Reads use paths of universal-pathlib and requests use s3fs;
neither is imported before the first URI.

Cost: one or two requests per file operation, and a part lies on the local disk ($TMPDIR) until it is uploaded.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

from feature_store.errors import InputError, NotFoundError, StoreWriteError

PROTOCOL = "s3"
STAND_IN = "scsae-local"
_CONFLICT, _EXISTS, _UNKNOWN = 409, 412, 501
_TRIES = 5
REQUEST_THREADS = 32
"""Number of requests that wait for the store at a time where many files are read."""


class Head(NamedTuple):
    """The size and version of one object, and the seconds since it was put, by the store's own clock."""

    bytes: int
    etag: str
    age_s: float


def open_path(uri: str) -> Path:
    """Return a path on object storage, with the interface of pathlib for joining and reading.

    InputError for another protocol or without the extra `s3`, NotFoundError if the bucket does not answer.
    """
    protocol, _, rest = uri.partition("://")
    bucket = rest.partition("/")[0]
    if protocol != PROTOCOL or not bucket:
        raise InputError(f"a store was given as {uri!r}; it is a folder, or s3://BUCKET/PREFIX on object storage")
    try:
        import s3fs  # noqa: F401
        from upath import UPath
    except ImportError as error:
        raise InputError(f"{uri} is on object storage, which needs more packages: pip install 'scsae[s3]'") from error
    # careful: fsspec caches listings, and other processes write here
    path: Any = UPath(
        uri.rstrip("/"), use_listings_cache=False, config_kwargs={"max_pool_connections": REQUEST_THREADS}
    )
    _reach(bucket)
    found: Path = path
    return found


def stand_in(root: Any) -> Path:
    """Return the local folder of a store: itself, or `scsae-local/BUCKET-PREFIX` for object storage."""
    if isinstance(root, Path):
        return root
    return Path(STAND_IN) / str(root.path).strip("/").replace("/", "-")


def read(target: Any) -> bytes:
    """Return the content of an object, by one request."""
    data: bytes = target.fs.cat_file(target.path, max_concurrency=1)
    return data


def read_end(target: Any, n_bytes: int) -> bytes:
    """Return the last bytes of an object that is not empty, or all of a smaller one, by one request."""
    data: bytes = target.fs.cat_file(target.path, start=-n_bytes)
    return data


def sizes(folder: Any) -> dict[str, int]:
    """Return the sizes of the objects directly below a folder, by name; 1,000 of them take one request."""
    try:
        entries = folder.fs.ls(folder.path, detail=True)
    except FileNotFoundError:
        return {}
    return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in entries if entry["type"] == "file"}


def put(source: Path, target: Any) -> None:
    """Put a local file as one object; an existing object is replaced."""
    with _clear_errors(target):
        target.fs.put_file(str(source), target.path)


def put_text(target: Any, text: str) -> None:
    """Put a small object; an existing object is replaced."""
    with _clear_errors(target):
        target.fs.pipe_file(target.path, text.encode())


def create(target: Any, text: str) -> bool:
    """Put a small object unless it exists; return whether it was put. StoreWriteError if the store cannot do so."""
    made = _put_if(target, text, IfNoneMatch="*") is not None
    if made:
        _refuse_if_overwritten(target, text)
    return made


def replace(target: Any, text: str, *, etag: str) -> bool:
    """Replace the version `etag` of a small object; return False if the object has changed since.

    If the store lacks `If-Match` (it answers 501), the object is put unconditionally.
    """
    try:
        return _put_if(target, text, IfMatch=etag) is not None
    except OSError as error:
        if status_of(error) != _UNKNOWN:
            raise
    put_text(target, text)
    return True


def head(target: Any) -> Head | None:
    """Return size, version and age of an object, None if there is none."""
    bucket, key, _ = target.fs.split_path(target.path)
    try:
        answer = target.fs.call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    age = now - answer["LastModified"]
    return Head(bytes=answer["ContentLength"], etag=answer["ETag"], age_s=age.total_seconds())


def download(folder: Any, target: Path) -> None:
    """Copy the objects directly below `folder` into a local folder."""
    for path in folder.iterdir():
        if path.is_file():
            path.fs.get_file(path.path, str(target / path.name))


def remove_object(target: Any) -> None:
    """Delete one object if it is there."""
    with _clear_errors(target), contextlib.suppress(FileNotFoundError):
        target.fs.rm_file(target.path)


def remove(folder: Any) -> None:
    """Delete every object below `folder`, if there are any."""
    with contextlib.suppress(FileNotFoundError):
        folder.fs.rm(folder.path, recursive=True)


def _put_if(target: Any, text: str, **condition: str) -> str | None:
    """Return the version that was put, or None if the condition does not hold."""
    bucket, key, _ = target.fs.split_path(target.path)
    with _clear_errors(target):
        for last in (False,) * (_TRIES - 1) + (True,):
            try:
                answer = target.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=text.encode(), **condition)
                return str(answer["ETag"])
            except OSError as error:
                status = status_of(error)
                if status == _EXISTS or isinstance(error, FileExistsError):
                    return None
                # 409: another process was putting or deleting the object at this moment
                if status != _CONFLICT or last:
                    raise
            time.sleep(0.2)
    raise AssertionError("the last try returns or raises")


@functools.cache
def _reach(bucket: str) -> None:
    """Check once per process that the bucket answers, so that a missing setup is reported before any work."""
    import s3fs
    from botocore.exceptions import BotoCoreError

    try:
        s3fs.S3FileSystem(use_listings_cache=False).call_s3("head_bucket", Bucket=bucket)
    except (OSError, BotoCoreError) as error:
        raise NotFoundError(
            f"the bucket {bucket!r} cannot be reached: {error}; make it, or set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), AWS_REGION, and AWS_ENDPOINT_URL for a store that is not AWS"
        ) from error


_CONDITIONAL: set[str] = set()


def _refuse_if_overwritten(target: Any, text: str) -> None:
    """Repeat a put that must fail, once per bucket and process; a store that accepts it ignores conditions."""
    bucket = target.fs.split_path(target.path)[0]
    if bucket in _CONDITIONAL:
        return
    if _put_if(target, text, IfNoneMatch="*") is not None:
        raise StoreWriteError(
            f"the store of {target} ignores conditional puts (If-None-Match: *), by which a run has one plan and one "
            "manifest; use one that knows them, as AWS S3 does, or a folder"
        )
    _CONDITIONAL.add(bucket)


@contextlib.contextmanager
def _clear_errors(target: Any) -> Iterator[None]:
    """Convert a failed put into StoreWriteError; PermissionError passes to `filesystem.clear_write_errors`."""
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except BotoCoreError as error:
        raise StoreWriteError(
            f"cannot write {target}: {error}; run the command again when the store answers: what is committed stays"
        ) from error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of s3fs."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None if status is None else int(status)
