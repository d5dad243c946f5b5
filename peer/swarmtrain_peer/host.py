"""The machine: the only reader of its clocks, entropy, processor count and own address.

Everything else gets these as arguments or calls here, so that one file says what a run depends on
beyond its inputs.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import UTC, datetime


def mono_s() -> float:
    """Monotonic seconds since some start; the ``now`` of every core."""
    return time.monotonic()


def wall_s() -> float:
    """Seconds since 1970-01-01 UTC, for people and for expiry of tickets; never to order events."""
    return time.time()


def local_now() -> datetime:
    """Date and time of day as people here read them, with their time zone; for nothing else."""
    return datetime.fromtimestamp(wall_s(), UTC).astimezone()


def doze(seconds: float) -> None:
    """Let ``seconds`` pass; a signal handler that raises ends it."""
    time.sleep(seconds)


def thread_cpu_s() -> float:
    """Processor seconds that the calling thread has used: what a piece of work costs."""
    return time.thread_time()


def entropy(nbytes: int) -> bytes:
    """``nbytes`` unpredictable bytes from the operating system."""
    return os.urandom(nbytes)


def cpu_count() -> int:
    """Processors this process may use: the affinity mask where there is one."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def outward_ip() -> str:
    """The address of the interface that faces the internet, loopback's if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a UDP connect sends nothing; it picks a route
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def default_gateway() -> str:
    """The IPv4 router that leads to the internet, as Linux says; '' if none, or elsewhere."""
    try:
        with open("/proc/net/route", encoding="ascii") as table:
            rows = [line.split() for line in table][1:]
    except OSError:
        return ""
    for row in rows:
        if len(row) > 7 and row[1] == row[7] == "00000000" and row[2] != "00000000":
            return socket.inet_ntoa(int(row[2], 16).to_bytes(4, "little"))
    return ""


def announced(bound: str) -> tuple[str, ...]:
    """Where others can dial a listener: itself, or this machine's outward address."""
    host_part, _, port = bound.rpartition(":")
    if host_part not in ("0.0.0.0", "[::]"):
        return (bound,)
    return (f"{outward_ip()}:{port}",)
