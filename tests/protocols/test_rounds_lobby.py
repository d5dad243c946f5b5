"""The leader's waiting rooms: bounded, and emptied of what the ledger has made void."""

from __future__ import annotations

import msgspec

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.memo import Noted
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.messages.member import StateReport
from swarmtrain_protocols.rounds.lobby import REPORT_WAIT_S, Lobbies, Lobby
from swarmtrain_protocols.rounds.policy import RoundPolicy
from tests.protocols.rounds_kit import GROUP, TRAIN, VALUES, A, B, C, D, Log, hash_of, joined

POLICY = RoundPolicy("fp32", "fp32", chunk_values=8)


def ready(channel: str = GROUP, **changes: object) -> m.Ready:
    good = m.Ready(0, channel, hash_of("given"), VALUES, "fp32", 1.0, 0)
    return msgspec.structs.replace(good, **changes)


def at(round_number: int, **changes: object) -> StateReport:
    good = StateReport(0, TRAIN, round_number, hash_of("state"), True, True)
    return msgspec.structs.replace(good, **changes)


def rooms(policy: RoundPolicy = POLICY) -> Lobbies:
    return Lobbies(policy, 0.0)


def test_rooms_for_invented_names_are_bounded() -> None:
    """Bad input: a member announces to ever new groups, or withdraws from and reports to them."""
    log, lobbies = Log(A, B, C), rooms()
    for number in range(10 * limits.CHANNELS_MAX):
        name = f"group/{number}"
        lobbies.withdrawn(PeerId(B), m.Withdraw(0, name, hash_of("given")))
        lobbies.reported(log.ledger, PeerId(B), at(0, channel=name))
        lobbies.reported(log.ledger, PeerId(B), at(0, channel=f"train/7/{number}"))
    assert lobbies.rooms == {}
    codes = [
        lobbies.announced(0.0, log.ledger, PeerId(B), ready(f"group/{number}"))
        for number in range(2 * limits.GROUPS_PER_MEMBER_MAX)
    ]
    assert codes == [""] * limits.GROUPS_PER_MEMBER_MAX + ["flood"] * limits.GROUPS_PER_MEMBER_MAX
    assert lobbies.announced(0.0, log.ledger, PeerId(C), ready("group/own")) == ""
    # One that takes everything back has room again, and empty rooms do not pile up.
    for number in range(20 * limits.CHANNELS_MAX):
        name = f"group/new {number}"
        assert lobbies.announced(0.0, log.ledger, PeerId(A), ready(name)) == ""
        lobbies.withdrawn(PeerId(A), m.Withdraw(0, name, hash_of("given")))
    assert len(lobbies.rooms) <= 2 * limits.CHANNELS_MAX


def test_what_strangers_report_is_not_kept() -> None:
    log, lobbies = Log(A, B), rooms()
    lobbies.reported(log.ledger, PeerId(D), at(0))
    lobbies.reported(log.ledger, PeerId(B), at(0, generation=3))
    assert lobbies.rooms == {}
    lobbies.reported(log.ledger, PeerId(B), at(0))
    assert list(lobbies.room(TRAIN).reports) == [B]


def test_a_suspension_holds_only_while_others_are_enough() -> None:
    """It ends with rounds: where they need the suspended, they do not wait for its end."""
    log, everybody = Log(A, B, C), [A, B, C]
    two, three = (rooms(RoundPolicy("fp32", "fp32", min_peers=count)) for count in (2, 3))
    log.add(e.MemberSuspended(B, "silent"))
    assert two.usable(log.ledger, TRAIN, everybody) == [A, C]
    assert two.usable(log.ledger, TRAIN, [A, B]) == [A], "C may return"
    assert three.usable(log.ledger, TRAIN, everybody) == everybody
    log.add(e.MemberSuspended(C, "silent"))
    assert two.usable(log.ledger, TRAIN, everybody) == everybody


def test_only_the_very_contribution_is_withdrawn() -> None:
    log, lobbies = Log(A, B), rooms()
    lobbies.announced(1.0, log.ledger, PeerId(B), ready())
    lobbies.withdrawn(PeerId(B), m.Withdraw(0, GROUP, hash_of("older")))
    lobbies.withdrawn(PeerId(A), m.Withdraw(0, GROUP, hash_of("given")))
    assert list(lobbies.room(GROUP).ready) == [B]
    lobbies.withdrawn(PeerId(B), m.Withdraw(0, GROUP, hash_of("given")))
    assert lobbies.room(GROUP).ready == {}


def test_the_clock_starts_with_the_first_announcement() -> None:
    log, lobbies = Log(A, B), rooms()
    lobbies.announced(1.0, log.ledger, PeerId(A), ready())
    lobbies.announced(2.0, log.ledger, PeerId(B), ready())
    assert lobbies.room(GROUP).first_ready == 1.0


def test_a_broken_link_takes_announcement_and_report_away() -> None:
    log, lobbies = Log(A, B), rooms()
    lobbies.announced(1.0, log.ledger, PeerId(B), ready(TRAIN))
    lobbies.reported(log.ledger, PeerId(B), at(0))
    lobbies.disconnected(PeerId(B))
    assert (lobbies.room(TRAIN).ready, lobbies.room(TRAIN).reports) == ({}, {})


def test_a_new_generation_empties_the_rooms_of_training_only() -> None:
    log, lobbies = Log(A, B), rooms()
    lobbies.reconcile(log.ledger)
    for channel in (TRAIN, GROUP):
        lobbies.announced(1.0, log.ledger, PeerId(B), ready(channel))
    lobbies.reported(log.ledger, PeerId(B), at(0))
    lobbies.reconcile(log.ledger)
    assert list(lobbies.room(TRAIN).ready) == [B]
    log.add(e.Rewound(1, "test", (TRAIN,), (0,), (hash_of("state 0"),)))
    lobbies.reconcile(log.ledger)
    assert (lobbies.room(TRAIN).ready, lobbies.room(TRAIN).reports) == ({}, {})
    assert list(lobbies.room(GROUP).ready) == [B]
    assert lobbies.announced(2.0, log.ledger, PeerId(B), ready(TRAIN)) == "stale_generation"


def test_callers_that_left_are_forgotten() -> None:
    log, lobbies = Log(A, B), rooms()
    for peer in (A, B):
        lobbies.announced(1.0, log.ledger, PeerId(peer), ready())
    log.add(e.MemberLeft(B, "leave"))
    lobbies.reconcile(log.ledger)
    assert list(lobbies.room(GROUP).callers) == [A]


def test_who_came_with_a_ticket_for_something_else_does_not_train() -> None:
    log, lobbies = Log(A), rooms()
    log.add(joined(B, role="seed"))
    log.add(joined(C, role="observer"))
    for peer in (B, C):
        fault = lobbies.announced(1.0, log.ledger, PeerId(peer), ready(TRAIN))
        assert fault == "may_not_train" and lobbies.rooms == {}
        assert lobbies.announced(1.0, log.ledger, PeerId(peer), ready(GROUP)) == ""
        lobbies.rooms.clear()
    assert lobbies.announced(1.0, log.ledger, PeerId(A), ready(TRAIN)) == ""


def test_the_shape_of_the_majority_is_summed_and_a_tie_goes_to_the_lowest_member() -> None:
    lobby = Lobby()
    lobby.ready = Noted({A: ready(values=7), B: ready(), C: ready()})
    assert lobby.agreeing([A, B, C]) == [B, C]
    assert lobby.agreeing([A, B]) == [A]
    assert lobby.agreeing([]) == []
    lobby.ready[C] = ready(codec="int8")
    assert lobby.agreeing([B, C]) == [B]


def test_the_odd_one_is_told_apart_when_it_announces() -> None:
    log, lobbies = Log(A, B, C), rooms()
    for peer in (A, B):
        assert lobbies.announced(1.0, log.ledger, PeerId(peer), ready()) == ""
    assert lobbies.announced(1.0, log.ledger, PeerId(C), ready(values=7)) == "bad_shape"


def test_who_has_not_reported_yet_is_waited_for_a_moment() -> None:
    log, lobbies = Log(A, B), rooms()
    lobbies.reported(log.ledger, PeerId(A), at(0))
    early = lobbies.expected(0.1, log.ledger, TRAIN, [A, B])
    late = lobbies.expected(REPORT_WAIT_S, log.ledger, TRAIN, [A, B])
    assert (early, late) == (([A, B], 1), ([A], 1))


def test_the_first_round_waits_for_the_peers_to_start_with() -> None:
    log, lobbies = Log(A), rooms(RoundPolicy("fp32", "fp32", min_peers=2, start_peers=5))
    lobbies.room(TRAIN)
    assert lobbies.expected(9.0, log.ledger, TRAIN, [])[1] == 5
    opened = log.open([A])
    log.choose(opened)
    log.commit(opened, hash_of("result"))
    assert lobbies.expected(9.0, log.ledger, TRAIN, [])[1] == 2


def test_patience_follows_measured_rounds_within_bounds() -> None:
    log, lobbies = Log(A), rooms()
    lobby = lobbies.room(TRAIN)
    assert lobbies.grace_s(TRAIN) == 5.0
    for now in (100.0, 120.0, 140.0):
        lobby.committed(now)
    assert lobbies.grace_s(TRAIN) == 20.0
    lobby.committed(1e6)
    assert lobbies.grace_s(TRAIN) == 60.0
    fixed = rooms(RoundPolicy(grace_s=3.0))
    fixed.room(TRAIN)
    assert fixed.grace_s(TRAIN) == 3.0
    lobbies.announced(0.0, log.ledger, PeerId(A), ready())
    assert lobbies.grace_s(GROUP) == POLICY.group_grace_s
    lobbies.announced(0.0, log.ledger, PeerId(A), ready(expect=3))
    assert lobbies.grace_s(GROUP) == POLICY.expect_grace_s


def test_a_contribution_that_was_listed_is_not_listed_again_by_an_old_announcement() -> None:
    """A member that lags behind the log repeats its announcement on a new link: counting it again
    would sum one contribution twice."""
    log, lobbies = Log(A, B), rooms()
    before = log.ledger.index
    opened = log.open([A, B])
    mine = next(c.root for c in opened.contributors if c.member == B)
    log.choose(opened, 0, 1)
    log.commit(opened, hash_of("result"))
    again = ready(TRAIN, root=mine, codec=opened.scatter_codec)
    assert (
        lobbies.announced(1.0, log.ledger, PeerId(B), msgspec.structs.replace(again, seen=before))
        == ""
    )
    assert B not in lobbies.room(TRAIN).ready
    # Equal values contributed once more, by somebody who has seen the commit, do count.
    now = log.ledger.index
    assert (
        lobbies.announced(2.0, log.ledger, PeerId(B), msgspec.structs.replace(again, seen=now))
        == ""
    )
    assert B in lobbies.room(TRAIN).ready


def test_what_was_said_before_its_maker_was_listed_anew_is_old_whatever_its_root() -> None:
    """Found by the model of spec 08: said to a site that did not lead then, and heard by it when it
    leads after two attempts, both aborted, that listed this contribution and then the next one."""
    log, lobbies = Log(A, B), rooms()
    said = ready(TRAIN, root=hash_of("first"), seen=log.ledger.index)
    for _ in range(2):
        opened = log.open([A, B])
        assert log.add(e.RoundAborted(opened.key, "too slow"))
    assert lobbies.announced(1.0, log.ledger, PeerId(B), said) == ""
    assert B not in lobbies.room(TRAIN).ready
    now = msgspec.structs.replace(said, seen=log.ledger.index)
    assert lobbies.announced(2.0, log.ledger, PeerId(B), now) == ""
    assert B in lobbies.room(TRAIN).ready


def test_what_was_said_before_something_newer_that_came_first_is_old() -> None:
    """Delayed past a second contribution of its sender, it may be in a committed round by now."""
    log, newest = Log(A, B), {}
    lobbies = Lobbies(POLICY, 0.0, newest)
    first = ready(TRAIN, root=hash_of("first"), seen=5)
    assert lobbies.announced(1.0, log.ledger, PeerId(B), ready(TRAIN, seen=9)) == ""
    assert lobbies.announced(2.0, log.ledger, PeerId(B), first) == ""
    assert lobbies.room(TRAIN).ready[B].root == hash_of("given")
    again = Lobbies(POLICY, 3.0, newest)
    assert again.announced(3.0, log.ledger, PeerId(B), first) == ""
    assert B not in again.room(TRAIN).ready, "nor by the next leadership of this site"
    assert again.announced(3.0, log.ledger, PeerId(A), first) == "" and A in again.room(TRAIN).ready


class Refusing:
    """Of a ledger, what vetting asks: who is refused at which index; and what was asked."""

    def __init__(self) -> None:
        self.index = 5
        self.refused: set[bytes] = set()
        self.asked: list[bytes] = []

    def refusal(self, member: bytes, *unused: object) -> str:
        self.asked.append(member)
        return "counted" if member in self.refused else ""


def test_an_announcement_is_vetted_once_while_log_and_round_stand() -> None:
    log, lobbies, ledger = Log(A, B, C), rooms(), Refusing()

    def left(number: int = 0) -> list[bytes]:
        ledger.asked.clear()
        lobbies.drop_stale(ledger, lobbies.rooms[TRAIN], number)  # type: ignore[arg-type]
        return list(lobbies.rooms[TRAIN].ready)

    of_b, of_c = ready(TRAIN), ready(TRAIN, root=hash_of("another"))
    assert lobbies.announced(1.0, log.ledger, PeerId(B), of_b) == ""
    assert left() == [B] and ledger.asked == [B]
    assert lobbies.announced(1.0, log.ledger, PeerId(C), of_c) == ""
    assert left() == [B, C] and ledger.asked == [C], "nothing is new about the first"
    ledger.index, ledger.refused = 6, {B}
    assert left() == [C] and ledger.asked == [B, C], "the log has gone on: who counted goes"
    assert lobbies.announced(1.0, log.ledger, PeerId(B), of_b) == ""
    assert left() == [C] and ledger.asked == [B], "the very same again is looked at again"
    assert left(POLICY.max_base_age_rounds) == [C]
    assert left(POLICY.max_base_age_rounds + 1) == [], "a later round: too old by now"
