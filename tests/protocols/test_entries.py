"""Bodies of log entries: one encoding, closed, bounded; skipping an entry would fork the log."""

from __future__ import annotations

import typing

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols import entries, limits
from swarmtrain_protocols.entries import (
    EntryBody,
    MemberLeft,
    NoOp,
    RoundCommitted,
    StewardsChanged,
    decode_body,
    encode_body,
)
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages.common import RoundKey
from tests.samples import instance

BODIES: tuple[type[msgspec.Struct], ...] = typing.get_args(EntryBody)
CASES = [(cls, large) for cls in BODIES for large in (False, True)]


@pytest.mark.parametrize(
    ("cls", "large"), CASES, ids=[f"{cls.__name__}-{large}" for cls, large in CASES]
)
def test_a_body_has_one_encoding(cls: type[msgspec.Struct], large: bool) -> None:
    body = instance(cls, large=large)
    data = encode_body(body)
    assert decode_body(data) == body
    assert encode_body(decode_body(data)) == data
    assert len(data) <= limits.ENTRY_BYTES_MAX


def test_every_tagged_struct_of_the_module_is_in_the_union() -> None:
    tagged = {
        value
        for value in vars(entries).values()
        if isinstance(value, type)
        and issubclass(value, msgspec.Struct)
        and value.__module__ == entries.__name__
        and value.__struct_config__.tag is not None
    }
    assert tagged == set(BODIES)
    assert len({cls.__struct_config__.tag for cls in BODIES}) == len(BODIES)


def test_the_bytes_that_are_hashed_are_pinned() -> None:
    assert encode_body(NoOp()).hex() == "81a474797065a46e6f6f70"
    committed = RoundCommitted(RoundKey(0, "train/0/0", 7, 1), bytes(range(32)))
    assert msgpack.unpackb(encode_body(committed)) == {
        "type": "committed",
        "key": [0, "train/0/0", 7, 1],
        "root": bytes(range(32)),
        "held_by": [],
    }
    assert list(msgpack.unpackb(encode_body(committed))) == ["type", "key", "root", "held_by"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        msgpack.packb({"type": "no-such-entry"}),
        msgpack.packb({"type": "left", "member": bytes(31), "reason": "leave"}),
        msgpack.packb({"type": "left", "member": bytes(33), "reason": "leave"}),
        msgpack.packb({"type": "left", "member": bytes(32), "reason": "x" * 257}),
        b"\x83\xa4type\xa4left\xa6member\xc4\x20" + bytes(32) + b"\xa6reason\xa1\xff",
        b"\x81\xa4type" + b"\x91" * 5000,
        encode_body(NoOp()) + b"\0",
    ],
)
def test_bytes_outside_the_schema_are_one_fault(data: bytes) -> None:
    with pytest.raises(PeerFault) as caught:
        decode_body(data)
    assert caught.value.code == "malformed"


def test_there_are_never_more_voters_than_the_limit() -> None:
    voters = tuple(bytes([number]) * 32 for number in range(limits.VOTERS_MAX + 1))
    good = StewardsChanged(voters[:-1])
    assert decode_body(encode_body(good)) == good
    for bad in (StewardsChanged(voters), StewardsChanged(())):
        with pytest.raises(PeerFault):
            decode_body(encode_body(bad))


@given(st.integers(0, len(CASES) - 1), st.data())
def test_any_damage_is_a_body_or_a_fault(case: int, data: st.DataObject) -> None:
    good = bytearray(encode_body(instance(CASES[case][0], large=CASES[case][1])))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        body = decode_body(bytes(good))
    except PeerFault as fault:
        assert fault.code == "malformed"
    else:
        assert isinstance(body, BODIES)


def test_a_reason_is_text_for_people() -> None:
    left = MemberLeft(bytes(32), "leave")
    assert decode_body(encode_body(left)) == left
