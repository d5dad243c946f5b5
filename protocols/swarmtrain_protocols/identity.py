"""Who says it: Ed25519 site keys (RFC 8032) behind one narrow interface.

Cores sign and verify through a ``Keyring``, so that the simulator can use a cheap stand-in.
"""

from __future__ import annotations

from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarmtrain_protocols.core import PeerId


class Keyring(Protocol):
    """Signs as one site and verifies any site. ``domain`` separates kinds of statements."""

    @property
    def peer_id(self) -> PeerId: ...

    def sign(self, domain: bytes, payload: bytes) -> bytes: ...

    def verify(self, peer: bytes, domain: bytes, payload: bytes, signature: bytes) -> bool: ...


def signed_bytes(domain: bytes, payload: bytes) -> bytes:
    """The exact bytes under a signature: ``swarmtrain/1 <domain> NUL <payload>``."""
    assert b"\0" not in domain
    return b"swarmtrain/1 " + domain + b"\0" + payload


def verify_ed25519(peer: bytes, domain: bytes, payload: bytes, signature: bytes) -> bool:
    """True if ``signature`` (64 bytes) by public key ``peer`` (32 bytes) covers the payload."""
    try:
        key = Ed25519PublicKey.from_public_bytes(peer)
        key.verify(signature, signed_bytes(domain, payload))
    except (InvalidSignature, ValueError):
        return False
    return True


class Ed25519Keyring:
    """The real keyring: one private key in memory."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self._peer_id = PeerId(self._key.public_key().public_bytes_raw())

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    def sign(self, domain: bytes, payload: bytes) -> bytes:
        return self._key.sign(signed_bytes(domain, payload))

    def verify(self, peer: bytes, domain: bytes, payload: bytes, signature: bytes) -> bool:
        return verify_ed25519(peer, domain, payload, signature)

    def __repr__(self) -> str:
        return f"Ed25519Keyring({self._peer_id.hex()[:8]})"
