"""When the driver ticks its node, and what it tells of links that cannot be made."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.driver import Driver
from swarmtrain_peer.roundclock import RoundClock
from swarmtrain_protocols.core import Effect, PeerId, Send
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.dht import FindNode
from swarmtrain_protocols.messages.member import LeaveRequest

PEER = PeerId(b"p" * 32)
QUESTION = FindNode(1, bytes(20))
WAIT_S = 10.0


class Dht:
    def __init__(self) -> None:
        self.at = math.inf

    def deadline(self) -> float:
        return self.at


class Node:
    """Says when it wants to be ticked; ``quiet``: messages of the DHT move nothing else."""

    def __init__(self) -> None:
        self.dht = Dht()
        self.at = math.inf
        self.quiet = True
        self.asked = 0
        self.effects: list[Effect] = []
        self.heard: list[Message] = []
        self.lost: list[PeerId] = []
        self.ticked: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def deadline(self) -> float:
        self.asked += 1
        return min(self.at, self.dht.at)

    def drain(self) -> list[Effect]:
        effects, self.effects = self.effects, []
        return effects

    def tick(self, now: float) -> None:
        self.at = self.dht.at = math.inf
        self.ticked.set_result(now)

    def nothing(self, now: float) -> None:
        pass

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        self.heard.append(message)

    def receive_dht(self, now: float, peer: PeerId, message: Message) -> bool:
        self.heard.append(message)
        return self.quiet

    def unreachable(self, now: float, peer: PeerId) -> None:
        self.lost.append(peer)


class Transport:
    def on_leaves(self, hear: Callable[..., None]) -> None:
        pass

    def send(self, peer: PeerId, message: Message) -> bool:
        return False


def driver_of(node: Any) -> Driver:
    nobody: Any = None
    transport: Any = Transport()
    return Driver(
        node=node,
        transport=transport,
        data=nobody,
        records=None,
        keeper=None,
        alarm=nobody,
        pool=nobody,
        on_event=lambda event: None,
        on_state=lambda channel: None,
        clock=RoundClock(),
    )


async def ticked(node: Node) -> float:
    async with asyncio.timeout(WAIT_S):
        return await node.ticked


def test_a_timer_that_is_early_ticks_nobody() -> None:
    async def main() -> None:
        node = Node()
        driver = driver_of(node)
        node.at = host.mono_s() + 0.02
        driver.run(node.nothing)
        node.at = late = host.mono_s() + 0.1
        driver.run(node.nothing)
        assert await ticked(node) >= late
        driver.close()

    asyncio.run(main())


def test_a_deadline_that_comes_nearer_is_kept() -> None:
    async def main() -> None:
        node = Node()
        driver = driver_of(node)
        node.at = far = host.mono_s() + WAIT_S
        driver.run(node.nothing)
        node.dht.at = host.mono_s() + 0.01
        driver.deliver(PEER, QUESTION)
        assert await ticked(node) < far
        driver.close()

    asyncio.run(main())


def test_what_only_the_dht_hears_asks_nobody_else_for_a_deadline() -> None:
    async def main() -> None:
        node = Node()
        driver = driver_of(node)
        node.at = host.mono_s() + WAIT_S
        driver.run(node.nothing)
        before = node.asked
        driver.deliver(PEER, QUESTION)
        assert (node.asked, node.heard) == (before, [QUESTION])
        node.quiet, node.at = False, host.mono_s() + 0.01
        driver.deliver(PEER, QUESTION)
        assert node.asked == before + 1
        await ticked(node)
        driver.deliver(PEER, LeaveRequest(reason="x"))
        assert node.asked > before + 1
        driver.close()

    asyncio.run(main())


def test_a_question_that_cannot_be_sent_is_told_at_once() -> None:
    async def main() -> None:
        node = Node()
        driver = driver_of(node)
        node.effects = [Send(PEER, QUESTION), Send(PEER, LeaveRequest(reason="x"))]
        driver.run(node.nothing)
        assert node.lost == [], "not from inside of a call"
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert node.lost == [PEER], "others look after their messages themselves"
        driver.close()

    asyncio.run(main())
