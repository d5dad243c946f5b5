"""Tries the way to an address, step by step: name, connection, handshake, admission, clock.

A probe is a peer that makes one outgoing link and closes it. It asks for nothing and leaves no
trace in the run.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field

from swarmtrain_peer import host
from swarmtrain_peer.admission import MEANINGS
from swarmtrain_peer.findings import CLOCK_TOLERANCE_S, TIMEOUT_S, Finding, found, good, span
from swarmtrain_peer.transport import Transport
from swarmtrain_protocols import PROTOCOL_VERSION
from swarmtrain_protocols.addresses import split_address
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import SwarmError
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.session import Hello, Refused


@dataclass(slots=True)
class Route:
    """What was found on the way to one address. ``rtt_s``: of the TCP connection."""

    address: str
    findings: list[Finding] = field(default_factory=list)
    open: bool = False
    rtt_s: float | None = None
    peer: bytes = b""


class _Ears:
    """Hears what a probe's transport says; satisfies ``handler.TransportHandler``."""

    def __init__(self) -> None:
        self.hello: Hello | None = None
        self.heard_s = 0.0
        self.code = ""

    def connected(self, peer: PeerId, hello: Hello, outgoing: bool) -> None:
        self.hello, self.heard_s = hello, host.wall_s()

    def disconnected(self, peer: PeerId, code: str, reason: str) -> None:
        return

    def answered(self, peer: PeerId, rtt_s: float) -> None:
        return

    def message(self, peer: PeerId, message: Message) -> None:
        return

    def refused(self, address: str, peer: PeerId | None, code: str, reason: str) -> None:
        self.code = code

    def turned_away(self, address: str, peer: PeerId | None, code: str, reason: str) -> None:
        return

    def peer_fault(self, peer: PeerId | None, code: str, why: str) -> None:
        return

    def fetched(self, ticket: int) -> None:
        return

    def fetch_failed(self, ticket: int, reason: str) -> None:
        return

    def sent(self, root: bytes, nbytes: int, begin_s: float) -> None:
        return

    def broken(self, error: BaseException) -> None:
        return


async def reach(address: str, timeout_s: float = TIMEOUT_S) -> tuple[Finding | None, float]:
    """What keeps a TCP connection from opening, if anything, and how long it took to open."""
    try:
        name, port = split_address(address)
    except ValueError as error:
        return found("no_route", address=address, why=str(error)), 0.0
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            where = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (TimeoutError, OSError):
        return found("name_unknown", address=address, host=name), 0.0
    family, kind, protocol, _, place = where[0]
    began_s = host.mono_s()
    try:
        with socket.socket(family, kind, protocol) as sock:
            sock.setblocking(False)
            async with asyncio.timeout(timeout_s):
                await loop.sock_connect(sock, place)
    except TimeoutError:
        return found("no_answer", address=address, timeout_s=timeout_s), 0.0
    except ConnectionRefusedError:
        return found("nobody_listens", address=address), 0.0
    except OSError as error:
        return found("no_route", address=address, why=error.strerror or str(error)), 0.0
    return None, host.mono_s() - began_s


async def probe(
    address: str,
    *,
    keyring: Ed25519Keyring,
    run: bytes,
    capability: bytes,
    timeout_s: float = TIMEOUT_S,
) -> Route:
    """Try ``address`` as a member of ``run`` would; ``capability``: the bytes of its ticket."""
    route = Route(address)
    trouble, rtt_s = await reach(address, timeout_s)
    if trouble is not None:
        route.findings.append(trouble)
        return route
    route.rtt_s = rtt_s
    ears = _Ears()
    hello = Hello(PROTOCOL_VERSION, run, "doctor", (), capability, wall_s=int(host.wall_s()))

    def admit(peer: PeerId, told: Hello) -> Refused | None:
        return None

    transport = Transport(
        keyring=keyring,
        static_key=host.entropy(32),
        entropy=host.entropy,
        hello=lambda: hello,
        admit=admit,
        handler=ears,
        provide=lambda root: None,
        threads=1,
    )
    await transport.start("")
    try:
        peer = await transport.connect_address(address, timeout_s)
    except SwarmError as error:
        route.findings.append(_refused(address, ears.code, error, timeout_s))
    else:
        route.open, route.peer = True, peer
        said = f"{address} answers in {1000 * rtt_s:.0f} ms and lets this machine in"
        route.findings.append(good("route", said, address=address, rtt_s=round(rtt_s, 6)))
        route.findings.append(_clock(address, ears))
    finally:
        await transport.close()
    return route


def _refused(address: str, code: str, error: SwarmError, timeout_s: float) -> Finding:
    if code == "version":
        return found("other_version", address=address)
    if code == "wrong_run":
        return found("other_run", address=address)
    if code in MEANINGS:
        why, todo = MEANINGS[code]
        todo = f"{todo[:1].upper()}{todo[1:]}."
        return found("turned_away", address=address, why=why, todo=todo)
    if code == "timeout":
        return found("no_answer", address=address, timeout_s=timeout_s)
    return found("not_a_peer", address=address)


def _clock(address: str, ears: _Ears) -> Finding:
    assert ears.hello is not None
    if not ears.hello.wall_s:
        return good("clock", f"the peer at {address} does not say what time it is", address=address)
    offset_s = ears.heard_s - (ears.hello.wall_s + 0.5)  # it says whole seconds
    facts = {"address": address, "offset_s": round(offset_s, 1)}
    if abs(offset_s) <= CLOCK_TOLERANCE_S:
        said = f"this machine's clock agrees with the one at {address} within a minute"
        return good("clock", said, **facts)
    cause = "clock_ahead" if offset_s > 0 else "clock_behind"
    return found(cause, address=address, offset=span(abs(offset_s)))
