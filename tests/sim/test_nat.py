"""Trainers that nobody can dial, seeds without state between them: through crashes, cuts, pauses.

Safety of rounds, fair relays and liveness hold in every schedule. Planted bugs: ``tests/mutants``.
"""

from __future__ import annotations

from collections import Counter

from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.relayed import nat_spec_of, run_nat

SEEDS = (*range(5), 69)
"""69: an announcement that is doubled and comes after a second one of its sender."""


def test_hidden_trainers_get_on_through_trouble() -> None:
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        outcome = run_nat(seed)
        assert not outcome.violation, f"seed {seed}: {outcome.text}"
        assert outcome.committed >= 2, f"seed {seed}"
        seen.update(name for name in outcome.seen if "relay" in name)
    assert seen["relay:spliced"] == len(SEEDS), "whoever comes late needs somebody's state"
    assert seen["send:relay-offer"] == len(SEEDS)


def test_the_relay_may_die_in_every_phase() -> None:
    """The only seed dies as it grants, as it splices, and while the state is on its way."""
    seed = next(s for s in range(100) if len(nat_spec_of(s)[1]) == 3)
    deaths = ("send:relay-offer", "do:Splice", "do:CloseStream")
    schedule = [Fault(6.0 + 5.0 * n, "aim-crash", "a", what, 2.0) for n, what in enumerate(deaths)]
    outcome = run_nat(seed, schedule)
    assert not outcome.violation, outcome.text
    assert outcome.seen["relay:spliced"] >= 2
