"""Ed25519 identities against RFC 8032's own vectors, and the separation of domains."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from swarmtrain_protocols.identity import Ed25519Keyring, signed_bytes, verify_ed25519

# RFC 8032, section 7.1: secret key and public key of tests 1 and 3.
RFC8032_KEYS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
    ),
]


@pytest.mark.parametrize(("seed", "public"), RFC8032_KEYS)
def test_a_peer_id_is_the_public_key_of_rfc_8032(seed: str, public: str) -> None:
    assert Ed25519Keyring(bytes.fromhex(seed)).peer_id.hex() == public


def test_the_bytes_under_a_signature_are_those_of_the_specification() -> None:
    assert signed_bytes(b"genesis", b"\x01\x02") == b"swarmtrain/1 genesis\x00\x01\x02"
    keyring = Ed25519Keyring(bytes(32))
    signature = keyring.sign(b"vote", b"payload")
    key = Ed25519PublicKey.from_public_bytes(keyring.peer_id)
    key.verify(signature, b"swarmtrain/1 vote\x00payload")  # raises if another layout was signed
    assert keyring.verify(keyring.peer_id, b"vote", b"payload", signature)


def test_a_signature_covers_domain_payload_and_key() -> None:
    keyring, other = Ed25519Keyring(bytes(32)), Ed25519Keyring(bytes([1]) * 32)
    signature = keyring.sign(b"vote", b"payload")
    assert not keyring.verify(keyring.peer_id, b"votes", b"payload", signature)
    assert not keyring.verify(keyring.peer_id, b"vote", b"payloads", signature)
    assert not keyring.verify(other.peer_id, b"vote", b"payload", signature)
    for position in range(64):
        flipped = bytearray(signature)
        flipped[position] ^= 1
        assert not keyring.verify(keyring.peer_id, b"vote", b"payload", bytes(flipped))


@pytest.mark.parametrize("peer", [b"", bytes(31), bytes(33), b"\xff" * 32])
@pytest.mark.parametrize("signature", [b"", bytes(63), bytes(64), bytes(65), b"\xff" * 64])
def test_hostile_keys_and_signatures_are_false_never_an_error(
    peer: bytes, signature: bytes
) -> None:
    assert verify_ed25519(peer, b"vote", b"payload", signature) is False


def test_a_domain_cannot_swallow_the_payload() -> None:
    with pytest.raises(AssertionError):
        signed_bytes(b"a\0b", b"")


def test_printing_a_keyring_shows_no_secret() -> None:
    seed = bytes(range(32))
    shown = repr(Ed25519Keyring(seed))
    assert seed.hex() not in shown
    assert Ed25519Keyring(seed).peer_id.hex()[:8] in shown
