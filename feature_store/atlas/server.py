"""The atlas over HTTP: the page, its scripts, and the resources below data/, which are made at request.

The server is read-only (GET and HEAD) and meant for one person at 127.0.0.1. It has no log-in: an address that others
reach shows them everything in the store. A request that names another host is refused, because a page elsewhere on the
web could otherwise point its own name at this address and read the answers. Scripts and styles come from this server
alone (content security policy). Only the title comes from the store into HTML, and it is escaped.
"""

import contextlib
import html
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feature_store.atlas.page import POLICY_IN_PAGE, STATIC, index_html
from feature_store.atlas.resources import Resources
from feature_store.atlas.routes import Resource
from feature_store.errors import InputError, StoreError
from feature_store.query.store import FeatureStore

PORT = 8300
LOCAL = ("127.0.0.1", "localhost", "[::1]", "::1")
POLICY = f"{POLICY_IN_PAGE}; frame-ancestors 'none'"
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
STATE = "Atlas-State"
"""The header of an answer that names the state of the store: a page reads everything again once it is another."""
CHECK_S = 1.0
"""Seconds between two looks at the runs of a store."""
WAIT_S = 2
"""Seconds after which the page that says what is being made asks for the atlas again."""
_POLL_S = 0.1
_WAITING_HEADERS = {**_HEADERS, "Content-Type": "text/html; charset=utf-8", "Retry-After": str(WAIT_S)}
_EVERYWHERE = ("0.0.0.0", "::", "")


def application(store: FeatureStore, *, hosts: Sequence[str] = LOCAL) -> Starlette:
    """The atlas of a store as an ASGI application that answers requests to `hosts` ("*": to any).

    It starts to read the tables of the first page at once, in a thread. Runs that are committed while it answers are
    read from then on: the store is looked at again at a request, at most once in CHECK_S seconds.
    """
    newest = _Newest(store)

    async def page(_: Request) -> Response:
        try:
            now = await run_in_threadpool(newest.resources)
        except StoreError as error:
            return JSONResponse({"error": str(error)}, status_code=500)
        return Response(index_html(now.data.store), media_type="text/html; charset=utf-8")

    async def data(request: Request) -> Response:
        def answer() -> tuple[Resource | None, str]:
            now = newest.resources()
            return now.get(request.path_params["path"]), now.data.store.state

        try:
            found, state = await run_in_threadpool(answer)
        except StoreError as error:
            return JSONResponse({"error": str(error)}, status_code=500)
        if found is None:
            return JSONResponse({"error": "no such resource"}, status_code=404, headers={STATE: state})
        return Response(found.body, media_type=found.media_type, headers={STATE: state})

    return Starlette(
        routes=[
            Route("/", page),
            Route("/index.html", page),
            Route("/data/{path:path}", data),
            Mount("/static", StaticFiles(directory=str(STATIC))),
        ],
        middleware=[
            Middleware(_Headers),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)),
        ],
    )


class _Newest:
    """The resources of a store as it is now; those of before are let go with all that they read."""

    def __init__(self, store: FeatureStore) -> None:
        self._lock = threading.Lock()
        self._resources = self._warmed(store)
        self._checked = time.monotonic()
        # careful: the state is that of now, and not that of the first look at the store
        _ = store.state

    def resources(self) -> Resources:
        """The resources. Raises as `FeatureStore.open` where the store was damaged since."""
        with self._lock:
            if time.monotonic() - self._checked >= CHECK_S:
                store = self._resources.data.store.renewed()
                if store is not self._resources.data.store:
                    self._resources = self._warmed(store)
                self._checked = time.monotonic()
            return self._resources

    def _warmed(self, store: FeatureStore) -> Resources:
        resources = Resources(store)
        threading.Thread(target=resources.warm, daemon=True).start()
        return resources


class _Headers:
    """Adds the headers of every answer. It is plain ASGI because Starlette's base class takes as long as the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self.app(scope, receive, sent)


def serve(
    store: FeatureStore,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    listening: socket.socket | None = None,
    ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve the atlas until it is interrupted; `ready` is called with the address once the server answers.

    `port` 0 takes any free port. `listening` is a socket of `listen(host, port)`, for callers that check the address
    first; it is closed at the end. Raises InputError for an address at which the server cannot listen.
    """
    import uvicorn

    listening = listening or listen(host, port)
    chosen = listening.getsockname()[1]
    hosts = ("*",) if host in _EVERYWHERE else (host, *LOCAL)
    config = uvicorn.Config(application(store, hosts=hosts), log_level="error", access_log=False, server_header=False)
    with listening:
        name = "127.0.0.1" if host in _EVERYWHERE else f"[{host}]" if ":" in host else host
        ready(f"http://{name}:{chosen}")
        uvicorn.Server(config).run(sockets=[listening])


@contextlib.contextmanager
def waiting_page(listening: socket.socket) -> Iterator[Callable[[str], None]]:
    """Answer every request to a socket with a page that says what is being made, until the block ends.

    The block calls what it gets with the name of each thing that it makes. The page asks again every WAIT_S seconds and
    so becomes the atlas once this is served. It holds nothing of the store.
    """
    made = ["the maps of the atlas"]

    class Waiting(BaseHTTPRequestHandler):
        timeout = 1

        def do_GET(self) -> None:
            body = _waiting(made[0])
            self.send_response(503)
            for name, value in _WAITING_HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing: stderr has the progress of the maps."""

    server = HTTPServer(listening.getsockname()[:2], Waiting, bind_and_activate=False)
    server.socket.close()
    server.socket = listening
    # careful: a visitor who leaves before it is accepted must not keep the thread
    listening.settimeout(_POLL_S)
    thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), daemon=True)
    thread.start()
    try:
        yield lambda what: made.__setitem__(0, what)
    finally:
        server.shutdown()
        thread.join()
        listening.settimeout(None)


def _waiting(made: str) -> bytes:
    """The page of `waiting_page`."""
    text = f"The server is making {made}, once for this store. The atlas appears here when that is done."
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="{WAIT_S}">'
        f"<title>scsae atlas</title><p>{html.escape(text)}</p></html>\n"
    ).encode()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; `port` 0 takes any free port. Raises InputError where that fails."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
    except (OSError, UnicodeError) as error:
        # careful: a text that cannot be a host name raises UnicodeError
        listening.close()
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot listen at {host}:{port}: {why}; name another with --port (0 takes any free port) or --host"
        ) from error
    return listening
