"""Stewards that do not lead: what they take, what they sign, what they refuse."""

from __future__ import annotations

from msgspec.structs import replace

from swarmtrain_protocols.core import Emit, PeerId, Persist, Send
from swarmtrain_protocols.entries import (
    EntryBody,
    NoOp,
    Paused,
    Rewound,
    StewardsChanged,
    encode_body,
)
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.messages.log import Append, AppendReply, WireEntry
from tests.protocols.log_world import World


def test_generation_grows_and_older_leaders_are_refused() -> None:
    world = World(11, "abc").settled("abc")
    world.propose(body=Rewound(1, "test", (), (), ()))
    world.run(1.0)
    assert world.caught_up()
    site = next(s for s in world.sites.values() if s is not world.leader())
    core, leader = site.core, world.leader()
    assert core is not None and core.generation == 1 and leader is not None
    log = core._s.log
    stale = Append(0, core.term + 1, 0, log.last_index + 1, log.last.chain_hash)
    core.receive(world.now, leader.id, stale)
    (reply,) = [e.message for e in core.drain() if isinstance(e, Send)]
    assert isinstance(reply, AppendReply) and not reply.ok and core.term == stale.term - 1


def _steward() -> tuple[World, LogCore, PeerId, PeerId]:
    """A steward that does not lead, its leader, and another steward."""
    world = World(21, "abc").settled("abc")
    world.run(1.0)
    leader = world.leader()
    assert leader is not None
    site, other = (s for s in world.sites.values() if s is not leader)
    core = site.core
    assert core is not None
    return world, core, leader.id, other.id


def _answer(core: LogCore, now: float, peer: PeerId, message: Append) -> AppendReply:
    core.receive(now, peer, message)
    sent = [e for e in core.drain() if isinstance(e, Send | Persist)]
    reply = sent[-1]
    assert isinstance(reply, Send) and isinstance(reply.message, AppendReply)
    if message.entries and reply.message.ok:
        assert isinstance(sent[0], Persist), "acknowledged before it was durable"
    return reply.message


def _append(core: LogCore, *bodies: EntryBody, term: int = 0, at: int = 0) -> Append:
    """What a leader would send to follow ``at`` (default: the end)."""
    log = core._s.log
    before = log.at(at or log.last_index)
    entries = tuple(WireEntry(term or core.term, encode_body(b)) for b in bodies)
    return Append(0, term or core.term, 0, before.index + 1, before.chain_hash, entries)


def test_an_entry_of_this_term_is_made_durable_and_then_signed() -> None:
    world, core, leader, _ = _steward()
    reply = _answer(core, world.now, leader, _append(core, Paused("x")))
    at = core._s.log.entry(core.last_index)
    assert (reply.ok, reply.index) == (True, at.index)
    where = (at.view, at.term, at.index, at.chain_hash)
    assert core._s.trust.signed_by(core._s.me, reply.signature, *where)
    again = _answer(core, world.now, leader, _append(core))
    assert again.signature == reply.signature


def test_an_entry_of_an_older_term_is_taken_but_not_signed() -> None:
    world, core, _, other = _steward()
    old = core.term
    message = replace(_append(core, Paused("x"), term=old), term=old + 1)
    reply = _answer(core, world.now, other, message)
    assert (reply.ok, reply.term, reply.signature) == (True, old + 1, b"")
    assert core.leader == other
    signed = _answer(core, world.now, other, _append(core, NoOp()))
    assert len(signed.signature) == 64


def test_a_leader_of_an_older_term_is_told_so() -> None:
    world, core, leader, _ = _steward()
    message = _append(core, Paused("x"), term=core.term)
    stale = replace(message, term=core.term - 1)
    last = core.last_index
    reply = _answer(core, world.now, leader, stale)
    assert (reply.ok, reply.term, core.last_index) == (False, core.term, last)


def test_a_gap_is_answered_with_where_to_go_on() -> None:
    world, core, leader, _ = _steward()
    ahead = replace(_append(core), start=core.last_index + 5)
    assert _answer(core, world.now, leader, ahead).index == core.last_index
    other = replace(_append(core), prev_hash=bytes(32))
    assert _answer(core, world.now, leader, other).index == core.commit_index


def test_an_uncertified_tail_is_replaced_by_a_newer_leader() -> None:
    world, core, leader, other = _steward()
    commit, term = core.commit_index, core.term
    _answer(core, world.now, leader, _append(core, Paused("x"), Paused("y")))
    assert core.last_index == commit + 2
    message = _append(core, NoOp(), term=term + 1, at=commit)
    reply = _answer(core, world.now, other, message)
    assert (reply.ok, reply.index, core.last_index) == (True, commit + 1, commit + 1)
    assert core._s.log.entry(commit + 1).term == term + 1


def test_a_second_change_of_the_set_waits_for_the_certificate_of_the_first() -> None:
    world, core, leader, _ = _steward()
    view = core._s.log.view
    assert view is not None
    one = StewardsChanged(view.voters[:1], view.voters)
    two = StewardsChanged(view.voters[:1])
    reply = _answer(core, world.now, leader, _append(core, one, two, NoOp()))
    assert (reply.ok, reply.index) == (True, core.commit_index + 1)


def test_a_change_without_grant_is_not_taken() -> None:
    world, core, leader, _ = _steward()
    view = core._s.log.view
    assert view is not None
    strangers = tuple(sorted(bytes([n]) * 32 for n in (1, 2, 3)))
    core.receive(world.now, leader, _append(core, StewardsChanged(strangers, view.voters)))
    effects = core.drain()
    (fault,) = [e.event for e in effects if isinstance(e, Emit)]
    assert isinstance(fault, PeerFault) and (fault.code, fault.peer) == ("bad_stewards", leader)
    assert core.last_index == core.commit_index


def test_a_second_leader_of_one_term_is_a_fault() -> None:
    world = World(22, "abc").settled("abc")
    leader = world.leader()
    assert leader is not None and leader.core is not None
    other = next(s for s in world.sites.values() if s is not leader)
    leader.core.receive(world.now, other.id, _append(leader.core, Paused("x")))
    events = [e.event for e in leader.core.drain() if isinstance(e, Emit)]
    assert [e.code for e in events if isinstance(e, PeerFault)] == ["unexpected"]
    assert leader.core.is_leader
