"""Serving: writes after a read only, short answers, and to nobody but the asker."""

from __future__ import annotations

import pytest

from swarmtrain_protocols import limits, messages
from swarmtrain_protocols.core import Connect, Emit, PeerId, Send
from swarmtrain_protocols.dht.events import DhtRefused
from swarmtrain_protocols.dht.ids import id_bytes, key_id
from swarmtrain_protocols.dht.kademlia import DhtCore
from swarmtrain_protocols.dht.records import digest_of, sign_record
from swarmtrain_protocols.messages.dht import (
    FindNode,
    FindValue,
    Nodes,
    StoreRecord,
    StoreReply,
    Values,
)
from swarmtrain_protocols.testing.keyring import FakeKeyring
from tests.protocols.dht.network import RUN, WALL_S, core

WRITER = FakeKeyring("writer")
KEY, OTHER = id_bytes(key_id(b"k")), id_bytes(key_id(b"other"))
RECORD = sign_record(WRITER, RUN, b"k", 1, int(WALL_S) + 600, b"\x01")


def ask(node: DhtCore, message: messages.Message, now: float = 0.0) -> messages.Message:
    node.drain()
    node.receive(now, WRITER.peer_id, message)
    sends = [e for e in node.drain() if isinstance(e, Send)]
    assert [send.peer for send in sends] == [WRITER.peer_id]
    return sends[0].message


def token_of(node: DhtCore, key: bytes = KEY, now: float = 0.0) -> bytes:
    reply = ask(node, FindValue(1, key), now)
    assert isinstance(reply, Values)
    return reply.token


def test_writing_takes_a_read_of_the_same_key() -> None:
    node = core("holder")
    for token in (b"", b"guessed!", token_of(node, OTHER), token_of(core("another"))):
        assert ask(node, StoreRecord(2, RECORD, token)) == StoreReply(2, "token", 0)
        assert len(node.held) == 0
    assert node.counters == {"dht_token": 4}
    assert ask(node, StoreRecord(3, RECORD, token_of(node))) == StoreReply(3, "ok", 1)
    assert len(node.held) == 1


def test_asking_for_nodes_near_the_key_is_a_read_too() -> None:
    node = core("holder")
    reply = ask(node, FindNode(1, KEY))
    assert isinstance(reply, Nodes)
    assert ask(node, StoreRecord(2, RECORD, reply.token)) == StoreReply(2, "ok", 1)


def test_a_read_of_long_ago_does_not_do() -> None:
    node = core("holder")
    token = token_of(node)
    late_s = 2 * limits.DHT_TOKEN_EPOCH_S
    node.drain()
    node.receive(late_s, WRITER.peer_id, StoreRecord(2, RECORD, token))
    effects = node.drain()
    assert Emit(DhtRefused(WRITER.peer_id, "token")) in effects
    assert len(node.held) == 0


def test_who_holds_the_same_is_told_so_and_nothing_is_repeated() -> None:
    node = core("holder")
    ask(node, StoreRecord(2, RECORD, token_of(node)))
    same = ask(node, FindValue(3, KEY, b"", digest_of([RECORD])))
    assert isinstance(same, Values)
    assert (same.records, same.contacts, same.more, same.same) == ((), (), False, True)
    assert ask(node, StoreRecord(4, RECORD, same.token)) == StoreReply(4, "ok", 1)
    newer = sign_record(WRITER, RUN, b"k", 2, int(WALL_S) + 600, b"\x02")
    other = ask(node, FindValue(5, KEY, b"", digest_of([newer])))
    assert isinstance(other, Values)
    assert (other.records, other.same) == ((RECORD,), False)


def test_an_answer_goes_to_the_asker_and_nowhere_else() -> None:
    node = core("holder")
    node.connected(0.0, WRITER.peer_id, ("8.8.4.4:1",))
    node.drain()
    for message in (FindNode(1, KEY), FindValue(2, KEY), StoreRecord(3, RECORD)):
        node.receive(0.0, WRITER.peer_id, message)
    effects = node.drain()
    assert not [e for e in effects if isinstance(e, Connect)]
    assert {e.peer for e in effects if isinstance(e, Send)} == {WRITER.peer_id}


@pytest.mark.parametrize("count", [1, 500])
def test_an_answer_is_of_bounded_length(count: int) -> None:
    node = core("holder")
    for number in range(count):
        peer = PeerId(number.to_bytes(32, "big"))
        node.connected(0.0, peer, (f"10.0.0.1:{number + 1}",))
    node.drain()
    reply = ask(node, FindNode(1, KEY))
    assert isinstance(reply, Nodes)
    assert len(reply.contacts) == min(count, limits.DHT_K)
    assert len(messages.encode(reply)) < 100 + limits.DHT_K * 64
