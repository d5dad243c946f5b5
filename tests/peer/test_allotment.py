"""Memory that others may make a site take: three nested bounds, reserved before allocation."""

from __future__ import annotations

import asyncio
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from swarmtrain_peer.allotment import Allotment, machine_bytes
from swarmtrain_peer.driver import Driver
from swarmtrain_peer.roundclock import RoundClock
from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Fetch, PeerId
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.rounds import effects as fx

ME, ONE, TWO = (PeerId(name * 32) for name in (b"m", b"a", b"b"))
KEY = RoundKey(0, "group/g", 0, 0)
MB = 1 << 20


def purpose(part: int, index: int = 0, key: RoundKey = KEY) -> fx.ContributionPart:
    return fx.ContributionPart(key, part, index)


def test_the_bounds_are_nested_and_released_with_the_attempt() -> None:
    allotment = Allotment(100)
    assert allotment.peer_bytes == 50
    assert allotment.reserve(purpose(0), ONE, 40) and not allotment.reserve(purpose(1), ONE, 11)
    assert allotment.reserve(purpose(0), ONE, 40), "asked for again, it is the same memory"
    assert allotment.reserve(purpose(2), TWO, 50) and allotment.reserved_bytes() == 90
    assert not allotment.reserve(purpose(3), ME, 11), "all together"
    later = RoundKey(0, "group/g", 1, 0)
    assert allotment.reserve(purpose(0, key=later), ME, 10)
    allotment.release(KEY)
    assert allotment.reserved_bytes() == allotment.reserved_bytes(ME) == 10
    assert allotment.reserve(purpose(1), ONE, 50)


def test_the_share_is_of_the_machine_or_of_its_control_group(tmp_path: Path) -> None:
    whole = machine_bytes(tmp_path)
    assert whole > 0
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_bytes(tmp_path) == whole
    (tmp_path / "memory.max").write_text(f"{64 * MB}\n")
    assert machine_bytes(tmp_path) == 64 * MB
    assert Allotment().total_bytes <= limits.GUEST_MEMORY_SHARE * whole


class _Node:
    """Hears what becomes of fetches."""

    def __init__(self) -> None:
        self.me = ME
        self.failed: list[tuple[int, str]] = []
        self.effects: list[Effect] = []

    def fetch_failed(self, now: float, ticket: int, reason: str) -> None:
        self.failed.append((ticket, reason))

    def drain(self) -> list[Effect]:
        effects, self.effects = self.effects, []
        return effects

    def deadline(self) -> float:
        return math.inf


class _Transport:
    """Takes what is asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def on_leaves(self, hear: Any) -> None:
        pass

    def fetch(self, ticket: int, peer: PeerId, *rest: Any) -> None:
        self.asked.append(ticket)


def _opened(channel: str, *people: bytes, values: int) -> e.RoundOpened:
    key = RoundKey(0, channel, 0, 0)
    contributors = tuple(e.Contributor(p, bytes([i]) * 32, 1.0, 0) for i, p in enumerate(people))
    chunks = -(-values // limits.CHUNK_VALUES)
    parts = (e.Part(0, chunks, ME, ME),)
    return e.RoundOpened(key, contributors, parts, people, values, "fp32", "fp32", bytes(32))


@pytest.mark.parametrize(
    ("channel", "people", "taken"),
    [
        ("group/g", (ONE, TWO), False),  # a call of others, longer than there is room for
        ("group/g", (ME, ONE), True),  # this site has called with that size itself
        ("train/0/0", (ONE, TWO), True),  # the size is the model's
    ],
)
def test_a_call_of_others_takes_no_more_than_its_room(
    channel: str, people: tuple[bytes, ...], taken: bool
) -> None:
    asyncio.run(_fetched(channel, people, taken))


async def _fetched(channel: str, people: tuple[bytes, ...], taken: bool) -> None:
    node: Any = _Node()
    transport: Any = _Transport()
    nobody: Any = None
    driver = Driver(
        node=node,
        transport=transport,
        data=DataPlane(),
        records=None,
        keeper=None,
        alarm=nobody,
        pool=nobody,
        on_event=lambda event: None,
        on_state=lambda channel: None,
        clock=RoundClock(),
    )
    driver.allotment = Allotment(16 * MB)
    opened = _opened(channel, *people, values=16 * MB)  # 64 MB
    driver.data.begin(opened)
    tracemalloc.start()
    try:
        wanted = fx.ContributionPart(opened.key, 0, 1)
        node.effects = [Fetch(7, ONE, bytes(32), 0, opened.parts[0].count, wanted)]
        driver.pump()
        await asyncio.sleep(0.01)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if taken:
        assert transport.asked == [7] and node.failed == []
    else:
        assert transport.asked == [] and node.failed == [(7, "no_room")]
        assert peak < MB, "nothing is taken before it is reserved"
