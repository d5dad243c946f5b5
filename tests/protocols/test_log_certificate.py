"""Statements, certificates and self-proving snapshots, against vectors and against forgers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import blake3
import msgspec
import pytest
from msgspec.structs import replace

from swarmtrain_protocols.entries import Genesis, StewardsChanged, encode_body
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.identity import Ed25519Keyring, verify_ed25519
from swarmtrain_protocols.log.certificate import (
    Link,
    SnapshotBody,
    SnapshotFile,
    Trust,
    encode_snapshot_body,
    encode_snapshot_file,
    endorsed,
    statement,
)
from swarmtrain_protocols.log.view import View, chained
from swarmtrain_protocols.manifest import make_genesis
from swarmtrain_protocols.messages.log import (
    Certificate,
    Endorsement,
    SnapshotCertificate,
    WireEntry,
)
from tests.protocols.log_world import FOUNDER, RUN, KeyedHash

VECTORS = Path(__file__).parents[2] / "protocols" / "vectors" / "log.json"
KEYS = sorted((KeyedHash(n) for n in "abcde"), key=lambda k: k.peer_id)
IDS = tuple(k.peer_id for k in KEYS)
TRUST = Trust(RUN, FOUNDER.peer_id, KEYS[0])


def test_vectors() -> None:
    """Chain, statement, signature and certificate with real keys, byte for byte."""
    for v in json.loads(VECTORS.read_text(encoding="utf-8"))["vectors"]:
        h = {k: bytes.fromhex(x) for k, x in v.items() if isinstance(x, str) and k != "what"}
        keys = [Ed25519Keyring(bytes.fromhex(seed)) for seed in v["seeds"]]
        body = msgspec.msgpack.decode(h["genesis"], type=Genesis)
        view = View.first(body, h["genesis"])
        first = chained(h["run"], 0, 0, h["genesis"])
        assert (view.digest, first) == (h["stewards"], h["chain_hash_0"])
        end = chained(first, 1, v["term"], h["entry"])
        assert end == h["chain_hash_1"]
        assert statement(h["run"], view, v["term"], 1, end) == h["statement"]
        trust = Trust(h["run"], h["founder"], keys[0])
        signature = trust.sign(view, v["term"], 1, end)
        assert signature == h["signature"]
        assert verify_ed25519(keys[0].peer_id, b"log", h["statement"], signature)
        certificate = msgspec.msgpack.decode(h["certificate"], type=Certificate)
        assert trust.certifies(view, certificate) and certificate.chain_hash == end
        assert msgspec.msgpack.encode(certificate) == h["certificate"]
        assert (
            trust.sign_snapshot(view, v["term"], 1, end, h["snapshot_hash"])
            == (h["snapshot_signature"])
        )


def test_a_statement_is_120_bytes_and_says_everything() -> None:
    view = View(5, IDS[:3], (), b"d" * 32, frozenset(), IDS[0])
    data = statement(RUN, view, 6, 7, b"h" * 32)
    assert data == RUN + struct.pack("<QQQ", 5, 6, 7) + b"h" * 32 + b"d" * 32 and len(data) == 120


def signed(view: View, index: int, by: tuple[int, ...]) -> Certificate:
    chain_hash = b"h" * 32
    signatures = {
        IDS[i]: Trust(RUN, FOUNDER.peer_id, KEYS[i]).sign(view, 2, index, chain_hash) for i in by
    }
    return Certificate(view.generation, 2, index, chain_hash, view.digest, endorsed(signatures))


THREE = View(1, IDS[:3], (), b"d" * 32, frozenset(), IDS[0])


@pytest.mark.parametrize(
    ("by", "valid"),
    [((0, 1), True), ((0, 1, 2), True), ((0,), False), ((3, 4), False), ((0, 3), False)],
)
def test_a_majority_of_the_set_in_force(by: tuple[int, ...], valid: bool) -> None:
    assert TRUST.certifies(THREE, signed(THREE, 9, by)) is valid


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": 0},
        {"term": 3},
        {"index": 8},
        {"chain_hash": b"x" * 32},
        {"stewards": b"x" * 32},
    ],
)
def test_no_field_of_a_certificate_can_be_changed(changes: dict[str, object]) -> None:
    assert not TRUST.certifies(THREE, replace(signed(THREE, 9, (0, 1, 2)), **changes))


def test_one_signer_counts_once() -> None:
    good = signed(THREE, 9, (0,))
    doubled = replace(good, endorsements=good.endorsements * 2)
    assert not TRUST.certifies(THREE, doubled)


def test_a_log_signature_is_no_snapshot_signature() -> None:
    by_log = TRUST.sign(THREE, 2, 9, b"h" * 32)
    assert not TRUST.snapshot_signed_by(IDS[0], by_log, THREE, 2, 9, b"h" * 32, b"")


# --- snapshot files ------------------------------------------------------------------------------


def snapshot_file() -> SnapshotFile:
    """Founded by 0, then 0, 1, 2 vote, then 2, 3, 4; each change certified by the set before."""
    genesis = make_genesis(FOUNDER, RUN, IDS[0])
    data = encode_body(genesis)
    view = View.first(genesis, data)
    links: list[Link] = []
    plan = [
        (IDS[:3], IDS[:1], (0, 1)),
        (IDS[:3], (), (0, 1)),
        (IDS[2:5], IDS[:3], (1, 2, 3)),
        (IDS[2:5], (), (3, 4)),
    ]
    for index, (voters, joint, by) in enumerate(plan, 5):
        body = StewardsChanged(voters, joint)
        entry = WireEntry(2, encode_body(body))
        granted = View(0, view.voters, view.joint, view.digest, frozenset(IDS), view.founding)
        view = granted.after(index, 2, entry.body, body)
        links.append(Link(index, entry, signed(view, index, by)))
    return sealed(tuple(links), view, data, (3, 4))


def sealed(
    links: tuple[Link, ...], view: View, genesis: bytes, by: tuple[int, ...], index: int = 20
) -> SnapshotFile:
    body = SnapshotBody(index, 2, b"h" * 32, 0, IDS, b"ledger")
    data, digest = encode_snapshot_body(body)
    assert digest == blake3.blake3(data).digest()
    signatures = {
        IDS[i]: Trust(RUN, FOUNDER.peer_id, KEYS[i]).sign_snapshot(
            view, 2, index, b"h" * 32, digest
        )
        for i in by
    }
    certificate = SnapshotCertificate(
        0, 2, index, b"h" * 32, view.digest, digest, endorsed(signatures)
    )
    return SnapshotFile(genesis, links, data, certificate)


def test_a_newcomer_checks_a_snapshot_down_to_the_founder() -> None:
    snapshot = TRUST.snapshot(encode_snapshot_file(snapshot_file()))
    assert snapshot.body.ledger == b"ledger" and snapshot.body.index == 20
    assert snapshot.view.voters == IDS[2:5] and snapshot.view.capable == frozenset(IDS)


def _without_link(file: SnapshotFile) -> SnapshotFile:
    return replace(file, links=file.links[:2] + file.links[3:])


def _own_first_link(file: SnapshotFile) -> SnapshotFile:
    """Three strangers certify themselves as the successors of the founding steward."""
    link = file.links[0]
    mine = replace(link.certificate, endorsements=link.certificate.endorsements[1:])
    return replace(file, links=(replace(link, certificate=mine), *file.links[1:]))


def _other_ledger(file: SnapshotFile) -> SnapshotFile:
    return replace(file, body=file.body.replace(b"ledger", b"lodger"))


def _minority(file: SnapshotFile) -> SnapshotFile:
    few = file.certificate.endorsements[:1]
    return replace(file, certificate=replace(file.certificate, endorsements=few))


def _other_founder(file: SnapshotFile) -> SnapshotFile:
    return replace(file, genesis=encode_body(make_genesis(KEYS[4], RUN, IDS[4])))


def _old_set(file: SnapshotFile) -> SnapshotFile:
    """The first three sign a snapshot after they were replaced."""
    bad = tuple(Endorsement(i, bytes(64)) for i in IDS[:3])
    return replace(file, certificate=replace(file.certificate, endorsements=bad))


FORGERIES = {
    "a link is missing": (_without_link, "bad_stewards"),
    "a set certifies itself": (_own_first_link, "bad_certificate"),
    "another ledger": (_other_ledger, "bad_certificate"),
    "a minority": (_minority, "bad_certificate"),
    "another founder": (_other_founder, "bad_genesis"),
    "the set of yesterday": (_old_set, "bad_certificate"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_snapshot_is_refused(name: str) -> None:
    forge, code = FORGERIES[name]
    with pytest.raises(PeerFault) as caught:
        TRUST.snapshot(encode_snapshot_file(forge(snapshot_file())))
    assert caught.value.code == code


def test_any_flipped_byte_of_a_snapshot_is_refused() -> None:
    data = encode_snapshot_file(snapshot_file())
    for at in range(0, len(data), 7):
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(PeerFault):
            TRUST.snapshot(flipped)
