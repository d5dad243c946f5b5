"""Searches against liars: what they hand over is refused, and they are named."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.events import DhtFound, DhtStored
from swarmtrain_protocols.dht.ids import id_bytes, key_id
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.dht.records import decode_value, encode_value, sign_record
from swarmtrain_protocols.messages.dht import FindValue, NodeInfo, Nodes, SignedRecord, Values
from swarmtrain_protocols.testing.keyring import FakeKeyring
from tests.protocols.dht.network import RUN, WALL_S, Network, Tamper

KEY = id_bytes(key_id(b"k"))
replace = msgspec.structs.replace


def forged(record: SignedRecord) -> SignedRecord:
    return replace(record, value=encode_value("lie"), sequence=record.sequence + 1)


def other_key(record: SignedRecord) -> SignedRecord:
    keyring = FakeKeyring("n0")
    return sign_record(keyring, RUN, b"other", 1, record.expires_s, record.value)


def lie(change: Callable[[SignedRecord], SignedRecord]) -> Tamper:
    def tamper(message: messages.Message) -> messages.Message:
        if isinstance(message, Values) and message.records:
            return replace(message, records=tuple(change(r) for r in message.records))
        return message

    return tamper


@pytest.mark.parametrize(("change", "code"), [(forged, "bad_signature"), (other_key, "dht_page")])
def test_forged_records_are_refused_and_the_liar_is_named(
    change: Callable[[SignedRecord], SignedRecord], code: str
) -> None:
    network = Network(1)
    nodes = network.grow(6)
    stored = network.settle(nodes[0], nodes[0].store(network.now, "k", encode_value("true"), 300.0))
    assert isinstance(stored, DhtStored)
    liar, reader = nodes[2], nodes[4]
    network.tampers[liar.me.peer] = lie(change)
    found = network.settle(reader, reader.get(network.now, "k"))
    assert isinstance(found, DhtFound)
    assert [decode_value(record.value) for record in found.records] == ["true"]
    assert [(fault.code, fault.peer) for fault in network.faults] == [(code, liar.me.peer)]


def test_among_liars_only_the_answer_is_nothing() -> None:
    network = Network(2)
    one, two, three = network.grow(3)
    network.settle(one, one.store(network.now, "k", encode_value("true"), 300.0))
    reader = three
    for node in (one, two):
        network.tampers[node.me.peer] = lie(forged)
    reader.held = type(reader.held)()  # it holds nothing of its own
    found = network.settle(reader, reader.get(network.now, "k"))
    assert getattr(found, "records", ()) == ()
    assert {fault.peer for fault in network.faults} == {one.me.peer, two.me.peer}


def test_one_reader_never_sees_a_sequence_go_back() -> None:
    network = Network(3)
    writer, holder, reader = network.grow(3)
    old = sign_record(writer.keyring, RUN, b"k", 1, int(WALL_S + network.now) + 500, b"\x01")
    network.settle(writer, writer.store(network.now, "k", b"\x02", 2.0))
    first = network.settle(reader, reader.get(network.now, "k"))
    assert isinstance(first, DhtFound)
    assert first.records[0].value == b"\x02"
    network.run(4)  # the newer record has expired everywhere; the older one would still be valid

    def replay(message: messages.Message) -> messages.Message:
        return replace(message, records=(old,)) if isinstance(message, Values) else message

    network.tampers[holder.me.peer] = replay
    second = network.settle(reader, reader.get(network.now, "k"))
    assert isinstance(second, DhtFound)
    assert second.records == ()
    fresh = network.add("fresh")  # who has never seen the newer one cannot know
    network.link(fresh.me.peer, holder.me.peer)
    network.run(2)
    third = network.settle(fresh, fresh.get(network.now, "k"))
    assert isinstance(third, DhtFound)
    assert third.records == (old,)


def test_all_pages_of_a_crowded_key_are_read() -> None:
    network = Network(4)
    holder, reader = network.grow(2)
    value = encode_value(b"x" * 1000)
    publishers = [FakeKeyring(f"p{n}") for n in range(limits.DHT_RECORDS_PER_KEY_MAX)]
    for keyring in publishers:
        record = sign_record(keyring, RUN, b"k", 1, int(WALL_S) + 300, value)
        assert holder.accept(network.now, record) == "ok"
    found = network.settle(reader, reader.get_all(network.now, "k"))
    assert isinstance(found, DhtFound)
    assert [r.publisher for r in found.records] == sorted(k.peer_id for k in publishers)


def page_of(publisher: int, request: int) -> Values:
    """One valid record by an invented publisher, and the claim that there are more."""
    keyring = FakeKeyring("invented")
    keyring._peer_id = PeerId(publisher.to_bytes(32, "big"))
    record = sign_record(keyring, RUN, b"k", 1, int(WALL_S) + 300, b"\x01")
    return Values(request, (record,), (), True)


def test_endless_pages_end() -> None:
    network = Network(5)
    liar, reader = network.grow(2)
    asked = 0

    def endless(message: messages.Message) -> messages.Message:
        nonlocal asked
        if not isinstance(message, Values):
            return message
        asked += 1
        return page_of(asked, message.request)

    network.tampers[liar.me.peer] = endless
    found = network.settle(reader, reader.get_all(network.now, "k"))
    assert asked == limits.DHT_RECORDS_PER_KEY_MAX + 1
    assert isinstance(found, DhtFound)
    assert len(found.records) == asked
    assert network.faults == []


@pytest.mark.parametrize(
    "page",
    [lambda request: Values(request, (), (), True), lambda request: page_of(1, request)],
    ids=["empty", "repeated"],
)
def test_pages_that_do_not_go_on_are_faults(page: Callable[[int], Values]) -> None:
    network = Network(6)
    liar, reader = network.grow(2)
    network.tampers[liar.me.peer] = lambda message: (
        page(message.request) if isinstance(message, Values) else message
    )
    network.settle(reader, reader.get(network.now, "k"))
    assert [(fault.code, fault.peer) for fault in network.faults] == [("dht_page", liar.me.peer)]


def test_invented_contacts_cost_time_but_not_the_result() -> None:
    network = Network(7)
    nodes = network.grow(10)
    network.settle(nodes[0], nodes[0].store(network.now, "k", encode_value("true"), 300.0))
    liar, reader = nodes[3], nodes[7]

    def invent(message: messages.Message) -> messages.Message:
        if isinstance(message, (Nodes, Values)):
            ghosts = [NodeInfo(network.rng.randbytes(32), ("ghost:1",)) for _ in range(20)]
            return replace(message, contacts=tuple(ghosts))
        return message

    network.tampers[liar.me.peer] = invent
    found = network.settle(reader, reader.get(network.now, "k"))
    assert isinstance(found, DhtFound)
    assert len(found.records) == 1
    known = {contact.peer for contact in reader.table.contacts()}
    assert known <= {node.me.peer for node in nodes}


def test_a_search_ends_in_time_whatever_happens() -> None:
    network = Network(8)
    nodes = network.grow(5)
    for node in nodes[1:]:
        network.tampers[node.me.peer] = lambda _message: None
    started = network.now
    network.settle(nodes[0], nodes[0].get(network.now, "k"), limit_s=60.0)
    assert network.now - started <= limits.DHT_LOOKUP_TIMEOUT_S + 1.0
    network.run(40)
    assert len(nodes[0].searches) == 0
    assert len(nodes[0].table) == 0


def test_many_waiting_searches_without_contacts_do_not_recurse() -> None:
    network = Network(9)
    one, two = network.grow(2)
    handles = [one.get(network.now, f"k{n}") for n in range(900)]
    network.vanish(two)
    one.forget(network.now, two.me.peer)
    network.settle(one, handles[-1])
    outcomes = [event for event in network.events[one.me.peer] if hasattr(event, "handle")]
    assert len(outcomes) == 900
    assert PeerId(two.me.peer) not in [c.peer for c in one.table.contacts()]


def test_questions_name_the_key_and_nothing_else() -> None:
    network = Network(10)
    one, two = network.grow(2)
    asked: list[messages.Message] = []
    network.tampers[one.me.peer] = lambda m: (asked.append(m), m)[1]
    network.settle(one, one.get(network.now, "k"))
    questions = [m for m in asked if isinstance(m, FindValue)]
    assert [(m.key, m.after) for m in questions] == [(KEY, b"")]
    assert two.me in one.table


def asked_for_value(network: Network, reader: DhtCore, key: str) -> tuple[DhtFound, int]:
    """What a lookup finds, and how many it asks."""
    before = network.sent
    asked: list[messages.Message] = []
    network.tampers[reader.me.peer] = lambda m: (asked.append(m), m)[1]
    found = network.settle(reader, reader.get_all(network.now, key))
    del network.tampers[reader.me.peer]
    assert isinstance(found, DhtFound) and network.sent > before
    return found, sum(isinstance(m, FindValue) for m in asked)


def test_five_that_agree_are_enough_and_nothing_is_never_enough() -> None:
    network = Network(11)
    nodes = network.grow(30)
    network.run(5)
    for number in range(8):
        writer = nodes[number]
        network.settle(writer, writer.store(network.now, f"k{number}", b"\x01", 600.0))
    network.run(3)
    counts = []
    for number in range(8):
        found, asked = asked_for_value(network, nodes[20 + number], f"k{number}")
        assert len(found.records) == 1
        counts.append(asked)
    # One key in nine has five holders that lie closer than it takes; there all are asked.
    assert sorted(counts)[5] == limits.DHT_AGREE
    _, asked = asked_for_value(network, nodes[29], "nobody wrote this")
    assert asked >= limits.DHT_K


def test_one_copy_that_differs_has_everybody_asked() -> None:
    network = Network(12)
    nodes = network.grow(30)
    network.run(5)
    writer, reader = nodes[0], nodes[25]
    network.settle(writer, writer.store(network.now, "k", encode_value("old"), 600.0))
    network.run(3)
    assert asked_for_value(network, reader, "k")[1] == limits.DHT_AGREE
    nearest = network.nearest(key_id(b"k"), 3, but=reader.me.peer)[2]
    newer = sign_record(
        writer.keyring, RUN, b"k", 1 << 50, int(WALL_S + network.now) + 500, encode_value("new")
    )
    network.nodes[nearest].accept(network.now, newer)
    found, asked = asked_for_value(network, reader, "k")
    assert [decode_value(record.value) for record in found.records] == ["new"]
    assert asked >= limits.DHT_K


def test_what_was_stored_a_moment_ago_is_read_by_anybody() -> None:
    network = Network(13)
    nodes = network.grow(40)
    network.run(5)
    for number in range(10):
        writer = nodes[number % 4]
        network.settle(writer, writer.store(network.now, "k", encode_value(number), 600.0))
        reader = nodes[10 + number]
        found = network.settle(reader, reader.get(network.now, "k"))
        assert isinstance(found, DhtFound)
        own = network.settle(reader, reader.get_all(network.now, "k"))
        assert isinstance(own, DhtFound)
        values = {r.publisher: decode_value(r.value) for r in own.records}
        assert values[writer.me.peer] == number
