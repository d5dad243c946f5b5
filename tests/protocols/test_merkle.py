"""Merkle trees: pinned shape, every range proves, any change is seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.merkle import Blob, leaf_hash, merkle_root, range_proof, verify_range


def _oracle(leaves: list[bytes]) -> bytes:
    """RFC 6962 recursion: split at the largest power of two below n."""
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return blake3(b"\x01" + _oracle(leaves[:k]) + _oracle(leaves[k:])).digest()


def _leaves(n: int) -> list[bytes]:
    return [leaf_hash(bytes([i % 256, i // 256])) for i in range(n)]


def test_leaf_is_domain_separated() -> None:
    assert leaf_hash(b"abc") == blake3(b"\x00abc").digest()
    assert leaf_hash(memoryview(bytearray(b"abc"))) == leaf_hash(b"abc")
    assert merkle_root([leaf_hash(b"abc")]) == leaf_hash(b"abc")
    two = merkle_root([leaf_hash(b"a"), leaf_hash(b"b")])
    forged = b"\x01" + leaf_hash(b"a") + leaf_hash(b"b")
    assert leaf_hash(forged) != two and leaf_hash(forged[1:]) != two


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 32, 33, 100])
def test_root_equals_the_rfc6962_recursion(n: int) -> None:
    leaves = _leaves(n)
    assert merkle_root(leaves) == _oracle(leaves)


def test_every_range_of_small_trees_proves() -> None:
    for n in range(1, 20):
        leaves = _leaves(n)
        root = merkle_root(leaves)
        for first in range(n):
            for count in range(1, n - first + 1):
                proof = range_proof(leaves, first, count)
                assert verify_range(root, n, first, leaves[first : first + count], proof)
                assert len(proof) <= 2 * n.bit_length()


def _flip(value: bytes, bit: int) -> bytes:
    data = bytearray(value)
    data[bit // 8 % 32] ^= 1 << bit % 8
    return bytes(data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_tampering_is_seen(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 70))
    leaves = _leaves(n)
    root = merkle_root(leaves)
    first = data.draw(st.integers(0, n - 1))
    count = data.draw(st.integers(1, n - first))
    proof = list(range_proof(leaves, first, count))
    piece = leaves[first : first + count]
    assert verify_range(root, n, first, piece, proof)
    bit = data.draw(st.integers(0, 255))
    i = data.draw(st.integers(0, count - 1))
    assert not verify_range(
        root, n, first, [*piece[:i], _flip(piece[i], bit), *piece[i + 1 :]], proof
    )
    assert not verify_range(_flip(root, bit), n, first, piece, proof)
    assert not verify_range(root, n, first, piece, [*proof, root])
    if proof:
        j = data.draw(st.integers(0, len(proof) - 1))
        wrong = [*proof[:j], _flip(proof[j], bit), *proof[j + 1 :]]
        assert not verify_range(root, n, first, piece, wrong)
        assert not verify_range(root, n, first, piece, proof[:j] + proof[j + 1 :])
    if count > 1:
        assert not verify_range(root, n, first, piece[1:], proof)
        assert not verify_range(root, n, first, piece[::-1], proof)
    elsewhere = data.draw(st.integers(-2, n + 2))
    if elsewhere != first:
        assert not verify_range(root, n, elsewhere, piece, proof)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-2, 9),
    st.integers(-2, 9),
    st.lists(st.binary(max_size=40), max_size=5),
    st.lists(st.binary(max_size=40), max_size=5),
)
def test_hostile_input_is_false_and_never_raises(
    total: int, first: int, leaves: list[bytes], proof: list[bytes]
) -> None:
    assert not verify_range(b"\0" * 32, total, first, leaves, proof)


def test_misuse_raises() -> None:
    for call in (
        lambda: merkle_root([]),
        lambda: merkle_root([b"short"]),
        lambda: range_proof(_leaves(3), 0, 0),
        lambda: range_proof(_leaves(3), 2, 2),
        lambda: range_proof(_leaves(3), -1, 1),
        lambda: Blob([b"a"], []),
    ):
        with pytest.raises(LocalProtocolError):
            call()


def test_blob_is_the_same_tree() -> None:
    chunks = [bytes([i]) * (i + 1) for i in range(11)]
    blob = Blob.of(chunks)
    leaves = [leaf_hash(c) for c in chunks]
    assert blob.leaves == tuple(leaves)
    assert blob.root == merkle_root(leaves)
    assert blob.nbytes == sum(range(1, 12))
    assert blob.proof(3, 5) == range_proof(leaves, 3, 5)
    again = Blob([memoryview(c) for c in chunks], leaves)
    assert again.root == blob.root
    assert [bytes(c) for c in again.chunks] == chunks


def test_vectors() -> None:
    path = Path(__file__).parents[2] / "protocols" / "vectors" / "merkle.json"
    for vector in json.loads(path.read_text())["vectors"]:
        chunks = [bytes.fromhex(chunk) for chunk in vector["chunks"]]
        leaves = [bytes.fromhex(leaf) for leaf in vector["leaves"]]
        root, first, count = bytes.fromhex(vector["root"]), vector["first"], vector["count"]
        proof = [bytes.fromhex(value) for value in vector["proof"]]
        assert [blake3(b"\0" + chunk).digest() for chunk in chunks] == leaves
        assert _oracle(leaves) == root == Blob.of(chunks).root
        assert list(range_proof(leaves, first, count)) == proof
        assert verify_range(root, len(leaves), first, leaves[first : first + count], proof)


def test_pinned_root() -> None:
    """The spec page quotes this value: a change of the tree is a change of the wire."""
    root = Blob.of([b"a", b"b", b"c"]).root
    assert root == _oracle([blake3(b"\0" + c).digest() for c in (b"a", b"b", b"c")])
    assert root.hex() == PINNED


PINNED = "6c62dd52a0971b7d00a7cead004e0c3f3c0766e3f5359a0f8297768d2b02d03c"
