"""Steps of a pipeline as this site saw them: when they were closed and decided, and what they used.

What happened before this process began is taken from the log's history, without times.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

from swarmtrain_peer import host
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.pipeline.book import stage_channel

Document = dict[str, Any]

STEPS = "steps"
"""Stands for a channel where all stages of a pipeline take a step together."""
STEPS_LISTED = 64
STEPS_MEASURED = 20


class StepBook:
    """One per peer process of a pipeline run in ``sync`` mode."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[int, int, int], Document] = OrderedDict()
        self._decided_wall_s: float | None = None

    def watch(self, event: object) -> None:
        """An event of the node. What comes closed and decided at once is history: nobody here
        knows when it was."""
        if not isinstance(event, LedgerChanged):
            return
        bodies = [body for _, body, accepted in event.entries if accepted]
        fresh = sum(isinstance(body, e.StepClosed) for body in bodies) <= 1
        for body in bodies:
            if isinstance(body, e.StepClosed):
                self._closed(body, host.wall_s() if fresh else None)
            elif isinstance(body, e.StepOutcome):
                self._over(body, host.wall_s() if fresh else None)

    def _closed(self, body: e.StepClosed, now: float | None) -> None:
        pairs: dict[bytes, float] = {}
        for item in body.stages:
            for one in item.contributors:
                pairs[one.member] = pairs.get(one.member, 0.0) + one.samples
        share = 1.0 / body.micro_batches
        self._seen[body.generation, body.step, body.attempt] = {
            "channel": STEPS,
            "round": body.step,
            "attempt": body.attempt,
            "outcome": "open",
            "reason": "",
            "micro_batches": body.micro_batches,
            "loss": body.loss if body.loss >= 0 else None,
            "contributors": [
                {"id": member.hex(), "samples": pairs[member], "coefficient": share}
                for member in sorted(pairs)
            ],
            "root": None,
            "stages": [
                {"stage": item.stage, "contributors": len(item.contributors), "root": None}
                for item in body.stages
            ],
            "began_wall_s": self._decided_wall_s,
            "opened_wall_s": now,
            "decided_wall_s": None,
        }
        while len(self._seen) > 2 * STEPS_LISTED:
            self._seen.popitem(last=False)

    def _over(self, body: e.StepOutcome, now: float | None) -> None:
        self._decided_wall_s = now
        found = self._seen.get((body.generation, body.step, body.attempt))
        if found is None:
            return
        found["decided_wall_s"] = now
        found["outcome"] = "committed" if body.stages else "aborted"
        found["reason"] = body.reason
        for one, item in zip(found["stages"], body.stages, strict=False):
            one["root"] = item.root.hex()

    def documents(self, ledger: Ledger) -> list[Document]:
        """The newest steps and attempts, oldest first; see ``docs/json.md``."""
        known = {(step, attempt) for _, step, attempt in self._seen}
        found = [
            dict(one) for one in _history(ledger) if (one["round"], one["attempt"]) not in known
        ]
        found += [dict(one) for one in self._seen.values()]
        found.sort(key=lambda one: (one["round"], one["attempt"]))
        return found[-STEPS_LISTED:]

    def times(self, step: int, attempt: int) -> tuple[float | None, float] | None:
        """Wall times at which an attempt began (the decision before it) and was closed; None: it
        was not seen."""
        for (_, number, which), one in reversed(self._seen.items()):
            if (number, which) == (step, attempt) and one["opened_wall_s"] is not None:
                return one["began_wall_s"], one["opened_wall_s"]
        return None

    def contributors(self, since_wall_s: float) -> list[str]:
        """Ids (hex) of members whose work is in a step that was committed since then."""
        found: dict[str, None] = {}
        for one in self._seen.values():
            decided_s = one["decided_wall_s"]
            if one["outcome"] == "committed" and decided_s is not None and decided_s > since_wall_s:
                found.update(dict.fromkeys(c["id"] for c in one["contributors"]))
        return list(found)

    def pace(self) -> tuple[float, float] | None:
        """(seconds per step, micro-batches per second) over the newest commits, None: too few."""
        done = [
            (one["decided_wall_s"], one["micro_batches"])
            for one in self._seen.values()
            if one["outcome"] == "committed" and one["decided_wall_s"] is not None
        ][-STEPS_MEASURED:]
        seconds = [b[0] - a[0] for a, b in itertools.pairwise(done)]
        if not seconds or sum(seconds) <= 0.0:
            return None
        return sum(seconds) / len(seconds), sum(count for _, count in done[1:]) / sum(seconds)


def _history(ledger: Ledger) -> list[Document]:
    """Committed steps that the ledger remembers, without times."""
    found: dict[int, Document] = {}
    for stage in range(len(ledger.pipeline.stages)):
        channel = ledger.channels.get(stage_channel(stage))
        for outcome in channel.history if channel is not None else []:
            one = found.setdefault(
                outcome.round,
                {
                    "channel": STEPS,
                    "round": outcome.round,
                    "attempt": outcome.attempt,
                    "outcome": "committed",
                    "reason": "",
                    "micro_batches": None,
                    "loss": None,
                    "contributors": [],
                    "root": None,
                    "stages": [],
                    "began_wall_s": None,
                    "opened_wall_s": None,
                    "decided_wall_s": None,
                },
            )
            members = outcome.contributors
            one["stages"].append(
                {"stage": stage, "contributors": len(members), "root": outcome.root.hex()}
            )
            known = {item["id"]: item for item in one["contributors"]}
            for member, samples, coefficient in members:
                item = known.get(member.hex())
                if item is not None:
                    item["samples"] += samples
                else:
                    item = {"id": member.hex(), "samples": samples, "coefficient": coefficient}
                    known[member.hex()] = item
            one["contributors"] = [known[key] for key in sorted(known)]
    return list(found.values())
