"""Signed statements from the specifications alone: msgpack, cryptography and blake3, none of ours.

Run as a module to rewrite ``protocols/vectors/manifest.json`` and ``dht.json``.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import msgpack
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

VECTORS = Path(__file__).resolve().parents[2] / "protocols" / "vectors"
FOUNDER_SEED = bytes(range(32))
SITE_SEED = bytes(range(32, 64))
WALL_S = 1_700_000_000

DEFAULT_KEYS: dict[str, object] = {
    "name": "tiny-lm",
    "seed": 1234,
    "preset": "lm-tiny",
    "model": {},
    "corpus": "stdlib",
    "corpus_hash": b"",
    "shards": 0,
    "batch_size": 4,
    "inner_steps": 20,
    "inner_lr": 3e-3,
    "inner_weight_decay": 0.1,
    "inner_clip": 1.0,
    "inner_warmup_steps": 50,
    "total_steps": 0,
    "inner_optimizer": "adamw",
    "outer_lr": None,
    "outer_momentum": None,
    "overlap": "auto",
    "codec_scatter": "int8",
    "codec_gather": "int8",
    "fragments": 1,
    "delay": 0,
    "mix": 0.5,
    "max_rounds": 0,
    "checkpoint_every_rounds": 10,
    "min_peers": 1,
    "start_peers": 1,
    "grace_s": 0.0,
    "round_timeout_s": 0.0,
    "max_base_age_rounds": 2,
    "max_extra_steps_factor": 2.0,
    "stages": 0,
    "micro_batches": 16,
    "pipeline_mode": "sync",
    "boundary_codec": "int8",
    "replicas_min": 2,
    "ends_replicas": 3,
    "close_fraction": 0.9,
    "swapped": False,
    "skip_fraction": 0.0,
    "generate_share": 0.1,
    "stewards": 0,
}
OTHER_KEYS: dict[str, object] = {
    **DEFAULT_KEYS,
    "name": "größer",
    "model": {"d_model": 128, "heads": 4, "layers": 6},
    "corpus_hash": bytes(range(100, 132)),
    "outer_lr": 0.7,
    "outer_momentum": 0.9,
    "overlap": "off",
    "stages": 6,
    "micro_batches": 1024,
    "pipeline_mode": "diloco",
    "boundary_codec": "bf16",
    "swapped": True,
    "skip_fraction": 0.125,
}


def pack(value: object) -> bytes:
    return bytes(msgpack.packb(value, use_bin_type=True))


def public(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def sign(seed: bytes, domain: bytes, payload: bytes) -> bytes:
    key = Ed25519PrivateKey.from_private_bytes(seed)
    return key.sign(b"swarmtrain/1 " + domain + b"\0" + payload)


def shown(value: object) -> object:
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def manifest_case(keys: dict[str, object], nonce: bytes) -> dict[str, object]:
    founder = public(FOUNDER_SEED)
    data = pack({"protocol": 1, "keys": keys, "founder": founder, "nonce": nonce})
    return {
        "keys": {name: shown(value) for name, value in keys.items()},
        "founder": founder.hex(),
        "nonce": nonce.hex(),
        "bytes": data.hex(),
        "run": blake3(data).hexdigest(),
    }


def manifest_vectors() -> dict[str, object]:
    cases = [
        manifest_case(DEFAULT_KEYS, bytes(16)),
        manifest_case(OTHER_KEYS, bytes(range(200, 216))),
    ]
    run = bytes.fromhex(str(cases[0]["run"]))
    steward = public(SITE_SEED)
    fields = [b"12345678", run, "trainer", True, WALL_S, 3]
    payload = pack(fields)
    secret = pack([payload, sign(FOUNDER_SEED, b"capability", payload)])
    text = base64.urlsafe_b64encode(secret).rstrip(b"=").decode()
    addresses = ["198.51.100.7:4242", "[2001:db8::1]:99"]
    return {
        "spec": "05-manifest-and-tickets.md",
        "founder_seed": FOUNDER_SEED.hex(),
        "manifests": cases,
        "genesis": {
            "run": run.hex(),
            "steward": steward.hex(),
            "signature": sign(FOUNDER_SEED, b"genesis", run + steward).hex(),
        },
        "capability": {
            "fields": [shown(field) for field in fields],
            "payload": payload.hex(),
            "bytes": secret.hex(),
        },
        "ticket": {
            "addresses": addresses,
            "url": f"swarm://{','.join(addresses)}/{run.hex()}#{text}",
        },
    }


def dht_vectors() -> dict[str, object]:
    run = bytes(range(64, 96))
    publisher = public(SITE_SEED)
    records = []
    digested: list[bytes] = []
    for name, sequence, value in (
        (b"stewards", 1, {"at": ["h:1"]}),
        (b"chunk/7", 1_700_000_000_123, b"\x00\xff"),
        (b"member/" + publisher, 2, ["198.51.100.7:4242", "[2001:db8::7]:4242"]),
    ):
        key = blake3(b"dht key\0" + name).digest()[:20]
        packed = pack(value)
        covered = pack([run, name, publisher, sequence, WALL_S + 600, packed])
        signature = sign(SITE_SEED, b"dht record", covered)
        digested += [publisher, sequence.to_bytes(8, "big")]
        digested += [(WALL_S + 600).to_bytes(8, "big"), signature]
        records.append(
            {
                "name": name.hex(),
                "key": key.hex(),
                "sequence": sequence,
                "expires_s": WALL_S + 600,
                "value": packed.hex(),
                "covered": covered.hex(),
                "record": pack([name, publisher, sequence, WALL_S + 600, packed, signature]).hex(),
            }
        )
    return {
        "spec": "03-dht.md",
        "site_seed": SITE_SEED.hex(),
        "run": run.hex(),
        "publisher": publisher.hex(),
        "node_id": blake3(publisher).digest()[:20].hex(),
        "records": records,
        "digest": {
            "of": "the three records as if they were under one key, in this order",
            "bytes": blake3(b"".join(digested)).digest()[:8].hex(),
        },
        "invalid": [
            {"name": name.hex(), "publisher": publisher.hex(), "value": pack(value).hex()}
            for name, value in (
                (b"member/" + bytes(32), ["198.51.100.7:4242"]),
                (b"member/" + publisher, "198.51.100.7:4242"),
                (b"member/" + publisher, ["198.51.100.7"]),
                (b"member/" + publisher, ["198.51.100.7:4242"] * 9),
            )
        ],
        "book": {
            "entries": [[publisher.hex(), ["198.51.100.7:4242"], WALL_S]],
            "bytes": pack([1, run, [[publisher, ["198.51.100.7:4242"], WALL_S]]]).hex(),
        },
    }


def text_of(vectors: dict[str, object]) -> str:
    return json.dumps(vectors, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (VECTORS / "manifest.json").write_text(text_of(manifest_vectors()), encoding="utf-8")
    (VECTORS / "dht.json").write_text(text_of(dht_vectors()), encoding="utf-8")
