"""The announcement of a contribution."""

from __future__ import annotations

from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.rounds.offer import Offer
from swarmtrain_protocols.rounds.pace import Pace
from tests.protocols.rounds_kit import TRAIN, hash_of


def test_an_announcement_says_what_is_offered_and_how_far_the_log_is() -> None:
    spans = ((3, 9),)
    offer = Offer(TRAIN, hash_of("r"), 40, "int8", 6.0, 4, 2, phase_s=1.5, claims=spans, age=1)
    assert offer.ready(generation=7, seen=21, pace=Pace()) == m.Ready(
        generation=7,
        channel=TRAIN,
        root=hash_of("r"),
        values=40,
        codec="int8",
        samples=6.0,
        base_round=4,
        expect=2,
        seen=21,
        phase_s=1.5,
        claims=spans,
        age=1,
    )
