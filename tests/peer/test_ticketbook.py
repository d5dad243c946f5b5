"""What is remembered of tickets: no secrets, and what the log says of them beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmtrain_peer.ticketbook import TicketBook
from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.tickets import Capability
from tests.protocols.rounds_kit import RUN, A, B, C, Log, joined

ONE, TWO, ELSEWHERE = b"ticket-1", b"ticket-2", b"ticket-3"


def test_tickets_with_their_bearers(tmp_path: Path) -> None:
    path = tmp_path / "tickets.json"
    book = TicketBook(path)
    book.made(Capability(ONE, RUN, uses=2, expires_s=1700), 1000.5, "for bob")
    book.made(Capability(TWO, RUN, role="seed", vote=True), 1001.0)
    assert path.stat().st_mode & 0o777 == 0o600
    log = Log(A)
    log.add(joined(B, ticket=ONE, uses=2))
    log.add(e.MemberLeft(B, "leave"))
    log.add(joined(C, ticket=ELSEWHERE))
    log.add(e.TicketRevoked(TWO, "leaked"))
    first, second, third = TicketBook(path).rows(log.ledger)
    assert first == {
        "id": ONE.hex(), "role": "trainer", "vote": False, "expires_s": 1700, "uses": 2,
        "made_s": 1000, "note": "for bob", "bearers": [B.hex()], "revoked": None,
    }  # fmt: skip
    assert (second["role"], second["vote"], second["revoked"]) == ("seed", True, "leaked")
    assert (third["id"], third["role"], third["bearers"]) == (ELSEWHERE.hex(), None, [C.hex()])


def test_the_book_is_bounded_and_says_if_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TICKETS_REVOKED_MAX", 3)
    path = tmp_path / "tickets.json"
    book = TicketBook(path)
    for number in range(5):
        book.made(Capability(number.to_bytes(8, "big"), RUN), float(number))
    assert [item.made_s for item in book.read()] == [2, 3, 4]
    path.write_bytes(b"[{")
    with pytest.raises(ConfigError, match="tickets"):
        book.read()
    nowhere = TicketBook(None)
    nowhere.made(Capability(ONE, RUN), 1.0)
    assert nowhere.read() == []
