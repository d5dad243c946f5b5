"""Lives of one site, and members that are turned out: by order, at once, or by a second self."""

from __future__ import annotations

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.ledger import load_snapshot
from swarmtrain_protocols.membership import Joiner
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.node_events import JoinFailed
from tests.protocols.rounds_kit import A, B, C, D, events, joined, opening, sent
from tests.protocols.test_membership import Door, Fold, asked, grant, site


def test_every_process_registers_and_who_is_replaced_asks_no_more() -> None:
    """Two machines with one identity: the log knows one of them."""
    door = Door(A)
    door.joiner = Joiner(B, site(life=b"second"), door.log.ledger, door.out)
    door.log.add(joined(B, name="b", life=b"first"))
    assert not door.joiner.satisfied() and not door.joiner.registered
    ((_, request),) = sent(door.step(1.0, A), mm.JoinRequest)
    assert request.life == b"second"
    assert door.joiner.refused == "", "it has not been in: it may well be the same site, restarted"
    door.log.add(joined(B, name="b", life=b"second"))
    assert door.joiner.satisfied() and door.joiner.registered
    door.log.add(joined(B, name="b", life=b"third"))
    effects = door.step(9.0, A)
    assert asked(effects) == [] and door.joiner.refused == "duplicate"
    assert [x.code for x in events(effects, JoinFailed)] == ["duplicate"]


def test_an_older_ledger_replaces_nobody() -> None:
    """After a recovery the log may know of an earlier life only."""
    door = Door(A)
    door.joiner = Joiner(B, site(life=b"second"), door.log.ledger, door.out)
    door.log.add(joined(B, name="b", life=b"first"))
    older = load_snapshot(door.log.ledger.snapshot())
    door.log.add(joined(B, name="b", life=b"second"))
    assert door.joiner.satisfied()
    door.joiner.ledger = older
    assert asked(door.step(9.0, A)) == [A] and door.joiner.refused == ""


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (e.MemberLeft(B, "evicted: noisy"), "evicted"),
        (e.MemberBanned(B, "lied"), "banned"),
        (e.MemberLeft(B, "lost"), ""),
        (e.MemberLeft(C, "evicted: noisy"), ""),
    ],
)
def test_who_is_turned_out_does_not_ask_again_and_who_was_lost_does(
    body: e.MemberLeft | e.MemberBanned, code: str
) -> None:
    door = Door(A)
    door.log.add(joined(B, name="b"))
    assert door.joiner.satisfied()
    door.log.add(body)
    door.joiner.turned_out(body)
    assert door.joiner.refused == code
    assert len(asked(door.step(2.0, A))) == (not code and body.member == B)


def test_what_befell_an_earlier_process_is_history() -> None:
    """A site that returns reads of its ban in the log, and only then that it was lifted."""
    door = Door(A)
    banned = e.MemberBanned(B, "lied")
    door.log.add(banned)
    door.joiner.turned_out(banned)
    door.log.add(e.MemberBanned(B, "", lifted=True))
    assert door.joiner.refused == "" and asked(door.step(2.0, A)) == [A]


def test_who_goes_down_at_once_is_let_go_at_once_unless_it_votes() -> None:
    fold = Fold(A, B, C, model=True)
    fold.log.add(e.StewardsChanged((A,)))
    fold.log.add(opening(fold.log.ledger, [A, B], owners=(A, B)))
    fold.shepherd.leave(1.0, B, "leave", at_once=True)
    assert fold.proposed == [e.MemberLeft(B, "leave")]
    fold.proposed.clear()
    fold.shepherd.leave(1.0, A, "leave", at_once=True)
    assert fold.proposed == []


def test_patience_grows_with_measured_delays_up_to_a_bound() -> None:
    fold = Fold(A, B)
    fold.links.clear()
    for factor, waits_s in ((1.0, 30.0), (2.0, 60.0), (30.0, 120.0)):
        fold.shepherd._patience = lambda factor=factor: factor
        fold.shepherd._missing.clear()
        fold.shepherd.step(10.0)
        assert fold.shepherd.deadline() == 10.0 + waits_s


def test_a_steward_that_is_turned_out_is_replaced_first() -> None:
    fold = Fold(A, B, C, D)
    three = tuple(sorted((A, B, C)))
    fold.log.add(e.StewardsChanged(three))
    fold.shepherd.turn_out(1.0, e.MemberBanned(B, "noise"))
    assert fold.proposed == [] and fold.voters == [tuple(sorted((A, C, D)))]
    fold.join(1.5, B, grant())
    assert fold.proposed == [], "it cannot undo that by asking again"
    fold.log.add(e.StewardsChanged(fold.voters[0]))
    fold.shepherd.step(2.0)
    assert fold.commit() == [e.MemberBanned(B, "noise")]
    assert B in fold.log.ledger.banned
