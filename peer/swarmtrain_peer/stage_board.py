"""How a pipeline stands, for ``status``, ``peers`` and the dashboard: coverage, occupancy, pace.

Coverage is what the log and this site's links say; occupancy is what members tell each other
(``stage_work.StagesBody``), never logged. Everything here runs on the loop's thread.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import msgspec

from swarmtrain_peer import host
from swarmtrain_peer.progress import is_behind
from swarmtrain_peer.recoveries import Recoveries
from swarmtrain_peer.roundclock import SPANS_TOLD, merge
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_peer.stage_work import StageRow, StagesBody, WorkLog
from swarmtrain_peer.step_book import StepBook
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.hops import ENDS, stage_of

Document = dict[str, Any]

TELL_S = 1.0
MEMBERS_PER_S = 16
"""A member's figures go to all others: in larger runs they go less often."""
HEARD_S = 10.0
"""Figures that are older say nothing any more."""
DELAYS_KEPT = 512
IDLE = StageRow(0)


class StageBoard:
    """One per peer process of a pipeline run."""

    def __init__(self, runtime: PeerRuntime) -> None:
        self._runtime = runtime
        self._heard: dict[bytes, tuple[float, StagesBody]] = {}
        self._told_s = -math.inf
        self._delays: deque[tuple[int, float]] = deque(maxlen=DELAYS_KEPT)
        self._refused = 0
        self.work = WorkLog(host.mono_s())
        self.steps = StepBook()
        self.recoveries = Recoveries()
        runtime.listeners.append(self._on_core_event)

    # -- what is heard -------------------------------------------------------------------------

    def heard(self, member: bytes, body: StagesBody) -> None:
        """A member told of its work."""
        ledger = self._runtime.node.ledger
        if member in ledger.members:
            self._heard[member] = host.mono_s(), body
        for gone in [k for k in self._heard if k not in ledger.members]:
            del self._heard[gone]

    def _on_core_event(self, event: object) -> None:
        self.steps.watch(event)
        self.recoveries.watch(event)
        if isinstance(event, px.HopDone) and event.outcome == "ok":
            stage = stage_of(event.hop, self._runtime.manifest.keys.stages)
            self._delays.append((stage, event.seconds))
        elif isinstance(event, px.HopDone):
            self._refused += 1

    # -- what is told --------------------------------------------------------------------------

    def tell(self, device: str) -> None:
        """Tell the others of this site's work if it is time to; called every moment or so."""
        now, members = host.mono_s(), len(self._runtime.node.ledger.members)
        if now < self._told_s + max(TELL_S, members / MEMBERS_PER_S):
            return
        node = self._runtime.node
        if node.me not in node.ledger.members or not node.pipeline.worker.values_max:
            return
        self._told_s = now
        body = self._own(now, device)
        self.heard(node.me, body)
        self._runtime.send_metrics(msgspec.msgpack.encode(body))

    def _own(self, now: float, device: str) -> StagesBody:
        pipeline, shares = self._runtime.node.pipeline, self.work.shares(now)
        report = pipeline.worker.report()
        rows = [
            StageRow(
                item.stage,
                item.version,
                not is_behind(self._runtime.node, stage_channel(item.stage)),
                round(busy, 4),
                round(rate, 4),
                round(item.seconds_per_sample, 6),
            )
            for item in report.stages
            for busy, rate in [shares.get(item.stage, (0.0, 0.0))]
        ]
        driver = pipeline.driver
        driving = len(driver.batches)
        return StagesBody(
            report.generation, rows, report.queued, driver.active, driving, device[:32]
        )

    def step_figures(self, step: int, attempt: int) -> Document:
        """When this site computed for an attempt that was decided just now."""
        times = self.steps.times(step, attempt)
        if times is None:
            return {}
        now, offset_s = host.mono_s(), host.wall_s() - host.mono_s()
        began_wall_s, closed_wall_s = times
        begin_s = now - 60.0 if began_wall_s is None else began_wall_s - offset_s
        zero = closed_wall_s - offset_s
        spans = self.work.spans(begin_s, now)
        return {
            "compute_s": round(sum(end - begin for begin, end in spans), 6),
            "compute_spans_s": [
                [round(begin - zero, 4), round(end - zero, 4)]
                for begin, end in merge(spans, SPANS_TOLD)
            ],
        }

    # -- what is shown -------------------------------------------------------------------------

    def _fresh(self, member: bytes) -> StagesBody | None:
        found = self._heard.get(member)
        return None if found is None or host.mono_s() > found[0] + HEARD_S else found[1]

    def of_member(self, member: bytes) -> Document:
        """What ``peers`` shows of a member."""
        ledger, body = self._runtime.node.ledger, self._fresh(member)
        rows = {row.stage: row for row in body.rows} if body is not None else {}
        busy = sum(row.busy for row in rows.values())
        return {
            "stages": [
                {
                    "stage": stage,
                    "ready": row.ready,
                    "version": row.version,
                    "busy": row.busy,
                    "micro_batches_per_s": row.rate,
                    "seconds_per_sample": row.seconds_per_sample,
                }
                for stage in ledger.pipeline.assigned.get(member, ())
                for row in [rows.get(stage, IDLE)]
            ],
            "busy": round(min(1.0, busy), 4) if body is not None else None,
            "queued": body.queued if body is not None else None,
            "drives": body.drives if body is not None else False,
            "driving": body.driving if body is not None else 0,
            "device": body.device if body is not None else "",
        }

    def document(self) -> Document:
        """The section ``pipeline`` of ``status``; ``docs/json.md`` lists its keys."""
        node, keys = self._runtime.node, self._runtime.manifest.keys
        ledger, state = node.ledger, node.ledger.pipeline
        pace = self.steps.pace()
        defined = stage_channel(0) in ledger.channels
        coverage = [self._stage(stage) for stage in range(len(state.stages))] if defined else []
        return {
            "stages": state.blocks,
            "mode": state.mode,
            "phase": self._phase(ledger),
            "step": state.step,
            "attempt": state.attempt,
            "era": state.era,
            "steps_committed": ledger.rounds_committed,
            "steps_aborted": state.aborted,
            "last_abort": state.last_abort or None,
            "loss": state.loss if state.loss >= 0 else None,
            "micro_batches": keys.micro_batches,
            "step_s": round(pace[0], 4) if pace is not None else None,
            "micro_batches_per_s": self._rate(coverage),
            "drivers": [
                member.hex()
                for member in sorted(ledger.members)
                if (body := self._fresh(member)) is not None and body.drives
            ],
            "hops_refused": self._refused,
            "boundary_codec": keys.boundary_codec,
            "coverage": coverage,
            "trouble": self._trouble(coverage),
            "recoveries": self.recoveries.documents(),
        }

    def _rate(self, coverage: list[Document]) -> float | None:
        """By the newest steps or, where stages step by themselves, of the slowest stage."""
        pace = self.steps.pace()
        if pace is not None:
            return round(pace[1], 4)
        if self._runtime.node.ledger.pipeline.mode == "sync" or not coverage:
            return None
        rate: float = min(one["micro_batches_per_s"] for one in coverage)
        return rate

    def _gathering(self) -> bool:
        """Stages are given out once there are enough workers; nobody has had one yet."""
        state = self._runtime.node.ledger.pipeline
        return not (state.assigned or state.step or state.era)

    def _trouble(self, coverage: list[Document]) -> list[str]:
        if not self._gathering() or self._runtime.node.ledger.ended:
            return [text for one in coverage if (text := self._sentence(one))]
        wanted, ready = self._runtime.manifest.keys.start_peers, len(self._heard)
        return [f"waiting for workers: {ready} of {wanted} so far, then stages are given out"]

    def _phase(self, ledger: Ledger) -> str:
        state = ledger.pipeline
        if ledger.ended:
            return "ended"
        if state.lost():
            return "recovering"
        if ledger.paused:
            return "paused"
        if stage_channel(0) not in ledger.channels:
            return "no model yet"
        if self._gathering():
            return "gathering"
        return "exchange" if state.closed is not None else "computing"

    def _stage(self, stage: int) -> Document:
        node, keys = self._runtime.node, self._runtime.manifest.keys
        ledger = node.ledger
        item, channel = ledger.pipeline.stages[stage], ledger.channels[stage_channel(stage)]
        linked = dict.fromkeys(node.linked())
        # Who only looks on has few links: work that was committed just now speaks for its worker.
        pace = self.steps.pace()
        lately_s = HEARD_S if pace is None else max(HEARD_S, 2 * pace[0])
        seen = self.steps.contributors(host.wall_s() - lately_s)
        members = []
        for member in ledger.pipeline.serving(stage):
            rows: list[Document] = self.of_member(member)["stages"]
            row = next(row for row in rows if row["stage"] == stage)
            present = member == node.me or PeerId(member) in linked
            present = present or self._fresh(member) is not None or member.hex() in seen
            listed = ledger.members.get(member)
            name = listed.name if listed is not None else ""
            members.append({"id": member.hex(), "name": name, "present": present, **row})
        present_count = sum(one["present"] for one in members)
        busy = [one["busy"] for one in members if one["present"]]
        standing = "ok"
        if item.host:
            standing = "lost"
        elif self._gathering():
            standing = "waiting"
        elif not present_count:
            standing = "unserved"
        elif present_count < keys.replicas_min:
            standing = "endangered"
        track = node.catchup.tracks.get(channel.name)
        known = track is not None and track.state_hash is not None
        return {
            "stage": stage,
            "name": "ends" if stage == ENDS else f"stage {stage}",
            "state": standing,
            "minimum": keys.replicas_min,
            "wanted": keys.ends_replicas if stage == ENDS else keys.replicas_min,
            "assigned": len(members),
            "present": present_count,
            "ready": sum(one["ready"] and one["present"] for one in members),
            "generation": item.generation,
            "version": channel.round,
            "values": channel.values,
            "host": item.host.hex() if item.host else None,
            "state_hash": track.state_hash.hex() if known and track and track.state_hash else None,
            "busy": round(sum(busy) / len(busy), 4) if busy else None,
            "micro_batches_per_s": round(sum(m["micro_batches_per_s"] for m in members), 4),
            "hop_s": self._hop_s(stage),
            "members": members,
        }

    def _hop_s(self, stage: int) -> Document | None:
        """Median and 95th percentile of the time of a hop, as this site saw it when driving."""
        seconds = sorted(each for number, each in self._delays if number == stage)
        if not seconds:
            return None
        return {
            "p50": round(seconds[len(seconds) // 2], 6),
            "p95": round(seconds[min(len(seconds) - 1, len(seconds) * 95 // 100)], 6),
        }

    def _sentence(self, one: Document) -> str:
        """What is wrong with a stage, for people; empty if nothing is."""
        ledger = self._runtime.node.ledger
        name = "the ends (embedding and head)" if one["stage"] == ENDS else one["name"]
        verb = "are" if one["stage"] == ENDS else "is"
        if ledger.ended or one["state"] == "ok":
            return ""
        if one["state"] == "lost":
            member = ledger.members.get(bytes.fromhex(one["host"]))
            who = member.name if member is not None and member.name else one["host"][:8]
            return f"{name} {verb} lost: {who} rebuilds it, and nothing commits until it is back"
        if one["state"] == "unserved":
            return f"nobody in reach serves {name}: nothing commits until somebody does"
        few = f"{one['present']} member{'s' if one['present'] > 1 else ''}"
        return f"{name} {verb} endangered: {few} in reach, at least {one['minimum']} wanted"
