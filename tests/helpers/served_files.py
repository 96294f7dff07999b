"""A folder over HTTP on this machine, with ranges, ETags and a count of what was asked for; and one as a bucket of S3.

What a server of the web may do otherwise is an attribute: no ranges, no ETag, a condition that it ignores, a status
that it answers, once or always.
"""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass
class ServedFolder:
    """A folder at `address`.

    Attributes:
        ranges, etags, times, conditions: whether the server answers ranges, gives ETags and times of the last change,
            and heeds `If-Match`.
        statuses: answers to the next requests, before any file is looked at.
        before: called with the path of each request before it is answered.
        asked: the path, and the bytes sent, of each answer with content.
    """

    folder: Path
    address: str = ""
    ranges: bool = True
    etags: bool = True
    times: bool = True
    conditions: bool = True
    kind: str = "application/octet-stream"
    statuses: list[int] = field(default_factory=list)
    before: Callable[[str], None] = lambda _path: None
    asked: list[tuple[str, int]] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        return sum(n for _, n in self.asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: ServedFolder

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        served, name = self.served, unquote(self.path.partition("?")[0]).strip("/")
        served.before(name)
        file = served.folder / name
        if served.statuses:
            self.answer(served.statuses.pop(0))
        elif not file.is_file():
            self.answer(404)
        else:
            self.send(name, file)

    def send(self, name: str, file: Path) -> None:
        served, found = self.served, file.stat()
        tag = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
        headers = {"Content-Type": served.kind, "Last-Modified": formatdate(found.st_mtime, usegmt=True), "ETag": tag}
        headers = {
            key: value
            for key, value in headers.items()
            if (served.etags or key != "ETag") and (served.times or key != "Last-Modified")
        }
        wanted = self.headers.get("Range")
        if served.conditions and self.headers.get("If-Match", tag) != tag:
            self.answer(412)
        elif wanted and served.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or found.st_size) + 1, found.st_size)
            if start >= found.st_size:
                self.answer(416)
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{found.st_size}"
            served.asked.append((name, stop - start))
            with file.open("rb") as opened:
                opened.seek(start)
                self.answer(206, opened.read(stop - start), headers)
        else:
            served.asked.append((name, found.st_size))
            self.answer(200, file.read_bytes(), headers)

    def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:
            # a client may go away when it has seen the status
            self.close_connection = True


@contextmanager
def served_folder(folder: Path) -> Iterator[ServedFolder]:
    """Serve a folder while the block runs."""
    served = ServedFolder(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Handler,), {"served": served}))
    server.daemon_threads = True
    served.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class GoogleHandler(BaseHTTPRequestHandler):
    """The three requests of Google Cloud Storage that reading takes; the generation of an object is its file's time."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        found = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(found.query).items()}
        bucket, _, name = found.path.partition("/b/")[2].partition("/o")
        file = self.folder / bucket / unquote(name.strip("/"))
        if not name.strip("/"):
            inside = (self.folder / bucket).rglob("*")
            names = [one.relative_to(self.folder / bucket).as_posix() for one in inside if one.is_file()]
            items = [self.facts(bucket, one) for one in sorted(names) if one.startswith(query.get("prefix", ""))]
            self.answer(200, json.dumps({"kind": "storage#objects", "items": items}).encode())
        elif not file.is_file() or query.get("generation", self.generation(file)) != self.generation(file):
            self.answer(404, b"{}")
        elif query.get("alt") == "media":
            start, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            self.answer(206, file.read_bytes()[int(start) : int(last) + 1])
        else:
            self.answer(200, json.dumps(self.facts(bucket, unquote(name.strip("/")))).encode())

    def facts(self, bucket: str, name: str) -> dict[str, str]:
        file = self.folder / bucket / name
        size, time = str(file.stat().st_size), "2026-01-01T00:00:00.000Z"
        facts = {"kind": "storage#object", "bucket": bucket, "name": name, "size": size, "etag": "x"}
        return {**facts, "generation": self.generation(file), "updated": time, "timeCreated": time}

    @staticmethod
    def generation(file: Path) -> str:
        return str(file.stat().st_mtime_ns)

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def emulated_google(folder: Path) -> Iterator[str]:
    """The folders of a folder as buckets of Google Cloud Storage, for reading; the address of the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (GoogleHandler,), {"folder": folder}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def emulated_s3() -> Iterator[str]:
    """An emulation of S3 in a thread, one request at a time; its address."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            """Say nothing."""

    app, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_at_a_time(environ: Any, start: Any) -> list[bytes]:
        with lock:
            return [b"".join(app(environ, start))]

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Bucket:
    """A bucket of an emulated S3, whose variables are in the environment."""

    def __init__(self, name: str) -> None:
        import s3fs

        self.name, self.fs = name, s3fs.S3FileSystem(use_listings_cache=False)
        self.fs.call_s3("create_bucket", Bucket=name)

    def put(self, source: Path, name: str) -> str:
        """Put a file or folder under a name; its address."""
        self.fs.put(str(source), f"{self.name}/{name}", recursive=source.is_dir())
        return f"s3://{self.name}/{name}"


@contextmanager
def bucket(patch: Any, name: str) -> Iterator[Bucket]:
    """An empty bucket; `patch` is a monkeypatch."""
    import s3fs

    with emulated_s3() as address:
        patch.setenv("AWS_ENDPOINT_URL", address)
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(variable, "emulated")
        for variable in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            patch.setenv(variable, "us-east-1")
        forget_connections()
        s3fs.S3FileSystem.clear_instance_cache()
        yield Bucket(name)
        s3fs.S3FileSystem.clear_instance_cache()
        forget_connections()


def forget_connections() -> None:
    """Let the next request read the environment anew."""
    from feature_store.storage import remote_protocols

    remote_protocols._objects.cache_clear()
