"""The chaos scenarios: how many peers, which trainers, which faults how often, which criteria.

``minutes`` is the length of the long form; any shorter one has the same faults at the same pace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos import schedule
from tests.chaos.schedule import Fault, Make

STAGES, MICRO_BATCHES = 3, 6
REAL_KEYS: Mapping[str, Any] = {
    "codec_scatter": "int8",
    "codec_gather": "int8",
    "overlap": "auto",
    "outer_lr": None,
    "outer_momentum": None,
    "inner_steps": 10,
    "inner_warmup_steps": 20,
    "grace_s": 0.0,
}


@dataclass(frozen=True)
class Scenario:
    """One row of the table. ``seeded``: the founder keeps the log and does nothing else."""

    name: str
    title: str
    peers: int
    make: Make | None
    period_s: float
    minutes: float
    criteria: tuple[str, ...]
    trainers: str = "synthetic"
    ground: str = "plain"
    phase_s: float = 0.7
    pause_s: float = 0.2
    calm_s: float = 20.0
    machine: bool = False
    rebirth: bool = False
    seeded: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict)
    bars: Mapping[str, float] = field(default_factory=dict)
    """Others than the criteria's own; those in seconds are scaled by the factor."""
    allowed: tuple[str, ...] = ()
    """Events that would be losses elsewhere."""
    allowed_codes: tuple[int, ...] = (4, 12, 75)
    """Exit codes of typed errors after which whoever supervises a process starts it again."""

    @property
    def run_keys(self) -> dict[str, Any]:
        """Of the run that is founded."""
        base: dict[str, Any] = {"start_peers": self.peers - self.seeded, "name": self.name}
        if self.trainers == "real":
            base |= REAL_KEYS
        return {**base, "checkpoint_every_rounds": 20, **self.keys}

    def schedule(self, seconds: float, seed: int) -> list[Fault]:
        """The faults of a run of that length; the last ones end within it."""
        if self.make is None:
            return self._constant(seconds)
        found = schedule.every(self.make, self.period_s, seconds, seed, self.peers)
        if self.name == "C3" and seconds > 240.0:
            found += schedule.every(
                schedule.long_freeze, 240.0, seconds - 90.0, seed, self.peers, 60.0
            )
        return sorted(found, key=lambda fault: float(fault["at_s"]))

    def _constant(self, seconds: float) -> list[Fault]:
        """What is so from the first moment to the last."""
        if self.name == "C14":
            return [{"at_s": 0.0, "kind": "flood", "per_s": 200, "for_s": seconds}]
        rates = (1, 1, 10, 10, 100, 100, 100, 100)
        return [
            {"at_s": 0.0, "kind": "rate", "site": site, "bits": mbit * 1_000_000, "for_s": seconds}
            for site, mbit in enumerate(reversed(rates))
        ]


_ALL = (
    Scenario(
        "C1", "kill -9 and restart of a random peer, also in mid-join and in mid-sync",
        8, schedule.kill, 10.0, 60.0, ("restarted", "rate", "loss"), trainers="real",
    ),
    Scenario(
        "C2", "churn as PCCL: spawn 60, kill 40, between 3 and 10 members, some leave politely",
        4, schedule.churn, 4.0, 30.0, ("restarted", "counted_once"), bars={"restart_s": 15.0},
    ),
    Scenario(
        "C3", "frozen with SIGSTOP for 1 to 24 s, in longer runs up to 90 s",
        8, schedule.freeze, 15.0, 30.0, ("thawed", "counted_once"),
    ),
    Scenario(
        "C4", "token buckets: two peers at 1 Mbit/s, two at 10, four at 100",
        # Rounds of 5 s; trainers as users have them, for these do not wait for exchanges.
        8, None, 0.0, 30.0, ("rate",), trainers="real", ground="namespaces", pause_s=0.5,
        calm_s=45.0, bars={"rate_share": 0.8},
    ),
    Scenario(
        "C5", "partitions 4/4 and 5/3, one-way, flapping every 5 s; healed",
        8, schedule.cut, 40.0, 30.0, ("one_side", "counted_once"), ground="namespaces",
    ),
    Scenario(
        "C6", "links reset and cut at random bytes, half-open, one byte at a time",
        6, schedule.link, 1.0, 20.0, ("reconnected", "counted_once"), ground="proxied",
    ),
    Scenario(
        "C7", "disks full, read-only, failing, syncs of 5 s",
        4, schedule.disk, 20.0, 20.0, ("disk_alarms", "reborn", "counted_once"),
        machine=True, rebirth=True,
    ),
    Scenario(
        "C8", "killed while a checkpoint is saved, checkpoints cut off at a random byte",
        3, schedule.save_crash, 3.0, 10.0, ("reborn", "counted_once"), rebirth=True,
        keys={"checkpoint_every_rounds": 1}, calm_s=5.0,
    ),
    Scenario(
        "C9", "flipped bits on the wire and in files",
        6, schedule.flip, 6.0, 20.0, ("flips_detected", "reborn", "counted_once"),
        ground="proxied", rebirth=True, keys={"checkpoint_every_rounds": 10},
    ),
    Scenario(
        "C10", "wall clocks off by an hour and by a second, drifting by 200 ppm",
        5, schedule.clock, 15.0, 20.0, ("no_expiry_storm", "rate", "counted_once"), machine=True,
    ),
    Scenario(
        "C11", "the leader killed, frozen, restored from an older copy of its log",
        6, schedule.leader, 25.0, 30.0, ("leader_back", "counted_once"),
    ),
    Scenario(
        "C12", "a pipeline of three stages of two: a site killed, all sites of a stage killed",
        8, schedule.stage, 30.0, 40.0, ("stages_back", "full_steps"), trainers="stages",
        seeded=True,
        keys={
            "stages": STAGES, "model": {"layers": STAGES}, "micro_batches": MICRO_BATCHES,
            "replicas_min": 2,
        },
    ),
    Scenario(
        "C14", "200 hostile sockets a second: silent, dripping, oversize, noise",
        5, None, 0.0, 15.0, ("flood_withstood", "rate", "counted_once"),
        bars={"rate_share": 1 / 3},
    ),
)  # fmt: skip
SCENARIOS = {one.name: one for one in _ALL}
