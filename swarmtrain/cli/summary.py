"""What came of a demo, computed from the event logs of its members and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from swarmtrain_peer.events import Record

STEPS = "steps"
"""Stands for a channel where all stages of a pipeline take a step together."""


@dataclass(slots=True)
class MemberLog:
    """One member's log, reduced to what the summary needs."""

    states: dict[str, dict[tuple[int, int], str]] = field(default_factory=dict)
    """Channel to (generation, round) to the state hash after that round."""
    bytes_sent: int = 0
    compute_utilization: float | None = None
    committed: set[tuple[int, str, int]] = field(default_factory=set)
    aborted: set[tuple[int, str, int, int]] = field(default_factory=set)
    losses: dict[tuple[int, int], float] = field(default_factory=dict)
    ended: str | None = None
    staged: bool = False
    """The run is a pipeline: its members hold the stages that they serve, and no others."""


def read_member(records: Iterable[Record]) -> MemberLog:
    """Fold one log. A life of the process that ended well says its total; of one that was killed
    the figures after its rounds are known."""
    log = MemberLog()
    life_bytes = 0
    for record in records:
        name, channel = record["name"], record.get("channel")
        generation, number = record.get("generation") or 0, record.get("round")
        if name == "peer_started":
            log.bytes_sent += life_bytes
            life_bytes = 0
        elif name == "round_figures":
            life_bytes += int(record["bytes_sent"])
        elif name == "peer_stopped":
            life_bytes = int(record["bytes_sent"])
        if record.get("compute_utilization") is not None:
            log.compute_utilization = float(record["compute_utilization"])
        log.staged = log.staged or name == "stage_assigned"
        if name == "run_ended":
            log.ended = str(record["reason"])
        if name == "step_committed":
            log.committed.add((generation, STEPS, record["step"]))
        elif name == "step_aborted":
            log.aborted.add((generation, STEPS, record["step"], record.get("attempt") or 0))
        if number is None:
            continue
        if name == "evaluated" and isinstance(record.get("loss"), (int, float)):
            log.losses[generation, number] = float(record["loss"])
        if channel is None:
            continue
        if name == "round_committed":
            log.committed.add((generation, channel, number))
        elif name == "round_aborted":
            log.aborted.add((generation, channel, number, record.get("attempt") or 0))
        elif name in ("state_applied", "state_synced") and record.get("state_hash"):
            log.states.setdefault(channel, {})[generation, number] = str(record["state_hash"])
    log.bytes_sent += life_bytes
    return log


def states_equal(members: Sequence[MemberLog]) -> bool:
    """True if all members ended in one state, and no two ever differed after one round.

    In a pipeline nobody holds all stages: there every stage ended after the last step (or in the
    same round, where each has rounds of its own), somewhere.
    """
    seen: dict[tuple[str, tuple[int, int]], str] = {}
    for member in members:
        for channel, states in member.states.items():
            for at, state_hash in states.items():
                if seen.setdefault((channel, at), state_hash) != state_hash:
                    return False
    steps = [at for member in members for at in member.committed if at[1] == STEPS]
    if steps:
        end = max(step for _, _, step in steps) + 1
        lasts = latest_states(members)
        return bool(lasts) and all(at[1] == end for at, _ in lasts.values())
    if any(member.staged for member in members):
        return len({at for at, _ in latest_states(members).values()}) == 1
    last = [final_states(member) for member in members]
    return bool(last) and bool(last[0]) and all(one == last[0] for one in last)


def latest_states(members: Sequence[MemberLog]) -> dict[str, tuple[tuple[int, int], str]]:
    """Channel to the last (generation, round) that any member reached, and its state hash."""
    found: dict[str, tuple[tuple[int, int], str]] = {}
    for member in members:
        for channel, last in final_states(member).items():
            found[channel] = max(last, found.get(channel, last))
    return dict(sorted(found.items()))


def final_states(member: MemberLog) -> dict[str, tuple[tuple[int, int], str]]:
    """Channel to its last (generation, round) and state hash."""
    return {
        channel: (max(states), states[max(states)])
        for channel, states in sorted(member.states.items())
    }


def combined_hash(members: Sequence[MemberLog]) -> str | None:
    """The state hash of the only channel, or BLAKE3 over those of all in order of their names."""
    hashes = [state_hash for _, state_hash in latest_states(members).values()]
    if len(hashes) <= 1:
        return hashes[0] if hashes else None
    return blake3(b"".join(bytes.fromhex(one) for one in hashes)).hexdigest()


def summarize(
    logs: Sequence[Iterable[Record]], *, finished: bool, dashboard_url: str | None
) -> dict[str, Any]:
    """The demo's summary. ``finished``: every process ended as it should.

    ``ok`` means: it finished, at least one round was committed, all states are equal and the loss
    is a number. Compute utilization is the mean over members that reported one.
    """
    members = [read_member(records) for records in logs]
    committed = set().union(*(member.committed for member in members))
    aborted = set().union(*(member.aborted for member in members))
    losses: dict[tuple[int, int], float] = {}
    for member in members:
        losses.update(member.losses)
    used = [m.compute_utilization for m in members if m.compute_utilization is not None]
    equal = states_equal(members)
    first = losses[min(losses)] if losses else None
    last = losses[max(losses)] if losses else None
    known = last is not None and math.isfinite(last)
    return {
        "ok": bool(finished and committed and equal and known),
        "peers": len(members),
        "rounds_committed": len(committed),
        "rounds_aborted": len(aborted),
        "loss_first": first,
        "loss_last": last,
        "state_hashes_equal": equal,
        "state_hash": combined_hash(members) if equal else None,
        "bytes_sent": sum(member.bytes_sent for member in members),
        "compute_utilization": round(sum(used) / len(used), 4) if used else None,
        "dashboard_url": dashboard_url,
    }


def summary_lines(summary: Mapping[str, Any], seconds: float, what: str = "rounds") -> list[str]:
    """The summary for people. ``what`` is committed: rounds, or steps of a pipeline."""

    def number(value: float | None, digits: int = 3) -> str:
        return "not measured" if value is None else f"{value:.{digits}f}"

    used = summary["compute_utilization"]
    share = "?" if used is None else f"{100 * used:.1f}"
    rounds = f"{summary['rounds_committed']} {what} committed, {summary['rounds_aborted']} aborted"
    state = str(summary["state_hash"])[:16]
    return [
        f"{summary['peers']} peers, {rounds}, {seconds:.0f} s",
        f"loss {number(summary['loss_first'])} -> {number(summary['loss_last'])} nats per byte",
        f"states equal: {state}" if summary["state_hashes_equal"] else "states NOT equal",
        f"{summary['bytes_sent'] / 1e6:.1f} MB sent, computing {share} % of the time",
    ]
