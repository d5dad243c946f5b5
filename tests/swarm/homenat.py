"""Homes behind routers: network namespaces of Linux, and a router between each home and the rest.

A router here is a thread with a TUN device on either side that translates addresses and ports and
keeps a table, as a home router does (RFC 4787: address- and port-dependent filtering): packets from
outside that nobody inside has asked for are dropped without a word. No kernel firewall is needed,
only the right to make namespaces and devices (root, or CAP_NET_ADMIN and CAP_SYS_ADMIN).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001
_CLONE_NEWNET = 0x40000000
_TCP, _UDP = 6, 17
MTU_BYTES = 9000
LAN_IP = "192.168.7.2"
GATEWAY_IP = "192.168.7.1"
PCP_PORT = 5351
MAPPED_PORT = 41000
_libc = ctypes.CDLL(None, use_errno=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _enter(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        if _libc.setns(fd, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {path}")
    finally:
        os.close(fd)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread, and the processes it starts, are in that network namespace meanwhile."""
    home = f"/proc/self/task/{threading.get_native_id()}/ns/net"
    back = os.open(home, os.O_RDONLY)
    try:
        _enter(f"/run/netns/{namespace}")
        yield
    finally:
        if _libc.setns(back, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns back")
        os.close(back)


def _tun(namespace: str, name: str) -> int:
    with inside(namespace):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        request = struct.pack("16sH22s", name.encode(), _IFF_TUN_NO_PI, b"")
        fcntl.ioctl(fd, _TUNSETIFF, request)
    _ip("-n", namespace, "link", "set", name, "mtu", str(MTU_BYTES), "up")
    return fd


def _fold(total: int) -> int:
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Router:
    """Translates between ``lan`` and ``wan``, two TUN descriptors; ``public`` is its address.

    ``maps``: it answers PCP (RFC 6887), and sends mapped ports on to the home.
    """

    def __init__(self, lan: int, wan: int, public: str, *, maps: bool = False) -> None:
        self.public = public
        self.maps = maps
        self.mapped: dict[int, int] = {}
        """Port inside by port outside, as asked for by PCP."""
        self.dropped = 0
        """Packets from outside that nobody has asked for."""
        self.forwarded = 0
        self._lan, self._wan = lan, wan
        self._public = IPv4Address(public).packed
        self._inner = IPv4Address(LAN_IP).packed
        self._out: dict[tuple[int, int], int] = {}
        self._in: dict[tuple[int, int], int] = {}
        self._asked: set[tuple[int, int, bytes, int]] = set()
        self._next_port = 20000
        self._wake, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._run, name="router", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.write(self._stop, b"x")
        self._thread.join(10.0)
        for fd in (self._lan, self._wan, self._wake, self._stop):
            os.close(fd)

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._lan, self._wan, self._wake], [], [])
            if self._wake in ready:
                return
            for fd, move, sink in (
                (self._lan, self._outward, self._wan),
                (self._wan, self._inward, self._lan),
            ):
                if fd in ready:
                    self._drain(fd, move, sink)

    def _drain(self, fd: int, move: object, sink: int) -> None:
        assert callable(move)
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = move(bytearray(os.read(fd, 65536)))
                if packet is not None:
                    self.forwarded += 1
                    os.write(sink, packet)

    @staticmethod
    def _ports(packet: bytearray) -> tuple[int, int, int, int] | None:
        """(protocol, offset of the transport header, source port, destination port)."""
        if packet[0] >> 4 != 4 or packet[9] not in (_TCP, _UDP):
            return None
        at = 4 * (packet[0] & 15)
        source, target = struct.unpack_from("!HH", packet, at)
        return packet[9], at, source, target

    def _outward(self, packet: bytearray) -> bytearray | None:
        found = self._ports(packet)
        if found is None:
            return None
        protocol, at, source, target = found
        if packet[16:20] == IPv4Address(GATEWAY_IP).packed:
            if self.maps and (protocol, target) == (_UDP, PCP_PORT):
                os.write(self._lan, self._pcp(packet[at + 8 :], source))
            return None
        port = self._out.get((protocol, source))
        if port is None:
            port, self._next_port = self._next_port, self._next_port + 1
            self._out[protocol, source] = port
            self._in[protocol, port] = source
        self._asked.add((protocol, port, bytes(packet[16:20]), target))
        return self._rewrite(packet, protocol, at, 12, self._public, at, port)

    def _inward(self, packet: bytearray) -> bytearray | None:
        found = self._ports(packet)
        if found is None:
            return None
        protocol, at, source, target = found
        asked = (protocol, target, bytes(packet[12:16]), source) in self._asked
        if not asked and not (protocol == _TCP and target in self.mapped):
            self.dropped += 1
            return None
        inner = self._in[protocol, target]
        return self._rewrite(packet, protocol, at, 16, self._inner, at + 2, inner)

    def _pcp(self, request: bytearray, to_port: int) -> bytes:
        """The packet that answers a MAP request; a lifetime of 0 ends the mapping."""
        lease, (inner,) = request[4:8], struct.unpack_from("!H", request, 40)
        if any(lease):
            self.mapped[MAPPED_PORT] = inner
            self._out[_TCP, inner], self._in[_TCP, MAPPED_PORT] = MAPPED_PORT, inner
        else:
            self.mapped.clear()
        place = bytes(10) + b"\xff\xff" + self._public
        head = bytes([2, 0x81, 0, 0]) + bytes(lease) + struct.pack("!I", 50) + bytes(12)
        body = head + bytes(request[24:42]) + struct.pack("!H", MAPPED_PORT) + place
        udp = struct.pack("!HHHH", PCP_PORT, to_port, 8 + len(body), 0) + body
        ends = IPv4Address(GATEWAY_IP).packed + self._inner
        ip = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, _UDP, 0) + ends)
        struct.pack_into("!H", ip, 10, ~_fold(sum(struct.unpack("!10H", ip))) & 0xFFFF)
        return bytes(ip) + udp

    @staticmethod
    def _rewrite(
        packet: bytearray,
        protocol: int,
        at: int,
        address_at: int,
        address: bytes,
        port_at: int,
        port: int,
    ) -> bytearray:
        """Replace an address and a port, and mend the checksums (RFC 1624)."""
        old = struct.unpack_from("!HH", packet, address_at)
        old_port = struct.unpack_from("!H", packet, port_at)[0]
        packet[address_at : address_at + 4] = address
        struct.pack_into("!H", packet, port_at, port)
        new = struct.unpack("!HH", address)
        change = sum(new) + sum(~word & 0xFFFF for word in old)
        sum_at = at + (16 if protocol == _TCP else 6)
        for where, more in ((10, 0), (sum_at, port + (~old_port & 0xFFFF))):
            kept = struct.unpack_from("!H", packet, where)[0]
            mended = ~_fold((~kept & 0xFFFF) + change + more) & 0xFFFF
            struct.pack_into("!H", packet, where, mended)
        return packet


class Lab:
    """An internet with public addresses, and homes behind routers. Use as a context manager."""

    def __init__(self) -> None:
        self._made: list[str] = []
        self._routers: list[Router] = []
        self._places: dict[str, tuple[str, str, str]] = {}
        self._cut: set[tuple[str, str]] = set()
        self.internet = f"swarm{os.getpid()}-net"

    def __enter__(self) -> Lab:
        self._namespace(self.internet)
        self._set("all", "rp_filter", "0")
        self._set("all", "forwarding", "1")
        return self

    def __exit__(self, *trouble: object) -> None:
        for router in self._routers:
            router.close()
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._made.append(name)
        _ip("-n", name, "link", "set", "lo", "up")

    def public(self, address: str) -> str:
        """A namespace with that address, which everybody can dial."""
        number = len(self._made)
        name, near, far = f"swarm{os.getpid()}-p{number}", f"pub{number}", f"via{number}"
        self._namespace(name)
        _ip("-n", self.internet, "link", "add", far, "type", "veth", "peer", near, "netns", name)
        _ip("-n", name, "addr", "add", f"{address}/32", "dev", near)
        _ip("-n", name, "link", "set", near, "up")
        _ip("-n", name, "route", "add", "default", "dev", near)
        _ip("-n", self.internet, "link", "set", far, "up")
        _ip("-n", self.internet, "route", "add", f"{address}/32", "dev", far)
        self._set(far, "proxy_arp", "1")
        self._places[address] = name, near, far
        return name

    def shape(self, address: str, bit_per_s: int) -> None:
        """A token bucket for each direction of a public address; 0: none."""
        name, near, far = self._places[address]
        for namespace, device in ((name, near), (self.internet, far)):
            command = ["tc", "-n", namespace, "qdisc"]
            if bit_per_s:
                bucket = ["tbf", "rate", str(bit_per_s), "burst", "32k", "latency", "400ms"]
                command += ["replace", "dev", device, "root", *bucket]
            else:
                command += ["del", "dev", device, "root"]
            subprocess.run(command, check=bool(bit_per_s), capture_output=True)

    def cut(self, pairs: set[tuple[str, str]]) -> None:
        """Drop, without a word, what goes from the first to the second address of these pairs."""
        for order, some in (("del", self._cut - pairs), ("add", pairs - self._cut)):
            for source, target in sorted(some):
                rule = ["from", source, "to", target, "pref", "100", "blackhole"]
                _ip("-n", self.internet, "rule", order, *rule)
        self._cut = set(pairs)

    def _set(self, device: str, name: str, value: str) -> None:
        with inside(self.internet):
            Path(f"/proc/sys/net/ipv4/conf/{device}/{name}").write_text(value)

    def home(self, public: str, *, maps: bool = False) -> tuple[str, Router]:
        """A namespace whose only way out is a router with that public address; see ``Router``."""
        number = len(self._routers)
        name = f"swarm{os.getpid()}-h{number}"
        self._namespace(name)
        lan, wan = _tun(name, "lan"), _tun(self.internet, f"wan{number}")
        _ip("-n", name, "addr", "add", f"{LAN_IP}/24", "dev", "lan")
        _ip("-n", name, "route", "add", "default", "via", GATEWAY_IP, "dev", "lan")
        _ip("-n", self.internet, "route", "add", f"{public}/32", "dev", f"wan{number}")
        self._set(f"wan{number}", "rp_filter", "0")
        self._routers.append(Router(lan, wan, public, maps=maps))
        return name, self._routers[-1]
