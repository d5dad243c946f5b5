"""Targets of doors on this machine: dashboard over HTTP and WebSocket, completions, the control
socket on both sides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import msgspec

from swarmtrain.dashboard.app import build_app
from swarmtrain.dashboard.completions import BadRequest, _parsed, arguments_of
from swarmtrain.dashboard.feed import Feed
from swarmtrain_peer.control import error_from_dict
from swarmtrain_peer.controlserver import ControlConnection, ControlServer
from swarmtrain_peer.loop import new_event_loop
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import SwarmError, UsageError
from tests.fuzz.engine import Target
from tests.fuzz.file_targets import Folder
from tests.fuzz.mutate import splice_json, splice_text
from tests.swarmtrain.fake_run import FakeClient, FakeRun

TOKEN = "canary-token-that-no-answer-may-show"


class Talker(FakeClient):
    """A made-up peer process that also writes a text; arguments travel as JSON, as they would."""

    def call(self, name: str, args: Any = None, timeout_s: float = 30.0) -> Any:
        line = msgspec.json.encode({"id": 1, "call": name, "args": args or {}})
        assert len(line) <= limits.CONTROL_LINE_BYTES_MAX
        if name == "generate":
            raise UsageError("no text here")
        return super().call(name, args, timeout_s)

    def on_close(self, callback: Any) -> None:
        """It does not go away."""


def _request(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The HTTP request of an input: request line and headers, an empty line, the body.

    As a server hands it over: what is no request at all never gets this far.
    """
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    words = [*first.split(b" "), b"/", b""][:2]
    path, _, query = words[1].partition(b"?")
    headers = [tuple(line.split(b": ", 1)) for line in lines if b": " in line]
    scope = {
        "type": "websocket" if words[0] == b"WS" else "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": words[0].decode("latin-1").upper(),
        "scheme": "http",
        "path": path.decode("utf-8", "replace"),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in headers],
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 8470),
    }
    return scope, body


class _Site:
    """The dashboard's application, with and without a token; no server around it."""

    def __init__(self) -> None:
        feed = Feed(lambda: FakeClient(FakeRun()))
        feed.poll()
        client = Talker(FakeRun())
        self.open = build_app(feed, connect=lambda: client)
        self.closed = build_app(feed, token=TOKEN, connect=lambda: client)
        self.loop = new_event_loop()

    def __call__(self, data: bytes) -> object:
        if not data:
            return "empty"
        scope, body = _request(data[1:])
        app = self.closed if data[0] % 2 else self.open
        return self.loop.run_until_complete(self.visit(app, scope, body, data[0] % 2 == 1))

    async def visit(self, app: Any, scope: dict[str, Any], body: bytes, guarded: bool) -> object:
        told: list[dict[str, Any]] = []
        kind = "websocket.connect" if scope["type"] == "websocket" else "http.request"
        given = iter([{"type": kind, "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            gone = {"type": "http.disconnect"}
            return next(given, gone) if kind == "http.request" else {"type": kind}

        async def send(message: dict[str, Any]) -> None:
            told.append(message)
            if len(told) > 8:
                raise ConnectionError("the browser went away")

        try:
            await app(scope, receive, send)
        except ConnectionError:
            pass
        if kind != "http.request":
            assert [m["type"] for m in told] == ["websocket.close"], told
            return "closed"
        status = told[0]["status"]
        text = b"".join(message.get("body", b"") for message in told)
        assert status < 500 or status == 503, (status, text[:200])
        assert TOKEN.encode() not in text and b"Traceback" not in text
        names = {name for name, _ in told[0]["headers"]}
        assert b"content-security-policy" in names
        right = any(TOKEN.encode() in value for _, value in scope["headers"])
        public = scope["path"] in ("/login", "/healthz", "/static/style.css", "/static/icon.svg")
        assert not guarded or right or public or status >= 300 or status == 0, "let in"
        return status


def _seeds() -> Iterator[bytes]:
    host = b"Host: 127.0.0.1:8470\r\n"
    pages = "/ /static/app.js /api/v1/run /api/v1/pipeline /api/v1/peers /api/v1/rounds /metrics"
    paths = (*pages.split(), "/healthz", "/readyz", "/login", "/v1/models", "/static/../app.py")
    for path in (*paths, "/api/v1/events?since_seq=3&last=7&code=R321"):
        for door in (b"\0", b"\1"):
            yield door + b"GET " + path.encode() + b" HTTP/1.1\r\n" + host + b"Accept: text/html"
    yield b"\1GET /api/v1/run HTTP/1.1\r\n" + host + b"Authorization: Bearer wrong"
    yield b"\1GET / HTTP/1.1\r\n" + host + b"Cookie: swarmtrain_session=abc"
    yield b"\0WS /events HTTP/1.1\r\n" + host + b"Origin: http://evil.example"
    yield b"\0GET / HTTP/1.1\r\nHost: evil.example"
    login = b"token=wrong"
    length = b"Content-Length: %d\r\n"
    yield b"\1POST /login HTTP/1.1\r\n" + host + length % len(login) + b"\r\n" + login
    for body in COMPLETIONS[:3]:
        yield (
            b"\0POST /v1/completions HTTP/1.1\r\n" + host + length % len(body)
            + b"Content-Type: application/json\r\nOrigin: http://127.0.0.1:8470\r\n\r\n" + body
        )  # fmt: skip


COMPLETIONS = [
    json.dumps(item).encode()
    for item in (
        {"prompt": "x", "max_tokens": 5, "temperature": 0.5, "stop": ["a", "b"], "stream": True},
        {"prompt": [1, 2, 3], "model": "tiny-lm", "seed": 7, "top_p": 0.9, "top_k": 3},
        {"prompt": ["one"], "stream_options": {"include_usage": True}, "n": 1, "logit_bias": {}},
        {"prompt": "x" * 50, "max_tokens": 2**40, "user": "me", "suffix": None, "echo": False},
    )
]


def dashboard() -> Target:
    site = _Site()
    return Target(
        "dashboard",
        site,
        (),
        list(_seeds()),
        splice_text,
        1 << 20,
        close=site.loop.close,
        share=0.3,
    )


def _completion(data: bytes) -> object:
    args = arguments_of(_parsed(data))
    line = msgspec.json.encode({"id": 1, "call": "generate", "args": args})
    again = msgspec.json.decode(line)["args"]
    assert set(again) == set(args)
    return sorted(args)


def completion() -> Target:
    numbers = b'{"prompt": [' + b"1e308," * 8000 + b"1]}"
    seeds = [*COMPLETIONS, numbers]
    return Target("completion", _completion, (BadRequest,), seeds, splice_json, 1 << 18)


# -- control socket ---------------------------------------------------------------------------


class _Backend:
    async def call(self, name: str, args: dict[str, Any], connection: ControlConnection) -> Any:
        if name == "refuse":
            raise SwarmError("refused", "because")
        return {"name": name, "count": len(args)}


class _Writer:
    """Where the answers go; ``transport`` as ``ControlConnection`` uses it."""

    def __init__(self) -> None:
        self.told = b""
        self.transport = self

    def write(self, data: bytes) -> None:
        self.told += data

    def close(self) -> None:
        pass

    abort = close

    def get_write_buffer_size(self) -> int:
        return 0

    async def drain(self) -> None:
        await asyncio.sleep(0)


class _Control:
    """One client that sends lines; every line has one answer, and a bad line ends the client."""

    def __init__(self, folder: Folder) -> None:
        self.loop = new_event_loop()
        self.server = ControlServer(folder.path, _Backend())
        self.wrong: list[Any] = []
        self.loop.set_exception_handler(lambda loop, context: self.wrong.append(context))
        self.folder = folder

    def __call__(self, data: bytes) -> object:
        writer = _Writer()
        self.loop.run_until_complete(self.visit(data, writer))
        assert not self.wrong, self.wrong
        answers = [msgspec.json.decode(line) for line in writer.told.splitlines()]
        assert all(("error" in answer) != answer["ok"] for answer in answers)
        assert not self.server.connections
        return len(answers), [answer["ok"] for answer in answers][:3]

    async def visit(self, data: bytes, writer: Any) -> None:
        reader = asyncio.StreamReader(limit=limits.CONTROL_LINE_BYTES_MAX)
        reader.feed_data(data)
        reader.feed_eof()
        self.server._accept(reader, writer)
        await asyncio.gather(*self.server._tasks)

    def close(self) -> None:
        self.loop.close()
        self.folder.close()


def control() -> Target:
    taker = _Control(Folder("control.sock"))
    lines = [{"id": 1, "call": "status", "args": {"a": 1}}, {"id": 2, "call": "refuse"}]
    one, two = (msgspec.json.encode(line) + b"\n" for line in lines)
    return Target(
        "control", taker, (), [one + two, one], _lines, 1 << 20, close=taker.close, share=0.3
    )


def _lines(rng: Any, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = splice_json(rng, lines[at])
    return b"\n".join(lines)


def _answer(data: bytes) -> object:
    """What a client makes of an error that a peer process of another version answers with."""
    try:
        document = msgspec.json.decode(data, type=dict[str, Any])
    except (ValueError, RecursionError):
        return "not JSON"
    error = error_from_dict(document)
    assert isinstance(error, SwarmError) and isinstance(error.exit_code, int)
    return type(error).__name__


def answer() -> Target:
    fields = {"exit_code": 6, "what": "a", "why": "b", "todo": "c", "retry": True}
    codes = ("NotAuthorised", "RoundFailed", "PeerFault", "GroupLost", "NoSuchError")
    seeds = [msgspec.json.encode({"code": code, **fields}) for code in codes]
    return Target("control_answer", _answer, (), seeds, splice_json, 1 << 17)


MAKERS = (dashboard, completion, control, answer)
