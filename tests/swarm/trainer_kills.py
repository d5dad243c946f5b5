"""Kill -9 a trainer process at random moments of its hand-over, and recompute what was committed.

``test_trainer_kills.py`` does it a few times, ``python -m tests.swarm.trainer_kills 200`` often.
"""

from __future__ import annotations

import itertools
import math
import random
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from swarmtrain_peer.events import read_events
from swarmtrain_peer.spawn import child_environment
from tests.swarm.harness import CHANNEL, WAIT_S, Seat, Swarm, closing_all, wait_same_stand
from tests.swarm.synthetic import VALUES, Oracle, Plan, Trainer, delta, seq_of

ROOT = Path(__file__).resolve().parent.parent.parent
DISCOUNTS = tuple(1.0 / math.sqrt(1.0 + late) for late in range(3))
STAGES = ("begin", "written", "complete", "handed")
VICTIM, WITNESS = 1, 2
"""Keys of the two trainers' pseudo-gradients."""


class Victim:
    """A trainer process that says what it does."""

    def __init__(self, seat: Seat) -> None:
        plan = msgspec.json.encode(Plan(key=VICTIM, phase_s=0.02, say=True)).decode()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.swarm.synthetic", str(seat.site.folder), plan],
            stdout=subprocess.PIPE,
            env=child_environment({"PYTHONPATH": _path()}),
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.decode().strip())
                self._news.notify_all()

    def wait_stage(self, stage: str, nth: int = 1) -> None:
        with self._news:
            assert self._news.wait_for(
                lambda: sum(line.startswith(stage) for line in self.lines) >= nth, WAIT_S
            ), f"no {stage}: {self.lines}"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()


def _path() -> str:
    return ":".join([str(ROOT), *(path for path in sys.path if path)])


class Counted:
    """Committed rounds as the log of one site shows them, and an oracle that follows them."""

    def __init__(self, seat: Seat, keys: dict[str, int]) -> None:
        self._seat = seat
        self._keys = keys
        self.contributions: dict[int, list[tuple[str, int]]] = {}
        self._samples: dict[int, list[tuple[float, str]]] = {}
        self._weights: dict[int, list[float]] = {}
        """By round: the logged coefficients; who came a round late counts for less (spec 08)."""

    def look(self) -> None:
        """Take up what is new; the site remembers 64 rounds."""
        for item in self._seat.call("rounds", {"last": 64})["rounds"]:
            if item["outcome"] == "committed" and item["channel"] == CHANNEL:
                self._samples[item["round"]] = [
                    (c["samples"], c["id"]) for c in item["contributors"]
                ]
                self._weights[item["round"]] = [c["coefficient"] for c in item["contributors"]]

    def check(self) -> int:
        """Every state hash equals the oracle's; returns how many contributions the victim made."""
        oracle = Oracle(VALUES)
        hashes = {
            record["round"]: record["state_hash"]
            for record in read_events(self._seat.site.events_path)
            if record["name"] == "state_applied"
        }
        self.look()  # afterwards: what was committed before a state is known by then
        victims: list[int] = []
        for round_ in range(max(hashes)):
            listed = self._samples[round_]
            late = discounts([s for s, _ in listed], self._weights[round_])
            parts = [
                (samples * discount, delta(self._keys[who], seq_of(samples), VALUES))
                for discount, (samples, who) in zip(late, listed, strict=True)
            ]
            victims += [seq_of(s) for s, who in listed if self._keys[who] == VICTIM]
            oracle.step(parts)
            assert oracle.state_hash() == hashes[round_ + 1], f"round {round_} is not what was sent"
        assert len(victims) == len(set(victims)), "a hand-over was counted twice"
        return len(victims)


def discounts(samples: list[float], weights: list[float]) -> tuple[float, ...]:
    """What each contribution was discounted by for coming late (spec 08), from the coefficients."""
    for found in itertools.product(DISCOUNTS, repeat=len(samples)):
        counted = [s * d for s, d in zip(samples, found, strict=True)]
        shares = [c / sum(counted) for c in counted]
        if max(found) == 1.0 and np.allclose(shares, weights, atol=1e-6):
            return found
    raise AssertionError(f"{weights} are no coefficients of {samples}")


def kill_often(folder: Path, times: int, seed: int) -> dict[str, Any]:
    """Two members; the trainer of one is killed ``times`` times. Returns what was seen."""
    luck = random.Random(seed)
    with Swarm(folder) as swarm:
        founder = swarm.found(checkpoint_every_rounds=1000)
        site = swarm.enter("victim", founder.ticket())
        counted = Counted(founder, {founder.id: WITNESS, site.id: VICTIM})
        witness = Trainer(founder.site, Plan(key=WITNESS, phase_s=0.25)).start()
        shm: set[str] = set()
        with closing_all(witness):
            with closing_all(Victim(site)):
                # The state at the beginning is a download, and so are the rounds it comes behind.
                site.wait_event("round_opened", lambda r: site.id in r["holders"])
            received, attempts = site.status()["bytes_received"], len(site.events("round_opened"))
            for number in range(times):
                victim = Victim(site)
                with closing_all(victim):
                    stage = STAGES[number % len(STAGES)]
                    victim.wait_stage(stage, luck.randint(1, 2))
                    threading.Event().wait(luck.uniform(0.0, 0.004))
                    victim.kill()
                    shm |= {line.split()[1] for line in victim.lines if line.startswith("attached")}
                counted.look()
            last = Victim(site)
            with closing_all(last):
                last.wait_stage("told", 3)
        # What the two have handed over last may be committed after they are gone.
        stand = wait_same_stand([founder, site])
        assert witness.failure is None
        return {
            "contributions": counted.check(),
            "rounds": stand[0],
            "stand": stand,
            "mappings": len(shm),
            "fetched_again": len(site.events("resync")) + len(site.events("state_synced")),
            "attempts": len(site.events("round_opened")) - attempts,
            "bytes_received": site.status()["bytes_received"] - received,
        }


def check(seen: dict[str, Any], times: int) -> None:
    """No torn contribution is possible (``kill_often`` recomputed them); and no download."""
    assert seen["mappings"] == 1, "a returning trainer finds the mapping of its predecessor"
    assert seen["fetched_again"] == 0
    assert seen["contributions"] >= times // 2
    # In one attempt a member of two receives at most one vector: what it sums plus what it lacks.
    most = (seen["attempts"] + 1) * VALUES * 4 * 1.02 + 128 * 1024
    assert seen["bytes_received"] <= most, "more than the rounds themselves: something was fetched"


if __name__ == "__main__":
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as temporary:
        found = kill_often(Path(temporary), wanted, seed=wanted)
    check(found, wanted)
    sys.stdout.write(f"{wanted} kills: {found}\n")
