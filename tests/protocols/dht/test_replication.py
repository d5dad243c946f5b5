"""Copies: compared before they are sent, made anew when a holder leaves, repaired by readers."""

from __future__ import annotations

from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.dht.events import DhtFound
from swarmtrain_protocols.dht.ids import id_bytes, key_id
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.dht.records import decode_value, encode_value, sign_record
from swarmtrain_protocols.messages.dht import FindValue, StoreRecord
from swarmtrain_protocols.testing.keyring import FakeKeyring
from tests.protocols.dht.network import RUN, WALL_S, Network

KEY = id_bytes(key_id(b"k"))


def version(sequence: int, who: str = "writer") -> object:
    value = encode_value([who, sequence])
    return sign_record(FakeKeyring(who), RUN, b"k", sequence, int(WALL_S) + 600, value)


def holders(network: Network) -> list[DhtCore]:
    return [node for node in network.nodes.values() if node.held.under(KEY, 0.0)]


def values(node: DhtCore) -> list[object]:
    return [decode_value(record.value) for record in node.held.under(KEY, 0.0)]


def test_both_sides_of_a_comparison_end_with_the_newer() -> None:
    network = Network(1)
    one, two = network.grow(2)
    for node, versions in ((one, (1, 5)), (two, (4, 2))):
        node.accept(network.now, version(versions[0], "a"))  # type: ignore[arg-type]
        node.accept(network.now, version(versions[1], "b"))  # type: ignore[arg-type]
    one.replication.compare(network.now, two.me, KEY)
    network._after(one)
    network.run(2)
    assert sorted(values(one)) == sorted(values(two)) == [["a", 4], ["b", 5]]


def test_many_publishers_are_compared_page_by_page() -> None:
    network = Network(2)
    one, two = network.grow(2)
    for number in range(limits.DHT_RECORDS_PER_KEY_MAX):
        value = encode_value(b"x" * 1000)
        keyring = FakeKeyring(f"p{number}")
        record = sign_record(keyring, RUN, b"k", 1, int(WALL_S) + 600, value)
        if number % 3:
            one.accept(network.now, record)
        if number % 3 != 1:
            two.accept(network.now, record)
    one.replication.compare(network.now, two.me, KEY)
    network._after(one)
    network.run(10)
    assert len(values(one)) == len(values(two)) == limits.DHT_RECORDS_PER_KEY_MAX


def test_equal_holders_exchange_questions_and_no_records() -> None:
    network = Network(3)
    nodes = network.grow(8)
    network.settle(nodes[0], nodes[0].store(network.now, "k", encode_value(1), 600.0, keep=True))
    network.run(5)
    sent: list[messages.Message] = []
    for node in nodes:
        network.tampers[node.me.peer] = lambda m: (sent.append(m), m)[1]
    network.run(250)
    asked = [m for m in sent if isinstance(m, FindValue) and m.known]
    stores = [m for m in sent if isinstance(m, StoreRecord)]
    assert len(asked) >= 7
    assert stores == []
    assert len(holders(network)) == 8


def test_copies_are_made_anew_when_a_holder_leaves_not_only_when_time_is_up() -> None:
    network = Network(4)
    nodes = network.grow(30, every_s=0.3)
    network.run(5)
    writer = nodes[0]
    network.settle(writer, writer.store(network.now, "k", encode_value(1), 600.0))
    network.run(2)  # the copies that the call does not wait for
    before = {node.me.peer for node in holders(network)}
    gone = [node for node in nodes if node.me.peer in before and node is not writer][:8]
    network.vanish(writer)
    for node in gone:
        network.vanish(node)
        for other in list(network.nodes.values()):  # the links to it break
            other.disconnected(network.now, node.me.peer)
            network._after(other)
        network._links = {p: v for p, v in network._links.items() if node.me.peer not in p}
    # Two requests in a row must fail, then at most ten seconds; replication in time takes 120.
    network.run(2 * limits.DHT_REQUEST_TIMEOUT_S + limits.DHT_LEFT_JITTER_S + 5)
    alive = set(network.nodes)
    new = {node.me.peer for node in holders(network)} - before
    nearest = set(network.nearest(key_id(b"k"), limits.DHT_K))
    assert new, "nobody new holds it"
    assert len({node.me.peer for node in holders(network)} & nearest) >= limits.DHT_K - 2
    assert alive >= new


def test_a_reader_repairs_a_few_holders_that_lack_it() -> None:
    network = Network(5)
    nodes = network.grow(10)
    network.settle(nodes[0], nodes[0].store(network.now, "k", encode_value(1), 600.0))
    network.run(3)
    for node in nodes[1:8]:
        node.held = type(node.held)()
    assert len(holders(network)) == 3
    reader = nodes[9]
    found = network.settle(reader, reader.get(network.now, "k"))
    assert isinstance(found, DhtFound)
    network.run(3)
    assert len(holders(network)) == 3 + limits.DHT_REPAIRS_MAX


def test_whoever_is_asked_to_compare_the_same_puts_its_own_turn_off() -> None:
    network = Network(6)
    one, two = network.grow(2)
    record = version(1)
    for node in (one, two):
        node.accept(network.now, record)  # type: ignore[arg-type]
    before = two.held.next_replication()
    network.run(30)
    one.replication.compare(network.now, two.me, KEY)
    network._after(one)
    network.run(1)
    after = two.held.next_replication()
    assert before is not None and after is not None
    assert after >= network.now - 1 + limits.DHT_REPLICATE_S


def test_who_is_no_longer_among_the_nearest_asks_three_of_them_and_takes_nothing() -> None:
    """Else everybody who ever was near would hold a copy for as long as it is renewed."""
    network = Network(11)
    nodes = network.grow(30, every_s=0.3)
    network.run(5)
    order = network.nearest(key_id(b"k"), len(nodes))
    far = network.nodes[order[-1]]
    for peer in order[: limits.DHT_K]:
        network.nodes[peer].accept(network.now, version(2))  # type: ignore[arg-type]
    far.accept(network.now, version(1))  # type: ignore[arg-type]
    asked: list[bytes] = []

    def watch(message: messages.Message) -> messages.Message:
        if isinstance(message, FindValue) and message.known:
            asked.append(message.key)
        return message

    network.tampers[far.me.peer] = watch
    network.run(2 * limits.DHT_REPLICATE_S + 5)
    assert len(asked) in (limits.DHT_PATHS, 2 * limits.DHT_PATHS), "one turn of its own, or two"
    assert values(far) == [["writer", 1]]


def test_what_only_somebody_far_away_holds_comes_to_the_nearest() -> None:
    network = Network(12)
    nodes = network.grow(30, every_s=0.3)
    network.run(5)
    order = network.nearest(key_id(b"k"), len(nodes))
    network.nodes[order[-1]].accept(network.now, version(1))  # type: ignore[arg-type]
    network.run(2 * limits.DHT_REPLICATE_S + 5)
    there = {node.me.peer for node in holders(network)}
    assert set(order[: limits.DHT_PATHS]) <= there
    network.run(2 * limits.DHT_REPLICATE_S + 5)
    there = {node.me.peer for node in holders(network)}
    assert set(order[: limits.DHT_K]) <= there
