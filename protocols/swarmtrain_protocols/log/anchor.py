"""Where trust in a log begins: the founder's genesis, or a recovery in its place (spec 04 §2.8).

A recovery is the founder's signature over one steward, a generation, a position and the hash of
the grants and the ledger there. Everything else of a recovered log is checked as of any other.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import blake3
import msgspec

from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.log.view import View
from swarmtrain_protocols.messages.log import Recovery

DOMAIN = b"recovery"
_NUMBERS = struct.Struct("<QQQ")
_encoder = msgspec.msgpack.Encoder()

Verify = Callable[[bytes, bytes, bytes, bytes], bool]
"""(key, domain, payload, signature) to whether the signature is good."""


def content_hash(capable: Sequence[bytes], ledger: bytes) -> bytes:
    """BLAKE3 of the MessagePack array [keys with a grant in key order, ledger bytes]."""
    return blake3.blake3(_encoder.encode([list(capable), ledger])).digest()


def statement(run: bytes, recovery: Recovery) -> bytes:
    """What the founder signs: run ‖ u64 generation ‖ u64 term ‖ u64 index ‖ steward ‖ content."""
    r = recovery
    return run + _NUMBERS.pack(r.generation, r.term, r.index) + r.steward + r.content


def digest(run: bytes, recovery: Recovery) -> bytes:
    """Chain hash at the index of the recovery, and the first steward digest after it."""
    return blake3.blake3(statement(run, recovery)).digest()


def recovered_view(run: bytes, founder: bytes, verify: Verify, recovery: Recovery) -> View:
    """The view that a recovery leads to, without grants beside that of its steward.

    Raises:
        PeerFault: ``bad_recovery``: the founder has not signed it.
    """
    if not verify(founder, DOMAIN, statement(run, recovery), recovery.signature):
        raise PeerFault("bad_recovery", "the founder has not signed it")
    steward = recovery.steward
    empty: frozenset[bytes] = frozenset()
    return View(recovery.generation, (steward,), (), digest(run, recovery), empty, steward)
