"""All targets by name."""

from __future__ import annotations

from collections.abc import Sequence

from tests.fuzz import core_targets, file_targets, number_targets, text_targets, web_targets
from tests.fuzz import lan_targets as lan
from tests.fuzz import wire_targets as wire
from tests.fuzz.engine import Target

MODULES = (wire, number_targets, core_targets, file_targets, text_targets, web_targets, lan)
PLANNED = (
    "frame decoder",
    "message schema",
    "DHT handlers and record validator",
    "handshake",
    "codecs and tensors",
    "checkpoint loader",
    "journal",
    "tickets, orders and manifest",
    "configuration",
    "dashboard",
    "control socket",
    "event log",
    "routers",
)
"""What the specification of the tests asks for; ``COVERS`` says which targets are it."""
COVERS: dict[str, tuple[str, ...]] = {
    "frame decoder": ("frames", "session", "bulk_header"),
    "message schema": ("message", "entry", "node_leader", "node_follower", "ledger_apply"),
    "DHT handlers and record validator": ("dht_record", "dht_value", "dht_core"),
    "handshake": ("handshake",),
    "codecs and tensors": ("codec", "compiled_codec", "boundary", "packed_chunk", "merkle"),
    "checkpoint loader": ("checkpoint_manifest", "checkpoint_state", "result_file", "state"),
    "journal": ("record_file", "log_record", "log_snapshot", "ledger", "contacts", "corpus"),
    "tickets, orders and manifest": ("ticket", "capability", "manifest", "genesis", "order"),
    "configuration": ("run_keys", "settings", "environment", "rate", "address", "ticket_book"),
    "dashboard": ("dashboard", "completion"),
    "control socket": ("control", "control_answer"),
    "event log": ("event_log",),
    "routers": ("port_map", "upnp_search", "upnp_description", "upnp_reply"),
}


def make_targets(names: Sequence[str] = ("all",)) -> list[Target]:
    """The targets of these names, in a fixed order.

    Raises:
        KeyError: there is no such target.
    """
    found = {target.name: target for module in MODULES for maker in module.MAKERS
             for target in (maker(),)}  # fmt: skip
    if list(names) == ["all"]:
        return list(found.values())
    for target in (found[name] for name in found if name not in names):
        target.close()
    return [found[name] for name in names]
