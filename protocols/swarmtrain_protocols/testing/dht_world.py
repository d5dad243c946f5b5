"""How often a lookup finds what was published, under churn and among liars, in virtual time.

``python -m swarmtrain_protocols.testing.dht_world --nodes 1000 --hostile 0.2``: 800 honest nodes
and 200 liars whose ids were all ground for one key; they drop what they are given, forge, and name
only each other. Lookups of that key and of others are counted apart.

``… --nodes 300 --churn 0.3 --hours 1``: 30 % of the nodes are lost per hour and replaced, half of
them with their machine. A lookup counts if its record has not expired.

Prints a JSON object; exits with 1 below the bar (95 % and 99 %) or if a rule is broken: nothing
forged is found, and nobody stands in a routing table who never had a link.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.events import DhtFound, DhtStored
from swarmtrain_protocols.dht.ids import key_id, subnets
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.dht.records import decode_value, encode_value
from swarmtrain_protocols.testing.dht_net import FORGED, LIES, Net, ground_names, introduce, liars

HOSTILE_MIN, CHURN_MIN = 0.95, 0.99
TARGET = "run/holders"
"""The name that the liars have made their keys for."""
AT_ONCE = 20
"""Lookups that begin together."""


@dataclass
class Tally:
    """Lookups of one kind. ``found``: with the right record. Times in virtual seconds."""

    lookups: int = 0
    found: int = 0
    times_s: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.found / max(1, self.lookups)

    def figures(self) -> dict[str, float]:
        times = sorted(self.times_s) or [0.0]
        return {
            "lookups": self.lookups,
            "found": self.found,
            "share": round(self.share, 4),
            "median_s": round(statistics.median(times), 3),
            "p95_s": round(times[int(0.95 * (len(times) - 1))], 3),
        }


@dataclass
class Outcome:
    """What a scenario came to. ``tallies`` by kind of lookup, ``broken`` rules in words."""

    tallies: dict[str, Tally]
    broken: list[str]
    counts: dict[str, int]

    def figures(self) -> dict[str, object]:
        return {
            "tallies": {name: tally.figures() for name, tally in self.tallies.items()},
            "broken": self.broken,
            "counts": dict(sorted(self.counts.items())),
        }


def grow(net: Net, count: int, *, every_s: float, first: str = "n") -> list[DhtCore]:
    """Honest nodes, one after the other; each knows one earlier node, as from a ticket."""
    grown: list[DhtCore] = []
    for number in range(count):
        known = net.honest()
        core = net.add(f"{first}{number}")
        if known:
            net.link(core.me.peer, net.rng.choice(known).me.peer)
        net.run(every_s)
        grown.append(core)
    return grown


def store(net: Net, core: DhtCore, name: str, value: object, *, keep: bool = False) -> bool:
    """Publish; True if it lies on some node."""
    ttl_s = limits.DHT_TTL_S_MAX
    handle = core.store(net.now, name, encode_value(value), ttl_s, keep=keep)
    return isinstance(net.outcome(core, handle), DhtStored)


@dataclass(frozen=True)
class Query:
    """One lookup: ``reader`` should find the record of ``publisher`` with ``value``."""

    reader: DhtCore
    name: str
    publisher: PeerId
    value: object


def look(net: Net, tally: Tally, *queries: Query) -> None:
    """Lookups that all begin now; returns when they have ended."""
    begin = net.now
    handles = [(query, query.reader.get_all(net.now, query.name)) for query in queries]
    for query, _ in handles:
        net.settle(query.reader.me.peer)
    end = begin + 2 * limits.DHT_LOOKUP_TIMEOUT_S
    waiting = {(query.reader.me.peer, handle) for query, handle in handles}
    while net.now < end and not waiting <= net.outcomes.keys():
        net.run(0.02)
    for query, handle in handles:
        event, at = net.outcomes.pop((query.reader.me.peer, handle), (None, net.now))
        tally.lookups += 1
        tally.times_s.append(at - begin)
        records = event.records if isinstance(event, DhtFound) else ()
        tally.found += any(
            r.publisher == query.publisher and decode_value(r.value) == query.value for r in records
        )


def rules_broken(net: Net) -> list[str]:
    """What must hold in every honest node at any time."""
    broken: list[str] = []
    for core in net.honest():
        blocks: dict[str, int] = {}
        for contact in core.table.contacts():
            if contact.peer not in net.proven:
                broken.append(f"{core.me.peer.hex()[:8]} has a contact that nobody has proven")
            for block in subnets(contact.addresses):
                blocks[block] = blocks.get(block, 0) + 1
        if max(blocks.values(), default=0) > limits.DHT_PER_SUBNET_IN_TABLE_MAX:
            broken.append(f"{core.me.peer.hex()[:8]} has too many contacts of one subnet")
        if len(core.book) > limits.DHT_BOOK_MAX or len(core.searches) > 64:
            broken.append(f"{core.me.peer.hex()[:8]} has a table without bound")
        held = [record for key in core.held.keys() for record in core.held.under(key, 0)]  # noqa: SIM118
        if any(record.value == FORGED for record in held):
            broken.append(f"{core.me.peer.hex()[:8]} holds something forged")
    return broken


def among_liars(
    nodes: int,
    hostile: float,
    *,
    seed: int = 0,
    lookups: int = 200,
    grind: int = 4096,
    blocks: int = 0,
    every_s: float = 0.05,
    ways: Sequence[str] = LIES,
) -> Outcome:
    """A share ``hostile`` of ``nodes`` has made its keys for one name; ``ways`` as in ``LIES``."""
    net = Net(seed)
    bad = round(nodes * hostile)
    names = ground_names(f"liar{seed}.", bad, key_id(TARGET.encode()), grind)
    grow(net, (nodes - bad) // 2, every_s=every_s)
    ring = liars(net, names, blocks=blocks, ways=ways)
    introduce(net, ring, limits.DHT_K)
    grow(net, nodes - bad - (nodes - bad) // 2, every_s=every_s, first="late")
    introduce(net, ring, limits.DHT_K)
    net.run(30.0)
    honest = net.honest()
    tallies = {"target": Tally(), "others": Tally()}
    publishers = net.rng.sample(honest, min(20, len(honest)))
    for number, publisher in enumerate(publishers):
        store(net, publisher, TARGET, number, keep=True)
        store(net, publisher, f"other {number}", number, keep=True)
    for turn in range(0, lookups, AT_ONCE):
        for kind, tally in tallies.items():
            queries = []
            for number in (n % len(publishers) for n in range(turn, min(turn + AT_ONCE, lookups))):
                name = TARGET if kind == "target" else f"other {number}"
                me = publishers[number].me.peer
                queries.append(Query(net.rng.choice(honest), name, me, number))
            look(net, tally, *queries)
    return Outcome(tallies, rules_broken(net), net.counts)


def under_churn(
    nodes: int, per_hour: float, hours: float, *, seed: int = 0, every_s: float = 1.0
) -> Outcome:
    """Nodes are lost and replaced at random; every node publishes one key, and keeps it."""
    net = Net(seed)
    alive = {core.me.peer: core for core in grow(net, nodes, every_s=0.1)}
    names: dict[PeerId, str] = {}
    until_s: dict[PeerId, float] = {}
    """Until when the record of a publisher is there to be found, by the network's clock."""

    def publish(core: DhtCore) -> None:
        names[core.me.peer] = f"key of {core.me.peer.hex()}"
        if store(net, core, names[core.me.peer], "v", keep=True):
            until_s[core.me.peer] = float("inf")

    for core in list(alive.values())[:: max(1, nodes // 60)]:
        publish(core)
    tally = Tally()
    end = net.now + hours * 3600
    next_loss = net.now + net.rng.expovariate(nodes * per_hour / 3600)
    lost = 0
    while net.now < end:
        if net.now >= next_loss:
            next_loss += net.rng.expovariate(nodes * per_hour / 3600)
            lost += 1
            gone = net.rng.choice(list(alive))
            del alive[gone]
            node = net.nodes[gone]
            assert isinstance(node, DhtCore)
            if gone in until_s:
                until_s[gone] = net.now + _left_s(node, names[gone], net.now)
            net.kill(gone, machine=net.rng.random() < 0.5)
            new = net.add(f"new{lost}")
            alive[new.me.peer] = new
            net.link(new.me.peer, net.rng.choice(list(alive.values())[:-1]).me.peer)
            if gone in until_s:
                net.run(2.0)
                publish(new)
        reader = net.rng.choice(list(alive.values()))
        valid = [peer for peer, until in until_s.items() if until > net.now + 5.0]
        publisher = net.rng.choice(valid)
        look(net, tally, Query(reader, names[publisher], publisher, "v"))
        net.run(every_s)
    net.counts["lost"] = lost
    return Outcome({"churn": tally}, rules_broken(net), net.counts)


def _left_s(core: DhtCore, name: str, now: float) -> float:
    """For how long the newest record of a node that dies is still valid."""
    (record,) = core.own_records(key_id(name.encode()).to_bytes(limits.DHT_ID_BYTES, "big"))
    return record.expires_s - core.wall(now)


def main(arguments: Sequence[str]) -> int:
    """Run one scenario; returns the exit code."""
    parser = argparse.ArgumentParser(description="lookups in a simulated DHT")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--hostile", type=float, default=0.0, help="share of liars, 0 to 0.9")
    parser.add_argument("--grind", type=int, default=4096, help="keys tried for each liar")
    parser.add_argument("--blocks", type=int, default=0, help="/24 of all liars; 0: one for each")
    parser.add_argument("--lookups", type=int, default=200, help="of each kind, with --hostile")
    parser.add_argument("--churn", type=float, default=0.0, help="share of nodes lost per hour")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.churn:
        outcome = under_churn(given.nodes, given.churn, given.hours, seed=given.seed)
        bar = CHURN_MIN
    else:
        outcome = among_liars(
            given.nodes,
            given.hostile,
            seed=given.seed,
            lookups=given.lookups,
            grind=given.grind,
            blocks=given.blocks,
        )
        bar = HOSTILE_MIN
    text = json.dumps({"options": vars(given), "bar": bar, **outcome.figures()}, indent=1)
    sys.stdout.write(text + "\n")
    return int(bool(outcome.broken) or any(t.share < bar for t in outcome.tallies.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
