"""Dialling: addresses in turn, growing pauses, bounded queues, no retry that nobody asked for."""

from __future__ import annotations

import asyncio
import random

from swarmtrain_peer.dialler import Dialler
from swarmtrain_peer.link import DialFailed
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import NoPeerReachable, NotAuthorised
from swarmtrain_protocols.messages.member import LeaveRequest
from tests.peer.test_transport import go

PEER = PeerId(b"p" * 32)
LEAVE = LeaveRequest(reason="x")


class Bench:
    """A dialler whose dials go as told."""

    def __init__(self, **outcome: str) -> None:
        self.dials: list[str] = []
        self.times: list[float] = []
        self.failures: list[tuple[str, str]] = []
        self.failed = asyncio.Event()
        self.outcome = outcome  # address host -> code of failure; absent: it hangs
        loop = asyncio.get_running_loop()
        self.dialler = Dialler(loop, random.Random(1), self._dial, self._on_failed)

    async def _dial(self, peer: PeerId | None, address: str) -> PeerId:
        self.dials.append(address)
        self.times.append(asyncio.get_running_loop().time())
        host = address.partition(":")[0]
        if host not in self.outcome:
            await asyncio.Event().wait()
        if self.outcome[host]:
            raise DialFailed(self.outcome[host], "as told")
        assert peer is not None
        return peer

    def _on_failed(self, peer: PeerId, address: str, failed: DialFailed) -> None:
        self.failures.append((address, failed.code))
        self.failed.set()

    async def fails(self, times: int) -> None:
        while len(self.failures) < times:
            self.failed.clear()
            await self.failed.wait()


def test_addresses_are_tried_in_turn_newest_first() -> None:
    async def main() -> None:
        bench = Bench(old="unreachable", new="timeout", good="")
        bench.dialler.learn(PEER, ["good:1"])
        bench.dialler.learn(PEER, ["new:1", "not an address", "old:1"])
        assert bench.dialler.queue(PEER, LEAVE)
        await asyncio.sleep(0.01)
        assert bench.dials == ["new:1", "old:1", "good:1"] and not bench.failures
        assert bench.dialler.opened(PEER) == [LEAVE]
        assert bench.dialler.opened(PEER) == []
        bench.dialler.close()

    go(main())


def test_addresses_and_queues_are_bounded() -> None:
    async def main() -> None:
        bench = Bench()
        bench.dialler.learn(PEER, [f"h{i}:1" for i in range(50)])
        assert not bench.dialler.queue(PeerId(b"q" * 32), LEAVE)  # no address
        queued = [bench.dialler.queue(PEER, LEAVE) for _ in range(1000)]
        assert sum(queued) == limits.MESSAGES_PENDING_PER_PEER_MAX
        assert len(bench.dialler.opened(PEER)) == limits.MESSAGES_PENDING_PER_PEER_MAX
        assert bench.dialler.addresses(PEER) == [
            f"h{i}:1" for i in range(limits.ADDRESSES_PER_PEER_MAX)
        ]
        bench.dialler.close()

    go(main())


def test_pauses_grow_and_messages_are_dropped_with_the_dial() -> None:
    async def main() -> None:
        bench = Bench(down="unreachable")
        bench.dialler.learn(PEER, ["down:1"])
        assert bench.dialler.queue(PEER, LEAVE)
        await bench.fails(1)
        assert not bench.dialler.queue(PEER, LEAVE)  # a pause: rather lost than late
        assert bench.dialler.opened(PEER) == []
        bench = Bench(down="unreachable")
        bench.dialler.learn(PEER, ["down:1"])
        bench.dialler.want(PEER)
        await bench.fails(4)
        gaps = [b - a for a, b in zip(bench.times, bench.times[1:], strict=False)]
        unit = limits.DIAL_BACKOFF_S_MIN
        for i, gap in enumerate(gaps):
            assert gap >= 0.5 * unit * 2 ** (i + 1)
        bench.dialler.forget_wish(PEER)
        bench.dialler.close()

    go(main())


def test_a_hopeless_refusal_waits_longest_and_skips_other_addresses() -> None:
    async def main() -> None:
        bench = Bench(banned="banned", other="")
        bench.dialler.learn(PEER, ["banned:1", "other:1"])
        bench.dialler.want(PEER)
        await bench.fails(1)
        assert bench.dials == ["banned:1"] and bench.failures == [("banned:1", "banned")]
        assert bench.dialler.pause_s(PEER) > 0.4 * limits.DIAL_BACKOFF_S_MAX
        bench.dialler.close()

    go(main())


def test_the_pause_ends_when_the_peer_comes_by_itself() -> None:
    async def main() -> None:
        bench = Bench(down="unreachable")
        bench.dialler.learn(PEER, ["down:1"])
        bench.dialler.want(PEER)
        await bench.fails(1)
        assert bench.dialler.pause_s(PEER) > 0
        bench.dialler.opened(PEER)
        assert bench.dialler.pause_s(PEER) == 0
        await asyncio.sleep(3 * limits.DIAL_BACKOFF_S_MIN)
        assert len(bench.dials) == 1  # no retry: the link is there
        bench.dialler.close()

    go(main())


def test_failures_become_typed_errors() -> None:
    async def main() -> None:
        for code, kind in (("unreachable", NoPeerReachable), ("banned", NotAuthorised)):
            error = DialFailed(code, "why").to_error("host:1")
            assert isinstance(error, kind) and error.todo and code in error.why

    go(main())


def test_invented_peers_push_out_nobody_who_could_be_dialled() -> None:
    async def main() -> None:
        bench = Bench(dead="unreachable", good="")
        bench.dialler.learn(PEER, ["good:1"])
        for number in range(limits.DIAL_TARGETS_MAX + 50):
            invented = PeerId(number.to_bytes(32, "big"))
            bench.dialler.learn(invented, ["dead:1"])
            if number < 60:
                bench.dialler.queue(invented, LEAVE)
                bench.dialler.forget_wish(invented)
                await bench.fails(number + 1)
        assert len(bench.dialler._targets) == limits.DIAL_TARGETS_MAX
        assert bench.dialler.addresses(PEER) == ["good:1"]

    go(main())
