"""``swarmtrain top``: the run in a terminal, as it goes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from swarmtrain.cli.options import CALL_TIMEOUT_S, Home, Json, SiteOption, site_of
from swarmtrain.cli.output import Output, human_bytes
from swarmtrain.cli.query import health
from swarmtrain_peer import host
from swarmtrain_peer.control import ControlClient, ControlClosed
from swarmtrain_peer.events import escape_text

ROUNDS = 20
MEMBERS_SHOWN = 40
COLUMNS = (
    ("name", "left"), ("role", "left"), ("link", "left"), ("round", "right"), ("loss", "right"),
    ("computing", "right"), ("up/round", "right"), ("down/round", "right"), ("heard", "right"),
)  # fmt: skip


def top(
    every_s: Annotated[
        float, typer.Option("--every", min=0.2, help="Seconds between two looks.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Members, rounds and rates, renewed until Ctrl-C. Into a pipe, or with --json: once."""
    console = Console(highlight=False)
    with site_of(home, site).connect() as client:
        if as_json or once or not console.is_terminal:
            found = look(client)
            if as_json:
                Output(as_json=True).result(found)
            else:
                console.print(screen(found))
            return
        with Live(screen(look(client)), console=console, screen=True, auto_refresh=False) as live:
            ended = threading.Event()
            client.on_close(ended.set)
            with contextlib.suppress(KeyboardInterrupt, ControlClosed):
                while not ended.wait(every_s):
                    live.update(screen(look(client)), refresh=True)


def look(client: ControlClient) -> dict[str, Any]:
    """Status, members and the newest rounds, of one moment."""
    status = client.call("status", timeout_s=CALL_TIMEOUT_S)
    word, _, reason = health(status)
    return {
        "health": word,
        "reason": reason,
        "status": status,
        "peers": client.call("peers", timeout_s=CALL_TIMEOUT_S)["peers"],
        "rounds": client.call("rounds", {"last": ROUNDS}, timeout_s=CALL_TIMEOUT_S)["rounds"],
    }


def headline(found: dict[str, Any]) -> str:
    """One line: is the run healthy, how far is it, how fast does it go?"""
    status, rounds = found["status"], found["rounds"]
    decided = [r["decided_wall_s"] for r in rounds if r["outcome"] == "committed"]
    known = sorted(at for at in decided if at is not None)
    parts = [f"{found['health']}: {found['reason']}"]
    front = max((c["round"] for c in (status.get("channels") or {}).values()), default=None)
    if front is not None:
        parts.append(f"round {front}")
    parts.append(f"{status['members']} members, {status['connected']} linked")
    if len(known) >= 2:
        parts.append(f"a commit every {(known[-1] - known[0]) / (len(known) - 1):.1f} s")
    if known:
        parts.append(f"the last {max(0.0, host.wall_s() - known[-1]):.0f} s ago")
    if status.get("loss") is not None:
        parts.append(f"loss {status['loss']:.4f}")
    return " · ".join(parts)


def rows(peers: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each member; those that were heard of last come first."""
    found: list[tuple[str, ...]] = []
    for peer in sorted(peers, key=lambda p: (not p.get("connected"), p["name"]))[:MEMBERS_SHOWN]:
        metrics = peer.get("metrics") or {}
        age_s = peer.get("last_report_age_s")
        found.append(
            (
                f"{peer['name']}{' *' if peer.get('is_self') else ''}",
                "leader" if peer.get("is_leader") else "steward" if peer.get("votes") else "member",
                "linked" if peer.get("connected") else "away",
                _number(peer.get("round"), "{:.0f}"),
                _number(metrics.get("loss"), "{:.4f}"),
                _number(_percent(metrics.get("compute_utilization")), "{:.0f} %"),
                human_bytes(metrics["bytes_up"]) if metrics.get("bytes_up") else "-",
                human_bytes(metrics["bytes_down"]) if metrics.get("bytes_down") else "-",
                _number(age_s, "{:.0f} s ago"),
            )
        )
    return found


def _percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def screen(found: dict[str, Any]) -> Group:
    """What stands on the terminal. Names are escaped: they are others' words."""
    table = Table(box=None, pad_edge=False)
    for name, justify in COLUMNS:
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows(found["peers"]):
        table.add_row(*(Text(escape_text(cell, 40)) for cell in row))
    more = len(found["peers"]) - MEMBERS_SHOWN
    lines: list[RenderableType] = [Text(escape_text(headline(found), 400)), Text(""), table]
    if more > 0:
        lines.append(Text(f"and {more} more"))
    aborted = [r for r in found["rounds"] if r["outcome"] == "aborted"]
    if aborted:
        newest = aborted[-1]
        where = f"{newest['channel']}#{newest['round']}"
        lines += [Text(""), Text(escape_text(f"last abort: {where}: {newest['reason']}", 200))]
    return Group(*lines)
