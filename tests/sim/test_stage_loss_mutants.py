"""Checks of recovery are taken out one by one, and the simulated swarms of test_stage_loss notice.

The same honest measure as in test_mutants: what a green run is worth is how many planted bugs
would have turned it red.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from swarmtrain_protocols import ledger
from swarmtrain_protocols.pipeline import book, requests
from swarmtrain_protocols.pipeline import worker as worker_module
from swarmtrain_protocols.pipeline.driver import DriverCore
from swarmtrain_protocols.pipeline.rebuild import Rebuilder
from swarmtrain_protocols.pipeline.recovery import RecoveryLeader
from swarmtrain_protocols.pipeline.sums import Sums
from swarmtrain_protocols.testing.world import Violation
from tests.sim.test_mutants import Mutant, mutated
from tests.sim.test_stage_loss import Loss, late_messages


def lost_for_good(seed: int) -> None:
    """All workers of a stage die and never come back."""
    loss = Loss(seed)
    loss.kill(*loss.serving(2))
    loss.goes_on()


def calm(seed: int) -> None:
    """Nobody dies."""
    loss = Loss(seed)
    loss.world.run(loss.world.now + 40.0)


def late(seed: int) -> None:
    late_messages(seed)


def verdict(scenario: Callable[[int], None]) -> Callable[[int], str]:
    """The class of the first violation, ``stuck`` if no steps are taken any more, or ''."""

    def run(seed: int) -> str:
        try:
            scenario(seed)
        except Violation as found:
            return found.kind
        except AssertionError:
            return "stuck"
        return ""

    return run


def case(
    check: str, owner: object, name: str, old: str, new: str, scenario: Callable[[int], None]
) -> Mutant:
    return Mutant(check, owner, name, old, new, verdict(scenario), range(5, 9))


MUTANTS = (
    case(
        "the candidate with the least loss is chosen",
        Rebuilder,
        "_decide",
        "best = min(scored",
        "best = max(scored",
        lost_for_good,
    ),
    case(
        "the loss of a candidate is its own",
        Rebuilder,
        "candidate_ready",
        "work.heard.clear()",
        "pass",
        lost_for_good,
    ),
    case(
        "what is installed is what was chosen",
        Rebuilder,
        "_decide",
        "root = work.roots[best]",
        "root = work.roots[work.names[0]]",
        lost_for_good,
    ),
    case(
        "only the state before the lost step passes for the state itself",
        Rebuilder,
        "_kept",
        "held is None or held[0] != work.round or",
        "held is None or",
        lost_for_good,
    ),
    case(
        "a stage is lost only if nobody has its state",
        RecoveryLeader,
        "_look",
        "if front:",
        "if front and now < 0.0:",
        calm,
    ),
    case(
        "a loss begins a new era",
        book,
        "_lost",
        "state.era += 1",
        "pass",
        late,
    ),
    case(
        "requests of an older era are refused",
        requests,
        "trouble",
        '("era", request.stage_generation, state.era),',
        "",
        late,
    ),
    case(
        "sums of an older era are cleared",
        Sums,
        "reconcile",
        "moved = ground != self._ground",
        "moved = ground[:2] != self._ground[:2]",
        late,
    ),
    case(
        "drivers drop what they have from an older era",
        DriverCore,
        "reconcile",
        "if view != self._view:",
        "same = view is None or (self._view is not None and view.step == self._view.step)\n"
        "    self._view = self._view if view is None or not same else view\n"
        "    if not same:",
        late,
    ),
    case(
        "a rebuilt stage warms up",
        book,
        "_recovered",
        "stage.recovered_step = body.step",
        "pass",
        lost_for_good,
    ),
)


def plant(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutated(mutant)
    monkeypatch.setattr(mutant.owner, mutant.name, changed)
    if mutant.owner is requests:
        monkeypatch.setattr(worker_module, mutant.name, changed)
    if mutant.owner is book:
        for body, handler in list(ledger._HANDLERS.items()):
            if handler is book.HANDLERS.get(body) and handler.__name__ == mutant.name:
                monkeypatch.setitem(ledger._HANDLERS, body, changed)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.check)
def test_the_simulator_misses_the_check(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not mutant.run(mutant.seeds[0]), "the code as it is passes"
    plant(mutant, monkeypatch)
    found = next((seed for seed in mutant.seeds if mutant.run(seed)), None)
    assert found is not None, f"{len(mutant.seeds)} swarms did not notice: {mutant.check}"
