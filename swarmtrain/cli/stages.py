"""What ``status``, ``peers`` and ``rounds`` say of a pipeline, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from swarmtrain.cli.output import human_bytes, table
from swarmtrain.cli.paths import reached

Document = Mapping[str, Any]

STEPS = "steps"
"""Channel of documents about steps of a whole pipeline."""


def stage_health(pipeline: Document) -> tuple[str, str]:
    """("stalled", "degraded" or "", and why) of the stages as one member sees them."""
    states = [one["state"] for one in pipeline.get("coverage") or []]
    why = "; ".join(pipeline.get("trouble") or [])
    if "lost" in states or "unserved" in states:
        return "stalled", why
    return ("degraded", why) if why else ("", "")


def status_fields(pipeline: Document) -> dict[str, str]:
    """Lines of ``status`` about all stages together."""
    pace, rate = pipeline.get("step_s"), pipeline.get("micro_batches_per_s")
    together = pipeline["mode"] == "sync"
    steps = f"{pipeline['steps_committed']} committed, {pipeline['steps_aborted']} aborted"
    if pace is not None:
        steps += f", one every {seconds(pace)}"
    if rate is not None:
        steps += f", {rate:.1f} micro-batches/s"
    mode = "one step together" if together else "steps of their own, then rounds (DiLoCo)"
    now = f", step {pipeline['step']}" if together else ""
    if pipeline["attempt"]:
        now += f", attempt {pipeline['attempt']}"
    names = {
        member["id"]: member["name"] for one in pipeline["coverage"] for member in one["members"]
    }
    drivers = [names.get(one) or str(one)[:8] for one in pipeline["drivers"]]
    return {
        "stages": f"{pipeline['stages']} and the ends, {mode}, "
        f"{pipeline['boundary_codec']} between them",
        "steps" if together else "rounds": steps if together else f"of all stages: {steps}",
        "now": f"{pipeline['phase']}{now}",
        "drivers": ", ".join(drivers) or "none",
    }


def coverage_table(pipeline: Document) -> list[str]:
    """Stages by who serves them and how busy they are."""
    rows = []
    for one in pipeline["coverage"]:
        members = [
            f"{m['name'] or m['id'][:8]}{'' if m['present'] else ' (away)'}" for m in one["members"]
        ]
        rows.append(
            (
                one["name"],
                one["state"],
                f"{one['present']} of {one['minimum']}+",
                "-" if one["busy"] is None else f"{100 * one['busy']:.0f} %",
                f"{one['micro_batches_per_s']:.1f}",
                "-" if one["hop_s"] is None else seconds(one["hop_s"]["p50"]),
                one["version"],
                one["generation"],
                str(one["state_hash"] or "-")[:8],
                ", ".join(members) or "nobody",
            )
        )
    header = (
        "stage",
        "state",
        "serving",
        "busy",
        "mb/s",
        "hop",
        "version",
        "generation",
        "hash",
        "members",
    )
    return table(header, rows)


def recovery_lines(pipeline: Document) -> list[str]:
    """How lost stages came back."""
    lines = []
    for one in pipeline.get("recoveries") or []:
        if one["choice"] is None:
            continue
        others = [f"{c['name']} {c['loss']:.3f}" for c in one["candidates"]]
        took = span(one["lost_wall_s"], one["back_wall_s"])
        lines.append(
            f"stage {one['stage']} was rebuilt before step {one['step']} in {took} from "
            f"{one['choice']} ({', '.join(others)})"
        )
    return lines


def peer_does(peer: Document) -> str:
    """What a member does in a pipeline, such as ``ends, 2``."""
    stages = [one["stage"] for one in peer["stages"]]
    if stages:
        return ", ".join("ends" if stage == 0 else str(stage) for stage in stages)
    return "waits" if peer.get("trains") else "holds" if peer.get("holds_state") else "serves"


def peers_table(peers: Sequence[Document]) -> list[str]:
    """Members with their stages."""
    rows = [
        (
            str(peer.get("id"))[:8],
            f"{peer.get('name')}{' (this site)' if peer.get('is_self') else ''}",
            "leader" if peer.get("is_leader") else "steward" if peer.get("votes") else "member",
            peer_does(peer),
            "-" if peer["busy"] is None else f"{100 * peer['busy']:.0f} %",
            "-" if peer["queued"] is None else peer["queued"],
            peer["driving"] if peer["drives"] else "-",
            "connected" if peer.get("connected") else "away",
            "-" if peer.get("round") is None else peer.get("round"),
            reached(peer),
        )
        for peer in peers
    ]
    header = (
        "id",
        "name",
        "role",
        "stages",
        "busy",
        "queued",
        "drives",
        "link",
        "at",
        "addresses",
    )
    return table(header, rows)


def steps_table(steps: Sequence[Document]) -> list[str]:
    """Steps and their outcomes. ``took`` is a whole step, ``exchange`` what came after closing."""
    rows = [
        (
            f"{one['round']}" + (f".{one['attempt']}" if one["attempt"] else ""),
            one["outcome"],
            "-" if one.get("micro_batches") is None else one["micro_batches"],
            len(one.get("contributors") or []),
            "-" if one.get("loss") is None else f"{one['loss']:.3f}",
            span(one.get("began_wall_s"), one.get("decided_wall_s")),
            span(one.get("opened_wall_s"), one.get("decided_wall_s")),
            human_bytes(one["bytes"]) if one.get("bytes") else "-",
            one.get("reason") or "",
        )
        for one in steps
    ]
    header = (
        "step",
        "outcome",
        "micro-batches",
        "workers",
        "loss",
        "took",
        "exchange",
        "bytes",
        "reason",
    )
    return table(header, rows)


def seconds(value: float) -> str:
    """``12 ms`` or ``1.25 s``."""
    return f"{1000 * value:.0f} ms" if value < 1.0 else f"{value:.2f} s"


def span(begin: float | None, end: float | None) -> str:
    """Between two moments, of which either may not be known."""
    return "-" if begin is None or end is None else seconds(max(0.0, end - begin))
