"""Machines on one machine: network namespaces, shaped uplinks, and a path with a long delay.

Linux, as root. Members hang on a bridge by veth pairs, their uplinks limited by ``tc tbf``. A far
member hangs on a pair of tun devices between which this module carries packets late and at a rate;
kernels without netem can do it too.

    python -m benchmarks.slowpath NAMESPACE HUB RATE_BYTES_PER_S DELAY_S    (one path, until killed)
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001
_CLONE_NEWNET = 0x40000000
QUEUE_S = 0.1
"""What a slow path's queue holds before it drops, as a small modem does."""
HUB_ADDRESS = "10.77.0.254"
FAR_ADDRESS, FAR_HUB_ADDRESS = "10.78.0.2", "10.78.0.1"


def ip(*arguments: str, inside: str = "") -> None:
    """Run ``ip`` (or another tool, if the first argument names one) in a namespace."""
    command = list(arguments) if arguments[0] in ("tc", "sysctl") else ["ip", *arguments]
    if inside:
        command = ["ip", "netns", "exec", inside, *command]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def within(namespace: str) -> Iterator[None]:
    """This thread, and what it starts meanwhile, is in that network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(there, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        yield
    finally:
        if libc.setns(home, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot return")
        os.close(there)
        os.close(home)


class Town:
    """``members`` machines at a hub and a far one. ``names[i]`` has the address ``10.77.0.i+1``.

    Args:
        up_bit_per_s: of each member's uplink; 0: as fast as the kernel.
        far_bytes_per_s, far_delay_s: of the far one's path, both ways; the delay is one way.
    """

    def __init__(
        self, members: int, *, up_bit_per_s: int, far_bytes_per_s: float, far_delay_s: float
    ) -> None:
        tag = f"st{os.getpid() % 10000}"
        self.hub, self.far = f"{tag}-hub", f"{tag}-far"
        self.names = [f"{tag}-{number}" for number in range(members)]
        self._relay: subprocess.Popen[bytes] | None = None
        self._far = far_bytes_per_s, far_delay_s
        self._up_bit_per_s = up_bit_per_s

    def __enter__(self) -> Town:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        for name in (self.hub, self.far, *self.names):
            ip("netns", "add", name)
            ip("link", "set", "lo", "up", inside=name)
        ip("link", "add", "br0", "type", "bridge", inside=self.hub)
        ip("addr", "add", f"{HUB_ADDRESS}/24", "dev", "br0", inside=self.hub)
        ip("link", "set", "br0", "up", inside=self.hub)
        ip("sysctl", "-qw", "net.ipv4.ip_forward=1", inside=self.hub)
        for number, name in enumerate(self.names):
            port = f"p{number}"
            ip("link", "add", port, "type", "veth", "peer", "name", "e0", "netns", name,
               inside=self.hub)  # fmt: skip
            ip("link", "set", port, "master", "br0", "up", inside=self.hub)
            ip("addr", "add", f"{self.address(number)}/24", "dev", "e0", inside=name)
            ip("link", "set", "e0", "up", inside=name)
            ip("route", "add", "default", "via", HUB_ADDRESS, inside=name)
            if self._up_bit_per_s:
                rate = ("rate", f"{self._up_bit_per_s}", "burst", "64k", "latency", "100ms")
                ip("tc", "qdisc", "add", "dev", "e0", "root", "tbf", *rate, inside=name)
        rate_text, delay_text = map(str, self._far)
        self._relay = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.slowpath",
                self.far,
                self.hub,
                rate_text,
                delay_text,
            ],
            stdout=subprocess.PIPE,
        )
        assert self._relay.stdout is not None
        if self._relay.stdout.readline() != b"ready\n":
            raise RuntimeError("the far path did not come up")

    @staticmethod
    def address(number: int) -> str:
        """Of member ``number``."""
        return f"10.77.0.{number + 1}"

    def __exit__(self, *exc: object) -> None:
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait()
        for name in (self.hub, self.far, *self.names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _tun(namespace: str, device: str, address: str, other: str) -> int:
    with within(namespace):
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TUN_NO_PI))
    ip("addr", "add", f"{address}/30", "dev", device, inside=namespace)
    ip("link", "set", device, "up", inside=namespace)
    if other:
        ip("route", "add", "default", "via", other, inside=namespace)
    return descriptor


def relay(far: int, hub: int, bytes_per_s: float, delay_s: float) -> None:
    """Carry packets both ways: one after another at the rate, each late by the delay."""
    free = {far: 0.0, hub: 0.0}
    line: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        now = time.monotonic()
        while line and line[0][0] <= now:
            _, _, target, packet = heapq.heappop(line)
            try:
                os.write(target, packet)
            except (BlockingIOError, OSError):
                continue  # its queue is full, or the device is down: the packet is lost
        wait_s = None if not line else max(0.0, line[0][0] - time.monotonic())
        for source in select.select([far, hub], [], [], wait_s)[0]:
            packet = os.read(source, 65536)
            now, target = time.monotonic(), hub if source == far else far
            if free[source] - now > QUEUE_S:
                continue
            free[source] = max(now, free[source]) + len(packet) / bytes_per_s
            count += 1
            heapq.heappush(line, (free[source] + delay_s, count, target, packet))


def main(arguments: list[str]) -> int:
    """One path, until killed."""
    namespace, hub_namespace, rate, delay = arguments
    far = _tun(namespace, "far0", FAR_ADDRESS, FAR_HUB_ADDRESS)
    hub = _tun(hub_namespace, "hub0", FAR_HUB_ADDRESS, "")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    relay(far, hub, float(rate), float(delay))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
