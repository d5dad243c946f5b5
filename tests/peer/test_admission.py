"""Who is talked to, and what those read who are not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from swarmtrain_peer.admission import FINAL, TurnedAway, admit, refused_error
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.tickets import Capability, sign_capability
from tests.protocols.rounds_kit import RUN, A, B, C, Log, joined

FOUNDER = Ed25519Keyring(b"\x01" * 32)
TICKET = b"ticket-1"


def code(log: Log, peer: bytes, **grant: object) -> str:
    capability = Capability(**{"id": TICKET, "run": RUN, **grant})  # type: ignore[arg-type]
    data = sign_capability(FOUNDER, capability)
    found = admit(log.ledger, PeerId(peer), data, RUN, FOUNDER.peer_id, 1e9)
    return "" if found is None else found.code


def test_members_and_bearers_of_good_tickets_are_talked_to() -> None:
    log = Log(A)
    log.ledger.founder = FOUNDER.peer_id
    assert admit(log.ledger, PeerId(A), b"", RUN, FOUNDER.peer_id, 1e9) is None
    assert code(log, B) == ""
    assert code(log, B, expires_s=1000) == "expired"
    assert code(log, B, run=bytes(32)) == "not_authorised"
    log.add(joined(C, ticket=TICKET, uses=1))
    assert code(log, B, uses=1) == "used_up"
    log.add(e.AllowChanged(C, True))
    assert code(log, B) == "not_allowed"
    log.add(e.TicketRevoked(TICKET, "leaked"))
    assert (code(log, B), code(log, C)) == ("revoked", "")
    log.add(e.MemberBanned(B, "noise"))
    found = admit(log.ledger, PeerId(B), b"", RUN, FOUNDER.peer_id, 1e9)
    assert found is not None and (found.code, found.reason) == ("banned", "noise")


@pytest.mark.parametrize("name", [*FINAL, "role", "full", "what a later version says"])
def test_whoever_is_turned_away_reads_why_and_what_to_do(name: str) -> None:
    error = refused_error(name, "127.0.0.1:4000")
    assert error.exit_code == 6 and error.why.startswith(name) and error.todo
    assert error.what == "127.0.0.1:4000 refuses this site"


class Known:
    """As much of a node as is asked for: a leader, and whether the log knows this process."""

    def __init__(self, log: Log, leader: bytes | None = None) -> None:
        self.ledger = log.ledger
        self.log = SimpleNamespace(leader=leader)
        self.joiner = SimpleNamespace(registered=False)


@pytest.mark.parametrize("code", ["duplicate", "banned"])
def test_refused_for_good_by_the_leaders_word_or_by_that_of_all_who_were_asked(code: str) -> None:
    def found(node: Known, *peers: bytes, linked: tuple[bytes, ...] = ()) -> bool:
        turned = TurnedAway()
        said = [turned.found(node, PeerId(p), code, linked) for p in peers]  # type: ignore[arg-type]
        return said[-1]

    log = Log(A, B, C)
    assert found(Known(log, B), B)
    assert not found(Known(log, B), C), "one member's word ends nobody"
    assert found(Known(log), B, C) and not found(Known(log), C, C)
    assert not found(Known(log), B, C, linked=(A,)), "somebody lets it in"
    assert not found(Known(log, B), B, linked=(B,)), "both sides have dialled"
    assert found(Known(Log(A, B)), B), "there is nobody else to ask"
    node = Known(log, B)
    node.joiner.registered = True
    assert not found(node, B)
    assert not TurnedAway().found(Known(log, B), PeerId(B), "full", ())  # type: ignore[arg-type]
