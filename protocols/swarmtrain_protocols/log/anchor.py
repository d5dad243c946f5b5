"""Where trust in a log begins: the founder's genesis, or a recovery in its place (spec 04 §2.8).

A recovery is the founder's signature over one steward, a generation, a position and the hash of
the grants and the ledger there. Everything else of a recovered log is checked as of any other.
A founder who handed the run over is believed no more: deeds lead from the key that founded the
run to the one whose word counts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import blake3
import msgspec

from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.log.view import View
from swarmtrain_protocols.messages.log import Deed, Recovery

DOMAIN = b"recovery"
DEED_DOMAIN = b"deed"
_NUMBERS = struct.Struct("<QQQ")
_DEED_NUMBER = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()

Verify = Callable[[bytes, bytes, bytes, bytes], bool]
"""(key, domain, payload, signature) to whether the signature is good."""


def content_hash(capable: Sequence[bytes], ledger: bytes) -> bytes:
    """BLAKE3 of the MessagePack array [keys with a grant in key order, ledger bytes]."""
    return blake3.blake3(_encoder.encode([list(capable), ledger])).digest()


def deed_statement(run: bytes, number: int, heir: bytes) -> bytes:
    """What a founder signs to hand the run over: run ‖ u32 number ‖ heir.

    ``number``: how often the run was handed over before.
    """
    return run + _DEED_NUMBER.pack(number) + heir


def make_deed(founder: Keyring, run: bytes, number: int, heir: bytes) -> Deed:
    """The founder's word that ``heir`` is the founder from here on."""
    return Deed(heir, founder.sign(DEED_DOMAIN, deed_statement(run, number, heir)))


def heir_of(run: bytes, founder: bytes, verify: Verify, deeds: Sequence[Deed]) -> bytes:
    """The key to which ``deeds`` lead from the one that founded the run.

    Raises:
        PeerFault: ``bad_deed``: one of them is not signed by the founder before it.
    """
    for number, deed in enumerate(deeds):
        said = deed_statement(run, number, deed.heir)
        if not verify(founder, DEED_DOMAIN, said, deed.signature):
            raise PeerFault("bad_deed", f"the founder has not signed deed {number}")
        founder = deed.heir
    return founder


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
        PeerFault: ``bad_recovery``: the founder has not signed it; ``bad_deed``.
    """
    founder = heir_of(run, founder, verify, recovery.deeds)
    if not verify(founder, DOMAIN, statement(run, recovery), recovery.signature):
        raise PeerFault("bad_recovery", "the founder has not signed it")
    steward = recovery.steward
    empty: frozenset[bytes] = frozenset()
    return View(recovery.generation, (steward,), (), digest(run, recovery), empty, steward)
