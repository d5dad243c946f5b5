"""The bound on a link's silence follows what was measured on it."""

from __future__ import annotations

import math
import random

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.silence import SAMPLES_MIN, FrameClock, Silence


def after(*rtts: float) -> Silence:
    silence = Silence()
    for rtt_s in rtts:
        silence.measured(rtt_s)
    return silence


def test_before_anything_is_measured_it_is_a_constant() -> None:
    for count in range(SAMPLES_MIN):
        assert after(*[0.01] * count).bound_s == limits.IDLE_TIMEOUT_S


def test_the_estimator_is_that_of_rfc_6298() -> None:
    silence = after(0.1)
    assert (silence.trips.smoothed_s, silence.trips.deviation_s) == (0.1, 0.05)
    silence.measured(0.3)
    assert silence.trips.deviation_s == pytest.approx(0.75 * 0.05 + 0.25 * 0.2)
    assert silence.trips.smoothed_s == pytest.approx(0.875 * 0.1 + 0.125 * 0.3)


def test_a_quick_link_is_given_up_sooner_and_a_slow_one_later() -> None:
    assert after(*[0.001] * 20).bound_s == limits.SILENCE_S_MIN < limits.IDLE_TIMEOUT_S
    slow = after(*[10.0] * 20)
    assert limits.IDLE_TIMEOUT_S < slow.bound_s < limits.SILENCE_S_MAX
    assert after(*[60.0] * 20).bound_s == limits.SILENCE_S_MAX


def test_a_link_that_jitters_gets_more_than_one_that_is_as_slow_and_steady() -> None:
    rng = random.Random(1)
    steady = after(*[2.0] * 50)
    jittery = after(*[rng.uniform(0.0, 4.0) for _ in range(50)])
    assert jittery.bound_s > steady.bound_s + 4.0


def test_no_answer_that_was_measured_lately_would_have_ended_the_link() -> None:
    rng = random.Random(2)
    silence, missed = Silence(), 0
    for _ in range(2000):
        rtt_s = rng.lognormvariate(-1.0, 1.0)  # median 0.37 s, one in a thousand beyond 8 s
        missed += limits.KEEPALIVE_INTERVAL_S + rtt_s > silence.bound_s
        silence.measured(rtt_s)
    assert missed <= 2


def test_a_frame_is_timed_from_its_first_byte() -> None:
    clock = FrameClock()
    assert clock.deadline() == math.inf
    clock.received(5.0, taken=0, rest_bytes=1)
    clock.received(9.0, taken=0, rest_bytes=2)
    assert clock.deadline() == 5.0 + limits.FRAME_TIMEOUT_S
    clock.received(11.0, taken=1, rest_bytes=3)  # that one is there, the next has begun
    assert clock.deadline() == 11.0 + limits.FRAME_TIMEOUT_S
    clock.received(12.0, taken=2, rest_bytes=0)
    assert clock.deadline() == math.inf
