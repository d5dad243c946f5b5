"""Publishing: copies on the k nearest, renewal in time, sequence numbers that survive a restart."""

from __future__ import annotations

import pytest

from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.dht.events import DhtFailed, DhtFound, DhtStored
from swarmtrain_protocols.dht.ids import id_bytes, key_id
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.dht.records import decode_value, encode_value, sign_record
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.messages.dht import FindNode, StoreRecord, StoreReply
from tests.protocols.dht.network import RUN, WALL_S, Network, core

KEY = id_bytes(key_id(b"k"))


def test_the_copies_lie_on_the_k_nearest() -> None:
    network = Network(1)
    nodes = network.grow(30, every_s=0.5)
    network.run(20)
    writer = nodes[11]
    stored = network.settle(writer, writer.store(network.now, "k", b"\x01", 600.0))
    assert isinstance(stored, DhtStored)
    assert stored.replicas == limits.DHT_STORED_ENOUGH  # the caller waits for no more
    network.run(2)
    holders = {peer for peer, node in network.nodes.items() if node.held.under(KEY, 0.0)}
    assert holders == set(network.nearest(key_id(b"k"), limits.DHT_K))


def test_nobody_else_is_asked_while_the_copies_that_the_caller_waits_for_are_under_way() -> None:
    network = Network(1)
    nodes = network.grow(30, every_s=0.5)
    network.run(20)
    writer = nodes[11]
    said: list[messages.Message] = []
    network.tampers[writer.me.peer] = lambda message: (said.append(message), message)[1]
    network.settle(writer, writer.store(network.now, "k", b"\x01", 600.0))
    asked = sum(isinstance(message, FindNode) for message in said)
    given = sum(isinstance(message, StoreRecord) for message in said)
    # Some go out between the fifth answer and the look at the clock that ends ``settle``.
    most = limits.DHT_STORED_ENOUGH + limits.DHT_ALPHA
    assert given == limits.DHT_STORED_ENOUGH <= asked <= most
    network.run(2)
    assert sum(isinstance(message, StoreRecord) for message in said) == limits.DHT_K


def test_holders_that_do_not_answer_hold_up_a_store_for_a_moment_only() -> None:
    network = Network(1)
    nodes = network.grow(30, every_s=0.5)
    network.run(20)
    writer, begin = nodes[11], network.now
    for peer in network.nearest(key_id(b"k"), limits.DHT_STORED_ENOUGH):
        network.tampers[peer] = lambda message: None if isinstance(message, StoreReply) else message
    stored = network.settle(writer, writer.store(network.now, "k", b"\x01", 600.0))
    assert isinstance(stored, DhtStored)
    assert network.now - begin < limits.DHT_REQUEST_TIMEOUT_S


def value_at(network: Network, reader: DhtCore) -> list[object]:
    found = network.settle(reader, reader.get(network.now, "k"))
    assert isinstance(found, DhtFound)
    return [decode_value(record.value) for record in found.records]


def test_what_is_kept_outlives_its_time_and_the_rest_does_not() -> None:
    network = Network(2)
    one, two, three = network.grow(3)
    network.settle(one, one.store(network.now, "k", encode_value("kept"), 20.0, keep=True))
    network.settle(two, two.store(network.now, "once", encode_value("once"), 20.0))
    network.run(70)
    assert value_at(network, three) == ["kept"]
    gone = network.settle(three, three.get(network.now, "once"))
    assert isinstance(gone, DhtFound)
    assert gone.records == ()
    one.withdraw(network.now, "k")
    network.run(30)
    assert value_at(network, three) == []
    assert len(one._publisher) == 0


def test_a_later_value_replaces_the_earlier() -> None:
    network = Network(3)
    one, two, _ = network.grow(3)
    network.settle(one, one.store(network.now, "k", encode_value("old"), 500.0))
    network.settle(one, one.store(network.now, "k", encode_value("new"), 50.0))
    assert value_at(network, two) == ["new"]
    network.run(60)
    assert value_at(network, two) == []


def test_replacing_a_value_under_way_ends_the_first_call() -> None:
    network = Network(4)
    one, two = network.grow(2)
    first = one.store(network.now, "k", encode_value("old"), 500.0)
    second = one.store(network.now, "k", encode_value("new"), 500.0)
    assert network.settle(one, first) == DhtFailed(first, b"k", "replaced")
    assert isinstance(network.settle(one, second), DhtStored)
    assert value_at(network, two) == ["new"]


def test_a_restarted_site_goes_on_above_its_own_records() -> None:
    network = Network(5)
    one, two, three = network.grow(3)
    network.settle(one, one.store(network.now, "k", encode_value("before"), 500.0))
    network.vanish(one)
    again = network.add("n0")
    assert again.me == one.me
    again.connected(network.now, two.me.peer, two.me.addresses)
    network.settle(again, again.store(network.now, "k", encode_value("after"), 500.0))
    assert value_at(network, three) == ["after"]


def test_a_clock_that_went_back_is_overcome_by_one_retry() -> None:
    network = Network(6)
    one, two, three = network.grow(3)
    ahead_ms = int((WALL_S + network.now + 300) * 1000)
    old = sign_record(one.keyring, RUN, b"k", ahead_ms, int(WALL_S) + 500, encode_value("old"))
    for node in (two, three):
        assert node.accept(network.now, old) == "ok"
    stored = network.settle(one, one.store(network.now, "k", encode_value("new"), 500.0))
    assert isinstance(stored, DhtStored)
    assert stored.replicas == 3
    assert value_at(network, two) == ["new"]


def test_a_liar_cannot_drive_the_sequence_to_its_end() -> None:
    network = Network(7)
    one, liar = network.grow(2)

    def lie(message: messages.Message) -> messages.Message:
        if isinstance(message, StoreReply):
            return StoreReply(message.request, "stale", 1 << 53)
        return message

    network.tampers[liar.me.peer] = lie
    network.settle(one, one.store(network.now, "k", b"\x01", 60.0))
    (record,) = one._publisher.own(KEY)
    assert record.sequence < (WALL_S + network.now + 1000) * 1000


def test_when_every_holder_refuses_the_caller_learns_why() -> None:
    network = Network(8)
    holder = network.grow(1)[0]
    client = network.add("client", addresses=())
    network.link(client.me.peer, holder.me.peer)
    network.run(2)
    for code in ("full", "far"):
        network.tampers[holder.me.peer] = lambda m, code=code: (
            StoreReply(m.request, code) if isinstance(m, StoreReply) else m
        )
        # The client itself holds nothing, so the one refusal is the outcome.
        client.table.seen(holder.me)
        handle = client.store(network.now, "k", b"\x01", 60.0)
        assert network.settle(client, handle) == DhtFailed(handle, b"k", code)
    assert len(client._publisher) == 0


def test_what_is_kept_is_tried_again_after_a_failure() -> None:
    network = Network(9)
    holder = network.grow(1)[0]
    client = network.add("client", addresses=())
    network.link(client.me.peer, holder.me.peer)
    network.tampers[holder.me.peer] = lambda m: (
        StoreReply(m.request, "full") if isinstance(m, StoreReply) else m
    )
    handle = client.store(network.now, "k", encode_value("kept"), 300.0, keep=True)
    assert isinstance(network.settle(client, handle), DhtFailed)
    del network.tampers[holder.me.peer]
    holder.held = type(holder.held)()
    network.run(limits.DHT_RETRY_S + 3)
    assert value_at(network, holder) == ["kept"]


def test_a_site_publishes_a_bounded_number_of_keys() -> None:
    node = core("me")
    for number in range(limits.DHT_RECORDS_PER_PUBLISHER_MAX):
        node.store(0.0, f"k{number}", b"\x01", 60.0)
    with pytest.raises(LocalProtocolError, match="too many"):
        node.store(0.0, "one more", b"\x01", 60.0)
    node.store(0.0, "k0", b"\x02", 60.0)


def test_lost_copies_are_replaced_without_the_publisher() -> None:
    network = Network(10)
    nodes = network.grow(30, every_s=0.3)
    network.run(5)
    writer = nodes[0]
    network.settle(writer, writer.store(network.now, "k", encode_value("here"), 600.0))
    network.run(2)

    def holders() -> list[DhtCore]:
        return [node for node in network.nodes.values() if node.held.under(KEY, 0.0)]

    network.vanish(writer)
    for node in [node for node in holders() if node is not writer][:14]:
        network.vanish(node)
    assert len(holders()) <= 6
    network.run(4 * limits.DHT_REPLICATE_S)  # dead contacts leave the tables on the way
    assert len(network.nodes) == 15
    assert len(holders()) == 15
