"""What one slow computer and one slow uplink among four members cost the others.

Two runs of real processes on this machine, one after the other, with equal run keys: four members
alike, then four of which one takes five times as long for an inner step and one has a tenth of the
uplink. Compute is made slow by pauses in the trainer's steps, because four trainers that share a
processor would slow each other down; links by ``--up``. Printed and written:

- ``round_rate_ratio``: rounds per second from the first commit to the last, unlike to alike
  (bar 0.85);
- per member, samples that it handed over and samples that committed rounds count;
- ``loss_ratio``: validation loss at the most samples that both runs have been evaluated at (linear
  between evaluations), unlike to alike (bar 1.01); the learning rate falls with the samples of all,
  so it is the same at the same sample in both.

    python benchmarks/unlike_members.py [--rounds 15] [--seeds 1] [--output FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from swarmtrain.training import trainer
from swarmtrain.training.trainer import PresetTrainer, Signals
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.control import ControlClient
from swarmtrain_peer.site import Site, enter_site, found_site
from swarmtrain_peer.spawn import spawn_peer, start_process, stop_process, watch_owner
from swarmtrain_protocols import limits
from swarmtrain_protocols.manifest import RunKeys, Ticket

RESULTS = Path(__file__).parent / "results"
Document = dict[str, Any]
I64 = NDArray[np.int64]
CHANNEL = "train/0/0"
MEMBERS = ("a", "b", "slow-compute", "slow-uplink")
SLOW_COMPUTE, SLOW_UPLINK = 5, 10
PAUSE_S = 0.25
"""In each inner step, so that most of a step is not processor time."""
UP_BYTES_PER_S = 3_000_000
"""24 Mbit/s."""
INNER_STEPS, BATCH = 20, 4
MODEL = {"d_model": 128, "layers": 4, "heads": 4, "context": 64}
RATE_BAR, LOSS_BAR = 0.85, 1.01
POLL_S = 0.5
EVALUATED_EVERY = 5
"""Rounds between two evaluations of a run."""


class PausingTrainer(PresetTrainer):
    """A preset trainer whose inner steps take ``pause_s`` longer."""

    pause_s = 0.0

    def _step(self, tokens: I64, targets: I64) -> None:
        time.sleep(self.pause_s)
        super()._step(tokens, targets)


def train(folder: Path, pause_s: float) -> None:
    """The trainer process of a site."""
    site = Site(folder)
    torch.set_num_threads(1)
    with Signals() as signals:
        watch_owner(lambda: os._exit(0))
        keys = trainer.await_run_keys(site, limits.TRAINER_WAIT_S_MAX, signals.event)
        found = PausingTrainer(site, keys, torch.device("cpu"), signals)
        found.pause_s = pause_s
        try:
            found.train(0)
        finally:
            found.swarm.close(5.0 if signals.received else None)


def keys_of(seed: int, planned: int) -> RunKeys:
    """``planned`` rounds of four like members are the schedule of the learning rate."""
    return RunKeys(
        name="unlike-members",
        seed=seed,
        model=MODEL,
        batch_size=BATCH,
        inner_steps=INNER_STEPS,
        inner_warmup_steps=20,
        total_steps=planned * INNER_STEPS,
        outer_lr=1.0,
        outer_momentum=0.0,
        overlap="eager",
        start_peers=len(MEMBERS),
    )


def config_of(name: str, unlike: bool) -> PeerConfig:
    slow = unlike and name == "slow-uplink"
    up = UP_BYTES_PER_S // (SLOW_UPLINK if slow else 1)
    return PeerConfig(name=name, listen="127.0.0.1:0", votes=True, up_bytes_per_s=up)


class Swarm:
    """The four members of one run; use as a context manager."""

    def __init__(self, folder: Path, keys: RunKeys, unlike: bool) -> None:
        self._folder = folder
        self._unlike = unlike
        self._processes: list[subprocess.Popen[bytes]] = []
        founder = found_site(folder / "a", keys, config_of("a", unlike))
        self.sites = {"a": founder}

    def __enter__(self) -> Swarm:
        founder = self.sites["a"]
        self._processes.append(spawn_peer(founder))
        with founder.connect() as client:
            ticket = Ticket.parse(client.call("ticket", {"vote": True})["ticket"])
        for name in MEMBERS[1:]:
            site = enter_site(self._folder / name, ticket, config_of(name, self._unlike))
            self._processes.append(spawn_peer(site))
            self.sites[name] = site
        for name, site in self.sites.items():
            slow = self._unlike and name == "slow-compute"
            # What a step takes beyond the pause is a small part of it, and not made slower.
            pause_s = PAUSE_S * (SLOW_COMPUTE if slow else 1)
            command = [sys.executable, __file__, "--trainer", str(site.folder)]
            command += ["--pause-s", f"{pause_s:g}"]
            self._processes.append(start_process(command, site.folder / "trainer.log", nice=5))
        return self

    def __exit__(self, *unused: object) -> None:
        for process in reversed(self._processes):
            stop_process(process)


def wait_rounds(client: ControlClient, rounds: int, timeout_s: float) -> None:
    """Wait until so many rounds are committed and the last of them has been evaluated."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        records = client.call("events", {"last": 400})["events"]
        if any(r["name"] == "evaluated" and r.get("round") == rounds for r in records):
            return
        time.sleep(POLL_S)
    raise SystemExit(f"{rounds} rounds took more than {timeout_s:g} s")


def events_of(site: Site) -> list[Document]:
    return [json.loads(line) for line in site.events_path.read_text().splitlines()]


def measure(seed: int, rounds: int, planned: int, unlike: bool) -> Document:
    """One run: rate of rounds, samples per member, loss by samples."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Swarm(Path(folder), keys_of(seed, planned), unlike) as swarm,
    ):
        with swarm.sites["a"].connect() as client:
            wait_rounds(client, rounds, 60.0 + 60.0 * rounds)
            committed = [
                r
                for r in client.call("rounds", {"last": 64})["rounds"]
                if r["channel"] == CHANNEL and r["outcome"] == "committed"
            ]
            names = {p["id"]: p["name"] for p in client.call("peers")["peers"]}
        seen = {name: events_of(site) for name, site in swarm.sites.items()}
    own = seen["a"]
    times = {r["round"]: r["mono_s"] for r in own if r["name"] == "round_committed"}
    first, last = min(times), max(times)
    counted = dict.fromkeys(MEMBERS, 0.0)
    rounds_in = dict.fromkeys(MEMBERS, 0)
    discounted = dict.fromkeys(MEMBERS, 0)
    progress, total = {0: 0.0}, 0.0
    for item in committed:
        weights = {c["id"]: c["coefficient"] / c["samples"] for c in item["contributors"]}
        for one in item["contributors"]:
            name = names[one["id"]]
            counted[name] += one["samples"]
            rounds_in[name] += 1
            discounted[name] += weights[one["id"]] < 0.999 * max(weights.values())
            total += one["samples"]
        progress[item["round"] + 1] = total
    handed = {
        name: sum(r["samples"] for r in records if r["name"] == "handover")
        for name, records in seen.items()
    }
    steps = {
        name: [r["inner_steps"] for r in records if r["name"] == "handover"]
        for name, records in seen.items()
    }
    losses = {r["round"]: r["loss"] for r in own if r["name"] == "evaluated"}
    return {
        "rounds": len(committed),
        "aborted": sum(r["name"] == "round_aborted" for r in own),
        "round_s": round((times[last] - times[first]) / (last - first), 3),
        "rounds_per_s": (last - first) / (times[last] - times[first]),
        "samples_handed_over": handed,
        "samples_counted": counted,
        "rounds_counted_in": rounds_in,
        "rounds_counted_discounted": discounted,
        "median_steps_per_phase": {n: statistics.median(s) for n, s in steps.items() if s},
        "loss_by_samples": [[progress[n], losses[n]] for n in sorted(losses) if n in progress],
    }


def loss_at(curve: list[list[float]], samples: float) -> float:
    """Linear between the evaluations on either side."""
    for (before, low), (after, high) in itertools.pairwise(curve):
        if before <= samples <= after:
            return low + (high - low) * (samples - before) / (after - before)
    raise ValueError(f"nothing was evaluated around {samples} samples")


def compare(seed: int, rounds: int) -> Document:
    """Both runs of one seed. The unlike one needs more rounds for the same samples."""
    share = (len(MEMBERS) - 1 + 1 / SLOW_COMPUTE) / len(MEMBERS)
    more = -(-round(rounds / share) // EVALUATED_EVERY) * EVALUATED_EVERY
    found = {
        "alike": measure(seed, rounds, rounds, unlike=False),
        "unlike": measure(seed, more, rounds, unlike=True),
    }
    curves = {kind: one["loss_by_samples"] for kind, one in found.items()}
    samples = min(curve[-1][0] for curve in curves.values())
    losses = {kind: loss_at(curve, samples) for kind, curve in curves.items()}
    return {
        "seed": seed,
        "round_rate_ratio": round(
            found["unlike"]["rounds_per_s"] / found["alike"]["rounds_per_s"], 4
        ),
        "samples": samples,
        "loss_at_samples": {kind: round(loss, 4) for kind, loss in losses.items()},
        "loss_ratio": round(losses["unlike"] / losses["alike"], 4),
        **found,
    }


def tell(one: Document) -> None:
    for kind in ("alike", "unlike"):
        print(f"seed {one['seed']}, {kind}: {one[kind]['round_s']:.2f} s a round")
        for name in MEMBERS:
            counted = one[kind]["samples_counted"][name]
            handed = one[kind]["samples_handed_over"].get(name, 0.0)
            print(
                f"  {name}: {counted:.0f} of {handed:.0f} samples handed over are counted, in "
                f"{one[kind]['rounds_counted_in'][name]} of {one[kind]['rounds']} rounds, "
                f"{one[kind]['rounds_counted_discounted'][name]} of them at a discount"
            )
    print(f"round rate ratio {one['round_rate_ratio']:.3f} (bar {RATE_BAR})")
    at = one["loss_at_samples"]
    print(
        f"loss at {one['samples']:.0f} samples: {at['unlike']:.4f} against {at['alike']:.4f}, "
        f"ratio {one['loss_ratio']:.4f} (bar {LOSS_BAR})"
    )


def main() -> None:
    """Measure every seed; write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of like members, fives")
    parser.add_argument("--seeds", default="1", help="comma separated")
    parser.add_argument("--output", type=Path, default=RESULTS / "unlike_members.json")
    parser.add_argument("--trainer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pause-s", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trainer is not None:
        train(given.trainer, given.pause_s)
        return
    results = []
    for seed in map(int, given.seeds.split(",")):
        results.append(compare(seed, given.rounds))
        tell(results[-1])
    mean = {
        name: round(statistics.fmean(one[name] for one in results), 4)
        for name in ("round_rate_ratio", "loss_ratio")
    }
    document = {
        "machine": platform.machine(),
        "load_average_1_min": round(os.getloadavg()[0], 1),
        "pause_s": PAUSE_S,
        "slow_compute": SLOW_COMPUTE,
        "slow_uplink": SLOW_UPLINK,
        "up_bytes_per_s": UP_BYTES_PER_S,
        "inner_steps": INNER_STEPS,
        "model": MODEL,
        "bars": {"round_rate_ratio": RATE_BAR, "loss_ratio": LOSS_BAR},
        "mean": mean,
        "seeds": results,
    }
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(json.dumps(document, indent=2) + "\n")
    print(f"mean: {mean}; written to {given.output}")


if __name__ == "__main__":
    main()
