"""Whole networks in virtual time: churn, loss, liars, one subnet; truth is brute force."""

from __future__ import annotations

import statistics

import pytest

from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.dht.events import DhtFound, DhtStored
from swarmtrain_protocols.dht.ids import Contact, key_id
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.dht.lookup import Lookup
from swarmtrain_protocols.dht.records import decode_value, encode_value
from swarmtrain_protocols.dht.search import Search
from swarmtrain_protocols.messages.dht import SignedRecord, Values
from tests.protocols.dht.network import Network


def store_many(network: Network, writers: list[DhtCore], count: int) -> None:
    handles = []
    for number in range(count):
        writer = writers[number % len(writers)]
        handles.append((writer, writer.store(network.now, f"k{number}", encode_value(number), 600)))
    for writer, handle in handles:
        assert isinstance(network.settle(writer, handle), DhtStored)


def read_many(network: Network, readers: list[DhtCore], count: int) -> tuple[int, list[float]]:
    """How many of ``count`` keys a random reader finds, and how long each took."""
    right = 0
    took_s = []
    for number in range(count):
        reader = network.rng.choice(readers)
        started = network.now
        found = network.settle(reader, reader.get(network.now, f"k{number}"))
        took_s.append(network.now - started)
        if isinstance(found, DhtFound) and found.records:
            right += decode_value(found.records[0].value) == number
    return right, took_s


def found_nodes(network: Network, node: DhtCore, target: int) -> list[Contact]:
    """What a plain node lookup from ``node`` converges to."""
    done: list[Lookup] = []

    def finish(_now: float, search: Search) -> None:
        assert search.lookup is not None
        done.append(search.lookup)

    node.searches.start(network.now, Search(target, finish))
    network.settle(node, node.get(network.now, "flush"))
    for _ in range(100):
        if done:
            break
        network.run(0.5)
    return done[0].closest()


def test_every_key_is_found_after_half_of_the_nodes_vanish() -> None:
    network = Network(1, loss=0.02)
    nodes = network.grow(60, every_s=0.25)
    network.run(5)
    store_many(network, nodes[::3], 60)
    network.run(2)  # the copies that nobody waits for
    for node in network.rng.sample(nodes, 30):
        network.vanish(node)
    right, took_s = read_many(network, list(network.nodes.values()), 60)
    assert right == 60
    assert statistics.median(took_s) < 5.0
    assert max(took_s) < limits.DHT_LOOKUP_TIMEOUT_S
    assert network.faults == []


def test_lookups_converge_to_the_truth() -> None:
    network = Network(2)
    nodes = network.grow(60, every_s=0.25)
    network.run(15)
    for number in range(20):
        target = key_id(b"target %d" % number)
        reader = nodes[network.rng.randrange(len(nodes))]
        closest = [contact.peer for contact in found_nodes(network, reader, target)]
        assert closest == network.nearest(target, limits.DHT_K, but=reader.me.peer)


@pytest.mark.slow
def test_records_outlive_a_complete_turnover_of_their_holders() -> None:
    network = Network(3, loss=0.02)
    old = network.grow(30, every_s=0.3)
    store_many(network, old[:1], 20)
    young = network.grow(30, every_s=1.0, first="young")
    network.run(2.5 * limits.DHT_REPLICATE_S)
    for node in old:
        network.vanish(node)
    right, _ = read_many(network, young, 20)
    assert right == 20


def test_thirty_per_cent_liars_get_no_forged_value_accepted() -> None:
    network = Network(4)
    nodes = network.grow(60, every_s=0.25)
    liars = network.rng.sample(nodes[10:], 18)
    store_many(network, nodes[:10], 50)

    def lie(message: messages.Message) -> messages.Message:
        if not isinstance(message, Values):
            return message
        false = tuple(
            SignedRecord(
                r.name,
                r.publisher,
                r.sequence + 1,
                r.expires_s + 1,
                encode_value("lie"),
                r.signature,
            )
            for r in message.records
        )
        return Values(message.request, false, (), False)

    for liar in liars:
        network.tampers[liar.me.peer] = lie
    honest = [node for node in nodes if node not in liars]
    right, _ = read_many(network, honest, 50)
    assert right == 50
    named = {fault.peer for fault in network.faults}
    assert named
    assert named <= {liar.me.peer for liar in liars}
    assert {fault.code for fault in network.faults} == {"bad_signature"}


def test_a_swarm_in_one_public_subnet_still_finds_its_records() -> None:
    # The caps that keep one operator from filling a table must not break one large laboratory.
    network = Network(5)
    nodes = []
    for number in range(40):
        node = network.add(f"lab{number}", addresses=(f"8.8.4.{number}:4242",))
        if nodes:
            network.link(node.me.peer, network.rng.choice(nodes).me.peer)
        network.run(0.5)
        nodes.append(node)
    network.run(10)
    store_many(network, nodes[:10], 50)
    right, _ = read_many(network, nodes, 50)
    assert right == 50
    assert max(len(node.table) for node in nodes) <= limits.DHT_PER_SUBNET_IN_TABLE_MAX


def test_memory_and_idle_traffic_stay_small() -> None:
    network = Network(6)
    nodes = network.grow(30, every_s=0.3)
    store_many(network, nodes, 60)
    network.run(400)
    started, sent = network.now, network.sent
    network.run(200)
    per_node_per_s = (network.sent - sent) / (network.now - started) / len(nodes)
    assert per_node_per_s < 3.0
    for node in nodes:
        assert len(node.requests) < 50
        assert len(node.requests._timers) < 2_000
        assert len(node.table) <= 29
        assert node.held.nbytes < 60 * 300
    network.run(300)  # the records' ten minutes are over
    assert sum(len(node.held) for node in nodes) == 0
    assert sum(node.held.nbytes for node in nodes) == 0


@pytest.mark.parametrize("seed", [11, 12])
def test_equal_seeds_give_equal_histories(seed: int) -> None:
    def history() -> tuple[int, float, list[int]]:
        network = Network(seed, loss=0.05)
        nodes = network.grow(25, every_s=0.2)
        store_many(network, nodes, 10)
        return network.sent, network.now, [len(node.held) for node in nodes]

    assert history() == history()
