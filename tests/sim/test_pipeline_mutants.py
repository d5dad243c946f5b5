"""Checks of pipelines are taken out one by one, and the audits of test_pipeline notice.

The same honest measure as in test_mutants: what a green run is worth is how many planted bugs
would have turned it red.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from swarmtrain_protocols.pipeline import requests, step_policy, steps
from swarmtrain_protocols.pipeline import worker as worker_module
from swarmtrain_protocols.pipeline.driver import DriverCore
from swarmtrain_protocols.pipeline.leases import Leases
from swarmtrain_protocols.pipeline.steps import StepLeader
from swarmtrain_protocols.pipeline.sums import Sums
from swarmtrain_protocols.pipeline.worker import WorkerCore
from swarmtrain_protocols.testing.pipeline_audit import DRIVER_STATES, WORKER_PHASES, run_audit
from swarmtrain_protocols.testing.pipeline_swarm import run_pipeline
from tests.sim.test_mutants import Mutant, mutated


def workers_die(seed: int) -> str:
    return run_audit(26, WORKER_PHASES, 2, seed=seed).outcome.violation


def drivers_die(seed: int) -> str:
    audit = run_audit(8, DRIVER_STATES, 1, seed=seed, drivers="ab", lost=0.0, doubled=0.0)
    return audit.outcome.violation


def anything(seed: int) -> str:
    return run_pipeline(seed).violation


def case(
    check: str,
    owner: object,
    name: str,
    old: str,
    new: str,
    run: Callable[[int], str] = workers_die,
    seeds: range = range(5, 25),
) -> Mutant:
    return Mutant(check, owner, name, old, new, run, seeds)


MUTANTS = (
    case(
        "what is in the accumulator is not added again",
        WorkerCore,
        "_start",
        "claim = self._sums.claim(hop, k)",
        "claim = None",
    ),
    case(
        "what is being added at this moment is waited for",
        WorkerCore,
        "_start",
        "if adder is not None:",
        "if False:",
        anything,
        range(60, 130),  # one schedule of forty meets it: 62, 79, 82, 126
    ),
    case(
        "an owner takes out what others own",
        Sums,
        "_undo",
        "if not shares.get(hop, 0) >> k & 1:",
        "if False:",
    ),
    case(
        "a gradient that was taken out is claimed no more",
        Sums,
        "undone",
        "del self._have[hop][k]",
        "pass",
    ),
    case(
        "weights of another version are refused",
        requests,
        "trouble",
        '("version", request.version, channel.round if training or not local else None),\n'
        '        ("step", request.id.step, state.step if sync and training else None),',
        "",
        anything,
        range(5, 40),
    ),
    case(
        "a trainer that died takes its claims with it",
        Sums,
        "lost",
        "self._have.clear()",
        "pass",
        anything,
        range(40),
    ),
    case(
        "have-sets are empty when a step begins",
        Sums,
        "_clear",
        "self._have.clear()",
        "pass",
    ),
    case(
        "accumulators are empty when a step begins",
        Sums,
        "_clear",
        "self._out.append(px.ClearGradients(tuple(stages)))",
        "pass",
    ),
    case(
        "the owner of a gradient is one",
        Sums,
        "_planned",
        "self._plan = _Plan(plan.key, digest, cl.by_stage(mine, self._blocks))",
        "mine = {h: cl.mask_of(self.have(h)) for h in mine}\n"
        "    self._plan = _Plan(plan.key, digest, cl.by_stage(mine, self._blocks))",
    ),
    case(
        "a step is clipped as a whole",
        steps,
        "clip_scale",
        "scale: float =",
        "return 1.0\n    scale: float =",
    ),
    case(
        "a driver that stepped forgets the step before",
        DriverCore,
        "reconcile",
        "self._forget()",
        "pass",
    ),
    case(
        "no step closes with less than what is asked for",
        StepLeader,
        "_settle",
        "if count < self.policy.micro_batches and not (late and count >= self.policy.least):",
        "if not count:",
    ),
)

STUCK = (
    case(
        "a lease runs out with its driver",
        Leases,
        "deal",
        "(lease.driver is None or lease.until <= now)",
        "lease.driver is None",
        drivers_die,
    ),
    case(
        "what nobody has any more is sent again",
        Leases,
        "settle",
        "lease.redo = list(hops)",
        "lease.redo = []",
    ),
)
"""Nobody is wrong, but nothing goes on: a simulated minute and a half each."""


def plant(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutated(mutant)
    monkeypatch.setattr(mutant.owner, mutant.name, changed)
    if mutant.owner is requests:
        monkeypatch.setattr(worker_module, mutant.name, changed)
    if mutant.owner is steps:
        monkeypatch.setattr(step_policy, mutant.name, changed)


def test_the_code_as_it_is_passes() -> None:
    assert workers_die(5) == ""


@pytest.mark.slow
@pytest.mark.parametrize("mutant", STUCK, ids=lambda m: m.check)
def test_the_simulator_misses_what_goes_on(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(mutant, monkeypatch)
    assert mutant.run(mutant.seeds[0]) == "liveness"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.check)
def test_the_simulator_misses_the_check(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(mutant, monkeypatch)
    found = next((seed for seed in mutant.seeds if mutant.run(seed)), None)
    assert found is not None, f"{len(mutant.seeds)} runs did not notice: {mutant.check}"
