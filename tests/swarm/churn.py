"""Members come and go without a pause, and every round has one outcome everywhere.

``python -m tests.swarm.churn --minutes 30`` keeps up to eight members on this machine, each a peer
process and a trainer, and every ten seconds one goes (SIGKILL to both processes, or a polite leave)
or comes (with its old identity and disk, or as a new member). It prints what happened, and exits
with 1 unless every state of a round that anybody reported has one hash and 95 of 100 members that
started again were counted within 15 s plus what their transfer took. ``test_churn.py`` runs a
minute of it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from swarmtrain_peer.spawn import start_process, stop_process
from swarmtrain_protocols.errors import SwarmError
from tests.swarm.harness import CHANNEL, WAIT_S, Document, Seat, Swarm, poll_until, wait_same_stand
from tests.swarm.synthetic import Plan, Trainer

BEAT_S = 10.0
MEMBERS = 8
MEMBERS_MIN = 5
COUNTED_S_MAX = 15.0
"""From the start of the processes to the commit of a round that counts the member, p95."""
DECIDED_S = 60.0
LEAVES = ("killed", "left")


@dataclass
class Start:
    """A member that was started, or started again. Times are of the wall clock."""

    name: str
    how: str
    at_s: float
    counted_s: float | None = None
    transfer_s: float = 0.0
    excused: bool = False
    """It went before ``COUNTED_S_MAX`` were over, or the run ended."""

    @property
    def waited_s(self) -> float | None:
        """Without the transfer; None: it was never counted."""
        return None if self.counted_s is None else self.counted_s - self.at_s - self.transfer_s


@dataclass
class Life:
    """What one seat does now."""

    seat: Seat
    trainer: Trainer | subprocess.Popen[bytes] | None = None
    out: bool = False
    """It left politely: it is a member again only once it joins anew."""


@dataclass
class Churn:
    """A swarm and who is there. ``real``: trainers are processes that train a model."""

    swarm: Swarm
    luck: random.Random
    real: bool
    lives: list[Life] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    counted: dict[int, set[str]] = field(default_factory=dict)
    """Whose contributions are in a committed round, as far as was asked."""

    def open(self, members: int) -> None:
        """Found a run of so many members; who loses its trainer goes on with its peer process."""
        keys: Document = {"start_peers": members, "checkpoint_every_rounds": 20}
        if self.real:
            keys |= {"inner_steps": 10, "overlap": "auto"}
        self._begin(self.swarm.found(**keys))
        for number in range(1, members):
            self._begin(self.swarm.enter(f"member-{number}", self.lives[0].seat.ticket()))

    def _begin(self, seat: Seat) -> None:
        life = Life(seat)
        self.lives.append(life)
        self._train(life)

    def _train(self, life: Life) -> None:
        seat = life.seat
        if not self.real:
            plan = Plan(key=self.lives.index(life), phase_s=0.5, decision_s=DECIDED_S)
            life.trainer = Trainer(seat.site, plan).start()
            return
        command = [sys.executable, "-m", "swarmtrain.training.trainer", str(seat.site.folder)]
        command += ["--device", "cpu", "--wait-s", "60"]
        life.trainer = start_process(command, seat.site.folder / "trainer.log")

    def _stop_trainer(self, life: Life) -> None:
        trainer, life.trainer = life.trainer, None
        if isinstance(trainer, Trainer):
            trainer.close()
        elif trainer is not None:
            trainer.kill()
            trainer.wait(WAIT_S)

    def there(self) -> list[Life]:
        return [life for life in self.lives if life.trainer is not None]

    # One beat

    def beat(self, members: int, members_min: int) -> str:
        """Somebody goes or comes; says who."""
        there = self.there()
        away = [life for life in self.lives if life.trainer is None and not life.out]
        goes = self.luck.random() < 0.5
        if len(there) <= members_min or (len(there) < members and not goes):
            return self._comes(there, away)
        # One that is killed may be a steward: no second one before it is back.
        kinds = LEAVES if not away else ("left",)
        return self._goes(self.luck.choice(there[1:] if away else there), self.luck.choice(kinds))

    def _goes(self, life: Life, how: str) -> str:
        if how == "left" and life is self.lives[0]:
            how = "killed"  # the founder stays a member
        seat = life.seat
        self.look()
        for start in self.starts:
            if start.name == seat.name and start.counted_s is None:
                start.excused = start.counted_s is None and time.time() < start.at_s + DECIDED_S / 2
        if how == "killed":
            seat.kill()
            self._stop_trainer(life)
        else:
            with contextlib.suppress(SwarmError):
                seat.call("leave", {"now": False})
            assert seat.process is not None
            code = seat.process.wait(DECIDED_S)
            assert code == 0, f"{seat.name} left with {code}\n{seat.tail()}"
            self._stop_trainer(life)
            seat.stop()
            life.out = True
        self.done[how] += 1
        return f"{seat.name} {how}"

    def _comes(self, there: Sequence[Life], away: Sequence[Life]) -> str:
        at_s = time.time()
        if away:
            life, how = self.luck.choice(list(away)), "restarted"
            life.seat.start()
            self._train(life)
        else:
            how = "joined"
            name = f"member-{len(self.lives)}"
            ticket = self.luck.choice([life.seat for life in there]).ticket(vote=False)
            self._begin(self.swarm.enter(name, ticket))
            life = self.lives[-1]
        self.starts.append(Start(life.seat.name, how, at_s))
        self.done[how] += 1
        return f"{life.seat.name} {how}"

    # What came of it

    def _look(self, start: Start) -> None:
        """When the member was counted, and what it had to fetch for that."""
        seat = next(life.seat for life in self.lives if life.seat.name == start.name)
        at_s = {round_: at for round_, at in self.committed().items() if at >= start.at_s}
        mine = [at for round_, at in at_s.items() if seat.id in self.counted.get(round_, ())]
        if mine:
            start.counted_s = min(mine)
            synced = [r for r in seat.events("state_synced") if r["wall_s"] >= start.at_s]
            done = [r for r in synced if r["wall_s"] <= start.counted_s]
            start.transfer_s = sum(r.get("sync_s") or 0.0 for r in done)

    def look(self) -> None:
        """Bring what is known of rounds and of all starts up to date."""
        for life in self.there():
            with contextlib.suppress(SwarmError):
                for item in life.seat.call("rounds", {"last": 64})["rounds"]:
                    if item["outcome"] == "committed" and item["channel"] == CHANNEL:
                        self.counted[item["round"]] = {c["id"] for c in item["contributors"]}
                break
        for start in self.starts:
            if start.counted_s is None and not start.excused:
                self._look(start)

    def committed(self) -> dict[int, float]:
        """When each round was first known to be committed."""
        found: dict[int, float] = {}
        for life in self.lives:
            for record in life.seat.events("round_committed"):
                if record["channel"] == CHANNEL:
                    known = found.get(record["round"], record["wall_s"])
                    found[record["round"]] = min(known, record["wall_s"])
        return found

    def close(self) -> None:
        for life in self.lives:
            trainer = life.trainer
            if isinstance(trainer, subprocess.Popen):
                stop_process(trainer)
            elif trainer is not None:
                trainer.close()


def spread(values: Sequence[float]) -> Document:
    """Median, 95th percentile and maximum; nothing of nothing."""
    ordered = sorted(values)
    if not ordered:
        return {}
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    found = {"median": statistics.median(ordered), "p95": p95, "max": ordered[-1]}
    return {name: round(value, 2) for name, value in found.items()}


def churn(
    folder: Path,
    duration_s: float,
    *,
    members: int = MEMBERS,
    members_min: int = MEMBERS_MIN,
    seed: int = 1,
    real: bool = True,
    beat_s: float = BEAT_S,
) -> Document:
    """Let members come and go for ``duration_s``; returns the figures.

    Raises:
        AssertionError: two states of one round differ, or the rounds stop.
    """
    with Swarm(folder) as swarm:
        run = Churn(swarm, random.Random(seed), real)
        with contextlib.closing(run):
            run.open(members)
            run.lives[0].seat.wait_applied(2, timeout_s=4 * DECIDED_S)
            began = time.monotonic()
            beats = 0
            while time.monotonic() < began + duration_s:
                beats += 1
                said = run.beat(members, members_min)
                stand = max(run.committed(), default=-1)
                sys.stderr.write(f"{time.monotonic() - began:7.1f} s round {stand:5} {said}\n")
                threading.Event().wait(max(0.0, began + beats * beat_s - time.monotonic()))
                run.look()
            wall_s, until_s = time.monotonic() - began, time.time()
            run.look()
            for start in run.starts:
                late = time.time() > start.at_s + COUNTED_S_MAX + start.transfer_s
                start.excused |= start.counted_s is None and not late
            before = max(run.committed())
            there = [life.seat for life in run.there()]
            poll_until(lambda: max(run.committed()) > before + 1, "rounds go on", 2 * DECIDED_S)
            for life in run.there():
                run._stop_trainer(life)
            stand = wait_same_stand(there, before)
            hashes = swarm.check_hashes()
            assert stand[1] == hashes[stand[0]]
            return figures(run, wall_s, until_s, hashes)


def figures(run: Churn, wall_s: float, until_s: float, hashes: dict[int, str]) -> Document:
    """What is printed and written."""
    rounds = [item for item in sorted(run.committed().items()) if item[1] <= until_s]
    gaps = [later[1] - earlier[1] for earlier, later in itertools.pairwise(rounds)]
    asked = [start for start in run.starts if not start.excused]
    waited = [s.waited_s for s in asked if s.waited_s is not None]
    never = [f"{s.name} {s.how}" for s in asked if s.waited_s is None]
    return {
        "wall_s": round(wall_s, 1),
        "happened": dict(run.done),
        "rounds": len(hashes),
        "rounds_with_two_hashes": 0,
        "round_gap_s": spread(gaps),
        "starts": len(asked),
        "never_counted": never,
        "counted_s": spread(waited),
        "transfer_s": spread([s.transfer_s for s in asked]),
    }


def main() -> int:
    """Run it, print the figures; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--members", type=int, default=MEMBERS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--synthetic", action="store_true", help="trainers without a model")
    parser.add_argument("--keep", type=Path, default=None, help="a new folder that is kept")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = churn(
            options.keep or Path(temporary),
            60.0 * options.minutes,
            members=options.members,
            members_min=max(3, options.members - 3),
            seed=options.seed,
            real=not options.synthetic,
        )
    text = json.dumps(found, indent=1)
    sys.stdout.write(text + "\n")
    if options.output is not None:
        options.output.write_text(text + "\n")
    fine = not found["never_counted"] and found["counted_s"].get("p95", 0.0) <= COUNTED_S_MAX
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
