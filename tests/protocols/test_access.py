"""Who may enter and who gives orders, as every member reads it from the log."""

from __future__ import annotations

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.access import founder_of, read_capability, refusal
from swarmtrain_protocols.errors import NotAuthorised
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.ledger import Ledger, load_snapshot
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.tickets import Capability, sign_capability
from tests.protocols.rounds_kit import FOUNDER, RUN, A, B, C, D, Log, joined

TICKET = b"ticket-1"
HEIR = FakeKeyring("heir")


def code(log: Log, member: bytes, ticket: bytes = TICKET, uses: int = 0) -> str:
    found = refusal(log.ledger, member, ticket, uses)
    return "" if found is None else found.code


def read(ledger: Ledger, by: Keyring) -> Capability:
    data = sign_capability(by, Capability(TICKET, RUN))
    return read_capability(data, ledger, FOUNDER.peer_id, RUN, 1e9, FOUNDER.verify)


def test_two_leaders_cannot_both_spend_the_last_use() -> None:
    """Each has logged a bearer before it saw the other's: the entry that comes second is void."""
    log = Log(A)
    assert log.add(joined(B, ticket=TICKET, uses=1))
    assert not log.add(joined(C, ticket=TICKET, uses=1))
    assert sorted(log.ledger.members) == sorted((A, B))
    assert (code(log, C, uses=1), code(log, B, uses=1)) == ("used_up", "")
    log.add(e.MemberLeft(B, "leave"))
    assert code(log, B, uses=1) == "", "its own use is not spent twice"
    assert code(log, C, uses=1) == "used_up"


def test_a_revoked_ticket_lets_nobody_new_in_and_turns_nobody_out() -> None:
    log = Log(A)
    log.add(joined(B, ticket=TICKET))
    assert log.add(e.TicketRevoked(TICKET, "posted on a forum"))
    assert not log.add(e.TicketRevoked(TICKET, "again"))
    assert "posted on a forum" in (refusal(log.ledger, C, TICKET, 0) or ("", ""))[1]
    assert (code(log, B), code(log, C), code(log, C, b"ticket-2")) == ("", "revoked", "")
    assert not log.add(joined(C, ticket=TICKET))
    assert log.add(joined(B, ticket=TICKET, name="renamed"))


def test_the_allow_list_holds_from_its_first_key_until_it_is_lifted() -> None:
    log = Log(A, B)
    assert code(log, C) == ""
    assert log.add(e.AllowChanged(C, True, "carol"))
    assert (code(log, B), code(log, C), code(log, D)) == ("", "", "not_allowed")
    assert D.hex() in (refusal(log.ledger, D, TICKET, 0) or ("", ""))[1]
    assert not log.add(joined(D)) and log.add(joined(C))
    assert log.add(e.AllowChanged(C, False)) and not log.add(e.AllowChanged(C, False))
    assert code(log, D) == "not_allowed", "an empty list holds, too"
    assert log.add(e.AllowChanged(b"", True)) and not log.add(e.AllowChanged(b"", True))
    assert code(log, D) == ""
    assert log.add(e.AllowChanged(b"", False)) and code(log, D) == "not_allowed"
    assert not log.add(e.AllowChanged(b"short", True))


def test_a_ban_can_be_lifted() -> None:
    log = Log(A, B)
    assert log.add(e.MemberBanned(B, "noise")) and code(log, B) == "banned"
    assert B not in log.ledger.members and not log.add(joined(B))
    assert log.add(e.MemberBanned(B, "", True)) and not log.add(e.MemberBanned(B, "", True))
    assert code(log, B) == "" and log.add(joined(B))


@pytest.mark.parametrize("tickets", [True, False])
def test_a_run_that_was_handed_over_has_another_founder(tickets: bool) -> None:
    log = Log(A, B)
    assert founder_of(Ledger(), FOUNDER.peer_id) == FOUNDER.peer_id
    assert read(log.ledger, FOUNDER).id == TICKET
    with pytest.raises(NotAuthorised, match="did not sign"):
        read(log.ledger, HEIR)
    assert not log.add(e.FounderChanged(FOUNDER.peer_id, True, "to whom it is", bytes(64)))
    assert log.add(e.FounderChanged(HEIR.peer_id, tickets, "holiday", b"1" * 64))
    assert founder_of(log.ledger, FOUNDER.peer_id) == HEIR.peer_id
    assert read(log.ledger, HEIR).id == TICKET
    if tickets:
        assert read(log.ledger, FOUNDER).id == TICKET
    else:
        with pytest.raises(NotAuthorised, match="did not sign"):
            read(log.ledger, FOUNDER)
    assert log.add(e.FounderChanged(FOUNDER.peer_id, tickets, "back", b"2" * 64))
    assert founder_of(log.ledger, FOUNDER.peer_id) == FOUNDER.peer_id
    assert log.ledger.access.former == ([HEIR.peer_id] if tickets else [])
    deeds = [(HEIR.peer_id, b"1" * 64), (FOUNDER.peer_id, b"2" * 64)]
    assert [(deed.heir, deed.signature) for deed in log.ledger.access.deeds] == deeds
    assert load_snapshot(log.ledger.snapshot()).access.deeds == log.ledger.access.deeds


def test_what_members_and_founders_add_is_bounded() -> None:
    log = Log(A)
    for number in range(limits.TICKETS_REVOKED_MAX):
        assert log.add(e.TicketRevoked(number.to_bytes(8, "big"), ""))
    assert not log.add(e.TicketRevoked(b"one more", ""))
    for number in range(limits.HANDOVERS_MAX):
        assert log.add(e.FounderChanged((number + 1).to_bytes(32, "big"), True, "", bytes(64)))
    assert len(log.ledger.access.former) == limits.FOUNDERS_KEPT
    assert not log.add(e.FounderChanged(B, True, "once more", bytes(64)))
    log.ledger.access.listed = {n.to_bytes(32, "big"): "" for n in range(limits.ALLOWED_MAX)}
    assert not log.add(e.AllowChanged(B, True))
    log.ledger.banned = {n.to_bytes(32, "big"): "" for n in range(limits.BANS_MAX)}
    assert not log.add(e.MemberBanned(B, ""))
    assert len(log.ledger.snapshot()) < limits.SNAPSHOT_BYTES_MAX // 2
    assert load_snapshot(log.ledger.snapshot()).access == log.ledger.access
