"""The closed schema of control messages, with the msgpack package as an independent witness."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages import MESSAGES, decode, encode
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.messages.rounds import Ready
from tests.samples import instance

CASES = [(cls, large) for cls in MESSAGES for large in (False, True)]
IDS = [f"{cls.__struct_config__.tag}-{'large' if large else 'small'}" for cls, large in CASES]


def plain(value: Any) -> Any:
    """What MessagePack must carry for a value, by the rules of 00-conventions."""
    if isinstance(value, msgspec.Struct):
        config = value.__struct_config__
        fields = {name: plain(getattr(value, name)) for name in value.__struct_fields__}
        if config.array_like:
            return ([config.tag] if config.tag else []) + list(fields.values())
        return ({config.tag_field: config.tag} if config.tag else {}) | fields
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


@pytest.mark.parametrize(("cls", "large"), CASES, ids=IDS)
def test_a_message_survives_the_wire_as_plain_messagepack(
    cls: type[msgspec.Struct], large: bool
) -> None:
    message = instance(cls, large=large)
    data = encode(message)
    assert decode(data) == message
    assert msgpack.unpackb(data) == plain(message)
    assert decode(msgpack.packb(plain(message))) == message


@pytest.mark.parametrize(("cls", "large"), CASES, ids=IDS)
def test_a_field_of_another_type_is_refused(cls: type[msgspec.Struct], large: bool) -> None:
    good = msgpack.unpackb(encode(instance(cls, large=large)))
    if isinstance(good, list):
        broken = [good[:1] + [{"no": "such"}] * (len(good) - 1)] if len(good) > 1 else []
    else:
        broken = [{**good, name: {"no": ["such", 3.5]}} for name in good if name != "type"]
    for item in broken:
        with pytest.raises(PeerFault, match="malformed") as caught:
            decode(msgpack.packb(item))
        assert caught.value.code == "malformed"


def test_tags_are_unique() -> None:
    tags = [cls.__struct_config__.tag for cls in MESSAGES]
    assert len(set(tags)) == len(tags) > 30


@pytest.mark.parametrize(
    "data",
    [
        b"",
        msgpack.packb({"type": "no-such-message"}),
        msgpack.packb({"type": "ping"}),
        msgpack.packb({"type": "ping", "nonce": -1}),
        msgpack.packb({"type": "ping", "nonce": 2**53 + 1}),
        msgpack.packb({"type": "ping", "nonce": 1}) + b"\0",
        msgpack.packb({"type": "bye", "code": "x" * (limits.NAME_CHARS_MAX + 1)}),
        b"\x82\xa4type\xa3bye\xa4code\xa1\xff",  # not UTF-8
        b"\x82\xa4type\xa4ping\xa5nonce\xdd\xff\xff\xff\xff",  # an array that claims 4 G items
        b"\x81\xa4type" + b"\x91" * 5000,  # nested deeper than any message
    ],
)
def test_bytes_outside_the_schema_are_one_fault(data: bytes) -> None:
    with pytest.raises(PeerFault) as caught:
        decode(data)
    assert caught.value.code == "malformed"


def test_unknown_keys_are_ignored_and_missing_ones_take_their_default() -> None:
    ready = instance(Ready, large=True)
    fields = msgpack.unpackb(encode(ready))
    del fields["expect"]
    old = decode(msgpack.packb({**fields, "from_the_future": [1, 2]}))
    assert old == msgspec.structs.replace(ready, expect=0)


def test_round_keys_order_by_generation_channel_round_attempt() -> None:
    keys = [RoundKey(1, "a", 2, 0), RoundKey(0, "b", 9, 9), RoundKey(1, "a", 1, 5)]
    assert sorted(keys) == [keys[1], keys[2], keys[0]]
    assert str(RoundKey(0, "train/0/1", 7, 2)) == "train/0/1#7.2"


@given(st.binary(max_size=400))
def test_any_bytes_are_a_message_or_a_fault(data: bytes) -> None:
    check_decodes_or_faults(data)


@given(st.sampled_from(CASES), st.data())
def test_any_damage_to_a_message_is_a_message_or_a_fault(
    case: tuple[type[msgspec.Struct], bool], data: st.DataObject
) -> None:
    good = bytearray(encode(instance(case[0], large=case[1])))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    check_decodes_or_faults(bytes(good[: data.draw(st.integers(0, len(good)))]))


def check_decodes_or_faults(data: bytes) -> None:
    try:
        message = decode(data)
    except PeerFault as fault:
        assert fault.code == "malformed"
    else:
        assert type(message) in MESSAGES
