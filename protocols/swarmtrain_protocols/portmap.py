"""PCP and NAT-PMP: asking the gateway for a port, sans-I/O (RFC 6887, RFC 6886; spec 14 §2.3).

``PortMap`` asks by PCP, falls back to NAT-PMP where the gateway says that it knows no version 2,
renews at half the lease and gives the mapping back. Datagrams come only from the gateway's socket:
whoever feeds ``receive`` has checked the sender's address (RFC 6887 §8.3).
"""

from __future__ import annotations

import ipaddress
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit
from swarmtrain_protocols.errors import PeerFault

PORT = 5351
PCP_VERSION, PMP_VERSION = 2, 0
_OP_MAP_PCP, _OP_MAP_TCP_PMP, _OP_ADDRESS_PMP = 1, 2, 0
_RESPONSE = 0x80
_TCP = 6
_UNSUPPORTED_VERSION = 1
_PCP_HEADER = struct.Struct("!BBHI16s")
_PCP_ANSWER = struct.Struct("!BBBBII12x")
_PCP_MAP = struct.Struct("!12sB3xHH16s")
_PMP_MAP = struct.Struct("!BBHHHI")
_PMP_ADDRESS = struct.Struct("!BBHI4s")
_PMP_MAPPED = struct.Struct("!BBHIHHI")
NONCE_BYTES = 12
_PCP_RESULTS = (
    *("success", "unsupported version", "not authorized", "malformed request"),
    *("unsupported opcode", "unsupported option", "malformed option", "network failure"),
    *("no resources", "unsupported protocol", "user exceeded quota", "cannot provide external"),
    *("address mismatch", "excessive remote peers"),
)
_PMP_RESULTS = (
    *("success", "unsupported version", "not authorized", "network failure", "no resources"),
    "unsupported opcode",
)


def map_address(ip: str) -> bytes:
    """16 bytes of an IPv6 address, or of an IPv4 one mapped into IPv6 (RFC 6887 §5)."""
    found = ipaddress.ip_address(ip)
    return found.packed if found.version == 6 else bytes(10) + b"\xff\xff" + found.packed


def unmap_address(data: bytes) -> str:
    """The inverse of ``map_address``."""
    found = ipaddress.IPv6Address(data)
    return str(found.ipv4_mapped or found)


def pcp_map_request(
    client: str, nonce: bytes, port: int, lease_s: int, wanted: int = 0, external: str = ""
) -> bytes:
    """A MAP request for TCP, 60 bytes (RFC 6887 §7.1, §11.1). ``lease_s`` 0: delete."""
    head = _PCP_HEADER.pack(PCP_VERSION, _OP_MAP_PCP, 0, lease_s, map_address(client))
    place = map_address(external) if external else map_address("0.0.0.0")
    return head + _PCP_MAP.pack(nonce, _TCP, port, wanted, place)


def pmp_map_request(port: int, lease_s: int, wanted: int = 0) -> bytes:
    """A NAT-PMP mapping request for TCP, 12 bytes (RFC 6886 §3.3). ``lease_s`` 0: delete."""
    return _PMP_MAP.pack(PMP_VERSION, _OP_MAP_TCP_PMP, 0, port, wanted, lease_s)


def pmp_address_request() -> bytes:
    """Asks for the gateway's external address, 2 bytes (RFC 6886 §3.2)."""
    return bytes((PMP_VERSION, _OP_ADDRESS_PMP))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a gateway said. ``result`` is 0 for success; fields that it did not give are empty."""

    version: int
    kind: Literal["map", "address"]
    result: int
    epoch_s: int
    lease_s: int = 0
    nonce: bytes = b""
    port: int = 0
    external_port: int = 0
    external: str = ""

    @property
    def why(self) -> str:
        """The result in words."""
        names = _PCP_RESULTS if self.version == PCP_VERSION else _PMP_RESULTS
        return names[self.result] if self.result < len(names) else f"result {self.result}"


def parse(data: bytes) -> Answer:
    """An answer of either protocol.

    Raises:
        PeerFault: ``malformed``: no answer, too short, too long, of another operation.
    """
    if not 4 <= len(data) <= limits.PORT_MAP_DATAGRAM_BYTES_MAX:
        raise PeerFault("malformed", f"port mapping: {len(data)} bytes")
    if not data[1] & _RESPONSE:
        raise PeerFault("malformed", "port mapping: not an answer")
    if data[0] == PCP_VERSION:
        return _parse_pcp(data)
    if data[0] == PMP_VERSION:
        return _parse_pmp(data)
    raise PeerFault("malformed", f"port mapping: version {data[0]}")


def _parse_pcp(data: bytes) -> Answer:
    if len(data) < _PCP_ANSWER.size or len(data) % 4:
        raise PeerFault("malformed", f"PCP answer of {len(data)} bytes")
    _, op, _, result, lease_s, epoch_s = _PCP_ANSWER.unpack_from(data)
    if op != _OP_MAP_PCP | _RESPONSE:
        raise PeerFault("malformed", f"PCP answer to operation {op & 127}")
    if len(data) < _PCP_ANSWER.size + _PCP_MAP.size:
        if result:  # an error may come without the operation's fields
            return Answer(PCP_VERSION, "map", result, epoch_s, lease_s)
        raise PeerFault("malformed", "PCP success without a mapping")
    nonce, protocol, port, external_port, place = _PCP_MAP.unpack_from(data, _PCP_ANSWER.size)
    if protocol != _TCP and not result:
        raise PeerFault("malformed", f"PCP mapping of protocol {protocol}")
    external = unmap_address(place)
    return Answer(
        PCP_VERSION, "map", result, epoch_s, lease_s, nonce, port, external_port, external
    )


def _parse_pmp(data: bytes) -> Answer:
    op = data[1] & 127
    result = int.from_bytes(data[2:4], "big")
    if op == _OP_ADDRESS_PMP and len(data) == _PMP_ADDRESS.size:
        _, _, _, epoch_s, place = _PMP_ADDRESS.unpack(data)
        external = str(ipaddress.IPv4Address(place))
        return Answer(PMP_VERSION, "address", result, epoch_s, external=external)
    if op == _OP_MAP_TCP_PMP and len(data) == _PMP_MAPPED.size:
        _, _, _, epoch_s, port, external_port, lease_s = _PMP_MAPPED.unpack(data)
        mapped = {"port": port, "external_port": external_port, "lease_s": lease_s}
        return Answer(PMP_VERSION, "map", result, epoch_s, **mapped)
    if result:  # a gateway of another version repeats what it likes (RFC 6887 §9)
        kind: Literal["map", "address"] = "address" if op == _OP_ADDRESS_PMP else "map"
        return Answer(PMP_VERSION, kind, result, 0)
    raise PeerFault("malformed", f"NAT-PMP answer of {len(data)} bytes")


@dataclass(frozen=True, slots=True)
class SendDatagram:
    """Effect: to the gateway, port 5351."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Mapped:
    """Event: connections to ``external:port`` come to this machine for ``lease_s`` seconds."""

    external: str
    port: int
    lease_s: int
    protocol: str


@dataclass(frozen=True, slots=True)
class NotMapped:
    """Event: there is no mapping (any more); asked again later."""

    reason: str


class PortMap:
    """One TCP port at one gateway. ``client``: this machine's address as the gateway sees it."""

    def __init__(self, client: str, port: int, entropy: Callable[[int], bytes]) -> None:
        self.mapping: Mapped | None = None
        self._client = client
        self._port = port
        self._nonce = entropy(NONCE_BYTES)
        self._version = PCP_VERSION
        self._out: list[Effect] = []
        self._external = ""
        self._tries = 0
        self._at = -math.inf
        self._ends = math.inf
        self._epoch: tuple[float, int] | None = None
        self._closed = False

    def tick(self, now: float) -> None:
        if self._closed or now < self._at:
            return
        if self.mapping is not None and now >= self._ends:
            self._lost("the lease is over")
        if self._tries >= limits.PORT_MAP_TRIES:
            silent = self._version == PCP_VERSION
            self._version = PMP_VERSION if silent else PCP_VERSION
            self._tries = 0
            if not silent:
                self._pause(now, "the gateway does not answer")
                return
        self._ask()
        self._at = now + limits.PORT_MAP_RETRY_S * 2**self._tries  # RFC 6886 §3.1
        self._tries += 1

    def _ask(self) -> None:
        lease_s, wanted = limits.PORT_MAP_LEASE_S, self.mapping.port if self.mapping else self._port
        if self._version == PCP_VERSION:
            external = self.mapping.external if self.mapping else ""
            request = pcp_map_request(
                self._client, self._nonce, self._port, lease_s, wanted, external
            )
        elif not self._external:
            request = pmp_address_request()
        else:
            request = pmp_map_request(self._port, lease_s, wanted)
        self._out.append(SendDatagram(request))

    def receive(self, now: float, data: bytes) -> None:
        """A datagram from the gateway. Raises PeerFault ``malformed``; nothing has changed then."""
        answer = parse(data)
        if self._closed or not self._is_ours(answer):
            return
        restarted = self._restarted(now, answer.epoch_s)
        if answer.result == _UNSUPPORTED_VERSION and self._version == PCP_VERSION:
            self._version, self._tries, self._at = PMP_VERSION, 0, now
            self.tick(now)
        elif answer.result:
            self._pause(now, answer.why)
        elif answer.kind == "address":
            self._external, self._tries, self._at = answer.external, 0, now
            self.tick(now)
        elif answer.lease_s and answer.external_port:
            self._mapped(now, answer)
        if restarted and self.mapping is not None:
            self._tries, self._at = 0, now  # it has forgotten what it had mapped (RFC 6887 §8.5)
            self.tick(now)

    def _is_ours(self, answer: Answer) -> bool:
        """An answer to the question that is open, as far as it says."""
        if answer.version != self._version:
            return answer.result == _UNSUPPORTED_VERSION
        if answer.kind == "map" and not answer.result:
            nonce = answer.nonce == self._nonce or answer.version == PMP_VERSION
            return nonce and answer.port == self._port
        return True

    def _restarted(self, now: float, epoch_s: int) -> bool:
        """The gateway's clock has gone back, by the test of RFC 6887 §8.5."""
        before, self._epoch = self._epoch, (now, epoch_s)
        if before is None:
            return False
        ours, theirs = now - before[0], epoch_s - before[1]
        return theirs < -1 or ours + 2 < theirs - theirs / 16 or theirs + 2 < ours - ours / 16

    def _mapped(self, now: float, answer: Answer) -> None:
        protocol = "PCP" if answer.version == PCP_VERSION else "NAT-PMP"
        external = answer.external or self._external
        lease_s = min(answer.lease_s, limits.PORT_MAP_LEASE_S)
        found = Mapped(external, answer.external_port, lease_s, protocol)
        if found != self.mapping:
            self.mapping = found
            self._out.append(Emit(found))
        self._tries = 0
        self._at = now + max(lease_s / 2, limits.PORT_MAP_RENEW_S_MIN)
        self._ends = now + lease_s

    def _pause(self, now: float, reason: str) -> None:
        self._lost(reason)
        self._external, self._tries = "", 0
        self._at = now + limits.PORT_MAP_PAUSE_S

    def _lost(self, reason: str) -> None:
        self.mapping = None
        self._ends = math.inf
        self._out.append(Emit(NotMapped(reason)))

    def close(self) -> None:
        """Give the mapping back: one datagram, and no wait for an answer."""
        if self.mapping is not None and not self._closed:
            if self._version == PCP_VERSION:
                request = pcp_map_request(self._client, self._nonce, self._port, 0)
            else:
                request = pmp_map_request(self._port, 0)
            self._out.append(SendDatagram(request))
        self._closed, self.mapping = True, None

    def deadline(self) -> float:
        return math.inf if self._closed else min(self._at, self._ends)

    def drain(self) -> list[Effect]:
        out, self._out = self._out, []
        return out
