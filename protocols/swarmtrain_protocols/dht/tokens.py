"""Tokens: writing under a key takes a recent answer of the same node to a request for that key.

As in the BitTorrent DHT (BEP 5). A write so costs a read, a message recorded earlier writes
nothing, and nobody who cannot receive what is sent to it writes at all. A token needs no memory: it
is a keyed hash of who asked and for what, under a secret that changes every five minutes.
"""

from __future__ import annotations

from blake3 import blake3

from swarmtrain_protocols import limits
from swarmtrain_protocols.identity import Keyring

_DOMAIN = b"dht token"
_TOKEN_BYTES = 8


class Tokens:
    """What one node hands out and takes back. Valid for five to ten minutes."""

    def __init__(self, keyring: Keyring, run: bytes) -> None:
        self._keyring = keyring
        self._run = run
        self._secrets: dict[int, bytes] = {}

    def make(self, wall_s: float, asker: bytes, key: bytes) -> bytes:
        """8 bytes for ``asker``, who has just asked for ``key`` (20 bytes)."""
        return self._token(_epoch(wall_s), asker, key)

    def valid(self, wall_s: float, asker: bytes, key: bytes, token: bytes) -> bool:
        """True if ``token`` was made for this asker and key in this epoch or the one before."""
        epoch = _epoch(wall_s)
        return any(token == self._token(e, asker, key) for e in (epoch, epoch - 1))

    def _token(self, epoch: int, asker: bytes, key: bytes) -> bytes:
        hasher = blake3(asker, key=self._secret(epoch))
        return hasher.update(key).digest(_TOKEN_BYTES)

    def _secret(self, epoch: int) -> bytes:
        # A signature that is shown to nobody: no other entropy is needed, and a restarted node
        # still takes what it gave out.
        secret = self._secrets.get(epoch)
        if secret is None:
            signature = self._keyring.sign(_DOMAIN, self._run + epoch.to_bytes(8, "big"))
            secret = blake3(signature).digest()
            self._secrets = {e: s for e, s in self._secrets.items() if e >= epoch - 1}
            self._secrets[epoch] = secret
        return secret


def _epoch(wall_s: float) -> int:
    return max(1, int(wall_s // limits.DHT_TOKEN_EPOCH_S))
