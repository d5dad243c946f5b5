"""The overlap mode changes by the log, and every site applies every round with the right step.

The checker recomputes each state with the mode that it read from the log itself.
"""

from __future__ import annotations

import dataclasses

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.testing import swarm
from swarmtrain_protocols.testing.checks.one_log import LogIsOne
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.host import Host
from swarmtrain_protocols.testing.nightly import explain
from swarmtrain_protocols.testing.site import SitePart, SwarmSpec
from swarmtrain_protocols.testing.world import World

SLOW_UNTIL_S = 90.0
TROUBLE = [
    Fault(40.0, "crash", "b", "", 3.0),
    Fault(70.0, "aim-crash", "a", "emit:LedgerChanged", 2.0),
    Fault(130.0, "crash", "a", "", 3.0),
    Fault(150.0, "aim-crash", "c", "do:ApplyResult", 2.0),
]


class Changes(LogIsOne):
    """The accepted changes, as the first site applied them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[e.ConfigChanged] = []

    def first(
        self, world: World, host: Host, index: int, body: e.EntryBody, accepted: bool
    ) -> None:
        if isinstance(body, e.ConfigChanged) and accepted:
            self.found.append(body)


def long_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases of 8 to 10 s, of which an exchange takes 2 % unless links are slow."""
    usual = swarm.spec_of

    def spec_of(seed: int) -> tuple[SwarmSpec, tuple[SitePart, ...]]:
        spec, parts = usual(seed)
        return dataclasses.replace(spec, phase_s=(8.0, 10.0), work_s=(0.001, 0.002)), parts

    monkeypatch.setattr(swarm, "spec_of", spec_of)
    monkeypatch.setattr(swarm, "HEAL_AT_S", 240.0)


@pytest.mark.slow
def test_slow_links_make_it_eager_and_fast_ones_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    long_phases(monkeypatch)
    modes: list[list[str]] = []
    for seed in (2, 7, 21, 23, 24, 25):
        spec, parts = swarm.spec_of(seed)
        assert spec.manifest.keys.overlap == "auto"
        slow = [Fault(4.0, "slow", part.name, "", SLOW_UNTIL_S) for part in parts]
        changes = Changes()
        outcome = swarm.run_swarm(seed, slow + TROUBLE, changes)
        assert outcome.violation == "", explain(outcome)
        assert outcome.committed > changes.found[-1].at_round, "rounds were applied in every mode"
        modes.append([body.value for body in changes.found])
    assert all(values[0] == "eager" for values in modes)
    assert sum(values[1:2] == ["off"] for values in modes) >= len(modes) // 2
