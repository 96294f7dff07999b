"""The atlas over HTTP: the page, its scripts, and the resources below data/, which are made at request.

The server is read-only (GET and HEAD) and meant for one person at 127.0.0.1. It has no log-in: an address that others
reach shows them everything in the store. A request that names another host is refused, because a page elsewhere on the
web could otherwise point its own name at this address and read the answers. Scripts and styles come from this server
alone (content security policy). Only the title comes from the store into HTML, and it is escaped.
"""

import socket
import threading
from collections.abc import Callable, Sequence

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
_EVERYWHERE = ("0.0.0.0", "::", "")


def application(store: FeatureStore, *, hosts: Sequence[str] = LOCAL) -> Starlette:
    """The atlas of a store as an ASGI application that answers requests to `hosts` ("*": to any).

    It starts to read the tables of the first page at once, in a thread.
    """
    resources = Resources(store)
    threading.Thread(target=resources.warm, daemon=True).start()

    async def page(_: Request) -> Response:
        return Response(index_html(store), media_type="text/html; charset=utf-8")

    async def data(request: Request) -> Response:
        try:
            found = await run_in_threadpool(resources.get, request.path_params["path"])
        except StoreError as error:
            return JSONResponse({"error": str(error)}, status_code=500)
        if found is None:
            return JSONResponse({"error": "no such resource"}, status_code=404)
        return Response(found.body, media_type=found.media_type)

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
