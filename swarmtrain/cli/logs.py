"""``swarmtrain logs``: what a site has logged, live or stopped, about everything or one peer."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from swarmtrain.cli.options import CALL_TIMEOUT_S, Home, Json, SiteOption, site_of
from swarmtrain.cli.output import Output
from swarmtrain.cli.query import dated
from swarmtrain.cli.ticket import parse_duration
from swarmtrain_peer import host
from swarmtrain_peer.control import ControlClosed
from swarmtrain_peer.events import escape_text, read_events
from swarmtrain_peer.site import Site
from swarmtrain_protocols.errors import UsageError

SEVERITIES = ("info", "warning", "error")
LAST_MAX = 100_000


def logs(
    peer: Annotated[
        str | None,
        typer.Argument(metavar="[PEER]", help="Only what is about it: its name or first digits."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they come.")] = False,
    last: Annotated[int, typer.Option("--last", "-n", min=1, max=LAST_MAX)] = 100,
    since: Annotated[
        str | None, typer.Option("--since", help="Not older than, such as 10m or 2h.")
    ] = None,
    level: Annotated[
        str, typer.Option("--level", help=f"At least: {', '.join(SEVERITIES)}.")
    ] = "info",
    process: Annotated[
        bool, typer.Option("--process", help="What the peer process printed, instead of events.")
    ] = False,
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """The events of a site, from its files: also of one that has stopped.

    With --json: one object per line.
    """
    if level not in SEVERITIES:
        raise UsageError(f"--level {level!r:.40}", "no such level", f"one of {SEVERITIES}")
    oldest_s = host.wall_s() - parse_duration(since, "--since") if since else 0.0
    output = Output(as_json=as_json)
    place = site_of(home, site, stopped=True)
    if process:
        lines = [{"line": line} for line in tail(place.output_path, last)]
        for one in lines:
            output.result(one, [escape_text(one["line"], 2000)])
        return
    wanted = Filter(peer, oldest_s, SEVERITIES.index(level))
    newest = 0

    def damaged(file: Path) -> None:
        output.note(f"a line of {file} is damaged and left out")

    found = (record for record in read_events(place.events_path, damaged) if wanted(record))
    for record in deque(found, maxlen=last):
        newest = max(newest, int(record["seq"]))
        output.result(record, [dated(record)])
    if follow:
        for record in pushed(place):
            if int(record["seq"]) > newest and wanted(record):
                output.result(record, [dated(record)])


class Filter:
    """Which records are shown: about ``peer`` if it is named, young and grave enough."""

    def __init__(self, peer: str | None, oldest_s: float, severity: int) -> None:
        self._peer = peer
        self._oldest_s = oldest_s
        self._severity = severity

    def __call__(self, record: dict[str, Any]) -> bool:
        if float(record.get("wall_s") or 0.0) < self._oldest_s:
            return False
        grave = record.get("severity", "info")
        if grave in SEVERITIES and SEVERITIES.index(grave) < self._severity:
            return False
        return self._peer is None or self._is_about(record, self._peer)

    @staticmethod
    def _is_about(record: dict[str, Any], peer: str) -> bool:
        digits = peer.lower()
        for key, value in record.items():
            if key == "site":
                continue  # every record is by this site
            for one in value if isinstance(value, list) else (value,):
                if isinstance(one, str) and (
                    one == peer or (len(one) == 64 and one[: len(digits)] == digits)
                ):
                    return True
        return False


def pushed(site: Site) -> Iterator[dict[str, Any]]:
    """Records as they come, until the peer process ends; at once if it does not run."""
    inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    try:
        client = site.connect()
    except ControlClosed:
        return
    with client:
        client.on_close(lambda: inbox.put(None))
        client.subscribe(
            lambda push: inbox.put(push["record"]) if push["event"] == "event" else None
        )
        answer = client.call("events", {"last": 100, "follow": True}, timeout_s=CALL_TIMEOUT_S)
        seen = 0
        for record in answer.get("events", []):
            seen = int(record["seq"])
            yield record
        while (record := inbox.get()) is not None:
            if int(record["seq"]) > seen:
                yield record


def tail(path: Path, last: int) -> list[str]:
    """The last lines of a text file, none if there is no such file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, maxlen=last)]
    except FileNotFoundError:
        return []
