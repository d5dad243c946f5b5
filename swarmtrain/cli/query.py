"""Looking at a running peer: ``status``, ``peers``, ``rounds``, ``events``; and ``leave``."""

from __future__ import annotations

import queue
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from swarmtrain.cli.options import CALL_TIMEOUT_S, Home, Json, SiteOption, connect, site_of
from swarmtrain.cli.output import (
    EXIT_DEGRADED,
    EXIT_STALLED,
    EXIT_STOPPED,
    Output,
    event_line,
    human_bytes,
    table,
)
from swarmtrain.cli.paths import carried, reachability, reached
from swarmtrain.cli.stages import (
    STEPS,
    coverage_table,
    peers_table,
    recovery_lines,
    stage_health,
    status_fields,
    steps_table,
)
from swarmtrain_peer.control import ControlClosed
from swarmtrain_peer.events import escape_text

Last = Annotated[int, typer.Option("--last", "-n", min=1, max=4096, help="How many.")]


MESH_MEMBERS = 32


def health(status: dict[str, Any]) -> tuple[str, int, str]:
    """(word, exit code, reason) of a run as one member sees it."""
    if status.get("ended"):
        return "stopped", EXIT_STOPPED, f"the run ended: {status['ended']}"
    if not status.get("leader"):
        return "stalled", EXIT_STALLED, "no majority of stewards answers"
    if status.get("paused"):
        return "stalled", EXIT_STALLED, f"paused: {status['paused']}"
    word, why = stage_health(status.get("pipeline") or {})
    if word == "stalled":
        return word, EXIT_STALLED, why
    if status.get("disk_full"):
        waiting = ", ".join(status["disk_full"])
        return "degraded", EXIT_DEGRADED, f"the disk of this site is full: {waiting} not written"
    if status.get("syncing"):
        return "degraded", EXIT_DEGRADED, "this site is catching up"
    members, connected = int(status.get("members", 0)), int(status.get("connected", 0))
    # Beyond this size not every member keeps a link to every other, and that is no trouble.
    if connected + 1 < members <= MESH_MEMBERS:
        return "degraded", EXIT_DEGRADED, f"{members - connected - 1} member(s) not connected"
    if word == "degraded":
        return word, EXIT_DEGRADED, why
    if members == 1:
        return "healthy", 0, "this site is the only member"
    return "healthy", 0, "every member is connected"


def status(site: SiteOption = None, home: Home = None, as_json: Json = False) -> None:
    """One screen about the run. Exit code: 0 healthy, 20 degraded, 21 stalled, 22 stopped."""
    output = Output(as_json=as_json)
    place = site_of(home, site)
    try:
        with place.connect() as client:
            answer = client.call("status", timeout_s=CALL_TIMEOUT_S)
    except ControlClosed as error:
        document = {"ok": False, "health": "stopped", "site": str(place.folder)}
        output.result(document, [f"stopped: {error.what} ({error.why})"])
        raise typer.Exit(EXIT_STOPPED) from None
    word, exit_code, reason = health(answer)
    lines = status_lines(answer, word, reason)
    output.result({"ok": exit_code == 0, "health": word, "reason": reason, **answer}, lines)
    raise typer.Exit(exit_code)


def status_lines(answer: dict[str, Any], word: str, reason: str) -> list[str]:
    """The status for people."""
    trainer, pipeline = answer.get("trainer") or {}, answer.get("pipeline")
    loss = answer.get("loss")
    listen = ", ".join(answer.get("listen") or []) or "no address"
    leader = str(answer.get("leader") or "none")[:8]
    me = " (this site)" if answer.get("is_leader") else ""
    sent, received = (human_bytes(answer.get(f"bytes_{way}") or 0) for way in ("sent", "received"))
    fields = {
        "run": f"{answer.get('name')} {str(answer.get('run'))[:16]}",
        "site": f"{answer.get('site_name')} {str(answer.get('site'))[:8]} on {listen}",
        "reach": reachability(answer) or "unknown",
        "members": f"{answer.get('members')}, {answer.get('connected')} connected",
        "leader": f"{leader}{me}, term {answer.get('term')}",
        "stewards": _stewards(answer),
        **(status_fields(pipeline) if pipeline else _rounds_fields(answer)),
        "loss": "not measured" if loss is None else f"{loss:.4f}",
        "traffic": f"{sent} sent, {received} received",
    }
    if (relay := carried(answer)).get("relayed_bytes"):
        total, streams = human_bytes(relay["relayed_bytes"]), relay.get("streams")
        fields["relays"] = f"{total} for members that cannot be dialled, {streams} streams now"
    if answer.get("data"):
        fields["data"] = data_line(answer["data"])
    lines = [f"{word}: {reason}", *(f"{key:8} {value}" for key, value in fields.items())]
    if trainer.get("attached"):
        used = trainer.get("compute_utilization")
        share = "" if used is None else f", computing {100 * used:.1f} % of the time"
        lines.append(f"trainer  step {trainer.get('step')}{share}")
    if pipeline:
        back = [escape_text(line) for line in recovery_lines(pipeline)]
        parts = [escape_text(line) for line in lines], coverage_table(pipeline), back
        return [line for part in parts if part for line in (*part, "")][:-1]
    for name, channel in sorted((answer.get("channels") or {}).items()):
        lines.append(
            f"channel  {name} round {channel.get('round')} {channel.get('phase')}"
            f" state {str(channel.get('state_hash') or '')[:8]}"
        )
    return [escape_text(line) for line in lines]


def _rounds_fields(answer: dict[str, Any]) -> dict[str, str]:
    return {
        "rounds": f"{answer.get('rounds_committed')} committed, "
        f"{answer.get('rounds_aborted')} aborted, generation {answer.get('generation')}",
        "overlap": _overlap(answer),
    }


def data_line(data: dict[str, Any]) -> str:
    """How far the data are, where they are dealt in shards."""
    if data.get("samples") is None:
        return "not known yet: no trainer has named them"
    return (
        f"epoch {data['epoch']}: {data['shards_done']} of {data['shards']} shards done, "
        f"{data['samples_counted']} samples counted ({data['epochs']:.2f} epochs)"
    )


def _stewards(answer: dict[str, Any]) -> str:
    count = len(answer.get("stewards") or [])
    if count <= 1:
        return f"{count}: the run stops while that one is away"
    return f"{count}: the run goes on while {count // 2 + 1} of them answer"


def _overlap(answer: dict[str, Any]) -> str:
    measured = ", as measured (auto)" if answer.get("overlap_key") == "auto" else ""
    return f"{answer.get('overlap')}{measured}"


def peers(site: SiteOption = None, home: Home = None, as_json: Json = False) -> None:
    """The members of the run."""
    with connect(home, site) as client:
        answer = client.call("peers", timeout_s=CALL_TIMEOUT_S)
    if any("stages" in peer for peer in answer.get("peers", [])):
        Output(as_json=as_json).result(answer, peers_table(answer["peers"]))
        return
    dealt = any(peer.get("shards") for peer in answer.get("peers", []))
    rows = [
        (
            str(peer.get("id"))[:8],
            f"{peer.get('name')}{' (this site)' if peer.get('is_self') else ''}",
            "leader" if peer.get("is_leader") else "steward" if peer.get("votes") else "member",
            "trains" if peer.get("trains") else "holds" if peer.get("holds_state") else "serves",
            "connected" if peer.get("connected") else "away",
            "-" if peer.get("round") is None else peer.get("round"),
            *([_shards(peer)] if dealt else []),
            reached(peer),
        )
        for peer in answer.get("peers", [])
    ]
    data = ["shards"] if dealt else []
    header = ("id", "name", "role", "does", "link", "round", *data, "addresses")
    Output(as_json=as_json).result(answer, table(header, rows))


def _shards(peer: dict[str, Any]) -> str:
    held = peer.get("shards") or []
    return f"{len(held)} ({peer.get('samples_left')} samples left)" if held else "-"


def rounds(
    last: Last = 20, site: SiteOption = None, home: Home = None, as_json: Json = False
) -> None:
    """The newest rounds, or steps of a pipeline, and their outcomes."""
    with connect(home, site) as client:
        answer = client.call("rounds", {"last": last}, timeout_s=CALL_TIMEOUT_S)
    if any(one.get("channel") == STEPS for one in answer.get("rounds", [])):
        steps = [one for one in answer["rounds"] if one.get("channel") == STEPS]
        Output(as_json=as_json).result(answer, steps_table(steps))
        return
    rows = [
        (
            f"{one.get('channel')}#{one.get('round')}.{one.get('attempt')}",
            one.get("outcome"),
            len(one.get("contributors") or []),
            _seconds(one.get("opened_wall_s"), one.get("decided_wall_s")),
            human_bytes(one["bytes"]) if one.get("bytes") else "-",
            str(one.get("root") or "")[:8],
            one.get("reason") or "",
        )
        for one in answer.get("rounds", [])
    ]
    header = ("round", "outcome", "contributors", "took", "bytes", "root", "reason")
    Output(as_json=as_json).result(answer, table(header, rows))


def _seconds(opened: float | None, decided: float | None) -> str:
    return "" if opened is None or decided is None else f"{decided - opened:.2f} s"


def events(
    last: Last = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they come.")] = False,
    code: Annotated[str | None, typer.Option("--code", help="Such as R3, or N610.")] = None,
    since_seq: Annotated[int, typer.Option("--since-seq", min=0)] = 0,
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """The site's events, the newest last. With --follow and --json: one object per line."""
    output = Output(as_json=as_json)
    pushed: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def show(records: list[dict[str, Any]]) -> None:
        for record in records:
            output.result(record, [dated(record)])

    with connect(home, site) as client:
        if follow:
            client.on_close(lambda: pushed.put(None))
            client.subscribe(
                lambda push: pushed.put(push["record"]) if push["event"] == "event" else None
            )
        arguments = {"since_seq": since_seq, "last": last, "follow": follow}
        answer = client.call("events", arguments, timeout_s=CALL_TIMEOUT_S)
        found = [record for record in answer.get("events", []) if _has_code(record, code)]
        if not follow:
            output.result({"events": found}, [dated(record) for record in found])
            return
        show(found)
        newest = max((record["seq"] for record in found), default=since_seq)
        while (record := pushed.get()) is not None:
            if record["seq"] > newest and _has_code(record, code):  # not in the answer already
                show([record])


def dated(record: dict[str, Any]) -> str:
    """A line with this machine's local time in front."""
    wall_s = record.get("wall_s")
    if wall_s is None:
        return event_line(record)
    return f"{datetime.fromtimestamp(wall_s, UTC).astimezone():%H:%M:%S}  {event_line(record)}"


def _has_code(record: dict[str, Any], code: str | None) -> bool:
    return code is None or str(record.get("code", "")).startswith(code)


def leave(
    now: Annotated[bool, typer.Option("--now", help="Do not wait for the round to end.")] = False,
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Let the local peer leave its run, after the round or now."""
    with connect(home, site) as client:
        client.call("leave", {"now": now}, timeout_s=CALL_TIMEOUT_S)
    when = "now" if now else "after this round"
    Output(as_json=as_json).result({"ok": True, "now": now}, [f"leaving {when}"])
