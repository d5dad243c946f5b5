"""A pipeline run that never was: six members on three stages, one of them endangered if wanted."""

from __future__ import annotations

import random
from typing import Any

from tests.swarmtrain.fake_run import FakeRun

Document = dict[str, Any]
NAMES = ("anna-laptop", "bob-3090", "cloud-spot-7", "dora-lab", "emil-a6000", "fritz-mini")
IDS = tuple(f"{number:02x}" * 32 for number in (0x1A, 0x3C, 0x5C, 0x9E, 0xB7, 0xD3))
SERVES = {0: (0, 2, 4), 1: (0, 3), 2: (1, 4), 3: (2, 5)}
"""Stage to the members that serve it, by their number."""
STEP_S = 3.0
MICRO_BATCHES = 16


class FakePipeline(FakeRun):
    """``rounds`` are steps. ``away``: a member without a link; ``lost``: a stage being rebuilt."""

    def __init__(
        self, rounds: int = 24, *, away: int | None = None, lost: int | None = None
    ) -> None:
        super().__init__(rounds)
        self.names = list(NAMES)
        self.ids = IDS
        self.away = away
        self.lost = lost

    def opened_s(self, number: int) -> float:
        return self.start_s + STEP_S * number

    def busy(self, member: int, stage: int) -> float:
        base = 0.12 if stage == 0 else 0.62 - 0.07 * stage
        return round(base + 0.05 * ((member * 7 + stage) % 4), 4)

    def coverage(self) -> list[Document]:
        rows = []
        for stage, serving in SERVES.items():
            members = [
                {
                    "id": IDS[m],
                    "name": self.names[m],
                    "present": m != self.away,
                    "stage": stage,
                    "ready": m != self.away and stage != self.lost,
                    "version": self.rounds,
                    "busy": 0.0 if m == self.away else self.busy(m, stage),
                    "micro_batches_per_s": 0.0 if m == self.away else 2.6,
                    "seconds_per_sample": 0.04,
                }
                for m in serving
            ]
            present = sum(one["present"] for one in members)
            busy = [one["busy"] for one in members if one["present"]]
            rows.append(
                {
                    "stage": stage,
                    "name": f"stage {stage}" if stage else "ends",
                    "state": "lost"
                    if stage == self.lost
                    else "ok"
                    if present > 1
                    else "endangered",
                    "minimum": 2,
                    "wanted": 2 if stage else 3,
                    "assigned": len(members),
                    "present": present,
                    "ready": sum(one["ready"] for one in members),
                    "generation": 1 if stage == 2 else 0,
                    "version": self.rounds,
                    "values": 49_280,
                    "host": IDS[3] if stage == self.lost else None,
                    "state_hash": f"{stage + 10:02x}" * 32,
                    "busy": round(sum(busy) / len(busy), 4),
                    "micro_batches_per_s": 2.6 * present,
                    "hop_s": {"p50": 0.021 + 0.004 * stage, "p95": 0.09},
                    "members": members,
                }
            )
        return rows

    def trouble(self) -> list[str]:
        found = []
        for one in self.coverage():
            if one["state"] == "lost":
                found.append(
                    f"{one['name']} is lost: dora-lab rebuilds it, and nothing commits until it is "
                    "back"
                )
            elif one["state"] == "endangered":
                found.append(f"{one['name']} is endangered: 1 member in reach, at least 2 wanted")
        return found

    def status(self) -> Document:
        channels = {
            f"train/{stage}/0": {
                "round": self.rounds,
                "attempt": 0,
                "phase": "waiting",
                "state_hash": f"{stage + 10:02x}" * 32,
            }
            for stage in SERVES
        }
        return super().status() | {
            "members": 6,
            "connected": 5 if self.away is None else 4,
            "channels": channels,
            "pipeline": {
                "stages": 3,
                "mode": "sync",
                "phase": "computing" if self.lost is None else "recovering",
                "step": self.rounds,
                "attempt": 0,
                "era": 0,
                "steps_committed": self.rounds,
                "steps_aborted": 1,
                "last_abort": "a contributor is lost",
                "loss": self.loss(self.rounds),
                "micro_batches": MICRO_BATCHES,
                "step_s": STEP_S,
                "micro_batches_per_s": MICRO_BATCHES / STEP_S,
                "drivers": [IDS[0], IDS[2]],
                "hops_refused": 12,
                "boundary_codec": "int8",
                "coverage": self.coverage(),
                "trouble": self.trouble(),
                "recoveries": [
                    {
                        "stage": 2,
                        "step": 9,
                        "host": IDS[3],
                        "lost_wall_s": self.opened_s(9),
                        "back_wall_s": self.opened_s(9) + 4.5,
                        "choice": "average",
                        "loss": 3.204,
                        "candidates": [
                            {"name": "average", "loss": 3.204},
                            {"name": "copy-left", "loss": 3.391},
                            {"name": "near-identity-0.1", "loss": 3.266},
                        ],
                    }
                ],
            },
        }

    def peers(self) -> Document:
        rows = []
        for index, (peer, name) in enumerate(zip(IDS, self.names, strict=True)):
            stages = [
                {
                    "stage": stage,
                    "ready": True,
                    "version": self.rounds,
                    "busy": self.busy(index, stage),
                    "micro_batches_per_s": 2.6,
                    "seconds_per_sample": 0.04,
                }
                for stage, serving in SERVES.items()
                if index in serving
            ]
            rows.append(
                {
                    "id": peer,
                    "name": name,
                    "addresses": [f"203.0.113.{10 + index}:7400"],
                    "trains": True,
                    "votes": index < 3,
                    "holds_state": True,
                    "reachable": index != 3,
                    "connected": index != self.away,
                    "is_leader": index == 1,
                    "round": self.rounds,
                    "last_report_age_s": 0.4 + 0.3 * index,
                    "metrics": {
                        "compute_utilization": 0.5,
                        "bytes_up": 75_000,
                        "bytes_down": 7_000,
                    },
                    "stages": stages,
                    "busy": round(sum(one["busy"] for one in stages), 4),
                    "queued": index,
                    "drives": index in (0, 2),
                    "driving": 5 if index in (0, 2) else 0,
                    "device": "cpu",
                }
            )
        return {"peers": rows}

    def all_rounds(self) -> Document:
        rows: list[Document] = []
        for number in range(self.rounds + 1):
            done, closed_s = number < self.rounds, self.opened_s(number) + 2.2
            rows.append(
                {
                    "channel": "steps",
                    "round": number,
                    "attempt": 0,
                    "outcome": "committed" if done else "open",
                    "reason": "",
                    "micro_batches": MICRO_BATCHES,
                    "loss": self.loss(number),
                    "contributors": [
                        {"id": i, "samples": 13.0, "coefficient": 1 / MICRO_BATCHES} for i in IDS
                    ],
                    "root": None,
                    "stages": [{"stage": s, "contributors": 2, "root": None} for s in SERVES],
                    "began_wall_s": self.opened_s(number),
                    "opened_wall_s": closed_s,
                    "decided_wall_s": closed_s + 0.6 if done else None,
                    "bytes": 900_000,
                }
            )
        return {"rounds": rows}

    def metrics(self) -> Document:
        rows = []
        draws = random.Random(7)
        for number in range(max(0, self.rounds - 30), self.rounds):
            for index, peer in enumerate(IDS):
                spans, at = [], -2.1
                while at < -0.1:
                    end = min(-0.02, at + draws.uniform(0.05, 0.3))
                    spans.append([round(at, 3), round(end, 3)])
                    at = end + draws.uniform(0.02, 0.25 + 0.05 * index)
                rows.append(
                    {
                        "id": peer,
                        "channel": "steps",
                        "outcome": "committed",
                        "round": number,
                        "attempt": 0,
                        "compute_s": sum(b - a for a, b in spans),
                        "compute_spans_s": spans,
                        "send_s": 0.15,
                        "t_send_offset_s": 0.05,
                        "send_spans_s": [[0.05, 0.2]],
                        "receive_s": 0.2,
                        "t_receive_offset_s": 0.1,
                        "receive_spans_s": [[0.1, 0.3]],
                        "reduce_s": 0.08,
                        "t_reduce_offset_s": 0.3,
                        "apply_s": 0.1,
                        "t_apply_offset_s": 0.62,
                        "bytes_up": 75_000,
                        "bytes_down": 75_000,
                    }
                )
        return {"members": rows}
