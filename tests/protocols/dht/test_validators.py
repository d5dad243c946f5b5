"""Rules by prefix: only a member says where it is, and in addresses that can be read."""

from __future__ import annotations

import msgspec
import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.dht.events import DhtFound
from swarmtrain_protocols.dht.records import encode_value, refusal, sign_record
from swarmtrain_protocols.dht.validators import breaks_its_rule
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.messages.dht import FindValue, StoreRecord, StoreReply, Values
from swarmtrain_protocols.testing.keyring import FakeKeyring
from tests.protocols.dht.network import RUN, WALL_S, Network, core

ME, OTHER = FakeKeyring("me"), FakeKeyring("other")
NAME = b"member/" + ME.peer_id
GOOD = encode_value(["10.0.0.1:5", "[2001:db8::1]:5", "host.example:5"])


def test_a_name_without_a_rule_takes_any_value_of_anybody() -> None:
    for name in (b"k", b"members", b"memberx" + bytes(32), b"x/member/"):
        assert not breaks_its_rule(name, b"p" * 32, b"\x01")


@pytest.mark.parametrize(
    "value",
    [
        encode_value("10.0.0.1:5"),
        encode_value(["10.0.0.1"]),
        encode_value(["10.0.0.1:99999"]),
        encode_value([b"10.0.0.1:5"]),
        encode_value(["10.0.0.1:5"] * (limits.ADDRESSES_PER_PEER_MAX + 1)),
        encode_value(["a" * 200 + ":5"]),
        encode_value({"a": 1}),
        b"\xc1",
        b"",
    ],
)
def test_addresses_that_cannot_be_read_break_the_rule(value: bytes) -> None:
    assert not breaks_its_rule(NAME, ME.peer_id, GOOD)
    assert breaks_its_rule(NAME, ME.peer_id, value)


def test_nobody_else_writes_under_a_members_name() -> None:
    assert breaks_its_rule(NAME, OTHER.peer_id, GOOD)
    assert breaks_its_rule(NAME[:-1], ME.peer_id, GOOD)
    squatted = sign_record(OTHER, RUN, NAME, 1, int(WALL_S) + 60, GOOD)
    assert refusal(ME, RUN, squatted, WALL_S) == "invalid"
    assert refusal(ME, RUN, sign_record(ME, RUN, NAME, 1, int(WALL_S) + 60, GOOD), WALL_S) == ""


def test_whoever_hands_such_a_record_over_is_named_and_nothing_is_kept() -> None:
    node = core("holder")
    squatted = sign_record(OTHER, RUN, NAME, 1, int(WALL_S) + 60, GOOD)
    node.receive(0.0, OTHER.peer_id, FindValue(1, squatted.key))
    (page,) = [e.message for e in node.drain() if hasattr(e, "message")]
    assert isinstance(page, Values)
    node.receive(0.0, OTHER.peer_id, StoreRecord(2, squatted, page.token))
    effects = node.drain()
    (reply,) = [e.message for e in effects if hasattr(e, "message")]
    (fault,) = [e.event for e in effects if hasattr(e, "event")]
    assert reply == StoreReply(2, "invalid", 0)
    assert (fault.code, fault.peer) == ("dht_invalid", OTHER.peer_id)
    assert len(node.held) == 0
    with pytest.raises(LocalProtocolError, match="rule"):
        node.store(0.0, NAME, GOOD, 60.0)


def test_a_reader_refuses_what_a_holder_should_have_refused() -> None:
    network = Network(1)
    victim, liar, reader = network.grow(3)
    name = b"member/" + victim.me.peer
    network.settle(victim, victim.store(network.now, name, encode_value(["v:1"]), 300.0))
    squatted = sign_record(liar.keyring, RUN, name, 9, int(WALL_S) + 500, encode_value(["evil:1"]))
    network.tampers[liar.me.peer] = lambda m: (
        msgspec.structs.replace(m, records=(squatted,)) if isinstance(m, Values) else m
    )
    found = network.settle(reader, reader.get_all(network.now, name))
    assert isinstance(found, DhtFound)
    assert [record.publisher for record in found.records] == [victim.me.peer]
    assert {(f.code, f.peer) for f in network.faults} == {("dht_invalid", liar.me.peer)}
