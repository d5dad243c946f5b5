"""The founder's word that a log begins again: what exactly is signed."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3

from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.identity import Ed25519Keyring, signed_bytes, verify_ed25519
from swarmtrain_protocols.log import anchor
from swarmtrain_protocols.messages.log import Deed, Recovery

RUN = bytes(range(32))
FOUNDER = Ed25519Keyring(hashlib.sha256(b"founder").digest())
STEWARD = b"s" * 32
CONTENT = blake3(b"\x92\x91\xc4\x20" + STEWARD + b"\xc4\x06ledger").digest()


def signed(**changes: object) -> Recovery:
    unsigned = Recovery(1007, 1 << 20, 1 << 21, STEWARD, CONTENT, bytes(64))
    payload = RUN + struct.pack("<QQQ", 1007, 1 << 20, 1 << 21) + STEWARD + CONTENT
    made = msgspec.structs.replace(unsigned, signature=FOUNDER.sign(b"recovery", payload))
    return msgspec.structs.replace(made, **changes)


def test_the_bytes_are_those_of_the_spec() -> None:
    recovery = signed()
    payload = RUN + struct.pack("<QQQ", 1007, 1 << 20, 1 << 21) + STEWARD + CONTENT
    assert anchor.statement(RUN, recovery) == payload
    assert anchor.digest(RUN, recovery) == blake3(payload).digest()
    assert anchor.content_hash([STEWARD], b"ledger") == CONTENT
    assert verify_ed25519(FOUNDER.peer_id, b"recovery", payload, recovery.signature)
    assert signed_bytes(b"recovery", payload) != payload


def test_vectors() -> None:
    path = Path(__file__).parents[2] / "protocols" / "vectors" / "log.json"
    for v in json.loads(path.read_text(encoding="utf-8"))["recoveries"]:
        h = {k: bytes.fromhex(x) for k, x in v.items() if isinstance(x, str) and k != "what"}
        steward, founder = (Ed25519Keyring(bytes.fromhex(seed)) for seed in v["seeds"])
        assert h["steward"] == steward.peer_id
        assert anchor.content_hash([h["steward"]], h["ledger"]) == h["content"]
        numbers = v["generation"], v["term"], v["index"]
        recovery = Recovery(*numbers, h["steward"], h["content"], h["signature"])
        assert anchor.statement(h["run"], recovery) == h["statement"]
        assert founder.sign(anchor.DOMAIN, h["statement"]) == h["signature"]
        view = anchor.recovered_view(h["run"], founder.peer_id, founder.verify, recovery)
        assert view.digest == h["digest"]


def test_its_view_has_one_voter_and_nobody_else_with_a_grant() -> None:
    view = anchor.recovered_view(RUN, FOUNDER.peer_id, FOUNDER.verify, signed())
    assert (view.generation, view.voters, view.joint) == (1007, (STEWARD,), ())
    assert view.digest == anchor.digest(RUN, signed())
    assert view.trusts(STEWARD) and not view.trusts(b"o" * 32)


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": 1008},
        {"term": 1},
        {"index": 1},
        {"steward": b"t" * 32},
        {"content": bytes(32)},
        {"signature": bytes(64)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_nothing_of_it_can_be_changed(changes: dict[str, object]) -> None:
    with pytest.raises(PeerFault, match="bad_recovery"):
        anchor.recovered_view(RUN, FOUNDER.peer_id, FOUNDER.verify, signed(**changes))


def test_another_run_or_another_founder_is_none() -> None:
    other = Ed25519Keyring(hashlib.sha256(b"other").digest())
    for run, founder in ((bytes(32), FOUNDER.peer_id), (RUN, other.peer_id)):
        with pytest.raises(PeerFault, match="bad_recovery"):
            anchor.recovered_view(run, founder, FOUNDER.verify, signed())


def deed(by: Ed25519Keyring, number: int, heir: Ed25519Keyring) -> Deed:
    payload = RUN + struct.pack("<I", number) + heir.peer_id
    return Deed(heir.peer_id, by.sign(b"deed", payload))


def test_a_founder_who_handed_the_run_over_is_believed_no_more() -> None:
    heir, last = (Ed25519Keyring(hashlib.sha256(name).digest()) for name in (b"heir", b"last"))
    deeds = (deed(FOUNDER, 0, heir), deed(heir, 1, last), deed(last, 2, FOUNDER))
    assert anchor.make_deed(FOUNDER, RUN, 0, heir.peer_id) == deeds[0]
    wanted = [FOUNDER, heir, last, FOUNDER]
    for count, founder in enumerate(wanted):
        args = RUN, FOUNDER.peer_id, FOUNDER.verify
        assert anchor.heir_of(*args, deeds[:count]) == founder.peer_id
        recovery = signed(deeds=deeds[:count])
        said = anchor.statement(RUN, recovery)
        good = msgspec.structs.replace(recovery, signature=founder.sign(b"recovery", said))
        assert anchor.recovered_view(*args, good).voters == (STEWARD,)
        if founder is not FOUNDER:
            with pytest.raises(PeerFault, match="bad_recovery"):
                anchor.recovered_view(*args, recovery)


def test_deeds_hold_in_their_order_only() -> None:
    heir, last = (Ed25519Keyring(hashlib.sha256(name).digest()) for name in (b"heir", b"last"))
    first, second = deed(FOUNDER, 0, heir), deed(heir, 1, last)
    for chain in ((second,), (second, first), (first, first), (deed(heir, 0, last), second)):
        with pytest.raises(PeerFault, match="bad_deed"):
            anchor.heir_of(RUN, FOUNDER.peer_id, FOUNDER.verify, chain)
    with pytest.raises(PeerFault, match="bad_deed"):
        anchor.heir_of(bytes(32), FOUNDER.peer_id, FOUNDER.verify, (first, second))
