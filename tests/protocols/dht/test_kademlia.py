"""The DHT core: what it serves, what it refuses, and what it never does."""

from __future__ import annotations

import itertools
import math
from random import Random

import msgspec
import pytest

from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.core import Emit, PeerId, Send
from swarmtrain_protocols.dht.events import (
    DhtBootstrapped,
    DhtFailed,
    DhtFound,
    DhtRefused,
    DhtStored,
)
from swarmtrain_protocols.dht.ids import id_bytes, key_id
from swarmtrain_protocols.dht.kademlia import DhtCore, usable
from swarmtrain_protocols.dht.records import decode_value, encode_value, sign_record
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.messages.dht import (
    FindNode,
    FindValue,
    Nodes,
    SignedRecord,
    StoreRecord,
    StoreReply,
    Values,
)
from swarmtrain_protocols.messages.session import Ping
from swarmtrain_protocols.testing.keyring import FakeKeyring
from tests.protocols.dht.network import RUN, WALL_S, Network, core

ALICE = Ed25519Keyring(b"\x01" * 32)
BOB = Ed25519Keyring(b"\x02" * 32)
KEY = id_bytes(key_id(b"somewhere"))
VALUE = encode_value("here")


def real(keyring: Ed25519Keyring) -> DhtCore:
    return DhtCore(
        keyring=keyring, rng=Random(1), now=5.0, wall_s=WALL_S, addresses=("a:1",), run=RUN
    )


def answers(node: DhtCore) -> list[messages.Message]:
    return [effect.message for effect in node.drain() if isinstance(effect, Send)]


def emitted(node: DhtCore) -> list[object]:
    return [effect.event for effect in node.drain() if isinstance(effect, Emit)]


def record(sequence: int = 1, ttl_s: int = 60, value: bytes = VALUE) -> SignedRecord:
    return sign_record(ALICE, RUN, b"somewhere", sequence, int(WALL_S) + ttl_s, value)


def give(node: DhtCore, item: SignedRecord) -> tuple[StoreReply, list[object]]:
    """Hand a record over as BOB, who has read first; returns the answer and the events."""
    node.receive(5.0, BOB.peer_id, FindValue(8, item.key))
    (page,) = answers(node)
    assert isinstance(page, Values)
    node.receive(5.0, BOB.peer_id, StoreRecord(9, item, page.token))
    effects = node.drain()
    replies = [e.message for e in effects if isinstance(e, Send) and e.peer == BOB.peer_id]
    (reply,) = [message for message in replies if isinstance(message, StoreReply)]
    assert reply.request == 9
    return reply, [effect.event for effect in effects if isinstance(effect, Emit)]


def test_a_valid_record_is_kept_and_given() -> None:
    node = real(Ed25519Keyring(b"\x03" * 32))
    reply, events = give(node, record())
    assert (reply.code, events) == ("ok", [])
    node.receive(5.0, BOB.peer_id, FindValue(10, KEY))
    (page,) = answers(node)
    assert page == Values(10, (record(),), (), False, page.token)


BAD = {
    "bad_signature": msgspec.structs.replace(record(9), value=encode_value("elsewhere")),
    "oversize": msgspec.structs.replace(record(9), value=bytes(limits.DHT_VALUE_BYTES_MAX + 1)),
    "malformed": record(9, value=b"\xc1"),
}


@pytest.mark.parametrize("code", list(BAD))
def test_faults_name_the_peer_and_change_nothing(code: str) -> None:
    node = real(Ed25519Keyring(b"\x03" * 32))
    give(node, record(5))
    before = (len(node.held), node.held.nbytes, node.held.under(KEY, WALL_S), len(node.held.marks))
    reply, events = give(node, BAD[code])
    assert reply.code == ("forged" if code == "bad_signature" else code)
    (fault,) = events
    assert isinstance(fault, PeerFault)
    assert (fault.code, fault.peer) == (code, BOB.peer_id)
    assert node.counters == {code: 1}
    after = (len(node.held), node.held.nbytes, node.held.under(KEY, WALL_S), len(node.held.marks))
    assert after == before


@pytest.mark.parametrize(
    ("code", "item"),
    [
        ("expired", record(9, ttl_s=0)),
        ("far", record(9, ttl_s=int(limits.DHT_TTL_S_MAX + limits.DHT_CLOCK_SKEW_S) + 1)),
        ("stale", record(4, ttl_s=600)),
    ],
)
def test_refusals_without_blame_name_the_peer_and_change_nothing(
    code: str, item: SignedRecord
) -> None:
    node = real(Ed25519Keyring(b"\x03" * 32))
    give(node, record(5))
    before = (len(node.held), node.held.nbytes, node.held.under(KEY, WALL_S))
    reply, events = give(node, item)
    assert reply == StoreReply(9, code, 5)
    assert events == [DhtRefused(BOB.peer_id, code)]
    assert (len(node.held), node.held.nbytes, node.held.under(KEY, WALL_S)) == before


def test_a_record_of_another_run_is_forged_here() -> None:
    other = sign_record(ALICE, bytes(32), b"somewhere", 1, int(WALL_S) + 60, VALUE)
    reply, _ = give(real(BOB), other)
    assert reply.code == "forged"


def test_many_publishers_come_in_pages_that_fit_a_frame() -> None:
    node = core("holder")
    value = encode_value(b"x" * 1000)
    for number in range(limits.DHT_RECORDS_PER_KEY_MAX):
        item = sign_record(FakeKeyring(f"p{number}"), RUN, b"somewhere", 1, int(WALL_S) + 60, value)
        assert node.accept(0.0, item) == "ok"
    found: list[bytes] = []
    after = b""
    for request in itertools.count(1):
        node.receive(0.0, PeerId(b"q" * 32), FindValue(request, KEY, after))
        (page,) = answers(node)
        assert isinstance(page, Values)
        assert len(messages.encode(page)) < limits.FRAME_BYTES_CONTROL_MAX
        found += [item.publisher for item in page.records]
        if not page.more:
            break
        after = found[-1]
    assert found == sorted({FakeKeyring(f"p{n}").peer_id for n in range(64)})
    assert request > 1


def test_a_flood_is_dropped_counted_and_reported_once() -> None:
    node = core("target")
    sender = PeerId(b"q" * 32)
    for number in range(1000):
        node.receive(1.0, sender, FindNode(number, bytes(20)))
    effects = node.drain()
    assert len([e for e in effects if isinstance(e, Send)]) == limits.DHT_BURST_SERVED
    assert [e.event for e in effects if isinstance(e, Emit)] == [DhtRefused(sender, "rate")]
    assert node.counters == {"dht_rate": 1000 - limits.DHT_BURST_SERVED}
    node.receive(1.0, PeerId(b"r" * 32), FindNode(1, bytes(20)))  # others are served
    assert len(answers(node)) == 1


def test_unknown_senders_take_bounded_memory() -> None:
    node = core("target")
    for number in range(limits.DHT_METERS_MAX + 500):
        node.receive(1.0, PeerId(number.to_bytes(32, "big")), FindNode(1, bytes(20)))
        node.drain()
    assert len(node.serving) == limits.DHT_METERS_MAX
    assert len(node.table) == 0  # nobody of them has an address
    assert len(node.requests) == 0


def test_answers_out_of_the_blue_are_faults() -> None:
    node = core("target")
    node.receive(0.0, BOB.peer_id, Nodes(77, ()))
    (fault,) = emitted(node)
    assert isinstance(fault, PeerFault)
    assert (fault.code, fault.peer) == ("dht_unasked", BOB.peer_id)


def test_local_misuse_is_raised() -> None:
    node = core("me")
    with pytest.raises(LocalProtocolError, match="MessagePack"):
        node.store(0.0, "k", b"\xc1", 60.0)
    with pytest.raises(LocalProtocolError, match="MessagePack"):
        node.store(0.0, "k", encode_value(b"x" * 1024), 60.0)
    for ttl_s in (0.5, limits.DHT_TTL_S_MAX + 1, math.nan):
        with pytest.raises(LocalProtocolError, match="time to live"):
            node.store(0.0, "k", VALUE, ttl_s)
    for key in ("", "k" * 257):
        with pytest.raises(LocalProtocolError, match="key"):
            node.get(0.0, key)
    with pytest.raises(LocalProtocolError, match="not a DHT message"):
        node.receive(0.0, BOB.peer_id, Ping(1))


def test_alone_a_node_stores_and_finds_its_own() -> None:
    node = core("me")
    stored = node.store(0.0, "k", VALUE, 60.0)
    found = node.get(0.0, b"k")
    missing = node.get(0.0, "other")
    boot = node.bootstrap(0.0)
    events = emitted(node)
    assert events[0] == DhtStored(stored, b"k", 1)
    assert isinstance(events[1], DhtFound)
    assert (events[1].handle, events[1].records[0].value) == (found, VALUE)
    assert events[2:] == [DhtFound(missing, b"other", ()), DhtBootstrapped(boot, 0)]
    node.tick(61.0)
    node.get(61.0, "k")
    assert emitted(node) == [DhtFound(boot + 1, b"k", ())]


def test_where_nobody_answers_the_call_fails() -> None:
    network = Network(1)
    one, two = network.grow(2)
    network.vanish(two)
    outcome = network.settle(one, one.get(network.now, "k"))
    assert outcome == DhtFailed(1, b"k", "unreachable")
    # Three dead ends later the neighbour is out of the table: nobody has it, and that is certain.
    network.settle(one, one.get(network.now, "k"))
    assert len(one.table) == 0
    assert isinstance(network.settle(one, one.get(network.now, "k")), DhtFound)


def test_a_broken_link_answers_at_once() -> None:
    network = Network(1)
    one, two = network.grow(2)
    network.vanish(two)
    handle = one.get(network.now, "k")
    one.drain()
    one.disconnected(network.now, two.me.peer)
    assert emitted(one) == [DhtFailed(handle, b"k", "unreachable")]


def test_a_link_that_cannot_be_made_answers_at_once() -> None:
    network = Network(1)
    one, two = network.grow(2)
    one.disconnected(network.now, two.me.peer)
    handle = one.get(network.now, "k")
    one.drain()
    one.unreachable(network.now, two.me.peer)
    assert emitted(one) == [DhtFailed(handle, b"k", "unreachable")]


def test_a_dial_that_fails_beside_a_link_loses_nothing() -> None:
    network = Network(1)
    one, two = network.grow(2)
    handle = one.get(network.now, "k")
    one.unreachable(network.now, two.me.peer)
    assert isinstance(network.settle(one, handle), DhtFound)


def test_get_gives_the_latest_expiry_and_get_all_gives_everybody() -> None:
    network = Network(2)
    nodes = network.grow(5)
    for number, node in enumerate(nodes):
        value = encode_value(number)
        ttl_s = 60.0 + 10 * (number % 4)
        assert isinstance(
            network.settle(node, node.store(network.now, "k", value, ttl_s)), DhtStored
        )
    for reader in nodes:
        best = network.settle(reader, reader.get(network.now, "k"))
        assert isinstance(best, DhtFound)
        assert [decode_value(item.value) for item in best.records] == [3]
        everybody = network.settle(reader, reader.get_all(network.now, "k"))
        assert isinstance(everybody, DhtFound)
        assert [item.publisher for item in everybody.records] == sorted(
            node.me.peer for node in nodes
        )


def test_a_client_without_address_publishes_and_reads_but_holds_nothing() -> None:
    network = Network(3)
    one, two = network.grow(2)
    client = network.add("client", addresses=())
    network.link(client.me.peer, one.me.peer)
    network.run(3)
    stored = network.settle(client, client.store(network.now, "k", VALUE, 60.0))
    assert isinstance(stored, DhtStored)
    assert stored.replicas == 2
    assert len(client.held) == 0
    found = network.settle(two, two.get(network.now, "k"))
    assert isinstance(found, DhtFound)
    assert found.records[0].publisher == client.me.peer
    for node in (one, two):
        assert client.me not in node.table
    read = network.settle(client, client.get(network.now, "k"))
    assert isinstance(read, DhtFound)
    assert len(read.records) == 1


def test_a_newcomer_is_given_what_it_should_hold() -> None:
    network = Network(4)
    one, two = network.grow(2)
    for number in range(10):
        network.settle(one, one.store(network.now, f"k{number}", VALUE, 600.0))
    newcomer = network.add("new")
    network.link(newcomer.me.peer, two.me.peer)
    network.run(5)
    assert len(newcomer.held) == 10
    network.vanish(one)
    network.vanish(two)
    found = network.settle(newcomer, newcomer.get(network.now, "k3"))
    assert isinstance(found, DhtFound)
    assert len(found.records) == 1


def test_a_banned_peer_is_neither_asked_nor_named() -> None:
    network = Network(5)
    one, two, three = network.grow(3)
    network.run(5)
    assert two.me in one.table
    one.forget(network.now, two.me.peer)
    assert two.me not in one.table
    one.drain()
    one.receive(network.now, three.me.peer, FindNode(1, id_bytes(two.me.id)))
    (reply,) = answers(one)
    assert isinstance(reply, Nodes)
    assert two.me.peer not in [info.peer for info in reply.contacts]


def test_bootstrap_from_a_contact_of_a_ticket() -> None:
    network = Network(6)
    nodes = network.grow(8)
    late = network.add("late")
    handle = late.bootstrap(network.now, [(nodes[0].me.peer, nodes[0].me.addresses)])
    done = network.settle(late, handle)
    assert isinstance(done, DhtBootstrapped)
    assert done.contacts == 8
    lost = network.add("lost")
    failed = network.settle(lost, lost.bootstrap(network.now, [(PeerId(b"x" * 32), ("x:1",))]))
    assert isinstance(failed, DhtFailed)
    assert failed.code == "unreachable"


def test_more_calls_than_can_wait_are_told_so() -> None:
    network = Network(7)
    one, _ = network.grow(2)
    room = limits.DHT_SEARCHES_ACTIVE_MAX + limits.DHT_SEARCHES_QUEUED_MAX
    handles = [one.get(network.now, f"k{n}") for n in range(room + 5)]
    busy = [event for event in emitted(one) if isinstance(event, DhtFailed)]
    assert [event.code for event in busy] == ["busy"] * 5
    assert [event.handle for event in busy] == handles[-5:]


def test_the_deadline_is_honoured() -> None:
    node = core("me", now=100.0)
    assert node.deadline() == 100.0 + limits.DHT_HOUSEKEEPING_S
    node.tick(101.0)
    assert node.deadline() > 101.0
    assert node.wall(101.0) == WALL_S + 101.0


def test_a_node_with_nothing_to_do_is_not_woken_for_it() -> None:
    network = Network(7)
    node, _ = network.grow(2)
    network.run(60.0)  # what a newcomer looks for is found
    handle = node.store(network.now, "k", encode_value("v"), 80.0, keep=True)
    network.settle(node, handle)
    began = network.now
    woken = 0
    while network.now < began + 30.0:
        woken += 1
        network.run(node.deadline() - network.now + 1e-3)
    assert woken <= 15  # not thirty times
    (before,) = node.own_records(id_bytes(key_id(b"k")))
    network.run(12.0)
    (after,) = node.own_records(id_bytes(key_id(b"k")))
    assert after.sequence > before.sequence, "renewed at half of its life"


def test_only_well_formed_addresses_are_used() -> None:
    assert usable(("h:1", "nonsense", "[::1]:2", "h:99999", "")) == ("h:1", "[::1]:2")


def test_a_later_flood_is_reported_again() -> None:
    node = core("target")
    sender = PeerId(b"q" * 32)
    reports = 0
    for second in (1.0, 2.0, 60.0):
        for number in range(300):
            node.receive(second, sender, FindNode(number, bytes(20)))
        reports += emitted(node).count(DhtRefused(sender, "rate"))
    assert reports == 2
