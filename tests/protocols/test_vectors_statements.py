"""Vectors of manifest, genesis, tickets and DHT records: ours and an independent maker agree."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from swarmtrain_protocols.dht.contacts import decode_book, encode_book
from swarmtrain_protocols.dht.ids import id_bytes, key_id, node_id
from swarmtrain_protocols.dht.records import digest_of, refusal, sign_record
from swarmtrain_protocols.dht.validators import breaks_its_rule
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.manifest import (
    Manifest,
    RunKeys,
    make_genesis,
    parse_manifest,
)
from swarmtrain_protocols.messages.dht import SignedRecord
from swarmtrain_protocols.tickets import Capability, Ticket, parse_capability, sign_capability
from tests.protocols import reference_statements as reference

MANIFEST: dict[str, Any] = json.loads((reference.VECTORS / "manifest.json").read_text("utf-8"))
DHT: dict[str, Any] = json.loads((reference.VECTORS / "dht.json").read_text("utf-8"))
FOUNDER = Ed25519Keyring(bytes.fromhex(MANIFEST["founder_seed"]))
SITE = Ed25519Keyring(bytes.fromhex(DHT["site_seed"]))
RUN = bytes.fromhex(MANIFEST["manifests"][0]["run"])


def plain(value: object) -> object:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) and "hex" in value else value


def test_the_files_are_what_the_independent_maker_writes() -> None:
    for name, made in (
        ("manifest.json", reference.manifest_vectors()),
        ("dht.json", reference.dht_vectors()),
    ):
        text = (reference.VECTORS / name).read_text(encoding="utf-8")
        assert text == reference.text_of(made), "run reference_statements.py if this is meant"


@pytest.mark.parametrize("case", MANIFEST["manifests"], ids=["default", "other"])
def test_manifests(case: dict[str, Any]) -> None:
    keys = RunKeys(**{name: plain(value) for name, value in case["keys"].items()})
    made = Manifest(keys=keys, founder=FOUNDER.peer_id, nonce=bytes.fromhex(case["nonce"]))
    assert made.to_bytes().hex() == case["bytes"]
    assert made.run_id.hex() == case["run"]
    assert parse_manifest(bytes.fromhex(case["bytes"]), made.run_id) == made


def test_the_default_manifest_holds_the_default_keys() -> None:
    case = MANIFEST["manifests"][0]
    assert parse_manifest(bytes.fromhex(case["bytes"]), RUN).keys == RunKeys()


def test_genesis() -> None:
    genesis = make_genesis(FOUNDER, RUN, SITE.peer_id)
    assert genesis.steward.hex() == MANIFEST["genesis"]["steward"]
    assert genesis.signature.hex() == MANIFEST["genesis"]["signature"]


def test_capability_and_ticket() -> None:
    vector = MANIFEST["capability"]
    capability = Capability(*(plain(field) for field in vector["fields"]))  # type: ignore[arg-type]
    data = sign_capability(FOUNDER, capability)
    assert data.hex() == vector["bytes"]
    read = parse_capability(data, founder=FOUNDER.peer_id, run=RUN, wall_s=reference.WALL_S - 1)
    assert read == capability
    ticket = Ticket(tuple(MANIFEST["ticket"]["addresses"]), RUN, data)
    assert str(ticket) == MANIFEST["ticket"]["url"]
    assert Ticket.parse(MANIFEST["ticket"]["url"]) == ticket


@pytest.mark.parametrize("case", DHT["records"], ids=["map", "binary", "member"])
def test_records(case: dict[str, Any]) -> None:
    run = bytes.fromhex(DHT["run"])
    key = id_bytes(key_id(bytes.fromhex(case["name"])))
    assert key.hex() == case["key"]
    value = bytes.fromhex(case["value"])
    name, sequence = bytes.fromhex(case["name"]), case["sequence"]
    made = sign_record(SITE, run, name, sequence, case["expires_s"], value)
    assert msgspec.msgpack.encode(made).hex() == case["record"]
    read = msgspec.msgpack.decode(bytes.fromhex(case["record"]), type=SignedRecord)
    assert read == made
    assert read.key == key
    assert refusal(FOUNDER, run, read, case["expires_s"] - 1) == ""


def test_the_digest_of_held_records() -> None:
    records = [
        msgspec.msgpack.decode(bytes.fromhex(case["record"]), type=SignedRecord)
        for case in DHT["records"]
    ]
    assert digest_of(records).hex() == DHT["digest"]["bytes"]


@pytest.mark.parametrize("case", DHT["invalid"], ids=["publisher", "type", "port", "many"])
def test_values_that_break_the_rule_of_their_name(case: dict[str, str]) -> None:
    name, publisher, value = (bytes.fromhex(case[k]) for k in ("name", "publisher", "value"))
    assert breaks_its_rule(name, publisher, value)


def test_the_book_of_contacts() -> None:
    run, book = bytes.fromhex(DHT["run"]), DHT["book"]
    entries = decode_book(bytes.fromhex(book["bytes"]), run)
    assert [[e.peer.hex(), list(e.addresses), e.seen_s] for e in entries] == book["entries"]
    assert encode_book(run, entries).hex() == book["bytes"]


def test_node_ids() -> None:
    assert SITE.peer_id.hex() == DHT["publisher"]
    assert id_bytes(node_id(SITE.peer_id)).hex() == DHT["node_id"]
