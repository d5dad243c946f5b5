"""Looks at this machine: key, ticket, port, disk, memory, speed. ``routes.py`` looks at others.

Every function returns findings and raises nothing that the user could have caused.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import shutil
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.budget import ENCODED_BYTES, free_bytes, needed_bytes
from swarmtrain_peer.findings import Finding, amount, found, good, span
from swarmtrain_peer.keys import load_or_create_identity
from swarmtrain_protocols.addresses import split_address
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.manifest import RunKeys, Ticket

STATE_COPIES = 4
"""Two checkpoints, one that is being written, and the results in between."""
SPACE_BYTES_MIN = 1_000_000_000
SYNC_BYTES = 1_000_000
SYNC_S_MAX = 1.0
SEND_S_MAX = 60.0


def check_key(path: Path) -> tuple[Finding, Ed25519Keyring | None]:
    """The identity of this machine; one is made if there is none."""
    try:
        keyring = load_or_create_identity(path)
    except ConfigError as error:
        try:
            mode = stat.S_IMODE(path.lstat().st_mode)
        except OSError:
            mode = 0
        if mode & 0o077 and path.is_file() and not path.is_symlink():
            return found("key_open", path=path, mode=f"{mode:04o}"), None
        return found("key_damaged", path=path, why=error.why), None
    key = keyring.peer_id.hex()
    return good("key", f"this machine's key is {key}", key=key), keyring


def check_ticket(text: str, wall_s: float) -> tuple[Finding, Ticket | None]:
    """What can be said of a ticket before anybody is asked; ``wall_s``: Unix time."""
    try:
        ticket = Ticket.parse(text)
    except ConfigError as error:
        return found("ticket_malformed", why=error.why), None
    claim = ticket.unverified
    if claim.expires_s and wall_s >= claim.expires_s:
        return found("ticket_expired", ago=span(wall_s - claim.expires_s)), ticket
    if claim.role != "trainer":
        return found("ticket_role", role=claim.role), ticket
    left = f"good for {span(claim.expires_s - wall_s)}" if claim.expires_s else "good for ever"
    said = f"the ticket is for run {ticket.run.hex()[:16]}, {left}"
    return good("ticket", said, run=ticket.run.hex()), ticket


def check_port(listen: str) -> Finding:
    """Whether this machine can listen there; nothing is left listening."""
    if not listen:
        return found("outgoing_only")
    name, _, port = listen.rpartition(":")
    name = name.strip("[]")
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((name, int(port)))
            sock.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return found("port_taken", address=listen)
        if error.errno in (errno.EACCES, errno.EPERM):
            return found("port_forbidden", address=listen)
        return found("address_elsewhere", address=listen)
    return good("port", f"this machine can listen on {listen}", address=listen)


def check_announced(announced: Sequence[str], others: Sequence[str]) -> list[Finding]:
    """Whether ``others``, by the addresses they are known by, can dial what they will be told."""
    public = [address for address in others if not is_private(address)]
    local = [address for address in announced if is_private(address)]
    if announced and len(local) == len(announced) and public:
        return [found("private_address", address=local[0])]
    told = ", ".join(address.removesuffix(":0") for address in announced)
    return [good("reachability", f"others are told to dial {told}")] if announced else []


def is_private(address: str) -> bool:
    """Whether only machines nearby can dial it; names are taken for public."""
    try:
        return not ipaddress.ip_address(split_address(address)[0].strip("[]")).is_global
    except ValueError:
        return False


def check_disk(folder: Path, state_bytes: int) -> list[Finding]:
    """Room, permission and speed of the disk that ``folder`` lies on, or will lie on.

    ``state_bytes``: of the model with its optimizer, 0 if it is not known yet.
    """
    place = folder
    while not place.exists():
        place = place.parent
    trial = place / f".swarmtrain-doctor-{os.getpid()}"
    began_s = host.mono_s()
    try:
        with open(trial, "xb") as file:
            file.write(bytes(SYNC_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return [_no_room(place, 0, SPACE_BYTES_MIN)]
        return [found("disk_forbidden", path=place, why=error.strerror or str(error))]
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()
    took_s = host.mono_s() - began_s
    free, needed = shutil.disk_usage(place).free, max(SPACE_BYTES_MIN, STATE_COPIES * state_bytes)
    if free < needed:
        return [_no_room(place, free, needed)]
    if took_s > SYNC_S_MAX:
        return [found("disk_slow", path=place, took_s=took_s)]
    return [good("disk", f"{amount(free)} are free where {place} lies", free_bytes=free)]


def _no_room(place: Path, free: int, needed: int) -> Finding:
    return found("disk_full", path=place, free=amount(free), needed=amount(needed))


def check_memory(values: int, keys: RunKeys | None) -> Finding:
    """Whether the model fits; ``values``: its parameters, 0 if nobody knows yet."""
    free = free_bytes()
    if values and keys is not None:
        needed = needed_bytes(values, keys)
        if needed > free:
            return found("memory_low", free=amount(free), needed=amount(needed))
        said = f"{amount(free)} of memory are free, and the model needs {amount(needed)}"
        return good("memory", said, free_bytes=free, needed_bytes=needed)
    return good("memory", f"{amount(free)} of memory are free", free_bytes=free)


def check_speed(rates: tuple[float, float], values: int, codec: str) -> Finding:
    """``rates``: bytes per second up and down as measured in rounds, 0: not yet."""
    up, down = rates
    facts: dict[str, Any] = {"up_bytes_per_s": up or None, "down_bytes_per_s": down or None}
    if not up:
        said = "how fast this machine sends is measured in its first rounds"
        return good("speed", said, **facts)
    took_s = values * ENCODED_BYTES.get(codec, 4.0) / up
    if took_s > SEND_S_MAX:
        return found("slow_uplink", took_s=took_s, rate=f"{amount(up)}/s")
    said = f"up {amount(up)}/s, down {amount(down)}/s; a contribution takes {took_s:.1f} s to send"
    return good("speed", said, **facts)


def check_member(status: dict[str, Any], me: dict[str, Any]) -> list[Finding]:
    """What a live site says of its place in the run."""
    members, connected = int(status["members"]), int(status["connected"])
    if members > 1 and not connected:
        return [found("nobody_linked", members=members)]
    if not me.get("reachable", True):
        return [found("not_dialled")]
    said = f"{connected} of {members - 1} other members are linked" if members > 1 else ""
    return [good("reachability", said or "this site is the only member so far")]
