"""Planted bugs around members that differ: the simulator must notice each."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from swarmtrain_protocols import channels
from swarmtrain_protocols.rounds import leader, lobby, member, turns
from swarmtrain_protocols.testing.unlike_swarm import run_unlike
from swarmtrain_protocols.testing.world import Violation
from tests.sim import test_unlike
from tests.sim.test_mutants import Mutant, plant


def trouble(seed: int) -> str:
    return run_unlike(seed).violation


def as_tested(test: Callable[..., None], *args: object) -> Callable[[int], str]:
    """What the slow ones cost in calm weather, as ``test_unlike`` asks for it."""

    def run(seed: int) -> str:
        try:
            test(*args)
        except Violation as broken:
            return broken.kind
        except AssertionError:
            return "slow"
        return ""

    return run


links_take_turns = as_tested(
    test_unlike.test_slow_members_do_not_set_the_pace_and_their_samples_count, "off", 0.75, 0.8
)
two_phases = as_tested(
    test_unlike.test_a_link_that_would_take_two_phases_does_not_hold_the_others_up
)
stubborn = as_tested(test_unlike.test_a_member_that_does_not_adapt_is_not_waited_for)


MUTANTS = (
    Mutant(
        "what was counted is not offered again",
        member.RoundMember,
        "_close_offer",
        "del self._offers[offer.channel]",
        "offer.bound = None",
        trouble,
        range(6),
    ),
    Mutant(
        "the discount of a late contribution is declared",
        leader.RoundLeader,
        "_contributor",
        "discount_of(late, said.age)",
        "1.0",
        trouble,
        range(6),
    ),
    Mutant(
        "what several phases have moved has the weight of one",
        leader.RoundLeader,
        "_contributor",
        "said.age)",
        "0)",
        trouble,
        range(6),
    ),
    Mutant(
        "how many phases are in a contribution is said",
        member.RoundMember,
        "_send_ready",
        "offer.age,",
        "0,",
        trouble,
        range(6),
    ),
    Mutant(
        "the declared discount is applied",
        leader.RoundLeader,
        "_gather",
        "item.samples * item.discount",
        "item.samples",
        trouble,
        range(6),
    ),
    Mutant(
        "late is late beyond what the overlap mode makes the rule",
        leader.RoundLeader,
        "_hidden",
        '!= "off"',
        '== "off"',
        trouble,
        range(6),
    ),
    Mutant(
        "samples count once",
        channels.ChannelState,
        "commit",
        "self.samples += samples",
        "self.samples += 2 * samples",
        trouble,
        range(6),
    ),
    Mutant(
        "only samples of the set count",
        channels.ChannelState,
        "commit",
        "for _, samples, _ in self.history[-1].contributors:",
        "for samples in [item.samples for item in opened.contributors]:",
        trouble,
        range(6),
    ),
    Mutant(
        "the base of a contribution is the one that its trainer said",
        leader.RoundLeader,
        "_contributor",
        "weight = said.samples, said.base_round,",
        "weight = said.samples, key.round,",
        trouble,
        range(6),
    ),
    Mutant(
        "who is not ready by the deadline is not waited for",
        lobby.Lobbies,
        "grace_over_at",
        "lobby.half_ready + grace_s",
        "lobby.half_ready + 100 * grace_s",
        stubborn,
        range(1),
    ),
    Mutant(
        "slow links have their turn",
        turns.Turns,
        "plan",
        "return True, ()",
        "pass",
        links_take_turns,
        range(1),
    ),
    Mutant(
        "who cannot deliver in time is not waited for in every round",
        turns.Turns,
        "plan",
        "hopeless.append(index)",
        "return True, ()",
        two_phases,
        range(1),
    ),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.check)
def test_the_simulator_misses_the_check(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(mutant, monkeypatch)
    found = next((seed for seed in mutant.seeds if mutant.run(seed)), None)
    assert found is not None, f"{len(mutant.seeds)} schedules did not notice: {mutant.check}"
