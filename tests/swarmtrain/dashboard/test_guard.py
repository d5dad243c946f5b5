"""Hosts, tokens and sessions."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from swarmtrain.dashboard import guard
from swarmtrain.dashboard.bind import check_bind, is_loopback, split_bind
from swarmtrain.dashboard.guard import COOKIE, Sessions, host_of
from swarmtrain.dashboard.server import open_socket
from swarmtrain_protocols.errors import ConfigError

TOKEN = "k" * 43


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Example.org:80", "example.org"),
        ("example.org", "example.org"),
        ("[::1]:80", "::1"),
        ("[::1]", "::1"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("", ""),
    ],
)
def test_the_host_of_a_header(header: str, name: str) -> None:
    assert host_of(header) == name


def test_what_loopback_is() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.x")))


def test_a_public_address_needs_a_token() -> None:
    check_bind("127.0.0.1", None)
    check_bind("0.0.0.0", TOKEN)
    for address in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigError, match="without a token"):
            check_bind(address, None)
    with pytest.raises(ConfigError, match="too short"):
        check_bind("127.0.0.1", "secret")


@pytest.mark.parametrize("bind", ["8470", ":8470", "localhost:", "localhost:99999", "a:b"])
def test_addresses_that_cannot_be(bind: str) -> None:
    with pytest.raises(ConfigError):
        split_bind(bind)


def test_an_address_in_use_is_a_typed_error() -> None:
    first = open_socket(*split_bind("127.0.0.1:0"))
    port = first.getsockname()[1]
    with pytest.raises(ConfigError, match="in use"):
        open_socket("127.0.0.1", port)
    first.close()


def request(**headers: str) -> Request:
    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    return Request({"type": "http", "headers": raw})


def test_sessions_expire_and_are_bounded() -> None:
    now = [0.0]
    sessions = Sessions(TOKEN, mono_s=lambda: now[0])
    value = sessions.open()
    assert sessions.admits(request(cookie=f"{COOKIE}={value}"))
    assert not sessions.admits(request(cookie=f"{COOKIE}={value[:-1]}"))
    assert not sessions.admits(request())
    assert sessions.admits(request(authorization=f"bearer {TOKEN}"))
    now[0] = guard.SESSION_S
    assert not sessions.admits(request(cookie=f"{COOKIE}={value}"))
    values = [sessions.open() for _ in range(guard.SESSIONS_MAX + 1)]
    assert not sessions.admits(request(cookie=f"{COOKIE}={values[0]}"))
    assert sessions.admits(request(cookie=f"{COOKIE}={values[-1]}"))


def test_logins_are_allowed_again_after_a_minute() -> None:
    now = [0.0]
    sessions = Sessions(TOKEN, mono_s=lambda: now[0])
    allowed = [sessions.login_allowed("a") for _ in range(6)]
    assert allowed == [True] * 5 + [False]
    assert sessions.login_allowed("b")
    now[0] = 60.0
    assert sessions.login_allowed("a")


def test_without_a_token_everybody_may_look() -> None:
    assert not Sessions(None).needed
    assert Sessions(None).admits(request())
    assert not Sessions(None).token_is_right("")
