"""Measuring exchanges, and what the leader makes of what members say."""

from __future__ import annotations

import math

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.rounds.pace import (
    NOTICE_ROUNDS,
    ROUNDS_TO_EAGER,
    ROUNDS_TO_OFF,
    OverlapChoice,
    Pace,
)
from tests.protocols.rounds_kit import GROUP, TRAIN, A, B, Log, hash_of, key

OTHER = "train/0/1"


def ready(exchange_s: float, phase_s: float = 10.0, channel: str = TRAIN) -> m.Ready:
    root = hash_of("given")
    return m.Ready(0, channel, root, 8, "fp32", 1.0, 0, phase_s=phase_s, exchange_s=exchange_s)


class Room:
    """A choice beside a ledger whose rounds are opened and committed one after another."""

    def __init__(self, enabled: bool = True) -> None:
        self.log = Log(A, B)
        self.choice = OverlapChoice(enabled)
        self.asked: list[e.ConfigChanged] = []

    def round(self, *shares: float, accepted: bool = True) -> None:
        opened = self.log.open([A, B])
        self.choice.opened(opened.key, [ready(10.0 * share) for share in shares])
        self.log.choose(opened)
        self.log.commit(opened, hash_of("result"))
        body = self.choice.proposal(self.log.ledger)
        if body is not None:
            self.asked.append(body)
            if accepted:
                assert self.log.add(body)


def test_a_member_measures_from_the_opening_to_the_state_with_its_encoding() -> None:
    pace = Pace()
    assert pace.exchange_s(TRAIN) == 0.0
    pace.begun(100.0, key(3), 0.5)
    pace.applied(101.0, TRAIN, 2)  # an older round: it was caught up with
    pace.applied(101.5, TRAIN, 3)
    assert pace.exchange_s(TRAIN) == 2.0
    pace.applied(200.0, TRAIN, 3)
    assert pace.exchange_s(TRAIN) == 2.0, "each is measured once"
    pace.begun(300.0, key(4), 0.0)
    pace.begun(310.0, key(4, attempt=1), 0.25)
    pace.applied(311.0, TRAIN, 4)
    assert pace.exchange_s(TRAIN) == 1.25, "the attempt that committed"
    pace.begun(400.0, key(0, channel=GROUP), 0.0)
    pace.applied(401.0, GROUP, 0)
    assert pace.exchange_s(GROUP) == 0.0, "groups have no phases"


def test_eager_once_the_exchange_takes_five_percent_of_a_phase() -> None:
    room = Room()
    for _ in range(ROUNDS_TO_EAGER):
        assert not room.asked
        room.round(0.06, 0.07)
    (body,) = room.asked
    assert (body.at_round, body.value) == (ROUNDS_TO_EAGER + NOTICE_ROUNDS, "eager")
    assert body.reason == "the exchange takes 6.0 % of a phase"


def test_off_while_it_takes_less() -> None:
    room = Room()
    for _ in range(40):
        room.round(0.049, 0.03)
    assert not room.asked


def test_off_again_only_when_it_takes_less_than_half_of_that_for_long() -> None:
    room = Room()
    for _ in range(ROUNDS_TO_EAGER):
        room.round(0.5)
    changed = room.asked[0].at_round
    for _ in range(30):
        room.round(0.03)
    assert len(room.asked) == 1, "between the bars nothing changes"
    rounds = 0
    while len(room.asked) == 1:
        room.round(0.02)
        rounds += 1
    assert ROUNDS_TO_OFF // 2 < rounds <= ROUNDS_TO_OFF
    assert room.asked[1].value == "off"
    assert room.asked[1].at_round > changed


def test_rounds_before_a_change_say_nothing_about_it() -> None:
    room = Room()
    for _ in range(ROUNDS_TO_EAGER):
        room.round(0.5)
    first = room.asked[0].at_round
    while room.log.ledger.channels[TRAIN].round <= first:
        room.round(0.0001)
    for _ in range(ROUNDS_TO_OFF - 1):
        room.round(0.0001)
        assert len(room.asked) == 1
    room.round(0.0001)
    assert len(room.asked) == 2


def test_one_slow_member_and_one_that_exaggerates_are_outvoted() -> None:
    room = Room()
    for _ in range(10):
        room.round(0.01, 0.02, 90.0)
    assert not room.asked
    for _ in range(3):
        room.round(0.01, 0.2, 90.0)
    assert len(room.asked) == 1


@pytest.mark.parametrize(
    ("exchange_s", "phase_s"),
    [(0.0, 10.0), (10.0, 0.0), (-1.0, 10.0), (math.nan, 10.0), (math.inf, 10.0), (1.0, math.nan)],
)
def test_what_is_not_known_or_cannot_be_is_not_counted(exchange_s: float, phase_s: float) -> None:
    room = Room()
    for number in range(10):
        room.choice.opened(RoundKey(0, TRAIN, number, 0), [ready(exchange_s, phase_s)])
        room.round()
    assert not room.asked


def test_later_attempts_and_groups_are_not_counted() -> None:
    room = Room()
    for number in range(10):
        room.choice.opened(RoundKey(0, TRAIN, number, 1), [ready(9.0)])
        room.choice.opened(RoundKey(0, GROUP, number, 0), [ready(9.0, channel=GROUP)])
        room.round()
    assert not room.asked


def test_what_was_not_logged_is_proposed_again_when_its_rounds_begin() -> None:
    room = Room()
    while len(room.asked) < 2:
        room.round(0.5, accepted=False)
    first, second = room.asked
    assert first.at_round < second.at_round <= first.at_round + 1 + NOTICE_ROUNDS
    assert room.log.ledger.channels[TRAIN].round > first.at_round


def test_a_run_that_names_its_mode_or_has_ended_is_left_alone() -> None:
    room = Room(enabled=False)
    for _ in range(10):
        room.round(0.5)
    assert not room.asked
    room = Room()
    for _ in range(ROUNDS_TO_EAGER - 1):
        room.round(0.5)
    opened = room.log.open([A, B])
    room.choice.opened(opened.key, [ready(5.0)])
    room.log.choose(opened)
    room.log.commit(opened, hash_of("result"))
    room.log.add(e.RunEnded("max_rounds"))
    assert room.choice.proposal(room.log.ledger) is None


def test_fragments_are_weighed_together() -> None:
    log, choice = Log(A, B, model=False), OverlapChoice(True)
    layout = (e.ChannelLayout(TRAIN, 8), e.ChannelLayout(OTHER, 8))
    assert log.add(e.ModelDefined(bytes(32), layout, (hash_of("0"), hash_of("1")), A))
    for number in range(ROUNDS_TO_EAGER):
        assert choice.proposal(log.ledger) is None
        for channel, exchange_s in ((TRAIN, 1.2), (OTHER, 0.0001)):
            choice.opened(RoundKey(0, channel, number, 0), [ready(exchange_s, channel=channel)])
            opened = log.open([A, B], channel=channel)
            log.choose(opened)
            log.commit(opened, hash_of("result"))
    body = choice.proposal(log.ledger)
    assert body is not None and body.reason == "the exchange takes 6.0 % of a phase"
