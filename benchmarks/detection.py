"""How soon a dead and a frozen peer are noticed, and what a death costs a large all-reduce.

Real processes on loopback. ``detect``: four sites with synthetic trainers that hand over at once,
so that somebody always waits; a member is killed, or stopped, again and again, and the leader's
event log says when it knew. ``reduce``: four processes reduce 64 Mi fp32 values; one is killed at
several moments of a round, and the clock runs until the others hold the next agreed result. A
result counts only if it is NumPy's mean of the contributions that it names.

    python -m benchmarks.detection [--parts detect,reduce] [--values 67108864] [--kills 6]
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "detection.json"
PEERS = 4
DEAD_S = 0.5
FROZEN_S = 2.0
ROUNDS = 1.5
"""The bars: a dead peer, a frozen one, and a round after a death in clean rounds."""
MOMENTS = "0.15,0.35,0.55,0.75,0.9"
"""Of a clean round, at which somebody is killed; ``0.5:0`` kills the process of rank 0."""
GROUP = "vectors"
CLEAN_CALLS = 2
WAIT_S = 120.0


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median and largest of measured seconds, and all of them."""
    return {
        "median_s": round(statistics.median(seconds), 3),
        "max_s": round(max(seconds), 3),
        "all_s": [round(s, 3) for s in seconds],
    }


# -- detection ----------------------------------------------------------------------------------


def noticed_s(leader: Any, name: str, victim: str, strike: Callable[[], object]) -> float:
    """Seconds from ``strike`` to the leader's event of that name about ``victim``."""
    since = leader.last_seq
    struck_s = time.time()
    strike()
    record = leader.wait_event(name, lambda r: r["peer"] == victim, since, WAIT_S)
    return float(record["wall_s"]) - struck_s


def counted_again(leader: Any, victim: str) -> None:
    """Wait until the victim is in a round that began after now."""
    listed = leader.wait_event(
        "round_opened", lambda r: victim in r["contributors"], leader.last_seq, WAIT_S
    )
    leader.wait_event("round_committed", lambda r: True, listed["seq"], WAIT_S)


def detect(kills: int, freezes: int) -> dict[str, Any]:
    """Kill and freeze members of a run of four; who leads it stays."""
    from tests.swarm.harness import Swarm, closing_all
    from tests.swarm.synthetic import Plan, Trainer

    dead: list[float] = []
    frozen: list[float] = []
    with tempfile.TemporaryDirectory() as folder, Swarm(Path(folder)) as swarm:
        founder = swarm.found()
        seats = [founder]
        seats += [swarm.enter(f"site{i}", founder.ticket(False)) for i in range(1, PEERS)]
        trainers = [Trainer(seat.site, Plan(key=i + 1)).start() for i, seat in enumerate(seats)]
        with closing_all(*trainers):
            for seat in seats:
                seat.wait_applied(3, timeout_s=WAIT_S)
            leader, others = founder, seats[1:]
            for turn in range(max(kills, freezes)):
                victim = others[turn % len(others)]
                process = victim.process
                assert process is not None
                if turn < freezes:
                    stop = lambda p=process: p.send_signal(signal.SIGSTOP)  # noqa: E731
                    frozen.append(noticed_s(leader, "peer_silent", victim.id, stop))
                    since = leader.last_seq
                    process.send_signal(signal.SIGCONT)
                    about = lambda r, v=victim: r["peer"] == v.id  # noqa: E731
                    leader.wait_event("peer_answers", about, since - 1, WAIT_S)
                    counted_again(leader, victim.id)
                if turn < kills:
                    dead.append(noticed_s(leader, "peer_disconnected", victim.id, victim.kill))
                    victim.start()
                    counted_again(leader, victim.id)
            wrong = [r for s in seats for r in s.events("peer_silent")]
            swarm.check_hashes()
    return {
        "kill -9": summary(dead),
        "SIGSTOP": summary(frozen),
        "suspicions": len(wrong),
    }


# -- a death in a large all-reduce --------------------------------------------------------------


def vector(rank: int, values: int, call: int) -> Any:
    """Gaussian f32[values] of one rank in one call; any rank can make any other rank's."""
    return np.random.default_rng([rank, call]).standard_normal(values, dtype=np.float32)


def say(**answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def serve(rank: int, values: int) -> None:
    """One process under test: JSON lines in, JSON lines out."""
    import swarmtrain

    ticket = None if rank == 0 else json.loads(sys.stdin.readline())["ticket"]
    peer = swarmtrain.Peer.start(ticket=ticket, listen="127.0.0.1:0", name=f"rank{rank}")
    say(ticket=peer.ticket, peer=peer.id)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "barrier":
            peer.all_reduce(np.zeros(1, np.float32), group="barrier", expect=command["of"])
            say(at="barrier")
        elif command["do"] == "prepare":
            own = vector(rank, values, command["call"])
            say(at="prepared")
        elif command["do"] == "reduce":
            begin_s = time.time()
            reduced = peer.all_reduce(own, group=GROUP, expect=command["of"])
            end_s = time.time()
            result = np.asarray(reduced.values)
            say(begin_s=begin_s, end_s=end_s, who=reduced.contributors, root=reduced.root_hash)
        elif command["do"] == "check":
            mean = np.zeros(values, np.float64)
            for other in command["ranks"]:
                mean += vector(other, values, command["call"])
            mean /= len(command["ranks"])
            off = float(np.linalg.norm(result - mean) / np.linalg.norm(mean))
            say(off=off)
    peer.close()


class Worker:
    """A process of ``serve``."""

    def __init__(self, rank: int, values: int, ticket: str | None) -> None:
        self.rank = rank
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.detection", "--serve", str(rank), str(values)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        if ticket is not None:
            self.tell(ticket=ticket)
        hello = self.answer()
        self.ticket, self.peer = hello["ticket"], hello["peer"]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._answers.get(timeout=WAIT_S))
        return answer


class Crew:
    """The processes, of which one may die in a call."""

    def __init__(self, values: int) -> None:
        self.values = values
        self.call = 0
        self.workers = [Worker(0, values, None)]
        for rank in range(1, PEERS):
            self.workers.append(Worker(rank, values, self.workers[0].ticket))

    def _all(self, **command: Any) -> list[dict[str, Any]]:
        for worker in self.workers:
            worker.tell(**command)
        return [worker.answer() for worker in self.workers]

    def reduce(
        self, victim: int = -1, after_s: float = 0.0, expect: int | None = None
    ) -> dict[str, Any]:
        """One call of all; ``victim`` is killed ``after_s`` after its begin."""
        self.call += 1
        self._all(do="prepare", call=self.call)
        self._all(do="barrier", of=PEERS)
        begin_s = time.time()
        for worker in self.workers:
            worker.tell(do="reduce", of=expect)
        killed_s = 0.0
        if victim >= 0:
            time.sleep(after_s)
            killed_s = time.time()
            self.workers[victim].process.kill()
            self.workers[victim].process.wait()
        left = [worker for worker in self.workers if worker.rank != victim]
        answers = [worker.answer() for worker in left]
        assert len({answer["root"] for answer in answers}) == 1, "results differ"
        named = [worker.rank for worker in self.workers if worker.peer in answers[0]["who"]]
        left[0].tell(do="check", ranks=named, call=self.call)  # all have the same bytes
        off = left[0].answer()["off"]
        assert off < 1e-6, f"no mean of the contributions named: {off:g}"
        end_s = max(answer["end_s"] for answer in answers)
        return {"took_s": end_s - begin_s, "after_s": end_s - killed_s, "ranks": named}

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()


def one_death(values: int, moment: float, victim: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds of two clean calls of a fresh crew, and what a death in the third one cost."""
    crew = Crew(values)
    try:
        crew.reduce(expect=PEERS)  # warms buffers and kernels, and is the group's history
        clean = [crew.reduce()["took_s"] for _ in range(CLEAN_CALLS)]
        found = crew.reduce(victim, moment * statistics.mean(clean))
    finally:
        crew.close()
    survivors = [rank for rank in range(PEERS) if rank != victim]
    return clean, {
        "moment": moment,
        "killed": "the leader" if victim == 0 else f"rank {victim}",
        "after_s": round(found["after_s"], 3),
        "rounds": round((found["after_s"] - DEAD_S) / statistics.mean(clean), 2),
        "contributions": len(found["ranks"]),
        "survivors_counted": all(rank in found["ranks"] for rank in survivors),
    }


def reduce(
    values: int,
    moments: list[str],
    deaths: list[dict[str, Any]],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """A crew for each moment, after ``deaths``; ``save`` gets what was measured so far."""
    for number, moment in enumerate(moments):
        share, _, whom = moment.partition(":")
        victim = int(whom) if whom else 1 + number % (PEERS - 1)
        took, death = one_death(values, float(share), victim)
        load = round(os.getloadavg()[0], 1)
        deaths.append({**death, "clean_s": [round(s, 3) for s in took], "load": load})
        clean = [s for found in deaths for s in found["clean_s"]]
        print(json.dumps(deaths[-1]), flush=True)
        save({"values": values, "clean": summary(clean), "deaths": deaths})


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]), int(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="detect,reduce")
    parser.add_argument("--values", type=int, default=64 << 20)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--moments", default=MOMENTS)
    parser.add_argument("--add", action="store_true", help="keep the deaths in the output file")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}

    def save(part: str, measured: dict[str, Any]) -> None:
        found[part] = {**measured, "load": load}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")

    for part in arguments.parts.split(","):
        load = round(os.getloadavg()[0], 1)
        if part == "detect":
            save(part, detect(arguments.kills, arguments.kills))
        else:
            moments = arguments.moments.split(",")
            before = found.get(part, {}).get("deaths", []) if arguments.add else []
            reduce(arguments.values, moments, before, lambda measured: save("reduce", measured))
    print(json.dumps(found, indent=1))
    bars = []
    if "detect" in found:
        bars += [found["detect"]["kill -9"]["max_s"] < DEAD_S]
        bars += [found["detect"]["SIGSTOP"]["max_s"] <= FROZEN_S]
    if "reduce" in found:
        bars += [
            d["rounds"] <= ROUNDS and d["survivors_counted"] for d in found["reduce"]["deaths"]
        ]
    return 0 if all(bars) else 1


if __name__ == "__main__":
    sys.exit(main())
