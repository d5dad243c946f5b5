"""``swarmtrain doctor``: what keeps this machine from taking part, one cause at a time."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarmtrain.cli.manage import package_version
from swarmtrain.cli.options import CALL_TIMEOUT_S, Home, Json, SiteOption, home_of
from swarmtrain.cli.output import Output
from swarmtrain.cli.query import health
from swarmtrain_peer import host
from swarmtrain_peer.checkup import (
    check_announced,
    check_disk,
    check_key,
    check_member,
    check_memory,
    check_port,
    check_speed,
    check_ticket,
)
from swarmtrain_peer.config import load_settings
from swarmtrain_peer.events import escape_text
from swarmtrain_peer.findings import (
    CHECKS,
    CLOCK_TOLERANCE_S,
    TIMEOUT_S,
    Finding,
    found,
    good,
    span,
)
from swarmtrain_peer.site import Site, find_site
from swarmtrain_peer.spawn import child_environment
from swarmtrain_protocols.errors import SwarmError, UsageError
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.manifest import PROTOCOL_VERSION, RunKeys, Ticket

if TYPE_CHECKING:
    from swarmtrain_peer.routes import Route

ADDRESSES_TRIED_MAX = 16
DEVICE_TIMEOUT_S = 120.0
STATE_BYTES = 8
"""θ and outer momentum, per parameter."""


@dataclass(slots=True)
class Live:
    """What the peer process of a live site answers."""

    site: Site
    status: dict[str, Any]
    peers: list[dict[str, Any]]

    @property
    def me(self) -> dict[str, Any]:
        return next((p for p in self.peers if p.get("is_self")), {})

    @property
    def values(self) -> int:
        channels = (self.status.get("channels") or {}).items()
        return sum(int(c.get("values") or 0) for name, c in channels if name.startswith("train/"))


def doctor(
    ticket: Annotated[str | None, typer.Option("--ticket", help="Try it, without joining.")] = None,
    ticket_file: Annotated[
        Path | None, typer.Option("--ticket-file", help="Read the ticket there.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option("--listen", help="host:port that you mean to listen on.")
    ] = None,
    announce: Annotated[
        str | None, typer.Option("--announce", help="Addresses that you mean to tell others.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds to wait for an address.")
    ] = TIMEOUT_S,
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Look for what keeps this machine out: route, key, version, clock, port, disk, memory, device.

    Exit code 0, or the one that joining would end with.
    """
    settings = load_settings(None, os.environ, {"net.listen": listen, "net.announce": announce})
    live = live_site(home, site)
    findings = [
        good(
            "version",
            f"swarmtrain {package_version()}, protocol {PROTOCOL_VERSION}, "
            f"Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        )
    ]
    key, keyring = check_key(home_of(home) / "identity.key")
    findings.append(key)
    text = ticket_text(ticket, ticket_file, live.site if live else None)
    parsed: Ticket | None = None
    if text:
        told, parsed = check_ticket(text, host.wall_s())
        findings.append(told)
    if live is not None:
        findings += look_at_live(live, timeout_s)
    else:
        routes = try_routes(parsed, keyring, timeout_s)
        findings += soften([one for route in routes for one in route.findings])
        findings.append(check_port(settings.peer.listen))
        findings += announced(settings.peer.listen, settings.peer.announce, parsed)
    values, keys = (live.values, run_keys(live)) if live is not None else (0, None)
    findings += check_disk(home_of(home), values * STATE_BYTES)
    findings.append(check_memory(values, keys))
    findings.append(check_device(device))
    tell(findings, Output(as_json=as_json), keyring)


def tell(findings: Sequence[Finding], output: Output, keyring: Ed25519Keyring | None) -> None:
    """Print the findings in the order of the checks; ends with the exit code of the first bad."""
    ordered = sorted(findings, key=lambda one: CHECKS.index(one.check))
    lines = []
    for one in ordered:
        mark = {"good": "ok", "note": "note", "bad": "BAD"}[one.state]
        lines.append(escape_text(f"{mark:5} {one.check:13} {one.sentence}"))
        if one.todo:
            lines.append(escape_text(f"{'':19} {one.todo}"))
    bad = [one for one in ordered if one.state == "bad"]
    lines.append(f"{len(bad)} to correct" if bad else "nothing keeps this machine out")
    document = {
        "ok": not bad,
        "key": keyring.peer_id.hex() if keyring is not None else None,
        "findings": [one.document() for one in ordered],
    }
    output.result(document, lines)
    if bad:
        raise typer.Exit(bad[0].exit_code)


def live_site(home: Path | None, site: str | None) -> Live | None:
    """What the live site says, if there is exactly one or it is named; None: look from outside.

    Raises:
        UsageError: a site was named that does not exist.
    """
    try:
        place = find_site(home_of(home), site)
        with place.connect() as client:
            status = client.call("status", timeout_s=CALL_TIMEOUT_S)
            peers = client.call("peers", timeout_s=CALL_TIMEOUT_S)["peers"]
    except UsageError:
        if site is not None:
            raise
        return None
    except SwarmError:
        return None  # a named site that is not live: look at the machine from outside
    return Live(place, status, peers)


def ticket_text(ticket: str | None, ticket_file: Path | None, site: Site | None) -> str:
    """The ticket that was given, or the one the site entered with; "" if there is none."""
    if ticket_file is not None:
        try:
            return ticket_file.read_text("ascii", "replace")
        except OSError as error:
            raise UsageError(
                f"ticket file {ticket_file}", error.strerror or str(error), "check the path"
            ) from None
    if ticket == "-":
        return typer.get_text_stream("stdin").readline()
    if ticket or os.environ.get("SWARMTRAIN_TICKET"):
        return ticket or os.environ["SWARMTRAIN_TICKET"]
    if site is not None and site.ticket_path.is_file():
        return site.ticket_path.read_text("ascii", "replace")
    return ""


def try_routes(
    ticket: Ticket | None, keyring: Ed25519Keyring | None, timeout_s: float
) -> list[Route]:
    """Every address of the ticket, at the same time, as a joiner would."""
    if ticket is None or keyring is None:
        return []
    from swarmtrain_peer.routes import probe

    async def work() -> list[Route]:
        tried = (
            probe(
                address,
                keyring=keyring,
                run=ticket.run,
                capability=ticket.capability,
                timeout_s=timeout_s,
            )
            for address in ticket.addresses
        )
        return list(await asyncio.gather(*tried))

    return asyncio.run(work())


def soften(findings: Sequence[Finding]) -> list[Finding]:
    """One address that lets this machine in is enough: what is wrong with others is a note."""
    inside = any(one.check == "route" and one.state == "good" for one in findings)
    if not inside:
        return list(findings)
    return [
        replace(one, state="note", exit_code=0) if one.state == "bad" else one for one in findings
    ]


def look_at_live(live: Live, timeout_s: float) -> list[Finding]:
    """A live site holds the key, so others are only knocked at; the rest it says itself."""
    from swarmtrain_peer.routes import reach

    others = [p for p in live.peers if not p.get("is_self")]
    addresses = [a for p in others for a in p.get("addresses") or []][:ADDRESSES_TRIED_MAX]

    async def work() -> list[tuple[Finding | None, float]]:
        return list(await asyncio.gather(*(reach(a, timeout_s) for a in addresses)))

    found_here: list[Finding] = []
    for address, (trouble, rtt_s) in zip(addresses, asyncio.run(work()), strict=True):
        said = f"{address} answers in {1000 * rtt_s:.0f} ms"
        facts = {"address": address, "rtt_s": round(rtt_s, 6)}
        found_here.append(trouble if trouble is not None else good("route", said, **facts))
    found_here = soften(found_here)
    found_here.append(clock_of(live.status))
    found_here += check_member(live.status, live.me)
    rates = live.status.get("rates") or {}
    up, down = rates.get("up_bytes_per_s") or 0.0, rates.get("down_bytes_per_s") or 0.0
    keys = run_keys(live)
    codec = keys.codec_scatter if keys is not None else "int8"
    found_here.append(check_speed((up, down), live.values, codec))
    word, exit_code, why = health(live.status)
    if exit_code:
        found_here.append(found("run_unwell", word=word, why=why))
    else:
        found_here.append(good("run", f"the run is {word}: {why}"))
    return found_here


def clock_of(status: dict[str, Any]) -> Finding:
    """This machine's clock beside those of most of its peers, as the live site has it."""
    off_s = float(status.get("clock_off_s") or 0.0)
    if abs(off_s) <= CLOCK_TOLERANCE_S:
        return good("clock", "this machine's clock agrees with most others' within a minute")
    cause = "clock_behind" if off_s > 0 else "clock_ahead"
    return found(cause, address="most others", offset=span(abs(off_s)))


def announced(listen: str, announce: Sequence[str], ticket: Ticket | None) -> list[Finding]:
    """What others would be told of this machine, and whether they could dial it."""
    if not listen:
        return []
    name, _, port = listen.rpartition(":")
    told = tuple(announce) or host.announced(f"{name}:{port}")
    return check_announced(told, ticket.addresses if ticket is not None else ())


def run_keys(live: Live) -> RunKeys | None:
    """The run's keys, if its manifest is here."""
    try:
        manifest = live.site.manifest()
    except SwarmError:
        return None
    return manifest.keys if manifest is not None else None


def check_device(name: str) -> Finding:
    """Ask a process of its own, which loads torch."""
    command = [sys.executable, "-m", "swarmtrain.training.device", name]
    try:
        done = subprocess.run(
            command,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEVICE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        why = f"torch did not answer within {DEVICE_TIMEOUT_S:g} s"
        return found("no_device", device=name, why=why)
    if done.returncode != 0:
        last = (done.stderr.splitlines() or ["no output"])[-1]
        if "No module named 'torch'" in last:
            return found("no_torch")
        return found("no_device", device=name, why=last)
    told = json.loads(done.stdout.splitlines()[-1])
    if not told["ok"]:
        return found("no_device", device=name, why=told["why"])
    said = f"{told['device']} ({told['name']}), torch {told['torch']}"
    return good("device", said, device=told["device"], torch=told["torch"])
