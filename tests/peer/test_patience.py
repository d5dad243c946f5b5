"""Patience follows the round trip to a majority of stewards and the lateness of this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from swarmtrain_peer.patience import MEASURE_S, ROUND_TRIPS, Patience
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId

ME, ADA, BOB = (PeerId(bytes([n]) * 32) for n in (1, 2, 3))
CYD, DAN = (PeerId(bytes([n]) * 32) for n in (4, 5))
LOOK_S = 0.25


@dataclass
class World:
    """A ledger with stewards, links with round trips, and a log that takes a factor."""

    voters: tuple[PeerId, ...]
    rtt_s: dict[PeerId, float] = field(default_factory=dict)
    me: PeerId = ME
    now: float = 0.0
    factors: list[float] = field(default_factory=list)
    measured: list[PeerId] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger, self.log = self, self
        self.patience = Patience(self, self, self.run)  # type: ignore[arg-type]

    def linked(self) -> list[PeerId]:
        return list(self.rtt_s)

    def recent_rtt_s(self, peer: PeerId) -> float | None:
        return self.rtt_s.get(peer)

    def measure(self, peer: PeerId) -> None:
        self.measured.append(peer)

    def set_patience(self, now: float, factor: float) -> None:
        self.factors.append(factor)

    def run(self, call: Callable[..., None], *args: float) -> None:
        call(self.now, *args)

    def live(self, seconds: float, late_s: float = 0.0) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += LOOK_S + late_s
            self.patience.look(self.now, late_s)


def test_fast_links_leave_it_as_it_is() -> None:
    world = World((ME, ADA, BOB), {ADA: 0.001, BOB: 0.2})
    world.live(60.0)
    assert world.factors == [] and world.patience.factor == 1.0


def test_what_counts_is_the_majority_not_the_slowest() -> None:
    world = World((ME, ADA, BOB), {ADA: 0.01, BOB: 5.0})
    world.live(60.0)
    assert world.factors == []
    world = World((ME, ADA, BOB, CYD, DAN), {ADA: 0.01, BOB: 1.0, CYD: 2.0, DAN: 9.0})
    world.live(60.0)
    assert world.factors == [pytest.approx(ROUND_TRIPS * 1.0 / limits.ELECTION_TIMEOUT_S)]


def test_who_is_far_from_all_is_patient_itself() -> None:
    world = World((ADA, BOB, CYD), {ADA: 10.0, BOB: 10.0, CYD: 10.0})
    world.live(60.0)
    assert world.factors == [limits.LOG_PATIENCE_FACTOR_MAX]
    newcomer = World((), {ADA: 2.0})
    newcomer.live(1.0)
    assert newcomer.factors == [6.0]


def test_it_is_measured_again_and_goes_back_when_links_are_fast_again() -> None:
    world = World((ME, ADA, BOB), {ADA: 1.0, BOB: 1.0})
    world.live(4 * MEASURE_S)
    assert 4 <= world.measured.count(ADA) <= 5 and ME not in world.measured
    world.rtt_s = {ADA: 1.05, BOB: 1.05}
    world.live(10.0)
    assert world.factors == [3.0], "small changes are not worth a new timer"
    world.rtt_s = {ADA: 0.01, BOB: 0.01}
    world.live(10.0)
    assert world.factors == [3.0, 1.0]


def test_a_machine_that_is_late_is_given_time_and_forgiven() -> None:
    world = World((ME, ADA, BOB), {ADA: 0.01, BOB: 0.01})
    world.live(2.0, late_s=0.5)
    assert world.factors[0] == pytest.approx(ROUND_TRIPS * (0.01 + 2 * 0.5))
    world.live(60.0)
    assert world.factors[-1] == 1.0
