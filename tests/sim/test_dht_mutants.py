"""Checks of the DHT are taken out one by one, and the small worlds of test_dht_world notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from swarmtrain_protocols.dht import records
from swarmtrain_protocols.dht.healing import Healing
from swarmtrain_protocols.dht.hearsay import Hearsay
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.dht.lookup import Lookup
from swarmtrain_protocols.dht.replication import Replication
from swarmtrain_protocols.dht.routing import RoutingTable
from swarmtrain_protocols.dht.search import Searches
from swarmtrain_protocols.dht.serving import Serving
from tests.sim import test_dht_world as world
from tests.sim.test_mutants import Mutant, mutated


def case(
    check: str, owner: object, name: str, old: str, new: str, run: Callable[[int], str]
) -> Mutant:
    return Mutant(check, owner, name, old, new, run, range(1, 2))


QUICK = (
    case(
        "what a node names reaches the path that asked it only",
        Lookup,
        "hear",
        "self._enter(view, contact)\n",
        "[self._enter(each, contact) for each in self._views]\n",
        world.led_away,
    ),
    case(
        "nobody is a contact who has not proven who it is",
        DhtCore,
        "hinted",
        "found.append(Contact(peer, addresses))",
        "found.append(Contact(peer, addresses)); self.table.seen(found[-1])",
        world.invented,
    ),
    case(
        "one subnet has few places in the table",
        RoutingTable,
        "_fits",
        "return False\n        inside",
        "pass\n        inside",
        world.flood,
    ),
    case(
        "writing takes a read of the same key",
        Serving,
        "_keep",
        "self.tokens.valid(core.wall(now), peer, record.key, message.token)",
        "True",
        world.blind,
    ),
    case(
        "a record keeps the rule of its name",
        records,
        "refusal",
        "breaks_its_rule(record.name, record.publisher, record.value)",
        "False",
        world.squatted,
    ),
    case(
        "hosts where nobody answers are not dialled because they are named",
        Hearsay,
        "_blocked",
        "return recent and",
        "return False and",
        world.reflected,
    ),
    case(
        "those out of sight are tried again",
        Healing,
        "tick",
        "core.ping(now, contact, partial(self._answered, contact))",
        "pass",
        world.split,
    ),
)

SLOW = (
    case(
        "a few keys beside the target cannot agree on half of the truth",
        Searches,
        "_agreed",
        "return not self._core.density.crowded(search.target, nearest)",
        "return True",
        world.halves,
    ),
    case(
        "copies are made anew when a holder leaves",
        Replication,
        "left",
        "if nearer < limits.DHT_PATHS:",
        "if False:",
        world.waves,
    ),
    case(
        "a crowd beside a key makes the search wider",
        Searches,
        "_surrounded",
        "return not few and density.crowded(target, closest)",
        "return False",
        world.ground,
    ),
)


@pytest.mark.parametrize("mutant", QUICK, ids=lambda m: m.check)
def test_the_small_worlds_miss_the_check(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutant.owner, mutant.name, mutated(mutant))
    assert any(mutant.run(seed) for seed in mutant.seeds), f"nobody noticed: {mutant.check}"


@pytest.mark.slow
@pytest.mark.parametrize("mutant", SLOW, ids=lambda m: m.check)
def test_the_larger_worlds_miss_it(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutant.owner, mutant.name, mutated(mutant))
    assert any(mutant.run(seed) for seed in mutant.seeds), f"nobody noticed: {mutant.check}"
