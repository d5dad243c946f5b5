"""Small DHTs in virtual time: churn, liars around one key, floods, waves of deaths, a split.

Each case returns what is wrong, or an empty text. ``tests/mutants`` takes checks of the cores out
one by one, and these cases must notice. The full sizes are a command: ``python -m
swarmtrain_protocols.testing.dht_world``; its figures are in ``benchmarks/results``.
"""

from __future__ import annotations

import json

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.dht.ids import id_bytes, key_id
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.dht.records import encode_value, sign_record
from swarmtrain_protocols.messages.dht import NodeInfo, StoreRecord
from swarmtrain_protocols.testing import dht_world
from swarmtrain_protocols.testing.dht_net import RUN, WALL_S, Liar, Net, introduce, liars
from swarmtrain_protocols.testing.dht_world import (
    CHURN_MIN,
    HOSTILE_MIN,
    Query,
    Tally,
    among_liars,
    grow,
    look,
    main,
    rules_broken,
    store,
    under_churn,
)
from swarmtrain_protocols.testing.keyring import FakeKeyring
from tests.protocols.dht.test_paths import share


def ground(seed: int) -> str:
    """Two fifths of a small network have made their keys for one name: k of them and more."""
    outcome = among_liars(100, 0.4, seed=seed, lookups=20, grind=300, every_s=0.1)
    wrong = list(outcome.broken)
    for kind, tally in outcome.tallies.items():
        if tally.share < HOSTILE_MIN:
            wrong.append(f"{kind}: {tally.found} of {tally.lookups}")
    return "; ".join(wrong)


def halves(seed: int) -> str:
    """Fewer than k liars beside a key agree to tell of one publisher and hide the others."""
    outcome = among_liars(50, 0.2, seed=seed, lookups=20, grind=300, every_s=0.1, ways=("half",))
    tally = outcome.tallies["target"]
    return "" if tally.share >= HOSTILE_MIN else f"{tally.found} of {tally.lookups}"


def churn(seed: int) -> str:
    """A third of thirty nodes is lost in five minutes."""
    outcome = under_churn(30, 4.0, 1 / 12, seed=seed, every_s=2.0)
    tally = outcome.tallies["churn"]
    assert outcome.counts["lost"] >= 6
    if tally.share < CHURN_MIN:
        return f"{tally.found} of {tally.lookups}"
    return "; ".join(outcome.broken)


def waves(seed: int) -> str:
    """Whoever holds copies dies, wave after wave, faster than copies are renewed in time."""
    net = Net(seed)
    nodes = grow(net, 70, every_s=0.1)
    writer, reader = nodes[0], nodes[1]
    assert store(net, writer, "k", "v")
    net.run(5.0)
    key = id_bytes(key_id(b"k"))
    net.kill(writer.me.peer, machine=False)
    for _ in range(4):
        held = [core for core in net.honest() if core.held.under(key, 0.0) and core is not reader]
        for core in held[:12]:
            net.kill(core.me.peer, machine=False)
        net.run(18.0)
    tally = Tally()
    look(net, tally, Query(reader, "k", writer.me.peer, "v"))
    return "" if tally.found else "the last copy is gone"


def flood(seed: int) -> str:
    """One /24 sends forty nodes into a small network."""
    net = Net(seed)
    grow(net, 15, every_s=0.1)
    ring = liars(net, [f"flood{n}" for n in range(40)], blocks=1)
    introduce(net, ring, 15)
    net.run(5.0)
    return "; ".join(rules_broken(net))


class Inventor(Liar):
    """Names contacts that do not exist, at addresses of its choice."""

    def _accomplices(self, target: bytes) -> tuple[NodeInfo, ...]:
        ghosts = [target + bytes([n]) * 12 for n in range(limits.DHT_K)]
        return tuple(NodeInfo(ghost, (f"8.8.4.4:{n + 1}",)) for n, ghost in enumerate(ghosts))


def inventors(seed: int) -> tuple[Net, list[DhtCore]]:
    net = Net(seed)
    nodes = grow(net, 12, every_s=0.1)
    peers = [FakeKeyring(f"inventor{n}").peer_id for n in range(4)]
    for peer in peers:
        net.enter(peer, (net.public_address(),), Inventor(peer, [], "drop"))
    introduce(net, peers, 12)
    net.run(2.0)
    return net, nodes


def invented(seed: int) -> str:
    """Liars name nodes that nobody has met."""
    net, nodes = inventors(seed)
    for number in range(5):
        net.outcome(nodes[number], nodes[number].get(net.now, f"k{number}"))
    return "; ".join(rules_broken(net))


def reflected(seed: int) -> str:
    """Liars name a third party's host over and over."""
    net, nodes = inventors(seed)
    before = net.counts.get("dials", 0)
    for number in range(10):
        net.outcome(nodes[0], nodes[0].get(net.now, f"k{number}"))
    dials = net.counts.get("dials", 0) - before
    return "" if dials <= 2 * limits.DHT_HEARSAY_TRIES_MAX else f"{dials} dials"


def blind(seed: int) -> str:
    """Somebody writes valid records of its own without reading first."""
    net = Net(seed)
    nodes = grow(net, 6, every_s=0.1)
    writer = FakeKeyring("writer")
    record = sign_record(writer, RUN, b"k", 1, int(WALL_S) + 600, b"\x01")
    for node in nodes:
        for token in (b"", b"a guess!"):
            node.receive(net.now, writer.peer_id, StoreRecord(1, record, token))
        net.settle(node.me.peer)
    held = sum(bool(node.held.under(record.key, 0.0)) for node in nodes)
    return f"{held} nodes hold it" if held else ""


def squatted(seed: int) -> str:
    """Somebody says, under a member's name and by the rules of writing, where that member is."""
    net = Net(seed)
    nodes = grow(net, 6, every_s=0.1)
    victim, squatter = nodes[0], FakeKeyring("squatter")
    name, value = b"member/" + victim.me.peer, encode_value(["8.8.4.4:1"])
    record = sign_record(squatter, RUN, name, 1, int(WALL_S) + 600, value)
    for node in nodes:
        token = node.serving.tokens.make(node.wall(net.now), squatter.peer_id, record.key)
        node.receive(net.now, squatter.peer_id, StoreRecord(1, record, token))
        net.settle(node.me.peer)
    held = sum(bool(node.held.under(record.key, 0.0)) for node in nodes)
    return f"{held} nodes hold it" if held else ""


def split(seed: int) -> str:
    """Two halves that cannot reach each other for six minutes, and then can."""
    net = Net(seed)
    nodes = grow(net, 16, every_s=0.1)
    net.run(5.0)
    left = {core.me.peer for core in nodes[::2]}
    net.reachable = lambda one, two: (one in left) == (two in left)
    for one in nodes[::2]:
        for two in nodes[1::2]:
            net.cut(one.me.peer, two.me.peer)
    net.run(360.0)
    if any({c.peer for c in core.table.contacts()} - left for core in nodes[::2]):
        return "the halves have not forgotten each other: nothing is tested"
    assert store(net, nodes[0], "k", "v")
    net.reachable = None
    net.run(3 * limits.DHT_HEAL_S)
    tally = Tally()
    for reader in nodes[1::2]:
        look(net, tally, Query(reader, "k", nodes[0].me.peer, "v"))
    return "" if tally.share == 1.0 else f"{tally.found} of {tally.lookups}"


def led_away(seed: int) -> str:
    """Of lookups among random liars with accomplices, as many must arrive as three tries give."""
    arrived = share()
    return "" if arrived >= 0.5 else f"{arrived:.0%} arrive"


CASES = (churn, halves, waves, flood, invented, reflected, blind, squatted, split)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_nothing_is_wrong(case: object) -> None:
    assert case(1) == ""  # type: ignore[operator]


def test_a_key_that_liars_surround_is_found() -> None:
    assert ground(1) == ""


def test_equal_seeds_give_equal_histories() -> None:
    one, two = (under_churn(15, 8.0, 1 / 60, seed=3) for _ in range(2))
    assert one.counts == two.counts
    assert one.tallies["churn"].times_s == two.tallies["churn"].times_s


def test_the_command_prints_figures_and_fails_below_its_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--nodes", "15", "--churn", "8", "--hours", "0.01"]
    assert main(options) == 0
    assert json.loads(capsys.readouterr().out)["tallies"]["churn"]["share"] == 1.0
    monkeypatch.setattr(dht_world, "CHURN_MIN", 1.01)
    assert main(options) == 1
