"""Runs a scenario: opens the swarm, lets it be calm, troubles it, heals it, asks for the end state.

All that is known afterwards is in the histories (``book.py``); what is to be thought of it is the
checker's affair (``check.py``).
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarmtrain_peer.spawn import child_environment
from swarmtrain_protocols.errors import SwarmError
from tests.chaos.acts import Acts
from tests.chaos.book import Book
from tests.chaos.crew import Crew, Home, Ways
from tests.chaos.ground import Namespaces, Plain, Proxied, can_have_namespaces
from tests.chaos.scenarios import Scenario
from tests.chaos.schedule import Fault

TURN_S = 0.05
SAMPLE_S = 5.0
LIST_S = 3.0
TELL_S = 60.0
CALM_SHARE = 0.02
"""Of a long run, at least: what the rate in the trouble is compared with."""
PROBE_S = 0.25
OPEN_S = 240.0
SETTLE_S = 120.0
END_S = 20.0
QUIET_S = 4.0
START_REFERENCE_S = 0.9
"""What an interpreter that imports the peer process takes on two free cores."""
FACTOR_MAX = 5.0
WARM = "from swarmtrain_protocols.codecs import kernels; kernels.use_numba(True)"


class StandsStill(Exception):
    """The swarm did not come up, or did not settle; the histories say how far it got."""


def calibrate() -> float:
    """How much slower than two free cores this machine is now; never less than 1."""
    took = []
    for _ in range(3):
        began = time.monotonic()
        command = [sys.executable, "-c", "import swarmtrain_peer.process"]
        subprocess.run(command, check=True, env=child_environment())
        took.append(time.monotonic() - began)
    return round(min(FACTOR_MAX, max(1.0, sorted(took)[1] / START_REFERENCE_S)), 2)


@dataclass(frozen=True)
class Order:
    """One run of a scenario. ``until_samples``: end when so many are committed (undisturbed).

    ``enough``: once it is set, the run settles, ends and is judged by what there is.
    """

    scenario: Scenario
    seconds: float
    seed: int
    factor: float
    schedule: Sequence[Fault]
    until_samples: float = 0.0
    enough: threading.Event = field(default_factory=threading.Event)


class Conductor:
    """One run, in a folder that must not exist yet."""

    def __init__(self, order: Order, folder: Path, tell: Callable[[str], None]) -> None:
        self.order = order
        self.book = Book(folder)
        self._tell = tell
        self._marks: dict[str, float] = {}
        self._sampled_s = self._listed_s = 0.0
        self._stop = threading.Event()
        self._wrong = ""
        self._ending = False

    def run(self) -> float:
        """Everything. Returns the samples that were committed."""
        scenario = self.order.scenario
        with tempfile.TemporaryDirectory(prefix="st-") as temporary:
            subprocess.run([sys.executable, "-c", WARM], check=True, env=child_environment())
            self._mark("began_s")
            ground = self._ground()
            clean = bool(self.order.until_samples)
            ways = Ways(
                scenario.trainers,
                scenario.phase_s,
                0.0 if clean else scenario.pause_s,
                scenario.machine,
            )
            self.crew = Crew(Path(temporary), ground, self.book, ways)
            self.acts = Acts(self.crew, self.order.seed)
            probing = threading.Thread(target=self._probe, name="probe", daemon=True)
            try:
                self._open()
                probing.start()
                self._calm()
                self._trouble()
                self._settle()
                self._ends()
            except StandsStill as reason:
                self._wrong = str(reason)
                self._tell(f"stands still: {reason}")
            finally:
                self._stop.set()
                for name in ("calm_from_s", "faults_from_s", "faults_until_s", "settled_s"):
                    self._marks.setdefault(name, time.monotonic())
                self._mark("ended_s")
                self._ending = True
                self.acts.heal()
                self.acts.strikes()
                self.crew.close(END_S * self.order.factor)
                self.book.close(self._document())
        return self.book.samples

    def _ground(self) -> Plain:
        wanted = self.order.scenario.ground
        if wanted == "namespaces" and can_have_namespaces():
            return Namespaces()
        if wanted == "namespaces":
            self._tell("no network namespaces here (they take root on Linux): proxies instead")
        return Plain() if wanted == "plain" else Proxied(self._pids)

    def _pids(self) -> dict[str, int]:
        return self.crew.pids()

    def _mark(self, name: str) -> None:
        self._marks[name] = time.monotonic()

    # Turns

    def _turn(self) -> None:
        now = time.monotonic()
        self.crew.turn()
        self.acts.turn()
        if now > self._sampled_s + SAMPLE_S:
            self._sampled_s = now
            self.crew.sample()
        if now > self._listed_s + LIST_S:
            self._listed_s = now
            self.crew.list_rounds()
        self._stop.wait(TURN_S)

    def _until(self, done: Callable[[], Any], timeout_s: float, what: str) -> Any:
        """Turn until ``done`` gives something true.

        Raises:
            StandsStill: it does not in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._turn()
            found = done()
            if found:
                return found
            if self.order.enough.is_set() and not self._ending:
                raise StandsStill(f"{what}: interrupted")
            if time.monotonic() > deadline_s:
                raise StandsStill(f"{what}: not within {timeout_s:.0f} s")

    def _probe(self) -> None:
        """How long members take to answer, one after the other."""
        number = 0
        while not self._stop.wait(PROBE_S):
            alive = self.crew.alive()
            number += 1
            if alive:
                home, began = alive[number % len(alive)], time.monotonic()
                with contextlib.suppress(SwarmError):
                    home.ask("ping", timeout_s=30.0)
                    took_s = round(time.monotonic() - began, 4)
                    self.book.write("probe", began, site=home.name, took_s=took_s)

    # Phases

    def _open(self) -> None:
        scenario, crew = self.order.scenario, self.crew
        limit_s = OPEN_S * self.order.factor
        founder = crew.found(trains=not scenario.seeded, seed=self.order.seed, **scenario.run_keys)

        def ticket() -> Any:
            with contextlib.suppress(SwarmError):
                return crew.ticket(founder, vote=True)

        found = self._until(ticket, limit_s, "the founder answers")
        for _ in range(scenario.peers - 1):
            crew.join(found, votes=not scenario.seeded)
        first = 3 if scenario.trainers != "stages" else 5
        self._until(lambda: self._progress() >= first, limit_s, f"{first} rounds")
        self._tell(f"{scenario.peers} members, {self._progress()} rounds; calm")

    def _progress(self) -> int:
        """The newest state that anybody has applied."""
        return max((n for home in self.crew.homes for n in home.applied.values()), default=-1)

    def _calm(self) -> None:
        self._mark("calm_from_s")
        if self.order.until_samples:
            return
        calm_s = max(self.order.scenario.calm_s, CALM_SHARE * self.order.seconds)
        until_s = time.monotonic() + calm_s
        self._until(lambda: time.monotonic() > until_s, 2 * calm_s, "the calm")
        self.crew.list_rounds()

    def _trouble(self) -> None:
        self._mark("faults_from_s")
        began, left = time.monotonic(), list(self.order.schedule)
        wanted = self.order.until_samples
        told_s = began
        while time.monotonic() < began + self.order.seconds and not self.order.enough.is_set():
            while left and time.monotonic() >= began + left[0]["at_s"]:
                fault = left.pop(0)
                self._tell(f"{time.monotonic() - began:6.1f} s, round {self._progress()}: {fault}")
                self.acts.do(fault)
            self._turn()
            if wanted and self.book.samples >= wanted:
                break
            if time.monotonic() > told_s + TELL_S:
                told_s = time.monotonic()
                self._tell(self._stand((told_s - began) / 60.0, wanted))

    def _stand(self, minutes: float, wanted: float) -> str:
        """How far it is, in a line."""
        up, largest = len(self.crew.alive()), self.crew.own_bytes_max / 2**20
        samples = f"{self.book.samples:.0f}" + (f" of {wanted:.0f}" if wanted else "")
        said = f"{minutes:.0f} min: round {self._progress()}, {samples} samples, {up} peers up"
        return f"{said}, the largest with {largest:.0f} MB of its own"

    def _settle(self) -> None:
        """Nothing is wrong any more: everybody is to apply a round that was not there before."""
        self._ending = True
        self.acts.heal()
        for home in self.crew.homes:
            self.crew.freeze(home, False)
        self._mark("faults_until_s")
        self._tell(f"healed at round {self._progress()}")
        before = self._progress()
        limit_s = SETTLE_S * self.order.factor

        def all_on() -> bool:
            # In a pipeline each site applies the rounds of its own stages.
            return all(max(h.applied.values(), default=-1) > before for h in self._states())

        try:
            self._until(all_on, limit_s, "everybody goes on")
        finally:
            self._mark("settled_s")
        self.crew.list_rounds()

    def _states(self) -> list[Home]:
        """Homes that are to have a state."""
        idle = self.order.scenario.seeded
        return [home for home in self.crew.there() if not (idle and home.number == 0)]

    def _ends(self) -> None:
        """Trainers rest; what everybody has then, and what is left lying about."""
        self.crew.rest()
        limit_s = SETTLE_S * self.order.factor
        try:
            self._until(self._same_stand, limit_s, "one state everywhere")
            # What was handed over last may be committed after the trainers are gone.
            until_s = time.monotonic() + QUIET_S
            self._until(lambda: time.monotonic() > until_s, limit_s, "quiet")
            self._until(self._same_stand, limit_s, "one state everywhere")
        finally:
            self._note("stand")
            self.crew.list_rounds()
            self.crew.sample()
            self.crew.left_over()
        if self.order.scenario.rebirth:
            self._note("before rebirth")
            for home in self.crew.there():
                self.crew.kill(home, "peer")
                home.due_s["peer"] = time.monotonic() + 0.5
            try:
                self._until(self._same_stand, limit_s, "one state everywhere after a restart")
            finally:
                self._note("after rebirth")

    def _same_stand(self) -> bool:
        stands = self.crew.stands()
        if any(home.name not in stands or not stands[home.name] for home in self._states()):
            return False
        by_channel: dict[str, set[tuple[int, str]]] = {}
        for found in stands.values():
            for channel, stand in found.items():
                by_channel.setdefault(channel, set()).add(stand)
        newest = max(round_ for found in by_channel.values() for round_, _ in found)
        return newest >= self._progress() and all(len(one) == 1 for one in by_channel.values())

    def _note(self, what: str) -> None:
        for site, channels in self.crew.stands().items():
            for channel, (round_, digest) in channels.items():
                self.book.write(what, site=site, channel=channel, round=round_, hash=digest)

    def _document(self) -> dict[str, Any]:
        order, scenario = self.order, self.order.scenario
        played_s = self._marks["faults_until_s"] - self._marks["faults_from_s"]
        cut_short = order.enough.is_set()
        due = [f for f in order.schedule if not cut_short or f["at_s"] <= played_s]
        return {
            "scenario": scenario.name,
            "minutes": round(order.seconds / 60.0, 2),
            "played_minutes": round(played_s / 60.0, 2),
            "interrupted": cut_short,
            "seed": order.seed,
            "factor": order.factor,
            "machine": f"{os.cpu_count()} cores {platform.machine()}",
            "load": round(os.getloadavg()[0], 1),
            "peers": scenario.peers,
            "trainers": scenario.trainers,
            "ground": self.crew.ground.name,
            "sites": {home.name: home.seat.id for home in self.crew.homes},
            "idle": ["site-0"] if scenario.seeded else [],
            "planned": dict(Counter(fault["kind"] for fault in due)),
            "schedule": list(order.schedule),
            "criteria": list(scenario.criteria) if not order.until_samples else [],
            "bars": {
                name: bar * (order.factor if name.endswith("_s") else 1.0)
                for name, bar in scenario.bars.items()
            },
            "allowed": list(scenario.allowed),
            "allowed_codes": list(scenario.allowed_codes),
            "micro_batches": scenario.run_keys.get("micro_batches", 0),
            "wrong": self._wrong,
            **self._marks,
        }
