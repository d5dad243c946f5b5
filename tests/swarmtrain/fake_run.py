"""A run that never was: what a peer process would answer, with numbers that look like training."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from swarmtrain_peer.control import ControlClosed

Document = dict[str, Any]
NAMES = ("anna-laptop", "bob-3090", "cloud-spot-7", "dora-lab")
IDS = tuple(f"{number:02x}" * 32 for number in (0x1A, 0x5C, 0x9E, 0xD3))
START_S = 1_790_000_000.0
ROUND_S = 6.0


class FakeRun:
    """Answers by call name. ``rounds`` is how far it has come."""

    def __init__(self, rounds: int = 24, start_s: float = START_S) -> None:
        self.rounds = rounds
        self.start_s = start_s
        self.ended: str | None = None
        self.names = list(NAMES)
        self.ids = IDS
        self.changes: list[Document] = []

    def opened_s(self, number: int) -> float:
        return self.start_s + ROUND_S * number

    def loss(self, number: int) -> float:
        return 1.9 + 3.6 * math.exp(-number / 9) + 0.03 * math.sin(number * 1.7)

    def status(self) -> Document:
        return {
            "run": "c0ffee11" * 8,
            "name": "tiny-lm",
            "site": IDS[0],
            "site_name": self.names[0],
            "generation": 0,
            "term": 3,
            "leader": IDS[1],
            "is_leader": False,
            "stewards": list(IDS[:3]),
            "members": 4,
            "connected": 3,
            "channels": {
                "train/0/0": {
                    "round": self.rounds,
                    "attempt": 0,
                    "phase": "training",
                    "state_hash": "ab12cd34" * 8,
                }
            },
            "syncing": False,
            "loss": self.loss(self.rounds - 1),
            "rounds_committed": self.rounds,
            "rounds_aborted": 2,
            "bytes_sent": 41_250_000 + self.rounds * 1_500_000,
            "bytes_received": 39_870_000 + self.rounds * 1_480_000,
            "ended": self.ended,
            "paused": None,
            "overlap": "eager",
            "overlap_key": "auto",
            "outer_lr": 0.4,
            "outer_momentum": 0.9,
            "trainer": {
                "attached": True,
                "step": 20 * self.rounds,
                "samples": 80 * self.rounds,
                "compute_utilization": 0.981,
            },
            "listen": ["127.0.0.1:40417"],
            "reachability": {"state": "reachable", "agree": 2, "asked": 2, "seen": "203.0.113.10"},
            "relay": {"serves": True, "streams": 2, "relayed_bytes": 1 << 20},
            "changes": self.changes,
        }

    def peers(self) -> Document:
        rows = []
        for index, (peer, name) in enumerate(zip(IDS, self.names, strict=True)):
            rows.append(
                {
                    "id": peer,
                    "name": name,
                    "addresses": [f"203.0.113.{10 + index}:7400"],
                    "trains": True,
                    "votes": index < 3,
                    "holds_state": True,
                    "reachable": index != 3,
                    "reachability": "reachable" if index != 3 else "outgoing only",
                    "path": "direct" if index != 3 else "relayed",
                    "via": None if index != 3 else IDS[0],
                    "connected": True,
                    "is_leader": index == 1,
                    "round": self.rounds,
                    "last_report_age_s": 0.4 + 0.3 * index,
                    "metrics": {
                        "loss": self.loss(self.rounds) + 0.05 * index,
                        "compute_utilization": 0.99 - 0.02 * index,
                        "bytes_up": 1_480_000 + 7000 * index,
                        "bytes_down": 1_510_000 - 6000 * index,
                    },
                }
            )
        return {"peers": rows}

    def all_rounds(self) -> Document:
        rows: list[Document] = []
        for number in range(self.rounds + 1):
            aborted = number in (7, 15)
            key = {"channel": "train/0/0", "round": number}
            contributors = [{"id": i, "samples": 80.0, "coefficient": 0.25} for i in IDS]
            if aborted:
                rows.append(
                    {
                        **key,
                        "attempt": 0,
                        "outcome": "aborted",
                        "reason": "owner lost",
                        "contributors": contributors,
                        "root": None,
                        "opened_wall_s": self.opened_s(number) - 2.0,
                        "decided_wall_s": self.opened_s(number) - 0.5,
                        "bytes": 900_000,
                    }
                )
            done = number < self.rounds
            rows.append(
                {
                    **key,
                    "attempt": int(aborted),
                    "outcome": "committed" if done else "open",
                    "reason": None,
                    "contributors": contributors,
                    "root": f"{number:02x}" * 32 if done else None,
                    "opened_wall_s": self.opened_s(number),
                    "decided_wall_s": self.opened_s(number) + 2.4 if done else None,
                    "bytes": 6_100_000,
                }
            )
        return {"rounds": rows}

    def metrics(self) -> Document:
        rows = []
        draws = random.Random(7)
        for number in range(max(0, self.rounds - 30), self.rounds):
            for index, peer in enumerate(IDS):
                slow = 1.9 if index == 1 else 1.0
                offset = -draws.uniform(0.05, 0.9)
                send_s, receive_s = 0.7 * slow + draws.uniform(0, 0.2), 0.8 + draws.uniform(0, 0.2)
                rows.append(
                    {
                        "id": peer,
                        "channel": "train/0/0",
                        "round": number,
                        "compute_s": ROUND_S - 0.25 + draws.uniform(-0.2, 0.1),
                        "wait_s": 0.04 + 0.03 * draws.random(),
                        "encode_s": 0.12 * slow,
                        "send_s": send_s,
                        "t_send_offset_s": 0.02,
                        "send_spans_s": [[0.02, 0.02 + send_s]],
                        "receive_s": receive_s,
                        "t_receive_offset_s": 0.3,
                        "receive_spans_s": [[0.3, 0.7], [1.2, 0.8 + receive_s]],
                        "reduce_s": 0.2,
                        "t_reduce_offset_s": 1.0,
                        "apply_s": 0.15,
                        "t_apply_offset_s": 2.45,
                        "bytes_up": 1_480_000,
                        "bytes_down": 1_500_000,
                        "loss": self.loss(number),
                        "samples": 80,
                        "t_open_offset_s": offset,
                    }
                )
        return {"members": rows}

    def events(self) -> Document:
        records: list[Document] = []

        def add(
            name: str, code: str, wall_s: float, severity: str = "info", **fields: object
        ) -> None:
            number = fields.pop("round", None)
            records.append(
                {
                    "v": 1,
                    "seq": len(records) + 1,
                    "wall_s": wall_s,
                    "mono_s": wall_s - self.start_s,
                    "site": IDS[0][:16],
                    "name": name,
                    "severity": severity,
                    "code": code,
                    "generation": 0,
                    "channel": "train/0/0" if number is not None else None,
                    "round": number,
                    "attempt": 0 if number is not None else None,
                    **fields,
                }
            )

        for index, (peer, name) in enumerate(zip(self.ids, self.names, strict=True)):
            add("member_joined", "M200", self.start_s - 9 + index, peer=peer, peer_name=name)
        for number in range(self.rounds):
            if number in (7, 15):
                at_s = self.opened_s(number) - 0.5
                add("round_aborted", "R321", at_s, "warning", round=number, reason="owner lost")
                add("leader_changed", "M210", at_s + 0.2, leader=IDS[1], term=3)
            add("round_committed", "R320", self.opened_s(number) + 2.4, round=number)
            add(
                "evaluated", "T520", self.opened_s(number) + 3, round=number, loss=self.loss(number)
            )
        return {"events": records}


class FakeClient:
    """A control connection to a ``FakeRun``."""

    def __init__(self, run: FakeRun) -> None:
        self.run = run
        self.closed = False
        self.calls: list[str] = []
        self._callbacks: list[Callable[[Document], None]] = []

    def call(self, name: str, args: Document | None = None, timeout_s: float = 30.0) -> Document:
        if self.closed:
            raise ControlClosed("the peer process went away")
        self.calls.append(name)
        answers: dict[str, Callable[[], Document]] = {
            "ping": dict,
            "status": self.run.status,
            "peers": self.run.peers,
            "rounds": self.run.all_rounds,
            "metrics": self.run.metrics,
            "events": self.run.events,
        }
        return answers[name]()

    def subscribe(self, callback: Callable[[Document], None]) -> None:
        self._callbacks.append(callback)

    def push(self, record: Document) -> None:
        for callback in self._callbacks:
            callback({"event": "event", "record": record})

    def close(self) -> None:
        self.closed = True
