"""Who has delivered what of an open attempt."""

from __future__ import annotations

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.rounds.phases import Phase
from tests.protocols.rounds_kit import A, B, C, Log, opening


def phase() -> Phase:
    """A and B contribute and own a part each; C is A's deputy once a test says so."""
    body = opening(Log(A, B, C).ledger, [A, B])
    return Phase(body.key, body, 0.0, 10.0)


def test_delivered_is_what_every_parts_computer_has() -> None:
    one = phase()
    assert one.delivered() == ([], False)
    one.held = {0: {A: (0, 1), C: (0,)}}
    assert one.delivered() == ([], False), "nothing is known of the second part"
    one.held[1] = {B: (1,)}
    assert one.delivered() == ([1], True)
    one.deputies[0] = C
    assert one.delivered() == ([], True), "the deputy's word counts now"


def test_what_is_missing_of_somebody_who_is_gone_never_comes() -> None:
    one = phase()
    first, second = (c.member for c in one.opened.contributors)
    one.held = {0: {A: (0, 1)}, 1: {B: (0,)}}
    assert not one.undeliverable([A, B]), "it may still come"
    assert one.undeliverable([first])
    assert not one.undeliverable([second]), "the first one's is everywhere"
    one.refused[1] = None
    assert one.undeliverable([A, B]), "its bytes are no contribution"


def test_a_part_is_broken_if_its_computer_lacks_what_nobody_has_any_more() -> None:
    one = phase()
    chosen = e.RoundSet(one.key, (e.Coefficient(0, 0.5), e.Coefficient(1, 0.5)))
    one.held = {0: {A: (0, 1)}, 1: {B: (0, 1)}}
    assert not one.broken([A], chosen), "all computers have all"
    one.deputies[1] = C
    assert not one.broken([A, C], chosen), "the deputy has said nothing yet"
    one.held[1][C] = (0,)
    assert one.broken([A, C], chosen)
    assert not one.broken([A, B, C], chosen), "its maker is there and has it"
    assert not one.broken([A, C], e.RoundSet(one.key, (e.Coefficient(0, 1.0),))), "not chosen"
    one.refused[1] = None
    assert one.broken([A, B, C], chosen), "its maker has lost it"
