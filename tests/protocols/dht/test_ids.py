"""Identifiers and the XOR metric."""

from __future__ import annotations

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.ids import (
    Contact,
    bucket_index,
    id_bytes,
    id_from_bytes,
    key_id,
    node_id,
)

ids = st.integers(0, (1 << 160) - 1)


def test_ids_are_the_first_160_bits_of_blake3() -> None:
    peer = bytes(range(32))
    assert id_bytes(node_id(peer)) == blake3(peer).digest()[:20]
    assert id_bytes(key_id(b"stewards")) == blake3(b"dht key\0stewards").digest()[:20]
    assert key_id(peer) != node_id(peer)


@given(ids)
def test_bytes_go_there_and_back(identifier: int) -> None:
    assert id_from_bytes(id_bytes(identifier)) == identifier
    assert len(id_bytes(identifier)) == 20


@given(ids, ids, ids)
def test_xor_is_a_metric(a: int, b: int, c: int) -> None:
    assert (a ^ b) == (b ^ a)
    assert (a ^ c) <= (a ^ b) + (b ^ c)


def test_buckets_count_from_the_lowest_differing_bit() -> None:
    assert bucket_index(0, 1) == 0
    assert bucket_index(0, 3) == 1
    assert bucket_index(5, 5 ^ (1 << 159)) == 159
    with pytest.raises(AssertionError):
        bucket_index(7, 7)


def test_a_contact_knows_its_place() -> None:
    peer = PeerId(b"p" * 32)
    assert Contact(peer).id == node_id(peer)
    assert Contact(peer, ("h:1",)) != Contact(peer)
    with pytest.raises(AssertionError):
        id_from_bytes(b"short")
