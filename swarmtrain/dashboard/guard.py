"""Who may look: allowed host names, tokens, sessions, and headers that keep browsers strict.

A token never stands in a URL: programs send ``Authorization: Bearer``, people log in once and get
a cookie that scripts cannot read.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swarmtrain.dashboard.bind import is_loopback
from swarmtrain_peer import host

COOKIE = "swarmtrain_session"
SESSION_S = 12 * 3600.0
SESSIONS_MAX = 256
LOGINS_PER_MINUTE_MAX = 5
LOGIN_CLIENTS_MAX = 1024
BODY_BYTES_MAX = 64 * 1024

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def host_of(header: str) -> str:
    """The host of a ``Host`` header, lower case, without port and brackets."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if name.count(":") == 1 else name


class Sessions:
    """Tokens, cookies and failed logins. Only hashes of secrets are kept."""

    def __init__(self, token: str | None, *, mono_s: Callable[[], float] = host.mono_s) -> None:
        self._token_hash = None if token is None else hashlib.sha256(token.encode()).digest()
        self._mono_s = mono_s
        self._sessions: OrderedDict[bytes, float] = OrderedDict()
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    @property
    def needed(self) -> bool:
        return self._token_hash is not None

    def token_is_right(self, token: str) -> bool:
        """Compare in constant time."""
        given = hashlib.sha256(token.encode()).digest()
        return self._token_hash is not None and hmac.compare_digest(given, self._token_hash)

    def login_allowed(self, client: str) -> bool:
        """False after five attempts of a client within a minute; each call counts as one."""
        now = self._mono_s()
        times = self._failures.setdefault(client, deque())
        self._failures.move_to_end(client)
        if len(self._failures) > LOGIN_CLIENTS_MAX:
            self._failures.popitem(last=False)
        while times and now - times[0] >= 60.0:
            times.popleft()
        if len(times) >= LOGINS_PER_MINUTE_MAX:
            return False
        times.append(now)
        return True

    def open(self) -> str:
        """A new session; the value of its cookie."""
        value = host.entropy(32).hex()
        self._sessions[hashlib.sha256(value.encode()).digest()] = self._mono_s() + SESSION_S
        while len(self._sessions) > SESSIONS_MAX:
            self._sessions.popitem(last=False)
        return value

    def admits(self, request: Request) -> bool:
        """True if a request carries the token or the cookie of a live session."""
        if not self.needed:
            return True
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.token_is_right(token.strip())
        value = request.cookies.get(COOKIE, "")
        expires_s = self._sessions.get(hashlib.sha256(value.encode()).digest())
        return expires_s is not None and self._mono_s() < expires_s


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        sessions: Sessions,
        hosts: Iterable[str],
        open_paths: Iterable[str] = (),
    ) -> None:
        self._app = app
        self._sessions = sessions
        self._hosts = frozenset(name.lower() for name in hosts)
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_strict(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send_strict)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        name = host_of(headers.get("host", ""))
        refuse = _refusal_json if scope["path"].startswith("/v1/") else _refusal_text
        if name not in self._hosts and not is_loopback(name):
            return refuse("misdirected request", 421)
        if not scope.get("query_string", b"").isascii():
            return refuse("malformed query", 400)
        request = Request(scope)
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            if origin is not None and host_of(origin.partition("://")[2]) != name:
                return refuse("wrong origin", 403)
            length = headers.get("content-length", "")
            if not length.isdecimal() or int(length) > BODY_BYTES_MAX:
                return refuse("body too long, or of unknown length", 413)
        if scope["path"] in self._open_paths or self._sessions.admits(request):
            return None
        if scope["path"] == "/" and "text/html" in headers.get("accept", ""):
            return RedirectResponse("/login", 303)
        return refuse("token needed", 401)


def _headers(status: int) -> dict[str, str]:
    return {"WWW-Authenticate": "Bearer"} if status == 401 else {}


def _refusal_text(message: str, status: int) -> Response:
    return PlainTextResponse(message + "\n", status, _headers(status))


def _refusal_json(message: str, status: int) -> Response:
    """In the shape that clients of ``/v1`` expect."""
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status, _headers(status))
