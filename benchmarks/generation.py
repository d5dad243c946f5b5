"""What texts cost the training: rounds or steps per second with texts being written, and without.

Three sites on this machine train; windows with and without two endless texts take turns, so that
whatever else the machine does hits both alike. ``slowdown`` is what is missing of the rate while
texts are written; the bar is the share of workers' time that the run gives (``generate_share``) and
5 % on top. Processor time per round stands beside it: on a machine that is not the run's alone the
rates are noisy, and texts also use processor time that training leaves idle.

    python benchmarks/generation.py [--windows 6] [--seconds 12] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.site import Site, enter_site, found_site
from swarmtrain_peer.spawn import spawn_peer, start_process, stop_process
from swarmtrain_peer.talk import Talk
from swarmtrain_protocols.errors import ShareUsedUp, SwarmError
from swarmtrain_protocols.manifest import RunKeys, Ticket

RESULTS = Path(__file__).parent / "results"
SITES, WRITERS, MARGIN = 3, 2, 0.05
SIZES = {"layers": 3}
WAIT_S = 60.0
RUNS: dict[str, dict[str, Any]] = {
    "without stages": {"inner_steps": 40, "overlap": "eager", "start_peers": SITES},
    "three stages": {
        "stages": 3,
        "micro_batches": 6,
        "replicas_min": 1,
        "start_peers": SITES,
    },
}


class Swarm:
    """Sites of one run; use as a context manager."""

    def __init__(self, folder: Path, keys: RunKeys) -> None:
        self.sites = [found_site(folder / "a", keys, _config("a"))]
        self._peers: list[subprocess.Popen[bytes]] = []
        self._trainers: list[subprocess.Popen[bytes]] = []
        self._folder = folder

    def __enter__(self) -> Swarm:
        founder = self.sites[0]
        self._peers.append(spawn_peer(founder))
        with founder.connect() as client:
            ticket = Ticket.parse(client.call("ticket")["ticket"])
        for name in "bcdefgh"[: SITES - 1]:
            site = enter_site(self._folder / name, ticket, _config(name))
            self._peers.append(spawn_peer(site))
            self.sites.append(site)
        for site in self.sites:
            command = [sys.executable, "-m", "swarmtrain.training.trainer", str(site.folder)]
            log = site.folder / "trainer.log"
            self._trainers.append(start_process([*command, "--device", "cpu"], log, nice=5))
        return self

    def __exit__(self, *unused: object) -> None:
        for process in (*self._trainers, *self._peers):
            stop_process(process)

    def progress(self) -> dict[str, float]:
        """What is committed, and processor seconds so far."""
        with self.sites[0].connect() as client:
            channels = client.call("status")["channels"]
        return {
            "rounds": float(channels["train/0/0"]["round"]) if channels else 0.0,
            "trainer_s": _cpu_s(self._trainers),
            "peer_s": _cpu_s(self._peers),
            "wall_s": time.monotonic(),
        }


def _cpu_s(processes: list[subprocess.Popen[bytes]]) -> float:
    times = [psutil.Process(process.pid).cpu_times() for process in processes]
    return float(sum(one.user + one.system for one in times))


def _config(name: str) -> PeerConfig:
    return PeerConfig(name=name, listen="127.0.0.1:0", votes=True)


class Writers:
    """Ask for one text after the other while they are let; count tokens."""

    def __init__(self, sites: list[Site]) -> None:
        self.tokens = 0
        self.refused = 0
        self._going = threading.Event()
        self._news = threading.Condition()
        self._open = 0
        self._begun: dict[int, None] = {}
        self._over = False
        self._threads = [
            threading.Thread(target=self._write, args=(sites[n % len(sites)], n), daemon=True)
            for n in range(WRITERS)
        ]
        for thread in self._threads:
            thread.start()

    def go(self) -> None:
        """Let them write; returns once each has written something, or was refused."""
        with self._news:
            self._begun.clear()
            self._going.set()
            assert self._news.wait_for(lambda: len(self._begun) == WRITERS, WAIT_S), "no texts"

    def rest(self) -> None:
        """Let them write no more; returns once no text is open."""
        self._going.clear()
        with self._news:
            assert self._news.wait_for(lambda: not self._open, WAIT_S), "a text does not end"

    def close(self) -> None:
        self._over = True
        self._going.set()
        for thread in self._threads:
            thread.join(60)

    def _write(self, site: Site, number: int) -> None:
        while not self._over:
            self._going.wait()
            args = {"prompt": "import ", "max_tokens": 4096, "temperature": 1.0, "seed": number}
            self._tell(number, opened=1)
            try:
                with site.connect() as client:
                    for _ in Talk(client, args).pieces():
                        self._tell(number, tokens=1)
                        if not self._going.is_set() or self._over:
                            break
            except ShareUsedUp:
                self._tell(number, refused=1)
            except SwarmError:
                if not self._over:
                    raise
            finally:
                self._tell(number, opened=-1)

    def _tell(self, number: int, opened: int = 0, tokens: int = 0, refused: int = 0) -> None:
        with self._news:
            self._open += opened
            self.tokens += tokens
            self.refused += refused
            if tokens or refused:
                self._begun[number] = None
            self._news.notify_all()


def measure(keys: dict[str, Any], windows: int, seconds: float) -> dict[str, Any]:
    """Pairs of windows, without and with texts; sums of each kind."""
    run = RunKeys(seed=7, preset="lm-tiny", model=SIZES, **keys)
    names = ("rounds", "trainer_s", "peer_s", "wall_s")
    sums = {kind: dict.fromkeys(names, 0.0) for kind in ("without", "with")}
    tokens = 0
    with tempfile.TemporaryDirectory() as folder, Swarm(Path(folder), run) as swarm:
        while swarm.progress()["rounds"] < 5:
            time.sleep(0.2)
        writers = Writers(swarm.sites)
        for number in range(windows):
            for kind in ("without", "with") if number % 2 else ("with", "without"):
                (writers.go if kind == "with" else writers.rest)()
                before, said = swarm.progress(), writers.tokens
                time.sleep(seconds)
                after = swarm.progress()
                tokens += (writers.tokens - said) if kind == "with" else 0
                for name in names:
                    sums[kind][name] += after[name] - before[name]
        writers.close()
    rates = {kind: one["rounds"] / one["wall_s"] for kind, one in sums.items()}
    cost = {kind: one["trainer_s"] / one["rounds"] for kind, one in sums.items()}
    peers = {kind: one["peer_s"] / one["rounds"] for kind, one in sums.items()}
    return {
        "slowdown": round(1 - rates["with"] / rates["without"], 4),
        "generate_share": run.generate_share,
        "bar": round(run.generate_share + MARGIN, 4),
        "tokens_per_s": round(tokens / sums["with"]["wall_s"], 2),
        "trainer_cpu_s_per_round": {kind: round(each, 5) for kind, each in cost.items()},
        "peer_cpu_s_per_round": {kind: round(each, 5) for kind, each in peers.items()},
        "rounds": {kind: one["rounds"] for kind, one in sums.items()},
        "rounds_per_s": {kind: round(each, 4) for kind, each in rates.items()},
    }


def main() -> None:
    """Measure both kinds of runs; write and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=6, help="pairs of windows")
    parser.add_argument("--seconds", type=float, default=12.0, help="of one window")
    parser.add_argument("--output", type=Path, default=RESULTS / "generation.json")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    for name, keys in RUNS.items():
        results[name] = found = measure(keys, given.windows, given.seconds)
        print(
            f"{name}: slower by {100 * found['slowdown']:.1f} % while texts are written at "
            f"{found['tokens_per_s']} tokens/s (bar {100 * found['bar']:.0f} %)"
        )
    document = {
        "machine": platform.machine(),
        "load_average_1_min": round(os.getloadavg()[0], 1),
        "sites": SITES,
        "writers": WRITERS,
        "model": SIZES,
        "windows": given.windows,
        "seconds": given.seconds,
        "runs": results,
    }
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
