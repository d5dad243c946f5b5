"""Where a dashboard may listen. Apart from the server, so that the command line can ask quickly."""

from __future__ import annotations

from ipaddress import ip_address

from swarmtrain_protocols.errors import ConfigError

TOKEN_CHARS_MIN = 32


def split_bind(bind: str) -> tuple[str, int]:
    """(host, port) of ``host:port``; port 0 means any free one.

    Raises:
        ConfigError: not of that form.
    """
    name, colon, port = bind.rpartition(":")
    if not colon or not name or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"dashboard address {bind!r:.80}", "not host:port", "127.0.0.1:8470")
    return name.strip("[]"), int(port)


def is_loopback(name: str) -> bool:
    """True for ``localhost`` and loopback addresses."""
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def check_bind(bind_host: str, token: str | None) -> None:
    """Refuse to show the dashboard to a network without a token.

    Raises:
        ConfigError: a public address without a token, or a token that can be guessed.
    """
    if token is not None and len(token) < TOKEN_CHARS_MIN:
        raise ConfigError(
            "the dashboard's token is too short",
            f"{len(token)} characters, at least {TOKEN_CHARS_MIN}",
            "make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    if token is None and not is_loopback(bind_host):
        raise ConfigError(
            f"the dashboard will not listen on {bind_host} without a token",
            "anybody who can reach this address could read it",
            "give --token-file, or bind to 127.0.0.1 and use an SSH tunnel",
        )
