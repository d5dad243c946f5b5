"""Noise_XX_25519_{AESGCM,ChaChaPoly}_SHA256 (Noise Protocol Framework, revision 34).

    -> e
    <- e, ee, s, es
    -> s, se

Both sides stay anonymous to a passive observer and prove possession of their static key. No entropy
of its own: static and ephemeral private keys are injected, and an ephemeral key must never be used
for two handshakes. Standard vectors: protocols/vectors/noise_xx.json.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from swarmtrain_protocols.errors import LocalProtocolError, PeerFault

Suite = Literal["AESGCM", "ChaChaPoly"]
SUITES: tuple[Suite, ...] = ("AESGCM", "ChaChaPoly")

KEY_BYTES = 32
TAG_BYTES = 16
MESSAGE_BYTES_MAX = 65535
"""Of a transport message, tag included (Noise, section 3)."""
NONCE_MAX = (1 << 64) - 2


def hkdf(chaining_key: bytes, material: bytes, outputs: int) -> tuple[bytes, ...]:
    """Noise's HKDF over SHA-256: two or three keys of 32 bytes."""
    temp = hmac.digest(chaining_key, material, "sha256")
    keys: list[bytes] = []
    last = b""
    for i in range(1, outputs + 1):
        last = hmac.digest(temp, last + bytes([i]), "sha256")
        keys.append(last)
    return tuple(keys)


class CipherState:
    """An AEAD key with a counter nonce; both directions of a link have one each."""

    def __init__(self, suite: Suite, key: bytes) -> None:
        self._big_endian = suite == "AESGCM"
        self._aead = AESGCM(key) if self._big_endian else ChaCha20Poly1305(key)
        self._nonce = 0

    def _next_nonce(self) -> bytes:
        if self._nonce > NONCE_MAX:
            raise LocalProtocolError("the nonces of this link are used up")
        order: Literal["big", "little"] = "big" if self._big_endian else "little"
        return b"\0\0\0\0" + self._nonce.to_bytes(8, order)

    def encrypt(self, plaintext: bytes, associated: bytes = b"") -> bytes:
        """Ciphertext with tag; the nonce moves on."""
        sealed = self._aead.encrypt(self._next_nonce(), plaintext, associated)
        self._nonce += 1
        return sealed

    def decrypt(self, sealed: bytes | memoryview, associated: bytes = b"") -> bytes:
        """Plaintext.

        Raises:
            PeerFault: ``tampered``; replayed, reordered, truncated and forged messages all end
                here. The link must be closed.
        """
        nonce = self._next_nonce()
        try:
            plaintext = self._aead.decrypt(nonce, bytes(sealed), associated)
        except (InvalidTag, ValueError):
            raise PeerFault("tampered", "a message does not authenticate") from None
        self._nonce += 1
        return plaintext


class _Symmetric:
    """SymmetricState of the specification: chaining key, transcript hash, current cipher."""

    def __init__(self, suite: Suite) -> None:
        name = f"Noise_XX_25519_{suite}_SHA256".encode()
        self.hash = name.ljust(32, b"\0") if len(name) <= 32 else hashlib.sha256(name).digest()
        self.chaining_key = self.hash
        self._suite: Suite = suite
        self._cipher: CipherState | None = None

    def mix_hash(self, data: bytes) -> None:
        self.hash = hashlib.sha256(self.hash + data).digest()

    def mix_key(self, material: bytes) -> None:
        self.chaining_key, key = hkdf(self.chaining_key, material, 2)
        self._cipher = CipherState(self._suite, key)

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        sealed = self._cipher.encrypt(plaintext, self.hash) if self._cipher else plaintext
        self.mix_hash(sealed)
        return sealed

    def decrypt_and_hash(self, sealed: bytes) -> bytes:
        plaintext = self._cipher.decrypt(sealed, self.hash) if self._cipher else sealed
        self.mix_hash(sealed)
        return plaintext


def public_key(private: bytes) -> bytes:
    """X25519 public key (32 bytes) of a private key (32 bytes)."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


class NoiseXX:
    """One handshake. Call ``write`` and ``read`` in the order of the pattern; then ``split``."""

    def __init__(
        self,
        *,
        initiator: bool,
        static_key: bytes,
        ephemeral_key: bytes,
        prologue: bytes = b"",
        suite: Suite = "AESGCM",
    ) -> None:
        if suite not in SUITES:
            raise LocalProtocolError(f"no cipher suite {suite!r}")
        self.initiator = initiator
        self.suite: Suite = suite
        self.remote_static: bytes | None = None
        self._s = X25519PrivateKey.from_private_bytes(static_key)
        self._e = X25519PrivateKey.from_private_bytes(ephemeral_key)
        self._re: bytes | None = None
        self._turn = 0
        self._symmetric = _Symmetric(suite)
        self._symmetric.mix_hash(prologue)

    @property
    def static_public(self) -> bytes:
        """Our static public key, 32 bytes."""
        return self._s.public_key().public_bytes_raw()

    @property
    def complete(self) -> bool:
        """All three messages are exchanged."""
        return self._turn == 3

    @property
    def our_turn(self) -> bool:
        """The next handshake message is ours to write."""
        return not self.complete and (self._turn % 2 == 0) == self.initiator

    @property
    def handshake_hash(self) -> bytes:
        """Transcript hash, 32 bytes: equal on both sides once complete, unique to the link."""
        return self._symmetric.hash

    def _mix_dh(self, private: X25519PrivateKey, public: bytes | None) -> None:
        assert public is not None
        try:
            shared = private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:  # all-zero result: a public key of small order
            raise PeerFault("tampered", "a public key of small order") from None
        self._symmetric.mix_key(shared)

    def _mix_es(self) -> None:
        """DH between the initiator's ephemeral and the responder's static key."""
        if self.initiator:
            self._mix_dh(self._e, self.remote_static)
        else:
            self._mix_dh(self._s, self._re)

    def _mix_se(self) -> None:
        """DH between the initiator's static and the responder's ephemeral key."""
        if self.initiator:
            self._mix_dh(self._s, self._re)
        else:
            self._mix_dh(self._e, self.remote_static)

    def write(self, payload: bytes = b"") -> bytes:
        """The next handshake message with ``payload`` (sealed from the second message on).

        Raises:
            LocalProtocolError: not our turn.
        """
        if not self.our_turn:
            raise LocalProtocolError("not our turn in the handshake")
        out = b""
        if self._turn < 2:
            ephemeral = self._e.public_key().public_bytes_raw()
            self._symmetric.mix_hash(ephemeral)
            out += ephemeral
        if self._turn == 1:
            self._mix_dh(self._e, self._re)
        if self._turn > 0:
            out += self._symmetric.encrypt_and_hash(self.static_public)
            if self._turn == 1:
                self._mix_es()
            else:
                self._mix_se()
        out += self._symmetric.encrypt_and_hash(payload)
        self._turn += 1
        return out

    def read(self, message: bytes) -> bytes:
        """The payload of the other side's handshake message.

        Raises:
            PeerFault: ``malformed`` (too short) or ``tampered``. The handshake is dead.
            LocalProtocolError: it is our turn, or the handshake is complete.
        """
        if self.our_turn or self.complete:
            raise LocalProtocolError("no handshake message is expected")
        at = 0

        def take(nbytes: int) -> bytes:
            nonlocal at
            if len(message) < at + nbytes:
                raise PeerFault("malformed", f"handshake message of {len(message)} bytes")
            at += nbytes
            return message[at - nbytes : at]

        if self._turn < 2:
            self._re = take(KEY_BYTES)
            self._symmetric.mix_hash(self._re)
        if self._turn == 1:
            self._mix_dh(self._e, self._re)
        if self._turn > 0:
            sealed = take(KEY_BYTES + TAG_BYTES)
            self.remote_static = self._symmetric.decrypt_and_hash(sealed)
            if self._turn == 1:
                self._mix_es()
            else:
                self._mix_se()
            take(TAG_BYTES)
            at -= TAG_BYTES
        payload = self._symmetric.decrypt_and_hash(message[at:])
        self._turn += 1
        return payload

    def split(self) -> tuple[CipherState, CipherState]:
        """(send, receive) of this side.

        Raises:
            LocalProtocolError: the handshake is not complete.
        """
        if not self.complete:
            raise LocalProtocolError("the handshake is not complete")
        first, second = hkdf(self._symmetric.chaining_key, b"", 2)
        ours, theirs = (first, second) if self.initiator else (second, first)
        return CipherState(self.suite, ours), CipherState(self.suite, theirs)

    def export(self, label: bytes) -> bytes:
        """A further secret of this link (32 bytes), the same on both sides, one per label.

        Third output of the HKDF whose first two are the transport keys, so independent of them;
        bound to the transcript by the handshake hash.

        Raises:
            LocalProtocolError: the handshake is not complete.
        """
        if not self.complete:
            raise LocalProtocolError("the handshake is not complete")
        third = hkdf(self._symmetric.chaining_key, b"", 3)[2]
        return hkdf(third, self.handshake_hash + label, 2)[0]
