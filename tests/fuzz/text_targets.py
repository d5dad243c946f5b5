"""Targets of what people and files give: tickets, manifests, orders, settings, addresses."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from blake3 import blake3

from swarmtrain_peer.config import load_settings, parse_rate
from swarmtrain_protocols import entries, limits
from swarmtrain_protocols.addresses import join_address, split_address, subnet
from swarmtrain_protocols.errors import (
    ConfigError,
    NotAuthorised,
    PeerFault,
    RunMismatch,
    VersionMismatch,
)
from swarmtrain_protocols.manifest import (
    RunKeys,
    check_genesis,
    make_genesis,
    make_manifest,
    parse_manifest,
    run_keys_from_mapping,
)
from swarmtrain_protocols.messages.member import Propose
from swarmtrain_protocols.orders import is_authorised, sign_order
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.tickets import Capability, Ticket, parse_capability, sign_capability
from tests.fuzz.engine import Target
from tests.fuzz.file_targets import Folder
from tests.fuzz.mutate import splice_json, splice_msgpack, splice_text

FOUNDER = FakeKeyring("founder")
RUN = b"r" * 32
SIGNED = sign_capability(FOUNDER, Capability(id=b"ticket-1", run=RUN, vote=True, expires_s=2000))
SECRET_CHARS_MAX = 4096
"""No error is that long, so none can tell a longer secret."""
URL = str(Ticket(("127.0.0.1:7000", "[::1]:7000"), RUN, SIGNED))


def _ticket(data: bytes) -> object:
    """A ticket that parses is written back as it was meant; no error shows the secret."""
    text = data.decode("utf-8", "surrogateescape")
    after = text.find("#") + 1 or len(text)
    secret = text[after : after + SECRET_CHARS_MAX].strip()  # no more: all of it is weighed, too
    try:
        ticket = Ticket.parse(text)
    except ConfigError as error:
        said = f"{error.what} {error.why} {error.todo}"
        assert len(secret) < 12 or secret not in said, "an error tells the secret"
        raise
    assert Ticket.parse(str(ticket)) == ticket
    assert base64.urlsafe_b64encode(ticket.capability).decode()[:12] not in repr(ticket)
    return len(ticket.addresses)


def ticket() -> Target:
    return Target("ticket", _ticket, (ConfigError,), [URL.encode()], splice_text)


def _capability(data: bytes) -> object:
    found = parse_capability(
        data, founder=FOUNDER.peer_id, run=RUN, wall_s=1000.0, verify=FOUNDER.verify
    )
    # Whatever was signed means one thing, however it was wrapped.
    assert found == Capability(id=b"ticket-1", run=RUN, vote=True, expires_s=2000), "forged"
    return "believed"


def capability() -> Target:
    return Target("capability", _capability, (NotAuthorised,), [SIGNED], splice_msgpack)


MANIFEST = make_manifest(RunKeys(), FOUNDER.peer_id, b"n" * 16)
STAGED = make_manifest(
    run_keys_from_mapping({"stages": 3, "inner_steps": 7, "model": {"layers": 6}}),
    FOUNDER.peer_id,
    b"m" * 16,
)


def _manifest(data: bytes) -> object:
    """Under its own hash, so that what is behind the hash is reached."""
    found = parse_manifest(data, blake3(data).digest())
    assert found.to_bytes() == data
    return found.keys.stages


def manifest() -> Target:
    seeds = [MANIFEST.to_bytes(), STAGED.to_bytes()]
    errors = (RunMismatch, VersionMismatch)
    return Target("manifest", _manifest, errors, seeds, splice_msgpack, 1 << 18)


GENESIS = make_genesis(FOUNDER, RUN, FOUNDER.peer_id)


def _genesis(data: bytes) -> object:
    body = entries.decode_body(data)
    if not isinstance(body, entries.Genesis):
        return type(body).__name__
    check_genesis(body, run=RUN, founder=FOUNDER.peer_id, verify=FOUNDER.verify)
    assert body == GENESIS, "forged"
    return "believed"


def genesis() -> Target:
    return Target(
        "genesis", _genesis, (PeerFault,), [entries.encode_body(GENESIS)], splice_msgpack, 1 << 18
    )


ORDER = sign_order(FOUNDER, RUN, 5, entries.Paused("lunch"))


def _order(data: bytes) -> object:
    import msgspec

    try:
        order = msgspec.msgpack.decode(data, type=Propose)
    except (ValueError, RecursionError) as error:
        raise PeerFault("malformed", str(error)) from None
    good = is_authorised(order, founder=FOUNDER.peer_id, run=RUN, index=9, verify=FOUNDER.verify)
    assert not good or order == ORDER, "forged"
    return good


def order() -> Target:
    import msgspec

    return Target("order", _order, (PeerFault,), [msgspec.msgpack.encode(ORDER)], splice_msgpack)


def _address(data: bytes) -> object:
    text = data.decode("utf-8", "surrogateescape")
    host, port = split_address(text)
    assert 1 <= port <= 65535 and split_address(join_address(host, port)) == (host, port)
    assert len(subnet(text)) <= limits.ADDRESS_CHARS_MAX + 4
    return ":" in host


def address() -> Target:
    seeds = [b"127.0.0.1:80", b"[::1]:65535", b"[2001:db8::1%0]:1", b"host-a.example.org:7000"]
    return Target("address", _address, (ValueError,), seeds, splice_text)


def _keys(data: bytes) -> object:
    try:
        mapping: Any = json.loads(data)
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(mapping, dict):
        return "no mapping"
    keys = run_keys_from_mapping(mapping)
    found = make_manifest(keys, FOUNDER.peer_id, b"n" * 16)
    assert parse_manifest(found.to_bytes(), found.run_id).keys == keys
    return "keys"


def keys() -> Target:
    plain = json.loads(json.dumps({
        "name": "run", "model": {"layers": 6}, "inner_steps": 20, "stages": 2, "outer_lr": "auto",
        "corpus_hash": "ab" * 32, "overlap": "eager", "codec_scatter": "int8", "grace_s": "auto",
        "fragments": 2, "mix": 0.5, "delay": 1, "min_peers": 2, "max_rounds": 3,
    }))  # fmt: skip
    known = set(RunKeys.__struct_fields__)
    one = json.dumps({key: value for key, value in plain.items() if key in known}).encode()
    return Target("run_keys", _keys, (ConfigError,), [one, b"{}"], splice_json, 1 << 19, share=0.2)


TOML = Path(__file__).parents[2] / "peer" / "peer.toml"


def settings() -> Target:
    body = TOML.read_bytes()
    run = b'[outer]\ninner_steps = 20\n[comm]\ncodec = "int8"\n[net]\nup = "5Mbit"\n'
    folder = Folder("run.toml")

    def take(data: bytes) -> object:
        return load_settings(folder.put(data)).peer.display_name is None

    return Target(
        "settings",
        take,
        (ConfigError,),
        [body, run],
        splice_text,
        1 << 20,
        close=folder.close,
        share=0.2,
    )


def _environment(data: bytes) -> object:
    pieces = data.decode("utf-8", "surrogateescape").split("\n")
    values = dict(piece.split("=", 1) for piece in pieces if "=" in piece)
    load_settings(None, environ=values)
    return len(values)


def environment() -> Target:
    seeds = [
        b"SWARMTRAIN_COMM__CODEC=int8\nSWARMTRAIN_LISTEN=127.0.0.1:0\nSWARMTRAIN_NET__UP=5MB/s"
    ]
    return Target(
        "environment", _environment, (ConfigError,), seeds, splice_text, 1 << 21, share=0.1
    )


def _rate(data: bytes) -> object:
    return parse_rate(data.decode("utf-8", "surrogateescape")) >= 0


def rate() -> Target:
    seeds = [b"50Mbit", b"10MB/s", b"auto", b"1.5 Gbit/s", b"12345"]
    return Target("rate", _rate, (ConfigError,), seeds, splice_text, 1 << 18)


MAKERS = (ticket, capability, manifest, genesis, order, address, keys, settings, environment, rate)
