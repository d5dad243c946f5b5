"""Finding back: after a restart without any seed, and when two halves of a network meet again."""

from __future__ import annotations

from swarmtrain_protocols import limits
from swarmtrain_protocols.dht.contacts import decode_book, encode_book
from swarmtrain_protocols.dht.events import DhtFound, DhtRejoined
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.dht.records import decode_value, encode_value
from tests.protocols.dht.network import RUN, Network


def found(network: Network, reader: DhtCore, key: str) -> list[object]:
    outcome = network.settle(reader, reader.get(network.now, key))
    assert isinstance(outcome, DhtFound), outcome
    return [decode_value(record.value) for record in outcome.records]


def test_a_restarted_node_finds_the_network_without_its_seed() -> None:
    network = Network(1)
    nodes = network.grow(12)
    network.run(5)
    seed, old = nodes[0], nodes[7]
    network.settle(nodes[3], nodes[3].store(network.now, "k", encode_value("here"), 600.0))
    saved = encode_book(RUN, old.book.entries())
    assert len(old.book) >= 5
    network.vanish(old)
    network.vanish(seed)
    again = network.add("n7")
    assert again.me == old.me
    again.book.load(decode_book(saved, RUN), again.wall(network.now))
    network._links = {pair: up for pair, up in network._links.items() if old.me.peer not in pair}
    network.run(3 * limits.DHT_LONELY_S + 3)
    assert len(again.table) >= 8
    assert found(network, again, "k") == ["here"]
    assert DhtRejoined in {type(event) for event in network.events[again.me.peer]}


def cut(network: Network, left: list[DhtCore], right: list[DhtCore]) -> None:
    """Break all links between two halves, and let no new one be made."""
    halves = {node.me.peer: node in left for node in [*left, *right]}
    network.reachable = lambda one, two: halves[one] == halves[two]
    network._links = {
        (one, two): up for (one, two), up in network._links.items() if halves[one] == halves[two]
    }
    for here, others in ((left, right), (right, left)):
        for node in here:
            for other in others:
                node.disconnected(network.now, other.me.peer)
            network._after(node)


def test_two_halves_that_forgot_each_other_become_one_again() -> None:
    network = Network(2)
    nodes = network.grow(20)
    network.run(5)
    left, right = nodes[::2], nodes[1::2]
    cut(network, left, right)
    network.run(400)
    for node in left:
        assert not {c.peer for c in node.table.contacts()} & {n.me.peer for n in right}
    network.settle(left[0], left[0].store(network.now, "l", encode_value("left"), 600.0))
    network.settle(right[0], right[0].store(network.now, "r", encode_value("right"), 600.0))
    assert found(network, right[3], "l") == []
    network.reachable = None
    network.run(3 * limits.DHT_HEAL_S)
    for node in left:
        assert len(node.table) >= 17
    assert found(network, right[3], "l") == ["left"]
    assert found(network, left[3], "r") == ["right"]


def test_trying_is_cheap() -> None:
    network = Network(3)
    one, two, three = network.grow(3)
    network.run(5)
    for gone in (two, three):
        network.vanish(gone)
        one.disconnected(network.now, gone.me.peer)
        network._after(one)
    network._links.clear()
    network.run(20)
    assert len(one.table) == 0
    before = one.healing.tried
    network.run(600)
    # Alone, all of the few that it knows every one to three seconds; never more than eight.
    assert one.healing.tried - before >= 2 * 600 / (1.5 * limits.DHT_LONELY_S) * 0.8
    assert one.healing.tried - before <= 2 * 600 / (0.5 * limits.DHT_LONELY_S)
    assert len(one.book) == 2
