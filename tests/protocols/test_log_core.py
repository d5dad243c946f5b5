"""The whole log core in a hostile little world: random schedules, planted bugs, and set pieces."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from swarmtrain_protocols.core import Emit, PeerId, Persist, Send
from swarmtrain_protocols.entries import NoOp, Paused, Rewound, StewardsChanged
from swarmtrain_protocols.errors import CheckpointError, LocalProtocolError, PeerFault
from swarmtrain_protocols.identity import Ed25519Keyring, Keyring
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.log.election import Election
from swarmtrain_protocols.log.events import Committed, Conflict, LeaderChanged, SnapshotLoaded
from swarmtrain_protocols.log.records import EntriesRecord, VoteRecord, decode_record
from swarmtrain_protocols.log.view import View
from swarmtrain_protocols.manifest import make_genesis
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.log import (
    Append,
    AppendReply,
    Subscribe,
    Update,
    VoteRequest,
)
from swarmtrain_protocols.messages.session import Ping
from tests.protocols.log_chaos import Chaos
from tests.protocols.log_world import FOUNDER, RUN, TIMEOUTS, KeyedHash, Ledger, World, joined

SEEDS = 220
PER_TEST = 55

_seen: Counter[str] = Counter()


# --- random schedules ----------------------------------------------------------------------------


@pytest.mark.parametrize("start", range(0, SEEDS, PER_TEST))
def test_random_schedules_are_safe_and_end_in_agreement(start: int) -> None:
    for seed in range(start, start + PER_TEST):
        chaos = Chaos(seed)
        try:
            chaos.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        _seen.update(set(chaos.seen))
    if start + PER_TEST == SEEDS:
        rare = {kind: n for kind, n in _seen.items() if n < SEEDS // 20}
        assert not rare, f"faults that hardly ever happened test nothing: {rare}"
        assert {"crash", "leader crashed", "partition", "leader isolated", "hand over",
                "change asked", "snapshot loaded", "compacted"} <= set(_seen)  # fmt: skip


def test_a_schedule_replays_exactly() -> None:
    worlds = [Chaos(9).run() for _ in range(2)]
    assert worlds[0].sent == worlds[1].sent and worlds[0].oracle.truth == worlds[1].oracle.truth


# --- planted bugs --------------------------------------------------------------------------------


def _forgetting(kind: type) -> Callable[[Chaos, pytest.MonkeyPatch], None]:
    def plant(chaos: Chaos, patch: pytest.MonkeyPatch) -> None:
        for site in chaos.world.sites.values():
            site.forget = lambda record: isinstance(decode_record(record), kind)

    return plant


def _votes_for_anybodys_log(chaos: Chaos, patch: pytest.MonkeyPatch) -> None:
    def grant(self: Election, peer: PeerId, request: VoteRequest) -> bool:
        s = self._s
        if request.term < s.term or (request.pre and request.term == s.term):
            return False
        return request.term > s.term or s.voted_for in (b"", peer)

    patch.setattr(Election, "_would_grant", grant)


def _new_set_alone_decides(chaos: Chaos, patch: pytest.MonkeyPatch) -> None:
    def quorum(self: View, agrees: Callable[[bytes], bool]) -> bool:
        return 2 * sum(1 for p in self.voters if agrees(p)) > len(self.voters)

    patch.setattr(View, "quorum", quorum)


def _half_is_enough(chaos: Chaos, patch: pytest.MonkeyPatch) -> None:
    def quorum(self: View, agrees: Callable[[bytes], bool]) -> bool:
        groups = [g for g in (self.voters, self.joint) if g]
        return all(2 * sum(1 for p in g if agrees(p)) >= max(2, len(g) - 1) for g in groups)

    patch.setattr(View, "quorum", quorum)


MUTANTS = {
    "votes are not durable": _forgetting(VoteRecord),
    "entries are not durable": _forgetting(EntriesRecord),
    "votes for anybody's log": _votes_for_anybodys_log,
    "the new set alone decides": _new_set_alone_decides,
    "half is enough": _half_is_enough,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(SEEDS):
        chaos = Chaos(seed)
        MUTANTS[name](chaos, monkeypatch)
        try:
            chaos.run()
        except (AssertionError, PeerFault, CheckpointError):
            return
    raise AssertionError(f"{SEEDS} schedules did not notice: {name}")


def _two_candidates(forget: bool) -> list[bool]:
    """Does a steward that crashes in between vote for both candidates of one term?"""
    world = World(3, "abc").settled("abc")
    site = world.sites["b"]
    site.forget = lambda record: forget and isinstance(decode_record(record), VoteRecord)
    world.cut = {(x, y) for x in "abc" for y in "abc"}
    answers: list[bool] = []
    for candidate in (world.sites["a"].id, world.sites["c"].id):
        world.run(0.9)  # long enough to miss a leader's heartbeat, too short to stand oneself
        assert site.core is not None
        log = site.core._s.log
        request = VoteRequest(0, 50, False, True, log.last_index, log.last.term)
        site.call(lambda core, c=candidate, r=request: core.receive(world.now, c, r))  # type: ignore[misc]
        world.run(0.1)
        answers.append(site.core._s.voted_for == candidate)
        site.crash()
        site.start()
    return answers


def test_a_vote_survives_a_crash_because_it_was_made_durable() -> None:
    assert _two_candidates(forget=False) == [True, False]
    assert _two_candidates(forget=True) == [True, True]


# --- one steward ---------------------------------------------------------------------------------


def _instant(names: str = "a", **options: object) -> World:
    world = World(1, names, **options)  # type: ignore[arg-type]
    world.disk_max_s = 0.0
    return world


def test_a_single_steward_leads_and_commits_at_once() -> None:
    world = _instant()
    world.start("a")
    core = world.sites["a"].core
    assert core is not None
    assert (core.is_leader, core.ready, core.leader) == (True, True, world.sites["a"].id)
    assert (core.term, core.commit_index, core.voters) == (1, 1, (world.sites["a"].id,))
    world.propose()
    world.run(0.0)
    assert world.sites["a"].shown.index == 2 and world.now == 0.0
    assert core.deadline() > 0.0


def test_effects_of_a_proposal_stand_in_order() -> None:
    """One drain: persist, then the update to the subscriber and the commit; no timer, no reply."""
    world = _instant("ab")
    world.start("ab")
    world.run(1.0)
    core = world.sites["a"].core
    assert core is not None
    core.propose(world.now, Paused("x"))
    core.propose(world.now, Paused("y"))
    effects = core.drain()
    kinds = [type(e) for e in effects]
    assert kinds == [Persist, Send, Emit]
    update, emitted = effects[1].message, effects[2].event  # type: ignore[union-attr]
    assert isinstance(update, Update) and len(update.entries) == 2
    assert update.certificate is not None and update.certificate.index == core.commit_index
    assert isinstance(emitted, Committed)
    assert [e.body for e in emitted.entries] == [Paused("x"), Paused("y")]


def test_three_stewards_commit_in_one_round_trip() -> None:
    world = _instant("abcd")
    world.latency_s = 0.0
    world.settled("abc")
    world.run(5.0)  # the follower has found the leader
    leader = world.leader()
    assert leader is not None
    start, before = world.now, Counter(world.sent)
    world.propose()
    index = leader.core.last_index  # type: ignore[union-attr]
    assert world.run(1.0, lambda: leader.shown.index == index)
    assert world.now - start == pytest.approx(0.002)  # one millisecond each way
    assert world.run(1.0, world.caught_up)
    assert world.now - start == pytest.approx(0.003)
    used = world.sent - before
    assert used == {"Append": 4, "AppendReply": 4, "Update": 1} or used["Append"] <= 4


# --- misuse --------------------------------------------------------------------------------------


def test_misuse_is_refused() -> None:
    world = _instant("ab")
    world.start("ab")
    world.run(1.0)
    a, b = world.sites["a"].core, world.sites["b"].core
    assert a is not None and b is not None
    me, other = world.sites["a"].id, world.sites["b"].id
    with pytest.raises(LocalProtocolError, match="does not lead"):
        b.propose(world.now, Paused("no"))
    with pytest.raises(LocalProtocolError, match="does not lead"):
        b.change_voters(world.now, (other,))
    for body in (NoOp(), StewardsChanged((me,)), make_genesis(FOUNDER, RUN, me)):
        with pytest.raises(LocalProtocolError, match="the log's own"):
            a.propose(world.now, body)
    with pytest.raises(LocalProtocolError, match="generation is 0"):
        a.propose(world.now, Rewound(2, "", (), (), ()))
    with pytest.raises(LocalProtocolError, match="grant"):
        a.change_voters(world.now, (other,))
    with pytest.raises(LocalProtocolError, match="2 voters"):
        a.change_voters(world.now, (me, other))
    with pytest.raises(LocalProtocolError, match="only steward"):
        a.hand_over(world.now)
    with pytest.raises(LocalProtocolError, match="not a message of the log"):
        a.receive(world.now, other, Ping(1))
    assert a.last_index == 1


def test_a_founder_must_be_the_one_that_genesis_names() -> None:
    world = World(1, "ab")
    world.sites["b"].genesis = world.sites["a"].genesis
    with pytest.raises(LocalProtocolError, match="another steward"):
        world.start("b")


def test_a_proposal_without_majority_is_bounded() -> None:
    world = World(1, "abc").settled("abc")
    leader = world.leader()
    assert leader is not None and leader.core is not None
    world.split(leader.name, "".join(n for n in "abc" if n != leader.name))
    core = leader.core
    with pytest.raises(LocalProtocolError, match="too many"):
        for _ in range(2000):
            core.propose(world.now, Paused("z"))
    assert world.run(4.0, lambda: not core.is_leader)  # it cannot hear a majority


# --- several stewards ----------------------------------------------------------------------------


def test_promotion_and_back_again() -> None:
    world = World(4, "abcde").settled("a")
    for names in ("abc", "abcde", "cde", "c", "bcd", "d"):
        world.vote_with(names)
        assert world.run(8.0, lambda names=names: world.set_in_force(names)), names  # type: ignore[misc]
        assert world.run(5.0, lambda: world.leader() is not None)
        world.propose()
        assert world.run(3.0, world.caught_up), names
        world.check()
    log = world.sites["a"].core._s.log  # type: ignore[union-attr]
    bodies = [log.trust.genesis(log.genesis)[0].steward == world.sites["a"].id]
    assert bodies == [True] and len(log.links) == 12


def _seconds_without_a_leader(*, notified: bool) -> float:
    world = World(5, "abcd").settled("abc")
    old = world.leader()
    assert old is not None
    world.run(1.0)
    old.core, old.queue = None, []  # dies without a word
    for other in world.sites.values() if notified else ():
        other.call(lambda core: core.disconnected(world.now, old.id))
    start = world.now
    assert world.run(6.0, lambda: _ready(world))
    return world.now - start


def _ready(world: World) -> bool:
    leader = world.leader()
    return leader is not None and leader.core is not None and leader.core.ready


def test_losing_the_leader_costs_one_election_and_a_broken_link_speeds_it_up() -> None:
    assert _seconds_without_a_leader(notified=True) < 0.5
    assert 1.0 <= _seconds_without_a_leader(notified=False) < 4.0


def test_a_lone_voter_that_returns_does_not_unseat_the_leader() -> None:
    world = World(6, "abc").settled("abc")
    leader = world.leader()
    assert leader is not None and leader.core is not None
    lonely = next(s for s in world.sites.values() if s is not leader)
    world.split(lonely.name, "".join(n for n in "abc" if n != lonely.name))
    term = leader.core.term
    world.run(15.0)
    world.cut = set()
    world.run(5.0)
    assert leader.core.is_leader and leader.core.term == term
    assert lonely.core is not None and lonely.core.leader == leader.id


def test_a_leader_hands_over_within_one_round_trip() -> None:
    world = World(7, "abc").settled("abc")
    world.run(1.0)
    old = world.leader()
    assert old is not None
    start = world.now
    old.call(lambda core: core.hand_over(world.now))
    assert world.run(1.0, lambda: _ready(world))
    assert world.leader() is not old and world.now - start < 0.2


# --- restart and catch-up ------------------------------------------------------------------------


def test_restart_emits_the_log_again_from_the_snapshot_on() -> None:
    world = _instant(compact_every=10)
    world.start("a")
    for _ in range(34):
        world.propose()
        world.run(0.01)
    site = world.sites["a"]
    before = site.shown.digest, site.shown.index
    assert len(site.disk) < 20  # compacted
    site.crash()
    core = LogCore(
        run=RUN,
        founder=FOUNDER.peer_id,
        keyring=site.keyring,
        rng=random.Random(1),
        now=world.now,
        records=site.disk,
        genesis=site.genesis,
        snapshot_of=site.ledger.snapshot,
        compact_every=10,
    )
    events = [e.event for e in core.drain() if isinstance(e, Emit)]
    assert isinstance(events[0], SnapshotLoaded) and events[0].index == 30
    ledger = Ledger()
    ledger.load(30, events[0].data)
    for event in events[1:]:
        for entry in event.entries if isinstance(event, Committed) else ():
            if entry.index <= before[1]:
                ledger.apply(entry.index, entry.term, entry.body)
    assert (ledger.digest, ledger.index) == before
    assert core.is_leader and core.ready and core.term == 2


def test_a_newcomer_far_behind_gets_a_snapshot_and_verifies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(8, "abcdef", compact_every=10)
    world.start("abcde")
    world.admit("bcde")
    for names in ("abc", "bcd"):
        world.vote_with(names)
        assert world.run(8.0, lambda names=names: world.set_in_force(names))  # type: ignore[misc]
        assert world.run(5.0, lambda: world.leader() is not None)
        for _ in range(30):
            world.propose()
            world.run(0.02)
    world.oracle.seen.clear()
    world.start("f")
    assert world.run(5.0, world.caught_up)
    f = world.sites["f"].core
    assert f is not None and world.oracle.seen["snapshot loaded"] == 1
    assert f._s.log.base.index >= 50 and len(f._s.log.links) == 4
    assert f.voters == tuple(sorted(world.sites[n].id for n in "bcd"))


def test_a_large_snapshot_comes_in_pieces_over_a_link_that_loses_some() -> None:
    world = World(9, "abc", compact_every=10)
    noise = random.Random(1).randbytes(700_000)
    world.start("ab")
    for site in (world.sites["a"], world.sites["b"]):
        assert site.core is not None
        plain = site.ledger.snapshot
        site.core._snapshots._take = lambda plain=plain: plain()[:0] + noise  # type: ignore[misc]
    world.oracle.loaded = lambda *a: None  # type: ignore[method-assign]
    for _ in range(40):
        world.propose()
        world.run(0.02)
    world.drop, world.latency_s = 0.1, 0.0
    c = world.sites["c"]
    loads: list[bytes] = []
    c.apply = c.show = lambda event: (  # type: ignore[method-assign,assignment]
        loads.append(event.data) if isinstance(event, SnapshotLoaded) else None
    )
    c.start()
    assert world.run(20.0, lambda: bool(loads))
    assert loads == [noise]


def test_a_follower_changes_a_silent_source_and_serves_others_itself() -> None:
    world = World(10, "abcd", hints=3).settled("a")
    # d hears only b; b hears a.
    world.cut = {(x, y) for x, y in (("a", "d"), ("d", "a"), ("c", "d"), ("d", "c"))}
    for _ in range(100):
        world.propose()
        world.run(0.25)
    assert world.sites["d"].shown.index >= len(world.oracle.truth) - 6
    assert world.sites["d"].core.source == world.sites["b"].id  # type: ignore[union-attr]


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


# --- lies ----------------------------------------------------------------------------------------


def test_two_certificates_that_conflict_halt_the_log_with_a_proof() -> None:
    """Run the steward twice from the same disk: its two lives sign different entries."""
    world = _instant("abc")
    world.start("a")
    world.run(0.0)
    fork = list(world.sites["a"].disk)
    world.start("bc")
    world.run(1.0)
    world.propose(body=Paused("for b"))
    world.run(1.0)
    liar = LogCore(
        run=RUN, founder=FOUNDER.peer_id, keyring=world.sites["a"].keyring, now=0.0,
        rng=random.Random(1), records=fork, genesis=None, snapshot_of=bytes, timeouts=TIMEOUTS,
    )  # fmt: skip
    liar.propose(0.0, Paused("for nobody else"))
    liar.drain()
    b = world.sites["b"].core
    assert b is not None
    # Its second life led from term 2 on, and contradicts what b has verified at index 2.
    liar.receive(0.0, world.sites["b"].id, Subscribe(0, 2, 2))
    for effect in liar.drain():
        if isinstance(effect, Send):
            b.receive(world.now, world.sites["a"].id, effect.message)
    events = [e.event for e in b.drain() if isinstance(e, Emit)]
    (conflict,) = [e for e in events if isinstance(e, Conflict)]
    assert b.halted and conflict.proof.index == 2 and conflict.proof.adds_up()
    assert len(conflict.proof.theirs_after) == 1
    b.tick(world.now + 100)
    assert b.drain() == [] and b.deadline() == float("inf")


@pytest.mark.parametrize("what", ["entry", "signature", "nobody", "stranger", "term"])
def test_a_follower_believes_no_forged_update(what: str) -> None:
    world = _instant("ab")
    world.start("a")
    a, b = world.sites["a"], world.sites["b"]
    b.start()
    world.run(0.5)
    assert b.core is not None and a.core is not None
    a.core.propose(world.now, Paused("true"))
    (true,) = [e.message for e in a.core.drain() if isinstance(e, Send)]
    b.core.receive(world.now, a.id, _forged(true, what, KeyedHash("stranger")))
    events = [e.event for e in b.core.drain() if isinstance(e, Emit)]
    assert [e.code for e in events if isinstance(e, PeerFault)] == ["bad_certificate"]
    assert b.core.commit_index == 1
    assert b.core.source is None  # it looks for another, and finds only this one
    b.core.tick(world.now + 1.0)
    (asked,) = [e.message for e in b.core.drain() if isinstance(e, Send)]
    assert asked == Subscribe(0, 2, 2)
    b.core.receive(world.now + 1.0, a.id, true)
    assert b.core.commit_index == 2


def _forged(message: Message, what: str, stranger: Keyring) -> Message:
    from msgspec.structs import replace

    assert isinstance(message, Update) and message.certificate is not None
    c = message.certificate
    (signed,) = c.endorsements
    if what == "entry":
        body = message.entries[0].body.replace(b"true", b"lies")
        return replace(message, entries=(replace(message.entries[0], body=body),))
    if what == "signature":
        bad = replace(signed, signature=bytes(64))
        return replace(message, certificate=replace(c, endorsements=(bad, bad)))
    if what == "nobody":
        return replace(message, certificate=replace(c, endorsements=()))
    if what == "term":
        return replace(message, certificate=replace(c, term=c.term + 1))
    key = replace(signed, signer=stranger.peer_id)
    return replace(message, certificate=replace(c, endorsements=(key,)))


def test_only_keys_with_a_grant_can_lead_or_be_voted_for() -> None:
    world = _instant("abx")
    world.start("abx")
    world.propose(body=joined(world.sites["b"].id))
    world.propose(body=joined(world.sites["x"].id, may_vote=False))
    world.run(1.0)
    b, x = world.sites["b"].core, world.sites["x"]
    assert b is not None
    last = b._s.log.last
    b.tick(world.now + 100)
    b.drain()
    for message in (
        VoteRequest(0, 50, False, False, last.index, last.term),
        Append(0, 50, 0, last.index + 1, last.chain_hash),
    ):
        b.receive(world.now + 100, x.id, message)
        assert b.drain() == [] and b._s.term == 1


# --- real signatures -----------------------------------------------------------------------------


def test_with_ed25519() -> None:
    def key(name: str) -> Ed25519Keyring:
        return Ed25519Keyring(name.encode() * 32)

    world = World(12, "abcd", compact_every=8, keyrings=key, founder=key("f")).settled("abc")
    for _ in range(20):
        world.propose()
        world.run(0.05)
    assert world.run(3.0, world.caught_up)
    leader = world.leader()
    assert leader is not None
    leader.crash()
    assert world.run(5.0, world.propose)
    assert world.run(3.0, world.caught_up)
    world.check()
    assert leader.name in "abc" and world.oracle.seen["compacted"] > 0


def test_leader_changes_are_told_once() -> None:
    world = World(13, "abc").settled("abc")
    world.run(5.0)
    for site in world.sites.values():
        told = [e for e in site.events if isinstance(e, LeaderChanged)]
        assert all(x != y for x, y in pairwise(told))
        leader = world.leader()
        assert leader is not None and told[-1].leader == leader.id
