"""What entries make of the ledger; what does not fit is ignored by everybody alike."""

from __future__ import annotations

import msgspec
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.ledger import Ledger, load_snapshot
from swarmtrain_protocols.messages.common import RoundKey
from tests.protocols.rounds_kit import (
    FOUNDER,
    GROUP,
    RUN,
    TRAIN,
    VALUES,
    A,
    B,
    C,
    D,
    Log,
    defined,
    hash_of,
    joined,
    key,
    opening,
)


def test_genesis_names_run_founder_and_first_steward_once() -> None:
    ledger = Ledger()
    assert ledger.apply(0, e.Genesis(RUN, FOUNDER.peer_id, A, bytes(64)))
    assert (ledger.run, ledger.founder, ledger.voters) == (RUN, FOUNDER.peer_id, (A,))
    assert not ledger.apply(1, e.Genesis(bytes(32), B, B, bytes(64)))
    assert ledger.run == RUN and ledger.index == 1
    with pytest.raises(AssertionError):
        ledger.apply(1, e.NoOp())


def test_members_join_update_leave_and_return() -> None:
    log = Log(A, B, model=False)
    assert [m.ordinal for m in log.ledger.ordered_members()] == [0, 1]
    assert log.add(joined(B, may_vote=False, name="new"))
    assert log.ledger.members[B].may_vote, "a grant is not taken back by a later request"
    assert (log.ledger.members[B].name, log.ledger.members[B].ordinal) == ("new", 1)
    assert log.add(e.MemberLeft(B, "leave"))
    assert not log.add(e.MemberLeft(B, "leave"))
    assert log.add(joined(B))
    assert log.ledger.members[B].ordinal == 2, "an ordinal is never used again"


def test_a_banned_member_is_out_and_stays_out() -> None:
    log = Log(A, B, model=False)
    assert log.add(e.MemberBanned(B, "lied"))
    assert B not in log.ledger.members
    assert not log.add(joined(B))
    assert log.ledger.banned == {B: "lied"}


def test_members_have_a_bound() -> None:
    log = Log(model=False)
    for number in range(limits.MEMBERS_MAX):
        assert log.add(joined(number.to_bytes(32, "big")))
    assert not log.add(joined(b"\xff" * 32))
    assert log.add(joined(bytes(32), name="known"))


def test_a_ticket_of_limited_uses_is_used_up_by_distinct_members() -> None:
    log = Log(A, model=False)
    ticket = {"ticket": b"12345678", "uses": 2}
    assert log.add(joined(B, **ticket))
    assert log.add(joined(B, **ticket))
    assert log.add(joined(C, **ticket))
    assert log.ledger.ticket_used_up(b"12345678", 2, D)
    assert not log.add(joined(D, **ticket))
    assert log.add(e.MemberLeft(B, "lost"))
    assert not log.add(joined(D, **ticket)), "leaving does not give a use back to others"
    assert log.add(joined(B, **ticket)), "a bearer may return"
    assert log.add(joined(D, ticket=b"87654321", uses=1))
    assert log.add(joined(D, ticket=b"any number"))
    assert b"any number" not in log.ledger.bearers, "unlimited tickets are not counted"


def test_the_model_is_defined_once_and_has_to_make_sense() -> None:
    log = Log(A, model=False)
    two = (e.ChannelLayout(TRAIN, 1), e.ChannelLayout(TRAIN, 1))
    other = (e.ChannelLayout("group/x", 1),)
    outside = (e.ChannelLayout(TRAIN, 9, ((0, 2), (8, 10))),)
    huge = (e.ChannelLayout(TRAIN, limits.VALUES_PER_CHANNEL_MAX + 1),)
    bad = [
        defined(values=0),
        e.ModelDefined(bytes(32), (), (), A),
        e.ModelDefined(bytes(32), two, (bytes(32),) * 2, A),
        e.ModelDefined(bytes(32), two[:1], (bytes(32),) * 2, A),
        e.ModelDefined(bytes(32), other, (bytes(32),), A),
        e.ModelDefined(bytes(32), huge, (bytes(32),), A),
        e.ModelDefined(bytes(32), outside, (bytes(32),), A),
    ]
    for body in bad:
        assert not log.add(body)
    assert log.ledger.model is None and log.ledger.channels == {}
    assert log.add(defined())
    assert not log.add(defined(values=3))
    assert log.ledger.channels[TRAIN].pinned_hash(0) == hash_of("state 0")
    assert log.ledger.plain_ranges(TRAIN) == log.ledger.plain_ranges("group/x") == ()


def test_the_model_says_which_values_do_not_decay() -> None:
    log = Log(A, model=False)
    assert log.ledger.plain_ranges(TRAIN) == ()
    ranges = ((0, 2), (8, 9))
    layout = (e.ChannelLayout("train/0/1", 9), e.ChannelLayout(TRAIN, 9, ranges))
    assert log.add(e.ModelDefined(bytes(32), layout, (bytes(32),) * 2, A))
    again = load_snapshot(log.ledger.snapshot())
    assert again.plain_ranges(TRAIN) == ranges and again.plain_ranges("train/0/1") == ()


def test_an_attempt_has_one_outcome() -> None:
    log = Log(A, B)
    opened = log.open([A, B])
    channel = log.ledger.channels[TRAIN]
    assert not log.add(e.RoundCommitted(opened.key, hash_of("early")))  # no set yet
    assert not log.add(opening(log.ledger, [A]))  # already open
    log.choose(opened)
    assert not log.add(e.RoundSet(opened.key, (e.Coefficient(0, 1.0),)))  # a second set
    log.commit(opened, hash_of("result"))
    for late in (
        e.RoundAborted(opened.key, "late"),
        e.RoundCommitted(opened.key, hash_of("other")),
        opened,
    ):
        assert not log.add(late)
    assert (channel.round, channel.attempt, channel.open) == (1, 0, None)
    done = channel.outcome(0)
    assert done is not None and done.root == hash_of("result")
    assert done.contributors == ((A, 4.0, 0.5), (B, 4.0, 0.5))
    assert done.held_by == opened.holders
    assert (log.ledger.rounds_committed, log.ledger.rounds_aborted) == (1, 0)


def test_an_abort_moves_to_the_next_attempt_of_the_same_round() -> None:
    log = Log(A, B)
    first = log.open([A, B])
    log.choose(first)
    assert log.add(e.RoundAborted(first.key, "owner lost"))
    channel = log.ledger.channels[TRAIN]
    assert (channel.round, channel.attempt, channel.aborted) == (0, 1, 1)
    assert channel.last_abort == "owner lost" and channel.chosen is None
    assert log.ledger.next_key(TRAIN) == key(0, 1)
    assert not log.add(e.RoundCommitted(first.key, hash_of("late")))
    second = log.open([A])
    assert second.key == key(0, 1)


@pytest.mark.parametrize("indices", [(), (2,), (1, 0), (0, 0)])
def test_a_set_lists_contributors_in_order_and_once(indices: tuple[int, ...]) -> None:
    log = Log(A, B)
    opened = log.open([A, B])
    body = e.RoundSet(opened.key, tuple(e.Coefficient(i, 0.5) for i in indices))
    assert not log.add(body)
    assert log.ledger.channels[TRAIN].chosen is None


def test_wrong_keys_paused_and_ended_runs_open_nothing() -> None:
    log = Log(A)
    body = opening(log.ledger, [A])
    for wrong in (
        RoundKey(1, TRAIN, 0, 0),
        RoundKey(0, TRAIN, 1, 0),
        RoundKey(0, TRAIN, 0, 1),
        RoundKey(0, "train/9/9", 0, 0),
        RoundKey(0, "other", 0, 0),
    ):
        assert not log.add(msgspec.structs.replace(body, key=wrong))
    assert not log.add(msgspec.structs.replace(body, contributors=()))
    assert not log.add(msgspec.structs.replace(body, parts=()))
    log.add(e.Paused(""))
    assert log.ledger.paused == "paused"
    assert not log.add(body)
    log.add(e.Resumed(""))
    assert log.add(body)
    assert log.add(e.RunEnded("enough"))
    assert not log.add(e.RunEnded("again"))
    assert log.ledger.ended == "enough"
    assert log.add(e.RoundAborted(body.key, "what is open is still decided"))
    assert not log.add(opening(log.ledger, [A]))


def test_a_rewind_goes_back_in_a_new_generation() -> None:
    log = Log(A)
    for number in range(3):
        opened = log.open([A])
        log.choose(opened)
        log.commit(opened, hash_of(f"result {number}"))
    log.open([A])
    assert not log.add(e.Rewound(2, "skips one", (TRAIN,), (1,), (hash_of("state 1"),)))
    assert not log.add(e.Rewound(1, "lengths differ", (TRAIN,), (), ()))
    assert log.ledger.generation == 0
    names, rounds = (TRAIN, "train/7/7"), (1, 5)
    roots = (hash_of("state 1"), hash_of("unknown channel"))
    assert log.add(e.Rewound(1, "data loss", names, rounds, roots))
    channel = log.ledger.channels[TRAIN]
    assert (channel.round, channel.attempt, channel.open) == (1, 0, None)
    assert [x.round for x in channel.history] == [0]
    assert channel.pinned_hash(1) == hash_of("state 1")
    assert log.ledger.next_key(TRAIN) == RoundKey(1, TRAIN, 1, 0)


def test_history_is_bounded_by_rounds_and_by_size() -> None:
    log = Log(A, B, C)
    for number in range(limits.HISTORY_ROUNDS + 5):
        opened = log.open([A])
        log.choose(opened)
        log.commit(opened, hash_of(f"result {number}"))
    channel = log.ledger.channels[TRAIN]
    assert [x.round for x in channel.history] == list(range(5, limits.HISTORY_ROUNDS + 5))
    assert channel.outcome(4) is None and channel.pinned_hash(4) is None
    many = [number.to_bytes(32, "big") for number in range(1000)]
    for _ in range(40):
        opened = log.open(many, holders=[A])
        log.choose(opened)
        log.commit(opened, hash_of("big"))
    assert len(channel.history) == limits.HISTORY_RECORDS_MAX // 1002
    assert len(log.ledger.snapshot()) < limits.SNAPSHOT_BYTES_MAX // 2


def test_who_was_listed_is_remembered_within_bounds() -> None:
    log = Log(A, model=False)
    for number in range(limits.CHANNELS_MAX):
        opened = log.open([A], channel=f"group/{number}")
        log.add(e.RoundAborted(opened.key, "x"))
    for number in range(300):
        opened = log.open([number.to_bytes(32, "big")], channel="group/0")
        log.add(e.RoundAborted(opened.key, "x"))
    listed = log.ledger.channels["group/0"].listed
    assert len(listed) == limits.HISTORY_RECORDS_MAX // limits.CHANNELS_MAX
    assert list(listed)[-1] == (299).to_bytes(32, "big")


def test_idle_groups_make_room_and_a_forgotten_name_never_repeats_a_key() -> None:
    """Bounded table: names come from members, and a full table must not shut groups out."""
    log = Log(A, model=False)

    def round_of(name: str) -> e.RoundOpened:
        opened = log.open([A], channel=name)
        log.choose(opened)
        log.commit(opened, hash_of(name))
        return opened

    first = round_of("group/0")
    round_of("group/0")
    for number in range(1, limits.CHANNELS_MAX):
        round_of(f"group/{number}")
    busy = log.open([A], channel="group/1")
    round_of("group/0")  # used just now: not the idle one any more
    assert len(log.ledger.channels) == limits.CHANNELS_MAX
    round_of("group/new")
    assert len(log.ledger.channels) == limits.CHANNELS_MAX
    assert "group/2" not in log.ledger.channels  # idle for longest; group/1 is busy
    assert log.ledger.channels["group/1"].open == busy
    again = log.ledger.next_key("group/2")
    assert again is not None and again.round >= 1 and first.key.round == 0
    for number in range(400):
        round_of(f"group/more {number}")
    revived = log.ledger.next_key("group/0")
    assert revived is not None and revived.round >= 3
    assert len(log.ledger.channels) == limits.CHANNELS_MAX


def test_a_table_full_of_open_groups_has_no_room() -> None:
    log = Log(A, model=False)
    for number in range(limits.CHANNELS_MAX):
        log.open([A], channel=f"group/{number}")
    assert log.ledger.next_key("group/more") is None
    assert not log.add(e.RoundOpened(key(channel="group/more"), *_fields()))
    assert len(log.ledger.channels) == limits.CHANNELS_MAX


def _fields() -> tuple[object, ...]:
    body = opening(Log(A).ledger, [A], channel=GROUP)
    return tuple(getattr(body, name) for name in body.__struct_fields__[1:])


def test_a_snapshot_carries_everything() -> None:
    log = Log(A, B)
    log.add(joined(C, ticket=b"12345678", uses=1))
    opened = log.open([A, B])
    log.choose(opened)
    log.open([A], channel=GROUP)
    log.add(e.StewardsChanged((A, B), (A,)))
    copy = load_snapshot(log.ledger.snapshot())
    assert copy == log.ledger
    body = e.RoundCommitted(opened.key, hash_of("result"), (A,))
    assert copy.apply(copy.index + 1, body) and log.add(body)
    assert copy.snapshot() == log.ledger.snapshot()
    assert (copy.voters, copy.joint) == ((A, B), (A,))
    assert copy.channels[TRAIN].values == VALUES


@pytest.mark.parametrize("data", [b"", b"\xc1", msgspec.msgpack.encode({"run": "x\udcff"[:1]})])
def test_a_damaged_snapshot_is_malformed(data: bytes) -> None:
    with pytest.raises(PeerFault, match="malformed"):
        load_snapshot(data)


def test_a_snapshot_with_bad_text_is_malformed() -> None:
    good = Log(A).ledger
    good.ended = "MARK"
    data = good.snapshot().replace(b"MARK", b"\xff\xfe\xff\xfe")
    with pytest.raises(PeerFault, match="malformed"):
        load_snapshot(data)


def test_who_may_vote() -> None:
    log = Log(B, model=False)
    log.add(joined(C, may_vote=False))
    assert [log.ledger.may_vote(x) for x in (A, B, C, D)] == [True, True, False, False]
