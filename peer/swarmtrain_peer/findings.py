"""What ``swarmtrain doctor`` can find: every cause, in plain words, with what to do about it.

``CAUSES`` is the whole list, and each entry has a test that produces it. A sentence names one
cause; fields in braces are filled in where it is found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["good", "note", "bad"]
TIMEOUT_S = 6.0
"""How long an address is waited for."""
CLOCK_TOLERANCE_S = 60.0
"""As much as records of the DHT are allowed (``limits.DHT_CLOCK_SKEW_S``)."""
CHECKS = (
    "version", "key", "ticket", "route", "clock", "port", "reachability", "speed", "disk",
    "memory", "device", "run",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cause:
    """``exit_code``: what ``swarmtrain join`` would end with, 0 for notes."""

    check: str
    sentence: str
    todo: str
    exit_code: int = 0


CAUSES: dict[str, Cause] = {
    # Keys and tickets
    "key_open": Cause(
        "key",
        "Others on this machine may read the key file {path} (mode {mode}).",
        "If nobody has: chmod 600 {path}. Else remove it; the next join makes a new key.",
        3,
    ),
    "key_damaged": Cause(
        "key",
        "The key file {path} is damaged: {why}.",
        "Restore it from a copy, or remove it; the next join makes a new key.",
        3,
    ),
    "ticket_malformed": Cause(
        "ticket", "The ticket is not whole: {why}.", "Copy it again, with quotes around it.", 3
    ),
    "ticket_expired": Cause(
        "ticket",
        "The ticket expired {ago} ago, if this machine's clock is right.",
        "Ask the founder for a new one.",
        6,
    ),
    "ticket_role": Cause(
        "ticket",
        "The ticket is for the role {role}, which does not train.",
        "Use it with swarmtrain seed, or ask for a trainer's ticket.",
    ),
    # The way to each address
    "name_unknown": Cause(
        "route",
        "The name {host} cannot be resolved.",
        "Check the spelling and this machine's name service (DNS).",
        4,
    ),
    "nobody_listens": Cause(
        "route",
        "The machine at {address} answers, and nothing listens on that port.",
        "Is the peer still running there? Ask for a new ticket if it has another port now.",
        4,
    ),
    "no_route": Cause(
        "route",
        "This machine has no way to {address}: {why}.",
        "Check this machine's network connection.",
        4,
    ),
    "no_answer": Cause(
        "route",
        "Nothing comes back from {address} within {timeout_s:g} s.",
        "The machine is off, or a firewall or router in between drops the connection.",
        4,
    ),
    "not_a_peer": Cause(
        "route",
        "Something at {address} answers, and it is no swarmtrain peer.",
        "Check the port; a proxy on the way may also answer.",
        4,
    ),
    "other_version": Cause(
        "version",
        "The peer at {address} speaks another version of the protocol than this one.",
        "Install the release that the run was founded with.",
        7,
    ),
    "other_run": Cause(
        "route",
        "The peer at {address} serves another run than the ticket's.",
        "Ask for a new ticket: the address belongs to somebody else's run by now.",
        8,
    ),
    "turned_away": Cause("ticket", "The run does not let this machine in: {why}.", "{todo}", 6),
    # Clocks
    "clock_ahead": Cause(
        "clock",
        "This machine's clock is {offset} ahead of that of {address}.",
        "Set it (NTP): tickets count by the clock, and here they expire too early.",
    ),
    "clock_behind": Cause(
        "clock",
        "This machine's clock is {offset} behind that of {address}.",
        "Set it (NTP): tickets count by the clock, and what this machine signs expires too early.",
    ),
    # Being reached
    "port_taken": Cause(
        "port",
        "Another program listens on {address} already.",
        "Choose another port with --listen, or port 0 for any free one.",
        3,
    ),
    "port_forbidden": Cause(
        "port",
        "This user may not listen on {address}.",
        "Choose a port above 1023 with --listen.",
        3,
    ),
    "address_elsewhere": Cause(
        "port",
        "{address} is not an address of this machine.",
        "Listen on 0.0.0.0:PORT, and say with --announce how others reach it.",
        3,
    ),
    "outgoing_only": Cause(
        "reachability",
        "This machine does not listen, so others cannot dial it.",
        "That works as long as some member can be dialled; it owns no parts and is no steward.",
    ),
    "private_address": Cause(
        "reachability",
        "Others are told {address}, which only machines in the same network can dial.",
        "With a public address or a forwarded port, say so with --announce HOST:PORT.",
    ),
    "not_dialled": Cause(
        "reachability",
        "The log lists this machine as one that others cannot dial.",
        "It works through links that it opens; open its port to own parts and to become a steward.",
    ),
    "nobody_linked": Cause(
        "reachability",
        "This site is one of {members} members, and has a link to none of the others.",
        "Look at the routes above: what is wrong with all of them is most likely on this side.",
        4,
    ),
    # What the machine can do
    "slow_uplink": Cause(
        "speed",
        "Sending one contribution takes {took_s:.0f} s at the measured {rate}.",
        "The run takes it late or without this machine; fewer others on the line would help.",
    ),
    "disk_full": Cause(
        "disk",
        "{free} are free where {path} lies, and this needs about {needed}.",
        "Make room, or choose another folder with --home.",
        14,
    ),
    "disk_forbidden": Cause(
        "disk",
        "The folder {path} cannot be written: {why}.",
        "Correct its owner and permissions, or choose another one with --home.",
        14,
    ),
    "disk_slow": Cause(
        "disk",
        "Writing and syncing a megabyte in {path} takes {took_s:.1f} s.",
        "Choose a local disk with --home; a commit may wait for it.",
    ),
    "memory_low": Cause(
        "memory",
        "{free} of memory are free, and the model of this run needs {needed} beside the trainer.",
        "Close other programs, or use a machine with more memory.",
        9,
    ),
    "no_torch": Cause(
        "device",
        "PyTorch is not installed here, so this machine cannot train.",
        "pip install 'swarmtrain[train]', or help with swarmtrain seed.",
        9,
    ),
    "no_device": Cause(
        "device",
        "The device {device} cannot be used: {why}.",
        "Use --device cpu, or correct the driver.",
        9,
    ),
    # The run
    "run_unwell": Cause(
        "run", "The run is {word}: {why}.", "See swarmtrain status and swarmtrain logs."
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``cause`` is empty if all is well."""

    check: str
    state: State
    sentence: str
    todo: str = ""
    cause: str = ""
    exit_code: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As ``--json`` has it."""
        return {
            "check": self.check,
            "state": self.state,
            "cause": self.cause or None,
            "sentence": self.sentence,
            "todo": self.todo or None,
            **self.facts,
        }


def good(check: str, sentence: str, **facts: Any) -> Finding:
    """Nothing is wrong with it."""
    assert check in CHECKS, check
    return Finding(check, "good", sentence, facts=facts)


def found(cause: str, **fields: Any) -> Finding:
    """A cause of the list, with its fields filled in."""
    known = CAUSES[cause]
    state: State = "bad" if known.exit_code else "note"
    return Finding(
        known.check,
        state,
        known.sentence.format_map(fields),
        known.todo.format_map(fields),
        cause,
        known.exit_code,
        {name: fields[name] for name in ("address",) if name in fields},
    )


def span(seconds: float) -> str:
    """``40 s``, ``12 min``, ``5.0 h``, ``3.2 d``."""
    for unit, size in (("d", 86400.0), ("h", 3600.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def amount(nbytes: float) -> str:
    """``1.5 MB``; powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
