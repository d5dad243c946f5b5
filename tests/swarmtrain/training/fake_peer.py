"""Peer processes for tests, in this process: real shared memory, averaging in NumPy.

``FakeRun`` is what the swarm agrees on; each ``FakeSite`` stands for one peer process. A round is
decided as soon as every live site has handed over, or when the test calls ``decide``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from swarmtrain.training.port import Document
from swarmtrain_peer.control import ControlClosed
from swarmtrain_peer.trainer_port import TrainerPort
from swarmtrain_protocols.changes import InnerStep
from swarmtrain_protocols.errors import RunMismatch
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.schedule import OuterStep

RESOLVED = {"overlap": "off", "outer_lr": 1.0, "outer_momentum": 0.0}


def samples_of(args: Document) -> float:
    """All samples in a hand-over: those of its phase, and what was returned."""
    return float(args["samples"] + args["carried"])


class FakeControl:
    """One connection to a fake site."""

    def __init__(self, site: FakeSite) -> None:
        self.site = site
        self.closed = False
        self.callbacks: list[Callable[[Document], None]] = []
        self.closers: list[Callable[[], None]] = []
        site.controls.append(self)

    def call(self, name: str, args: Document, timeout_s: float) -> Document:
        if self.closed or not self.site.alive:
            raise ControlClosed("the peer process went away")
        return self.site.call(name, args)

    def subscribe(self, callback: Callable[[Document], None]) -> None:
        self.callbacks.append(callback)

    def on_close(self, callback: Callable[[], None]) -> None:
        self.closers.append(callback)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            for callback in self.closers:
                callback()


class FakeSite:
    """One peer process: a shared memory, its control connections, and what it was told."""

    def __init__(self, run: FakeRun, name: str, folder: Path) -> None:
        self.run = run
        self.name = name
        self.folder = folder
        folder.mkdir()
        self.alive = True
        self.controls: list[FakeControl] = []
        self.calls: list[tuple[str, Document]] = []
        self.port = TrainerPort(folder, shared_memory=None)
        self.next_position = 0
        self.outcomes: Document = {}
        self.withheld = False
        """Hand-overs are taken, but decided only by the test."""

    def connect(self) -> FakeControl:
        if not self.alive:
            raise ControlClosed("no peer process answers")
        return FakeControl(self)

    def push(self, **document: Any) -> None:
        for control in self.controls:
            for callback in control.callbacks:
                callback(document)

    def kill(self) -> None:
        """The peer process dies: its connections close, its memory is never written again."""
        with self.run.lock:
            self.alive = False
            self.run.waiting = {
                key: value for key, value in self.run.waiting.items() if key[0] != self.name
            }
        self.drop_connections()

    def restart(self) -> None:
        self.port = TrainerPort(self.folder, shared_memory=None)
        self.alive = True

    def drop_connections(self) -> None:
        for control in self.controls:
            control.close()
        self.controls.clear()

    def call(self, name: str, args: Document) -> Document:
        with self.run.lock:
            self.calls.append((name, args))
            return getattr(self, f"_{name}")(args)

    def _attach(self, args: Document) -> Document:
        run = self.run
        if run.schema_hash and args["schema_hash"] != run.schema_hash:
            raise RunMismatch("attach", "another model")
        layout = [(channel, n) for channel, n in args["layout"]]
        path = self.port.open(bytes.fromhex(args["schema_hash"]), layout)
        for channel in run.theta:
            run.publish(self, channel)
        keys = {name: getattr(run.keys, name) for name in RunKeys.__struct_fields__}
        keys["corpus_hash"] = run.keys.corpus_hash.hex()
        return {
            "shm": path,
            "run": {**keys, **run.resolved},
            "rounds": dict(run.rounds),
            "need_theta0": not run.theta,
            "site": self.name,
            "ordinal": list(run.sites).index(self.name),
            "next_position": self.next_position,
            "members": [site.name for site in run.sites.values()],
            "outcomes": self.outcomes,
        }

    def _define(self, args: Document) -> Document:
        run = self.run
        values = {c: self.port.handover(c, seq) for c, seq in args["seqs"].items()}
        assert all(value is not None for value in values.values())
        if not run.theta:
            run.author = self.name
            for channel, value in values.items():
                assert value is not None
                run.theta[channel] = value.copy()
                run.momentum[channel] = np.zeros_like(value)
                run.rounds[channel] = 0
        for channel in values:
            self.port.release(channel)
        for site in run.sites.values():
            if site.port.is_open:
                for channel in run.theta:
                    run.publish(site, channel)
        return {}

    def _handover(self, args: Document) -> Document:
        key = (self.name, args["channel"])
        known = self.run.waiting.get(key)
        if known is not None and known["seq"] == args["seq"]:
            return {}
        assert known is None, "one hand-over per channel is in flight"
        value = self.port.handover(args["channel"], args["seq"])
        assert value is not None, "the call comes after the write"
        self.run.waiting[key] = {**args, "value": value.copy()}
        self.port.release(args["channel"])
        if args.get("next_position") is not None:
            self.next_position = args["next_position"]
        self.run.decide_if_complete(args["channel"])
        return {}

    def _scalars(self, args: Document) -> Document:
        return {}

    def _evaluated(self, args: Document) -> Document:
        return {}

    def _detach(self, args: Document) -> Document:
        return {}


class FakeRun:
    """The agreed state: θ, momentum and round per channel, and what waits for a decision."""

    def __init__(self, folder: Path, sites: int = 1, resolved: Document | None = None, **keys: Any):
        self.keys = RunKeys(**keys)
        self.resolved = {**RESOLVED, **(resolved or {})}
        self.lock = threading.RLock()
        self.theta: dict[str, np.ndarray] = {}
        self.momentum: dict[str, np.ndarray] = {}
        self.rounds: dict[str, int] = {}
        self.waiting: dict[tuple[str, str], Document] = {}
        self.schema_hash = ""
        self.author = ""
        """The site whose θ⁰ the run began with."""
        self.fate: Callable[[str, int], str] = lambda site, round_: "committed"
        """Says what happens to a site's contribution in a round."""
        self.step_of: Callable[[int], OuterStep | None] = lambda round_: None
        self.inner_of: Callable[[int], InnerStep | None] = lambda round_: None
        """The outer step that is said with θ of a round; None: that of ``resolved``."""
        self.decisions: list[tuple[str, int, dict[str, float]]] = []
        self.sites = {
            f"site{i}": FakeSite(self, f"site{i}", folder / f"site{i}") for i in range(sites)
        }

    def decide_if_complete(self, channel: str) -> None:
        live = [site for site in self.sites.values() if site.alive and site.port.is_open]
        ready = all((site.name, channel) in self.waiting for site in live)
        if ready and not any(site.withheld for site in live):
            self.decide(channel)

    def decide(self, channel: str) -> None:
        """Decide the round with whoever has handed over; in member order, like the real thing."""
        with self.lock:
            round_ = self.rounds[channel]
            given = {name: it for (name, c), it in sorted(self.waiting.items()) if c == channel}
            fates = {name: self.fate(name, round_) for name in given}
            counted = [name for name in given if fates[name] == "committed"]
            aborted = "aborted" in fates.values() or not counted
            each = {name: samples_of(it) / (1 + it["age"]) for name, it in given.items()}
            total = sum(each[name] for name in counted)
            weights = {name: np.float32(each[name] / total) for name in counted}
            if not aborted:
                self._step(channel, [(weights[n], given[n]["value"]) for n in counted])
            for name, it in given.items():
                outcome = "aborted" if aborted else fates[name]
                weight = 0.0 if aborted else float(weights.get(name, 0.0))
                site = self.sites[name]
                site.outcomes = {
                    channel: {
                        "seq": it["seq"],
                        "outcome": outcome,
                        "coefficient": weight,
                        "round": self.rounds[channel],
                    }
                }
                if site.alive:
                    site.port.decided(channel, it["seq"], outcome, weight, self.rounds[channel])
                del self.waiting[(name, channel)]
            self.decisions.append((channel, round_, {n: float(w) for n, w in weights.items()}))

    def _step(self, channel: str, given: list[tuple[np.float32, np.ndarray]]) -> None:
        step = self.step_of(self.rounds[channel])
        lr, beta = (np.float32(self.resolved[k]) for k in ("outer_lr", "outer_momentum"))
        if step is not None:
            lr, beta = np.float32(step.lr), np.float32(step.momentum)
        mean = np.zeros_like(self.theta[channel])
        for weight, value in given:
            mean += weight * value
        momentum = self.momentum[channel] = beta * self.momentum[channel] + mean
        self.theta[channel] = self.theta[channel] - lr * (mean + beta * momentum)
        self.rounds[channel] += 1
        for site in self.sites.values():
            if site.alive and site.port.is_open:
                self.publish(site, channel)

    def publish(self, site: FakeSite, channel: str) -> None:
        round_ = self.rounds[channel]
        told = self.step_of(round_), self.inner_of(round_)
        site.port.publish(channel, round_, self.theta[channel], *told)
