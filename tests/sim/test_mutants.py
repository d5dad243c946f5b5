"""Each named check in the cores is taken out, and the simulator must notice.

A green simulator proves little by itself; how many planted bugs it finds is the honest measure
(docs/reliability goals, G3). A mutant is a piece of source replaced by another: if the piece is
gone from the code, the test fails and says so, so that mutants cannot rot.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from swarmtrain_protocols import dataplane, ledger
from swarmtrain_protocols.log import election, state, view
from swarmtrain_protocols.rounds import attempt, catchup, leader, member
from swarmtrain_protocols.testing.faults import Fault, generate
from swarmtrain_protocols.testing.swarm import run_swarm, spec_of
from tests.sim.test_log_sim import POWER_CUT, plan, run_log
from tests.sim.test_swarm import first_holder_lost


@dataclass(frozen=True)
class Mutant:
    """``old`` in the source of ``owner.name`` becomes ``new``; ``seeds`` are tried in order."""

    check: str
    owner: Any
    name: str
    old: str
    new: str
    run: Callable[[int], str]
    seeds: range


def swarm(seed: int) -> str:
    return run_swarm(seed).violation


def swarm_stored_then_lost(seed: int) -> str:
    """Everybody dies after storing a result and before saying so: the attempt is aborted."""
    names = [part.name for part in spec_of(seed)[1]]
    cuts = [
        Fault(at_s, "aim-crash", name, "send:holding", 1.5)
        for at_s in (9.0, 15.0)
        for name in names
    ]
    return run_swarm(seed, cuts).violation


def swarm_first_holder_lost(seed: int) -> str:
    return run_swarm(seed, first_holder_lost(seed)).violation


def log(seed: int) -> str:
    return run_log(seed, generate(seed, plan()))[2]


def log_power_cut(seed: int) -> str:
    return run_log(seed, POWER_CUT)[2]


MUTANTS = (
    Mutant(
        "sums run in member order",
        dataplane.DataPlane,
        "reduce",
        "coefficients = [c.value for c in chosen.coefficients]\n"
        "    sources = [self._source(buffers, part, c.index) for c in chosen.coefficients]",
        "order = sorted(chosen.coefficients, key=lambda c: -c.index)\n"
        "    coefficients = [c.value for c in order]\n"
        "    sources = [self._source(buffers, part, c.index) for c in order]",
        swarm,
        range(20),
    ),
    Mutant(
        "a contribution is summed with its own coefficient",
        dataplane.DataPlane,
        "reduce",
        "coefficients = [c.value for c in chosen.coefficients]",
        "coefficients = [1 / len(chosen.coefficients) for c in chosen.coefficients]",
        swarm,
        range(20),
    ),
    Mutant(
        "an aborted contribution goes back to its trainer as aborted",
        member.RoundMember,
        "_decide_offer",
        '"aborted", 0.0',
        '"committed", 1.0',
        swarm,
        range(20),
    ),
    Mutant(
        "a result is applied only if the log committed its root",
        catchup.CatchUp,
        "_advance",
        "(forgotten or (outcome is not None and outcome.root == stored))",
        "True",
        swarm_stored_then_lost,
        range(40),
    ),
    Mutant(
        "a commit needs a majority of the holders",
        leader.RoundLeader,
        "_decide",
        "need = len(holders) if len(holders) <= 2 else len(holders) // 2 + 1",
        "need = 1",
        swarm_first_holder_lost,
        range(20),
    ),
    Mutant(
        "a round is applied with the outer step of that round",
        catchup.CatchUp,
        "_apply",
        "outer_at(self._keys, self.ledger, number)",
        "outer_at(self._keys, self.ledger, channel.round + 1)",
        swarm,
        range(40),
    ),
    Mutant(
        "a new leader is told of contributions that wait",
        member.RoundMember,
        "announce",
        "self._send_ready(offer)",
        "pass",
        swarm,
        range(30),
    ),
    Mutant(
        "a new leader is told who is in step",
        catchup.CatchUp,
        "announce",
        "self.report(name)",
        "pass",
        swarm,
        range(30),
    ),
    Mutant(
        "a contribution that is too old goes back",
        member.RoundMember,
        "_expire_offer",
        'self._close_offer(offer, "excluded", 0.0, key)',
        "pass",
        swarm,
        range(60),
    ),
    Mutant(
        "a silent deputy is no liar",
        attempt.Attempt,
        "part_result",
        "if result.owner not in allowed:",
        'if result.owner not in allowed and self._fault(sender, "bad_signature") is None:',
        swarm,
        range(360, 400),
    ),
    Mutant(
        "entries are durable before they count",
        state.LogState,
        "save",
        "self.out.append(Persist(encode_record(self._unsaved()), relied=self.votes))",
        "self._unsaved()",
        log_power_cut,
        range(4),
    ),
    Mutant(
        "a majority, not anybody, decides in the log",
        view.View,
        "quorum",
        "<= len(group):",
        "< 1:",
        log,
        range(40),
    ),
    Mutant(
        "one vote per term",
        election.Election,
        "_would_grant",
        'if request.term == s.term and s.voted_for not in (b"", peer):',
        "if False:",
        log,
        range(60),
    ),
)


def mutated(mutant: Mutant) -> Any:
    """The function with the piece of source replaced."""
    original = inspect.unwrap(getattr(mutant.owner, mutant.name))
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(mutant.old) == 1, f"{mutant.check}: the check is no longer in the source"
    module = sys.modules[original.__module__]
    space = dict(vars(module))
    exec(compile(source.replace(mutant.old, mutant.new), "<mutant>", "exec"), space)
    return space[mutant.name]


def plant(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutated(mutant)
    monkeypatch.setattr(mutant.owner, mutant.name, changed)
    if mutant.owner is ledger:
        for body, handler in list(ledger._HANDLERS.items()):
            if handler.__name__ == mutant.name:
                monkeypatch.setitem(ledger._HANDLERS, body, changed)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.check)
def test_the_simulator_misses_the_check(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(mutant, monkeypatch)
    found = next((seed for seed in mutant.seeds if mutant.run(seed)), None)
    assert found is not None, f"{len(mutant.seeds)} schedules did not notice: {mutant.check}"
