"""The vectors of spec 08, against the code and against the specification's own words."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.rounds.attempt import PART_DOMAIN, part_statement
from swarmtrain_protocols.rounds.clip import coefficients_of
from swarmtrain_protocols.rounds.plan import plan_parts

ROOT = Path(__file__).resolve().parents[2]
VECTORS: dict[str, Any] = json.loads((ROOT / "protocols" / "vectors" / "rounds.json").read_text())


def test_part_tables() -> None:
    assert len(VECTORS["parts"]) >= 8
    for case in VECTORS["parts"]:
        owners = [bytes([number]) * 32 for number in case["owners"]]
        leader = bytes([case["leader"]]) * 32
        parts = plan_parts(case["values"], owners, leader, case["round"])
        found = [[p.first, p.count, p.owner[0], p.deputy[0]] for p in parts]
        assert found == case["table"], case
        assert spelled_out(case) == case["table"], case


def spelled_out(case: dict[str, Any]) -> list[list[int]]:
    """08 §1.4 word for word."""
    owners, n = list(case["owners"]), -(-case["values"] // (1 << 18))
    if case["leader"] in owners:
        owners.remove(case["leader"])
        owners.insert(0, case["leader"])
    m = len(owners)
    if n >= m:
        for _ in range(case["round"] % m):
            owners.append(owners.pop(0))
    shares = min(n, math.ceil(math.ceil(n / 1024) / m) * m, 256)
    table, first = [], 0
    for i in range(shares):
        count = n // shares + (1 if i < n % shares else 0)
        table.append([first, count, owners[i % m], owners[(i + 1) % m]])
        first += count
    return table


def test_coefficients() -> None:
    for case in VECTORS["coefficients"]:
        found = coefficients_of(case["samples"])
        assert [struct.pack("<f", value).hex() for value in found] == case["f32"]
        assert all(struct.unpack("<f", struct.pack("<f", value))[0] == value for value in found)


def test_result_statements() -> None:
    for case in VECTORS["results"]:
        key = RoundKey(*case["key"])
        run, root = bytes.fromhex(case["run"]), bytes.fromhex(case["root"])
        statement = part_statement(run, key, case["part"], root)
        assert statement.hex() == case["statement"]
        assert statement == run + msgspec.msgpack.encode([case["key"], case["part"], root])
        seed = bytes.fromhex(case["seed"])
        ring = Ed25519Keyring(seed)
        assert ring.peer_id.hex() == case["owner"]
        signature = bytes.fromhex(case["signature"])
        assert ring.sign(PART_DOMAIN, statement) == signature
        # Independently of identity.py: the signed bytes of 00 §2.
        signed = b"swarmtrain/1 part\x00" + statement
        assert Ed25519PrivateKey.from_private_bytes(seed).sign(signed) == signature
