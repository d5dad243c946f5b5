"""Trainers that nobody can dial, seeds without state between them: through crashes, cuts, pauses.

Safety of rounds, fair relays and liveness hold in every schedule; each planted bug in the relay
core is found by one of a few schedules.
"""

from __future__ import annotations

from collections import Counter

import pytest

from swarmtrain_protocols.relay import Relay
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.relayed import nat_spec_of, run_nat
from tests.sim.test_mutants import Mutant, plant

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


def nat(seed: int) -> str:
    return run_nat(seed).violation


MUTANTS = (
    Mutant(
        "a token opens the stream that it was made for",
        Relay,
        "attached",
        "end = stream.tokens.pop(token, None)",
        "end = stream.tokens.popitem()[1] if stream.tokens else None",
        nat,
        range(10, 13),
    ),
    Mutant(
        "both ends get a token of their own",
        Relay,
        "_requested",
        "self._out.append(Send(target, RelayOffer(peer, tokens[1])))",
        "self._out.append(Send(target, RelayOffer(peer, tokens[0])))",
        nat,
        range(2),
    ),
    Mutant(
        "the target is told",
        Relay,
        "_requested",
        "self._out.append(Send(target, RelayOffer(peer, tokens[1])))",
        "pass",
        nat,
        range(2),
    ),
    Mutant(
        "a wish that failed may be granted later",
        Relay,
        "_failed",
        "wish.asking = False",
        "pass",
        nat,
        range(9, 15),
    ),
    Mutant(
        "both ends pay",
        Relay,
        "moved",
        "self._spent(now, end) + nbytes",
        "self._spent(now, end) + nbytes // 2",
        nat,
        range(2),
    ),
    Mutant(
        "a stream that nobody came to is closed",
        Relay,
        "tick",
        'self._close(number, "timeout")',
        "pass",
        nat,
        range(10, 15),
    ),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.check)
def test_a_planted_bug_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(mutant, monkeypatch)
    found = next((seed for seed in mutant.seeds if mutant.run(seed)), None)
    assert found is not None, f"{len(mutant.seeds)} schedules did not notice: {mutant.check}"
