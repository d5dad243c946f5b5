"""Whoever has only a ticket asks its addresses in turn, and again if nobody answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from swarmtrain_peer import enquiry
from swarmtrain_peer.enquiry import Enquiry
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import NoPeerReachable, NotAuthorised, RunMismatch, SwarmError
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.manifest import RunKeys, make_manifest
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.tickets import Capability, Ticket, sign_capability

FOUNDER = Ed25519Keyring(bytes(32))
MANIFEST = make_manifest(RunKeys(), FOUNDER.peer_id, bytes(16))
OTHER = make_manifest(RunKeys(name="other"), FOUNDER.peer_id, bytes(16))
CAPABILITY = Capability(bytes(8), MANIFEST.run_id, "trainer", False, 0, 0)
TICKET = Ticket(("a:1", "b:1"), MANIFEST.run_id, sign_capability(FOUNDER, CAPABILITY))


class Net:
    """Stands in for the transport: what each address does, in turn; the last for ever."""

    def __init__(self, **answers: list[SwarmError | bytes | None]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.enquiry = Enquiry(self, MANIFEST.run_id)  # type: ignore[arg-type]

    async def connect_address(self, address: str, timeout_s: float) -> PeerId:
        name = address[0]
        self.asked.append(name)
        found = self.answers[name]
        answer = found.pop(0) if len(found) > 1 else found[0]
        if isinstance(answer, SwarmError):
            raise answer
        self.answer = answer
        return PeerId(name.encode() * 32)

    def send(self, peer: PeerId, message: Message) -> None:
        assert message == mm.ManifestRequest(MANIFEST.run_id)
        if self.answer is not None:
            self.enquiry.heard(mm.ManifestReply(self.answer))


def ask(story: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enquiry, "PAUSE_S", 0.0)
    monkeypatch.setattr(enquiry, "MANIFEST_TIMEOUT_S", 0.05)
    asyncio.run(story())  # type: ignore[arg-type]


GONE = NoPeerReachable("x", "unreachable")


def test_the_first_that_answers_is_believed_if_the_hash_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story() -> None:
        net, saved = Net(a=[GONE], b=[MANIFEST.to_bytes()]), []
        assert await net.enquiry.manifest(TICKET, saved.append) == MANIFEST
        assert saved == [MANIFEST.to_bytes()] and net.asked == ["a", "b"]
        net = Net(a=[OTHER.to_bytes()], b=[GONE])
        with pytest.raises(RunMismatch):
            await net.enquiry.manifest(TICKET, None)

    ask(story, monkeypatch)


def test_silence_is_asked_again_and_a_refusal_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        net = Net(a=[None, GONE, MANIFEST.to_bytes()], b=[GONE])
        assert await net.enquiry.manifest(TICKET, None) == MANIFEST
        assert net.asked == ["a", "b", "a", "b", "a"]
        net = Net(a=[GONE], b=[NotAuthorised("no", "banned")])
        with pytest.raises(NotAuthorised):
            await net.enquiry.manifest(TICKET, None)
        assert net.asked == ["a", "b"]
        net = Net(a=[GONE], b=[GONE])
        with pytest.raises(NoPeerReachable):
            await net.enquiry.manifest(TICKET, None)
        assert net.asked == ["a", "b"] * enquiry.MANIFEST_TRIES
        with pytest.raises(NoPeerReachable, match="no ticket"):
            await net.enquiry.manifest(None, None)

    ask(story, monkeypatch)
