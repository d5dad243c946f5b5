"""A keyring without curves: keyed BLAKE3 stands in for Ed25519, ids come from names.

Every simulated site could forge every other; the simulator's liars are written so that they do not,
which is what real keys would enforce.
"""

from __future__ import annotations

import blake3

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.identity import signed_bytes


def peer_id_of(name: str) -> PeerId:
    """The deterministic id (32 bytes) of a named site."""
    return PeerId(blake3.blake3(b"peer " + name.encode()).digest())


class FakeKeyring:
    """Satisfies ``identity.Keyring``: signs as ``name``, verifies anybody."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._peer_id = peer_id_of(name)

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    def sign(self, domain: bytes, payload: bytes) -> bytes:
        return _signature(self._peer_id, domain, payload)

    def verify(self, peer: bytes, domain: bytes, payload: bytes, signature: bytes) -> bool:
        return len(peer) == 32 and signature == _signature(peer, domain, payload)


def _signature(peer: bytes, domain: bytes, payload: bytes) -> bytes:
    return blake3.blake3(signed_bytes(domain, payload), key=bytes(peer)).digest(length=64)
