"""Addresses as people write them: ``host:port``, IPv6 in brackets (RFC 3986 §3.2.2)."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

from swarmtrain_protocols import limits

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?\Z")
_PORT = re.compile(r"[0-9]{1,5}\Z")


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of ``host:port`` or ``[v6]:port``; the host comes back without brackets.

    Raises:
        ValueError: with the reason; the text is short enough to print.
    """
    if len(address) > limits.ADDRESS_CHARS_MAX:
        raise ValueError(f"longer than {limits.ADDRESS_CHARS_MAX} characters")
    if address.startswith("["):
        host, bracket, rest = address[1:].partition("]")
        if not bracket or not rest.startswith(":"):
            raise ValueError("an IPv6 address is written [host]:port")
        port = rest[1:]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError("no IPv6 address between the brackets") from None
    else:
        host, colon, port = address.rpartition(":")
        if not colon:
            raise ValueError("no port; write host:port")
        if ":" in host:
            raise ValueError("an IPv6 address needs brackets: [host]:port")
        if not _HOST_NAME.match(host):
            raise ValueError("the host is empty or has characters that no host name has")
    if not _PORT.match(port) or not 1 <= int(port) <= 65535:
        raise ValueError("the port is not a number from 1 to 65535")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of ``split_address``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def subnet(address: str) -> str:
    """The block that one operator usually holds: /24 of IPv4, /48 of IPv6; else the host name.

    Loopback and private blocks are returned like any other; who calls decides whether to cap them.

    Raises:
        ValueError: for what ``split_address`` refuses.
    """
    host, _ = split_address(address)
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host.lower()
    prefix = 24 if ip.version == 4 else 48
    return str(ipaddress.ip_network((ip, prefix), strict=False))


@lru_cache(maxsize=4096)
def is_private(address: str) -> bool:
    """True for loopback, link-local, private and carrier-grade NAT addresses (no subnet caps).

    Host names count as public: nobody can tell without a resolver.
    """
    host, _ = split_address(address)
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return False
