"""Two peers keep one link: simultaneous dials, restarts, two processes with one identity."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import NotAuthorised
from tests.peer.test_transport import LEAVE, go
from tests.peer.transport_kit import WAIT_S, Node


@pytest.mark.parametrize("seed", range(4))
def test_simultaneous_dials_settle_on_one_link(seed: int) -> None:
    async def main() -> None:
        async with Node(10 + seed) as a, Node(20 + seed) as b:
            for _ in range(5):
                got = await asyncio.gather(
                    a.transport.connect_address(b.address, WAIT_S),
                    b.transport.connect_address(a.address, WAIT_S),
                )
                assert list(got) == [b.id, a.id]
                (_, _, out_a, _) = await a.until("connected", b.id)
                (_, _, out_b, _) = await b.until("connected", a.id)
                assert out_a != out_b  # the same link
                assert a.transport.send(b.id, LEAVE) and b.transport.send(a.id, LEAVE)
                await a.until("message", b.id)
                await b.until("message", a.id)
                assert not a.saw("disconnected") and not b.saw("disconnected")
                assert not a.saw("refused") and not b.saw("refused")
                a.transport.disconnect(b.id, "again", "")
                await a.until("disconnected", b.id)
                await b.until("disconnected", a.id)

    go(main())


def test_simultaneous_sends_by_known_address() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            a.transport.learn(b.id, [b.address])
            b.transport.learn(a.id, [a.address])
            assert a.transport.send(b.id, LEAVE) and b.transport.send(a.id, LEAVE)
            await a.until("message", b.id)
            await b.until("message", a.id)
            assert not a.saw("disconnected") and not b.saw("disconnected")

    go(main())


def test_dialling_twice_gives_the_same_link() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(2) as b:
            dials = [a.transport.connect_address(b.address, WAIT_S) for _ in range(4)]
            assert await asyncio.gather(*dials) == [b.id] * 4
            assert await a.transport.connect_address(b.address, WAIT_S) == b.id
            assert [e[0] for e in a.events] == ["connected"]
            await b.until("connected", a.id)
            assert not b.saw("disconnected") and not b.saw("connected")

    go(main())


def test_a_second_live_process_with_the_same_identity_is_refused() -> None:
    async def main() -> None:
        async with Node(1) as a, Node(1) as twin, Node(2) as b:
            await a.join(b)
            with pytest.raises(NotAuthorised, match="duplicate"):
                await twin.transport.connect_address(b.address, WAIT_S)
            assert b.transport.send(a.id, LEAVE)
            await a.until("message", b.id)
            assert not a.saw("disconnected") and not b.saw("disconnected")

    go(main())


@pytest.mark.parametrize("outgoing", [True, False])
def test_a_restarted_peer_replaces_its_stale_connection(outgoing: bool) -> None:
    """The old process froze (or its host lost power): its connection is open and silent."""

    async def main() -> None:
        async with Node(2) as b:
            old = Node(1)
            await old.__aenter__()
            if outgoing:
                await old.join(b)
            else:
                await b.join(old)
                await b.until("connected", old.id)
            old.transport._table.links[b.id]._transport.pause_reading()  # type: ignore[union-attr]
            async with Node(1) as new:
                assert await new.transport.connect_address(b.address, WAIT_S) == b.id
                assert (await b.until("disconnected", new.id))[2] == "replaced"
                await b.until("connected", new.id)
                assert b.transport.send(new.id, LEAVE)
                await new.until("message", b.id)
            with contextlib.suppress(ConnectionError):
                await old.transport.close()

    go(main())


def test_a_killed_peer_comes_back_at_once() -> None:
    async def main() -> None:
        async with Node(2) as b:
            old = Node(1)
            await old.__aenter__()
            await old.join(b)
            old.transport._table.links[b.id]._transport.abort()  # type: ignore[union-attr]
            async with Node(1) as new:
                assert await new.transport.connect_address(b.address, 0.9) == b.id
                await b.until("disconnected", new.id)
                await b.until("connected", new.id)
            await old.transport.close()

    go(main())


@pytest.mark.parametrize("sleeper", [0, 1])
def test_a_dial_that_was_never_answered_stands_in_nobodys_way(
    sleeper: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A laptop sleeps: its kernel takes connections, and nobody speaks. Then it wakes up."""
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.2)

    async def main() -> None:
        silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        async with Node(1) as a, Node(2) as b:
            awake, asleep = ((a, b), (b, a))[sleeper]
            awake.transport.learn(asleep.id, [f"127.0.0.1:{port}"])
            awake.transport.connect(asleep.id)
            await awake.until("refused", "timeout")
            silent.close()
            monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 3.0)
            assert await asleep.transport.connect_address(awake.address, WAIT_S) == awake.id
            await awake.until("connected", asleep.id)
            assert awake.transport.send(asleep.id, LEAVE)
            await asleep.until("message", awake.id)
            assert not awake.saw("disconnected") and not asleep.saw("disconnected")

    go(main())
