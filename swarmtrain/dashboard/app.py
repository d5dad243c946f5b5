"""The dashboard's web application: one page, a small API, a stream, metrics, completions.

============================  ====================================================================
``/``                         the page; ``/static/…`` its files
``/api/v1/run``               status of the run as this site sees it, and the loss by round
``/api/v1/pipeline``          stages: coverage, occupancy, trouble; null in a run without stages
``/api/v1/peers``             members
``/api/v1/rounds``            rounds and the timeline's figures
``/api/v1/events``            events; ``since_seq``, ``last``, ``code``
``/events``                   server-sent events: a snapshot, then the sections that changed
``/metrics``                  Prometheus
``/v1/completions``           text from the weights of now, ``/v1/models``: ``completions.py``
``/healthz`` ``/readyz``      this process lives; the peer process answers
``/login``                    only where a token is needed
============================  ====================================================================
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from urllib.parse import parse_qs

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from swarmtrain.dashboard.completions import Client, Completions
from swarmtrain.dashboard.feed import EVENTS_KEPT, Document, Feed
from swarmtrain.dashboard.guard import COOKIE, SESSION_S, Guard, Sessions
from swarmtrain.dashboard.metrics import render

STATIC = Path(__file__).parent / "static"
FILES = {
    "app.js": "text/javascript",
    "charts.js": "text/javascript",
    "stages.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
KEEPALIVE_S = 15.0


def _json(document: object, status_code: int = 200) -> Response:
    body = msgspec.json.encode(document)  # NaN becomes null, as browsers need it
    return Response(body, status_code, media_type="application/json")


class Pages:
    """The handlers, over one feed."""

    def __init__(self, feed: Feed, sessions: Sessions) -> None:
        self._feed = feed
        self._sessions = sessions

    async def index(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html", media_type="text/html")

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in FILES:
            return PlainTextResponse("not found\n", 404)
        return FileResponse(STATIC / name, media_type=FILES[name])

    async def run(self, request: Request) -> Response:
        snapshot = self._feed.snapshot()
        return _json({key: snapshot[key] for key in ("source", "run", "losses")})

    async def pipeline(self, request: Request) -> Response:
        return _json({"pipeline": self._feed.snapshot()["run"].get("pipeline")})

    async def peers(self, request: Request) -> Response:
        return _json({"peers": self._feed.snapshot()["peers"]})

    async def rounds(self, request: Request) -> Response:
        snapshot = self._feed.snapshot()
        return _json({key: snapshot[key] for key in ("rounds", "timeline")})

    async def events(self, request: Request) -> Response:
        query = request.query_params
        try:
            since_seq = int(query.get("since_seq", "0"))
            last = min(max(int(query.get("last", "100")), 0), EVENTS_KEPT)
        except ValueError:
            return _json({"error": "since_seq and last are whole numbers"}, 400)
        return _json({"events": self._feed.events(since_seq, last, query.get("code", "")[:8])})

    async def stream(self, request: Request) -> Response:
        subscriber = self._feed.subscribe(asyncio.get_running_loop())
        if subscriber is None:
            return PlainTextResponse("too many viewers\n", 503, {"Retry-After": "30"})

        async def body() -> AsyncIterator[bytes]:
            try:
                yield _event("snapshot", self._feed.snapshot())
                while True:
                    try:
                        delta = await asyncio.wait_for(subscriber.get(), KEEPALIVE_S)
                    except TimeoutError:
                        yield b": alive\n\n"
                        continue
                    if delta is None:
                        return
                    yield _event("delta", delta)
            finally:
                self._feed.unsubscribe(subscriber)

        return StreamingResponse(
            body(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )

    async def metrics(self, request: Request) -> Response:
        return Response(
            render(self._feed.snapshot()), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def healthz(self, request: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def readyz(self, request: Request) -> Response:
        if self._feed.connected:
            return PlainTextResponse("ready\n")
        return PlainTextResponse("the peer process does not answer\n", 503)

    async def login_page(self, request: Request) -> Response:
        return FileResponse(STATIC / "login.html", media_type="text/html")

    async def login(self, request: Request) -> Response:
        client = request.client.host if request.client else ""
        if not self._sessions.login_allowed(client):
            return PlainTextResponse("too many attempts, wait a minute\n", 429)
        form = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=8)
        if not self._sessions.token_is_right(form.get("token", [""])[0].strip()):
            return PlainTextResponse("wrong token\n", 401)
        response = RedirectResponse("/", 303)
        response.set_cookie(
            COOKIE,
            self._sessions.open(),
            max_age=int(SESSION_S),
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response


def _event(name: str, document: Document) -> bytes:
    # JSON has no raw line breaks, so one data line always holds it.
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(document) + b"\n\n"


def build_app(
    feed: Feed,
    *,
    token: str | None = None,
    hosts: Iterable[str] = (),
    connect: Callable[[], Client] | None = None,
) -> Starlette:
    """The application over a feed.

    Args:
        hosts: names it may be called by, besides loopback's.
        connect: opens a control connection; without it there are no completions.
    """
    sessions = Sessions(token)
    pages = Pages(feed, sessions)
    routes = [
        Route("/", pages.index),
        Route("/static/{name}", pages.static),
        Route("/api/v1/run", pages.run),
        Route("/api/v1/pipeline", pages.pipeline),
        Route("/api/v1/peers", pages.peers),
        Route("/api/v1/rounds", pages.rounds),
        Route("/api/v1/events", pages.events),
        Route("/events", pages.stream),
        Route("/metrics", pages.metrics),
        Route("/healthz", pages.healthz),
        Route("/readyz", pages.readyz),
    ]
    if connect is not None:
        completions = Completions(feed, connect)
        routes += [
            Route("/v1/completions", completions.complete, methods=["POST"]),
            Route("/v1/models", completions.models),
            Route("/v1/{rest:path}", completions.nothing, methods=["GET", "POST"]),
        ]
    if sessions.needed:
        routes += [
            Route("/login", pages.login_page, methods=["GET"]),
            Route("/login", pages.login, methods=["POST"]),
        ]
    open_paths = ("/login", "/healthz", "/static/style.css", "/static/icon.svg")
    guard = Middleware(Guard, sessions=sessions, hosts=hosts, open_paths=open_paths)
    return Starlette(routes=routes, middleware=[guard])
