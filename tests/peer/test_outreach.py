"""Knocks and relayed links between real sockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from swarmtrain_peer.events import EventLog, Record
from swarmtrain_peer.loop import run
from swarmtrain_peer.outreach import Outreach
from swarmtrain_peer.settings import PeerSettings
from swarmtrain_protocols import limits, reach, relay
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.member import LeaveRequest
from swarmtrain_protocols.messages.reach import RelayRequest
from swarmtrain_protocols.messages.session import Hello
from tests.peer.transport_kit import WAIT_S, Node, blob_of, same

LEAVE = LeaveRequest(reason="test")


class Member(Node):
    """A transport with its outreach; ``listens`` False: nobody can dial it."""

    def __init__(
        self, seed: int, folder: Path, log: dict[PeerId, bool], *, listens: bool = True, **more: Any
    ) -> None:
        super().__init__(seed)
        self._listens = listens
        self.log = log
        log[self.id] = listens
        self.records = EventLog(folder / f"{seed}.jsonl", self.id.hex())
        settings = PeerSettings(
            keyring=Ed25519Keyring(seed.to_bytes(32, "big")),
            run=b"r" * 32,
            name=str(seed),
            trains=not listens,
            **more,
        )
        self.outreach = Outreach(settings, self.transport, self.records)
        self.outreach.can_be_dialled = log.get  # type: ignore[method-assign]
        hello = self.transport._hello
        self.transport._hello = lambda: _with(hello(), self.outreach.features)

    async def __aenter__(self) -> Member:
        self.address = await self.transport.start("127.0.0.1:0" if self._listens else "")
        self.outreach.start((self.address,) if self._listens else ())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.outreach.close()
        await super().__aexit__(*exc)
        self.records.close()

    def connected(self, peer: PeerId, hello: Hello, outgoing: bool) -> None:
        self.outreach.connected(peer, hello)
        super().connected(peer, hello, outgoing)

    def disconnected(self, peer: PeerId, code: str, reason: str) -> None:
        self.outreach.disconnected(peer)
        super().disconnected(peer, code, reason)

    def message(self, peer: PeerId, message: Message) -> None:
        if not self.outreach.message(peer, message):
            super().message(peer, message)

    def told(self, name: str) -> list[Record]:
        return [r for r in self.records.query(since_seq=0, last=None) if r["name"] == name]

    async def link_to(self, other: Node) -> None:
        """Wish for a link until there is one."""
        async with asyncio.timeout(WAIT_S):
            while self.transport.route(other.id) is None:
                self.transport.send(other.id, LEAVE)
                await asyncio.sleep(0.2)


def _with(hello: Hello, features: tuple[str, ...]) -> Hello:
    return Hello(hello.version, hello.run, hello.name, hello.listen, b"", features)


async def until(done: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            if done():
                return
            await asyncio.sleep(0.01)


def go(main: Any) -> None:
    async def limited() -> None:
        async with asyncio.timeout(3 * WAIT_S):
            await main()

    run(limited())


def test_two_others_find_a_listener_reachable(tmp_path: Path) -> None:
    async def main() -> None:
        log: dict[PeerId, bool] = {}
        async with (
            Member(1, tmp_path, log) as me,
            Member(2, tmp_path, log) as b,
            Member(3, tmp_path, log) as c,
        ):
            await me.join(b)
            await me.join(c)
            await until(lambda: me.outreach.verdict.asked == 2)
            assert me.outreach.verdict.state == "reachable"
            assert me.outreach.verdict.seen == "127.0.0.1"
            assert me.outreach.addresses == (me.address,)
            assert b.outreach.verdict.state == "reachable", "it was dialled"
            assert [r["state"] for r in me.told("reachability")][-1] == "reachable"

    go(main)


def test_a_port_that_somebody_else_serves_makes_it_outgoing_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are told a port at which something else listens: it does not know the answer."""
    monkeypatch.setattr(limits, "DIAL_BACK_TIMEOUT_S", 0.2)

    async def main() -> None:
        log: dict[PeerId, bool] = {}
        with socket.create_server(("127.0.0.1", 0)) as stranger:
            async with Member(1, tmp_path, log) as me, Member(2, tmp_path, log) as other:
                port = stranger.getsockname()[1]
                told = (f"127.0.0.1:{port}",)
                me.outreach.reaching.pump.run(me.outreach.reaching.core.listen, told)
                await me.join(other)
                await until(lambda: me.outreach.verdict.state != "unknown")
                assert me.outreach.verdict == reach.Verdict("outgoing only", 1, 1, "127.0.0.1")
                assert me.outreach.addresses == ()

    go(main)


def test_a_newcomer_waits_for_those_it_has_asked_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DIAL_BACK_TIMEOUT_S", 0.2)

    async def main() -> None:
        log: dict[PeerId, bool] = {}
        async with Member(1, tmp_path, log) as me, Member(2, tmp_path, log) as other:
            await me.outreach.first_verdict()  # nobody is asked yet
            assert me.outreach.verdict.state == "unknown"
            me.outreach.reaching.pump.run(me.outreach.reaching.core.listen, ("203.0.113.9:9",))
            await me.join(other)
            assert me.outreach.reaching.core.waits
            await me.outreach.first_verdict()
            assert not me.outreach.reaching.core.waits, "it was answered"
            assert me.outreach.verdict.state == "unknown", "that port is of another host"

    go(main)


def test_a_knock_that_was_not_sent_for_gets_no_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with Member(1, tmp_path, {}) as me:
            host, port = me.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(reach.PREFACE + bytes(16))
            assert await reader.read() == b""
            writer.close()
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(relay.PREFACE + bytes(16))
            assert await reader.read() == b""
            writer.close()

    go(main)


@contextlib.asynccontextmanager
async def hidden_pair(
    tmp_path: Path, **seed_is: Any
) -> AsyncIterator[tuple[Member, Member, Member]]:
    """A seed, and two that nobody can dial, each with a link to it."""
    log: dict[PeerId, bool] = {}
    async with (
        Member(1, tmp_path, log, **seed_is) as seed,
        Member(2, tmp_path, log, listens=False) as a,
        Member(3, tmp_path, log, listens=False) as b,
    ):
        await a.join(seed)
        await b.join(seed)
        yield seed, a, b


def test_a_link_and_its_bulk_go_through_the_seed(tmp_path: Path) -> None:
    async def main() -> None:
        async with hidden_pair(tmp_path) as (seed, a, b):
            await a.link_to(b)
            path = a.outreach.path(b.id, False)
            assert path == {
                "reachability": "outgoing only",
                "path": "relayed",
                "via": seed.id.hex(),
            }
            blob = b.hold(blob_of(*[1 << 20] * 8))
            buffers = a.fetch(1, b, blob)
            await a.until("fetched", 1)
            assert same(buffers, blob)
            core = seed.outreach.relaying.core
            assert core.relayed_bytes > blob_bytes(blob)
            assert core.streams >= 2, "one for the link, one for bulk"
            assert seed.outreach.document()["relay"]["relayed_bytes"] == core.relayed_bytes
            assert [r["via"] for r in a.told("link_relayed")] == [seed.id.hex()]
            assert [r["via"] for r in b.told("link_relayed")] == [seed.id.hex()]
            assert len(seed.told("relay_began")) == core.streams
            assert core.spent[a.id] == core.spent[b.id] == core.relayed_bytes

            # The end of it closes what the seed had open.
            a.transport.disconnect(b.id, "left", "enough")
            await b.until("disconnected", a.id)
            await until(lambda: not core.streams)
            assert len(seed.told("relay_ended")) == len(seed.told("relay_began"))

    go(main)


def blob_bytes(blob: Blob) -> int:
    return sum(chunk.nbytes for chunk in blob.chunks)


def test_what_passes_the_seed_is_sealed(tmp_path: Path) -> None:
    """The seed sees neither names nor chunks, and a byte that it alters ends the link."""

    async def main() -> None:
        async with hidden_pair(tmp_path) as (seed, a, b):
            loop = asyncio.get_running_loop()
            passed = bytearray()
            spoil = False
            carry = loop.sock_sendall

            async def watched(sock: socket.socket, data: Any) -> None:
                if isinstance(data, memoryview) and data.nbytes:
                    data = bytearray(data)
                    passed.extend(data)
                    if spoil:
                        data[-1] ^= 1
                await carry(sock, data)

            seed.outreach.relaying._loop = _Loop(loop, watched)  # type: ignore[assignment]
            await a.link_to(b)
            secret = LeaveRequest(reason="not for the seed" * 8)
            a.transport.send(b.id, secret)
            await b.until("message", a.id, secret)
            assert b"not for the seed" not in passed and len(passed) > 300
            spoil = True
            a.transport.send(b.id, secret)
            assert (await b.until("disconnected", a.id))[2] == "tampered"

    go(main)


class _Loop:
    """The loop, with another way to send."""

    def __init__(self, loop: Any, send: Any) -> None:
        self._inner = loop
        self.sock_sendall = send

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_the_seed_dies_and_the_link_with_it(tmp_path: Path) -> None:
    async def main() -> None:
        log: dict[PeerId, bool] = {}
        async with (
            Member(2, tmp_path, log, listens=False) as a,
            Member(3, tmp_path, log, listens=False) as b,
            Member(4, tmp_path, log) as other,
        ):
            async with Member(1, tmp_path, log) as seed:
                await a.join(seed)
                await b.join(seed)
                await a.link_to(b)
            await a.until("disconnected", b.id)
            await b.until("disconnected", a.id)
            await a.join(other)
            await b.join(other)
            await a.link_to(b)
            assert a.outreach.path(b.id, False)["via"] == other.id.hex()

    go(main)


def test_without_a_relay_it_is_said_and_nothing_hangs(tmp_path: Path) -> None:
    async def main() -> None:
        async with hidden_pair(tmp_path, relay="no") as (seed, a, b):
            assert not seed.outreach.features
            for _ in range(20):
                a.transport.send(b.id, LEAVE)
                await asyncio.sleep(0.1)
            assert a.transport.route(b.id) is None
            assert [r["reason"] for r in a.told("relay_failed")] == ["no_relay"]

    go(main)


def test_who_can_be_dialled_is_dialled_by_the_other_when_it_asks(tmp_path: Path) -> None:
    async def main() -> None:
        log: dict[PeerId, bool] = {}
        async with (
            Member(1, tmp_path, log) as seed,
            Member(2, tmp_path, log) as open_,
            Member(3, tmp_path, log, listens=False) as hidden,
        ):
            await open_.join(seed)
            await hidden.join(seed)
            hidden.transport.learn(open_.id, [open_.address])  # as the log says
            await open_.link_to(hidden)
            assert open_.outreach.path(hidden.id, False)["path"] == "direct"
            link = open_.transport.route(hidden.id)
            assert link is not None and not link.initiator
            assert seed.outreach.relaying.core.relayed_bytes == 0

    go(main)


def test_a_malformed_question_is_a_fault_of_its_sender(tmp_path: Path) -> None:
    async def main() -> None:
        log: dict[PeerId, bool] = {}
        async with Member(1, tmp_path, log) as seed, Member(2, tmp_path, log) as a:
            await a.join(seed)
            message = RelayRequest(1, seed.id)
            a.transport.send(seed.id, message)
            await until(lambda: seed.told("peer_fault"))
            (fault,) = seed.told("peer_fault")
            assert (fault["peer"], fault["fault"]) == (a.id.hex(), "malformed")
            assert seed.transport.route(a.id) is not None, "the link goes on"

    go(main)
