"""Streams through a third member: who gets one, who does not, and what it may cost."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Connect, Effect, Emit, PeerId, Send
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages.reach import RelayOffer, RelayReply, RelayRequest
from swarmtrain_protocols.relay import (
    REFUSALS,
    CloseStream,
    OpenStream,
    Relay,
    Relayed,
    RelayFailed,
    Splice,
    StreamFailed,
)

N1, N2, SEED, SEED2, OPEN, STRANGER = (PeerId(bytes([n]) * 32) for n in range(1, 7))
LOG = {N1: False, N2: False, SEED: True, SEED2: True, OPEN: True}


def make(me: PeerId, *, relays: bool = False, uses: bool = True) -> Relay:
    entropy = random.Random(me[0]).randbytes
    return Relay(me=me, entropy=entropy, dialled_by_others=LOG.get, relays=relays, uses=uses)


def seed(*links: PeerId) -> Relay:
    core = make(SEED, relays=True)
    for peer in links:
        core.connected(0.0, peer, relays=False, direct=True)
    return core


def wishing(core: Relay, peer: PeerId, *relays: PeerId) -> list[Effect]:
    """The effects of a wish that is repeated."""
    for via in relays:
        core.connected(0.0, via, relays=True, direct=True)
    core.drain()
    core.want(10.0, peer)
    assert not core.drain(), "once is not enough"
    core.want(10.0 + limits.RELAY_WISH_S, peer)
    return core.drain()


def replies(effects: Sequence[Effect]) -> list[object]:
    return [(e.peer, e.message) for e in effects if isinstance(e, Send)]


def test_two_that_nobody_can_dial_meet_at_the_seed() -> None:
    a, b, r = make(N1), make(N2), seed(N1, N2)
    (wish,) = wishing(a, N2, SEED)
    assert isinstance(wish, Send) and wish.peer == SEED
    r.receive(11.0, N1, wish.message)
    (to_a, grant), (to_b, offer) = replies(r.drain())  # type: ignore[misc]
    assert (to_a, to_b) == (N1, N2)
    b.connected(0.0, SEED, relays=True, direct=True)
    a.receive(11.1, SEED, grant)
    b.receive(11.1, SEED, offer)
    (first,), (second,) = a.drain(), b.drain()
    assert isinstance(first, OpenStream) and isinstance(second, OpenStream)
    assert (first.kind, first.via, first.peer) == ("link", SEED, N2)
    assert (second.kind, second.via, second.peer) == ("answer", SEED, N1)
    assert first.token != second.token
    number = r.attached(11.2, first.token)
    assert number is not None and not r.drain()
    assert r.attached(11.3, second.token) == number
    assert r.drain() == [Splice(number), Emit(Relayed(N1, N2, 0))]
    r.moved(11.4, number, 1000)
    assert (r.relayed_bytes, r.spent, r.streams) == (1000, {N1: 1000, N2: 1000}, 1)
    r.closed(11.5, number)
    assert r.drain() == [CloseStream(number), Emit(Relayed(N1, N2, 1000, "closed"))]
    assert r.streams == 0


def test_a_token_opens_one_end_once() -> None:
    r = seed(N1, N2)
    r.receive(0.0, N1, RelayRequest(1, N2))
    (_, grant), _ = replies(r.drain())  # type: ignore[misc]
    assert isinstance(grant, RelayReply)
    assert r.attached(0.1, bytes(16)) is None
    number = r.attached(0.1, grant.token)
    assert number is not None
    assert r.attached(0.2, grant.token) is None, "the other end is not opened with it"
    r.tick(limits.RELAY_WAIT_S)
    assert CloseStream(number) in r.drain(), "nobody came to the other end"


def test_a_relay_is_not_asked_for_whoever_can_be_dialled_or_is_no_member() -> None:
    for peer in (OPEN, STRANGER, N1):
        assert wishing(make(N1), peer, SEED) == []
    linked = make(N1)
    linked.connected(0.0, N2, relays=False, direct=False)
    assert wishing(linked, N2, SEED) == []
    assert wishing(make(N1, uses=False), N2, SEED) == []


def test_the_next_relay_is_asked_and_then_there_is_a_pause() -> None:
    a = make(N1)
    (wish,) = wishing(a, N2, SEED, SEED2)
    assert isinstance(wish, Send) and isinstance(wish.message, RelayRequest)
    a.receive(12.0, SEED, RelayReply(wish.message.request, code="busy"))
    (wish,) = a.drain()
    assert isinstance(wish, Send) and wish.peer == SEED2
    a.tick(12.0 + limits.RELAY_WAIT_S)
    assert a.drain() == [StreamFailed(N2, "link", 0, "timeout"), Emit(RelayFailed(N2, "timeout"))]
    a.want(22.5, N2)
    a.want(23.0, N2)
    assert not a.drain()
    a.want(26.0, N2)
    assert [e.peer for e in a.drain() if isinstance(e, Send)] == [SEED]


def test_who_can_be_dialled_has_the_other_dial() -> None:
    a, b, r = make(OPEN), make(N2), seed(OPEN, N2)
    (wish,) = wishing(a, N2, SEED)
    assert isinstance(wish, Send) and wish.message == RelayRequest(1, N2, True)
    r.receive(11.0, OPEN, wish.message)
    effects = r.drain()
    assert replies(effects) == [(OPEN, RelayReply(1, code="called")), (N2, RelayOffer(OPEN))]
    a.receive(11.1, SEED, RelayReply(1, code="called"))
    assert not a.drain(), "no stream"
    b.connected(0.0, SEED, relays=True, direct=True)
    b.drain()
    b.receive(11.1, SEED, RelayOffer(OPEN))
    assert b.drain() == [Connect(OPEN)]
    b.receive(11.2, SEED, RelayOffer(N1))
    assert not b.drain(), "a member that cannot be dialled cannot ask for it"
    b.receive(11.2, SEED, RelayOffer(STRANGER))
    assert not b.drain(), "nobody has strangers dialled"


def refused(core: Relay, peer: PeerId, target: PeerId, now: float = 0.0) -> str:
    core.receive(now, peer, RelayRequest(1, target))
    ((to, reply), *_) = replies(core.drain())  # type: ignore[misc]
    assert to == peer and isinstance(reply, RelayReply)
    return reply.code


def test_refusals() -> None:
    assert refused(make(SEED), N1, N2) == "off"
    assert refused(seed(N1), N1, N2) == "unknown"
    assert refused(seed(N1, STRANGER), N1, STRANGER) == "not_a_member"
    assert refused(seed(N1, STRANGER), STRANGER, N1) == "not_a_member"
    assert refused(seed(N1, OPEN), N1, OPEN) == "direct"
    assert {"off", "unknown", "not_a_member", "direct"} < set(REFUSALS)
    for target in (N1, SEED):
        with pytest.raises(PeerFault) as caught:
            seed(N1).receive(0.0, N1, RelayRequest(1, target))
        assert (caught.value.code, caught.value.peer) == ("malformed", N1)


def test_streams_are_limited_per_member() -> None:
    r = seed(N1, N2)
    codes = [refused(r, N1, N2, float(n)) for n in range(limits.RELAY_STREAMS_PER_PEER_MAX + 1)]
    opened = [c for c in codes if not c]
    assert len(opened) <= limits.RELAY_STREAMS_PER_PEER_MAX
    quick = seed(N1, N2)
    codes = [refused(quick, N1, N2) for _ in range(limits.RELAY_STREAMS_PER_PEER_MAX + 3)]
    assert codes == [""] * limits.RELAY_STREAMS_PER_PEER_MAX + ["busy"] * 3


def test_requests_are_limited_in_time() -> None:
    r = seed(N1, N2)
    codes = []
    for _ in range(40):
        codes.append(refused(r, N1, N2))
        r.tick(1e6)  # what was granted is over: only the rate holds
        r.drain()
    assert codes.count("") == limits.RELAY_BURST


def spliced(r: Relay, now: float) -> int:
    r.receive(now, N1, RelayRequest(1, N2))
    (_, grant), (_, offer) = replies(r.drain())  # type: ignore[misc]
    assert isinstance(grant, RelayReply) and isinstance(offer, RelayOffer)
    number = r.attached(now, grant.token)
    assert number is not None and r.attached(now, offer.token) == number
    r.drain()
    return number


def test_bytes_are_limited_by_the_hour() -> None:
    r = seed(N1, N2)
    number = spliced(r, 0.0)
    r.moved(1.0, number, limits.RELAY_BYTES_PER_HOUR_MAX)
    assert not r.drain()
    r.moved(1.0, number, 1)
    closed, event = r.drain()
    assert closed == CloseStream(number)
    assert isinstance(event, Emit) and event.event.code == "quota"  # type: ignore[attr-defined]
    assert refused(r, N1, N2, 2.0) == "quota"
    assert refused(r, N1, N2, 4000.0) == "", "the next hour"


def test_a_silent_stream_is_closed_and_so_are_those_of_a_lost_link() -> None:
    r = seed(N1, N2)
    number = spliced(r, 0.0)
    assert r.deadline() == limits.RELAY_SILENCE_S
    r.moved(10.0, number, 5)
    r.tick(limits.RELAY_SILENCE_S)
    assert not r.drain()
    r.tick(10.0 + limits.RELAY_SILENCE_S)
    assert CloseStream(number) in r.drain()
    number = spliced(r, 100.0)
    r.disconnected(101.0, N2)
    assert CloseStream(number) in r.drain(), "who is banned or gone is carried no more"


def test_one_more_stream_for_bulk() -> None:
    a = make(N1)
    a.connected(0.0, SEED, relays=True, direct=True)
    a.connected(0.0, N2, relays=False, direct=False)
    a.drain()
    handle = a.stream(1.0, N2)
    (wish,) = a.drain()
    assert isinstance(wish, Send) and isinstance(wish.message, RelayRequest)
    assert not wish.message.reverse
    a.receive(1.1, SEED, RelayReply(wish.message.request, b"t" * 16))
    assert a.drain() == [OpenStream(SEED, b"t" * 16, N2, "bulk", handle)]
    handle = a.stream(2.0, N2)
    a.disconnected(2.1, SEED)
    assert StreamFailed(N2, "bulk", handle, "disconnected") in a.drain()


def test_offers_come_from_those_it_is_linked_to_and_not_too_many() -> None:
    b = make(N2)
    b.receive(0.0, SEED, RelayOffer(N1, b"t" * 16))
    assert not b.drain(), "no link to the relay"
    b.connected(0.0, SEED, relays=True, direct=True)
    b.drain()
    for _ in range(200):
        b.receive(0.1, SEED, RelayOffer(N1, b"t" * 16))
    assert len(b.drain()) == limits.RELAY_OFFERS_BURST
    with pytest.raises(PeerFault, match="token"):
        b.receive(0.2, SEED, RelayOffer(N1, b"short"))


def test_a_grant_without_a_token_is_malformed_and_late_ones_are_ignored() -> None:
    a = make(N1)
    (wish,) = wishing(a, N2, SEED)
    assert isinstance(wish, Send) and isinstance(wish.message, RelayRequest)
    a.receive(11.0, SEED2, RelayReply(wish.message.request, b"t" * 16))
    assert not a.drain(), "somebody else was asked"
    with pytest.raises(PeerFault, match="token"):
        a.receive(11.0, SEED, RelayReply(wish.message.request))
    a.receive(11.0, SEED, RelayReply(wish.message.request, b"t" * 16))
    assert not a.drain()
