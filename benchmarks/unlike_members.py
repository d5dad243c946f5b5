"""What one slow computer and one slow uplink among four members cost the others.

Runs of real processes on this machine, one after the other, with equal run keys: ``alike``, four
equal members; ``unlike``, four of which one takes five times as long for an inner step and one has
a tenth of the uplink; ``without``, the two others by themselves. Compute is made slow by pauses in
the steps of trainers, which stand for a device of their own: four trainers that share a processor
would slow each other down. Links are made slow by ``--up``. Each seed has its own order of runs.
Printed and written:

- ``round_rate_ratio``: rounds per second, ``unlike`` to ``alike`` and to ``without`` (bar 0.85).
  Rounds per second are those from the commit of round ``SETTLED`` to the last commit, over the
  seconds between, so that rounds that wait for a slow link count in full; before that members have
  not told each other how fast they are. With and without these rounds is in the file.
- per member, samples that it handed over, those that committed rounds count, and those that still
  wait: what is left out of a round goes along with the next contribution. ``lost`` is the rest.
- ``loss_ratio``: validation loss of θ at equal samples, ``unlike`` to ``alike`` (bar 1.01): the
  mean over the last third of the samples that both have seen, at each committed round of the
  ``alike`` run, linear between two rounds of the ``unlike`` one. The learning rate falls with the
  samples of all, so it is the same at the same sample in both. θ of every round is kept while
  training and evaluated afterwards.

    python -m benchmarks.unlike_members [--rounds 12] [--seeds 1] [--add] [--output FILE]

A seed takes five minutes, most of them rounds; ``--add`` puts it beside those of the output file.
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
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from swarmtrain.training import trainer
from swarmtrain.training.data import obtain_corpus
from swarmtrain.training.presets import build, evaluate
from swarmtrain.training.trainer import EVALUATION_WINDOWS, PresetTrainer, Signals
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.site import Site, enter_site, found_site
from swarmtrain_peer.spawn import spawn_peer, start_process, stop_process, watch_owner
from swarmtrain_protocols import limits
from swarmtrain_protocols.manifest import RunKeys
from tests.swarm.harness import CHANNEL, Seat

RESULTS = Path(__file__).parent / "results"
Document = dict[str, Any]
I64 = NDArray[np.int64]
MEMBERS = ("a", "b", "slow-compute", "slow-uplink")
KINDS = ("alike", "unlike", "without")
SLOW_COMPUTE, SLOW_UPLINK = 5, 10
PAUSE_S = 0.25
"""In each inner step, so that most of a step is not processor time."""
UP_BYTES_PER_S = 3_000_000
"""24 Mbit/s."""
INNER_STEPS, BATCH = 20, 4
MODEL = {"d_model": 128, "layers": 4, "heads": 4, "context": 64}
RATE_BAR, LOSS_BAR = 0.85, 1.01
SETTLED = 3
ROUND_S_MAX = 60.0
"""A round that takes longer is a failure."""
START_S_MAX = 240.0
"""Eight processes of which four load torch, and a first round."""
SHARE_WITHOUT = 1 / 3
"""Of the samples of the other runs: only its rate is of interest."""


class PausingTrainer(PresetTrainer):
    """A preset trainer whose inner steps take ``pause_s`` longer; ``thetas`` keeps θ by round."""

    pause_s = 0.0
    thetas: Path | None = None
    _shown: tuple[int, ...] = ()

    def _step(self, tokens: I64, targets: I64) -> None:
        begun_s = time.monotonic()
        if self.thetas is not None and self.swarm.shown() != self._shown:
            self._shown = self.swarm.shown()
            round_, vectors = self.swarm.theta()
            named = {k: v.numpy() for k, v in self.swarm.state_dict(vectors).items()}
            np.savez(self.thetas / f"{round_}.npz", **named)
        # This is the slow device at work, and nothing else waits for it.
        time.sleep(max(0.0, self.pause_s - (time.monotonic() - begun_s)))
        super()._step(tokens, targets)


def train(folder: Path, pause_s: float, thetas: Path | None) -> None:
    """The trainer process of a site."""
    site = Site(folder)
    torch.set_num_threads(1)
    with Signals() as signals:
        watch_owner(lambda: os._exit(0))
        keys = trainer.await_run_keys(site, limits.TRAINER_WAIT_S_MAX, signals.event)
        found = PausingTrainer(site, keys, torch.device("cpu"), signals)
        found.pause_s, found.thetas = pause_s, thetas
        found.swarm.on("progress_dropped", lambda e: sys.stderr.write(json.dumps(e) + "\n"))
        try:
            found.train(0)
        finally:
            found.swarm.close(5.0 if signals.received else None)


def keys_of(seed: int, planned: int, members: int) -> RunKeys:
    """``planned`` rounds of four like members are the schedule of the learning rate."""
    return RunKeys(
        name="unlike-members",
        seed=seed,
        model=MODEL,
        batch_size=BATCH,
        inner_steps=INNER_STEPS,
        inner_warmup_steps=20,
        total_steps=planned * INNER_STEPS * len(MEMBERS) // members,
        outer_lr=1.0,
        outer_momentum=0.0,
        overlap="eager",
        start_peers=members,
    )


class Run:
    """The members of one run, each a peer process and a trainer; use as a context manager."""

    def __init__(self, folder: Path, kind: str, seed: int, planned: int) -> None:
        self.folder = folder
        self.unlike = kind == "unlike"
        self.members = MEMBERS[:2] if kind == "without" else MEMBERS
        self.keys = keys_of(seed, planned, len(self.members))
        self.seats: dict[str, Seat] = {}
        self._trainers: list[subprocess.Popen[bytes]] = []

    def _config(self, name: str) -> PeerConfig:
        slow = self.unlike and name == "slow-uplink"
        up = UP_BYTES_PER_S // (SLOW_UPLINK if slow else 1)
        return PeerConfig(name=name, listen="127.0.0.1:0", votes=True, up_bytes_per_s=up)

    def __enter__(self) -> Run:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for name in self.members:
            config = self._config(name)
            if not self.seats:
                site = found_site(self.folder / name, self.keys, config)
            else:
                ticket = next(iter(self.seats.values())).ticket()
                site = enter_site(self.folder / name, ticket, config)
            self.seats[name] = Seat(site, name)
            self.seats[name].process = spawn_peer(site)
            self.seats[name].follow()
            self._start_trainer(name, site)

    def _start_trainer(self, name: str, site: Site) -> None:
        slow = self.unlike and name == "slow-compute"
        # What a step takes beyond the pause is a small part of it, and not made slower.
        pause_s = PAUSE_S * (SLOW_COMPUTE if slow else 1)
        command = [sys.executable, "-m", "benchmarks.unlike_members"]
        command += ["--trainer", str(site.folder), "--pause-s", f"{pause_s:g}"]
        if name == "a":
            (self.folder / "thetas").mkdir()
            command += ["--thetas", str(self.folder / "thetas")]
        self._trainers.append(start_process(command, site.folder / "trainer.log", nice=5))

    def __exit__(self, *unused: object) -> None:
        for process in reversed(self._trainers):
            stop_process(process)
        for seat in reversed(self.seats.values()):
            seat.stop()

    def committed(self) -> list[Document]:
        """Committed rounds, in order, as the first member knows them."""
        found = self.seats["a"].call("rounds", {"last": 64})["rounds"]
        return [r for r in found if r["channel"] == CHANNEL and r["outcome"] == "committed"]

    def wait_samples(self, samples: float) -> list[Document]:
        """The committed rounds, once they count so many samples."""
        rounds: list[Document] = []
        while not rounds or sum(map(samples_of, rounds)) < samples:
            patience_s = ROUND_S_MAX if rounds else START_S_MAX
            self.seats["a"].wait_applied(len(rounds) + 1, timeout_s=patience_s)
            rounds = self.committed()
        return rounds

    def losses(self) -> dict[int, float]:
        """Validation loss of θ before each round that was kept, nats per byte."""
        keys = {name: getattr(self.keys, name) for name in RunKeys.__struct_fields__}
        corpus = obtain_corpus(self.seats["a"].site, self.keys, 0.0, threading.Event())
        preset = build(keys, torch.device("cpu"))
        tokens, targets = map(
            torch.from_numpy, corpus.evaluation(EVALUATION_WINDOWS, preset.context)
        )
        found = {}
        for path in sorted((self.folder / "thetas").glob("*.npz")):
            with np.load(path, allow_pickle=False) as kept:
                state = {name: torch.from_numpy(kept[name]) for name in kept.files}
            preset.model.load_state_dict(state, strict=False)
            found[int(path.stem)] = evaluate(preset.model.eval(), tokens, targets)
        return found


def samples_of(round_: Document) -> float:
    return float(sum(c["samples"] for c in round_["contributors"]))


def accounts(run: Run, rounds: list[Document]) -> dict[str, Document]:
    """What became of what each member has handed over; the trainers have ended."""
    names = {seat.id: name for name, seat in run.seats.items()}
    found: dict[str, Document] = {}
    for name, seat in run.seats.items():
        mine = [
            (c["samples"], c["coefficient"])
            for r in rounds
            for c in r["contributors"]
            if names[c["id"]] == name
        ]
        given = [r for r in seat.events("handover") if r["channel"] == CHANNEL]
        sums = list(itertools.accumulate(r["samples"] for r in given))
        counted = sum(samples for samples, _ in mine)
        # What is counted is what was handed over up to some phase; later ones wait.
        whole = counted == 0 or counted in sums
        log = (seat.site.folder / "trainer.log").read_text(errors="replace")
        found[name] = {
            "handed_over": sums[-1] if sums else 0.0,
            "counted": counted,
            "waiting": sums[-1] - counted if whole and sums else None,
            "lost": 0.0 if whole else None,
            "progress_dropped": log.count('"progress_dropped"'),
            "rounds": len(mine),
            "phases_counted_in_a_later_round": max(0, sum(s <= counted for s in sums) - len(mine)),
            "median_steps_per_phase": statistics.median(r["inner_steps"] for r in given),
        }
    return found


def rates(run: Run, rounds: int) -> Document:
    """Rounds per second, of the first ``rounds``; what comes later came when the run was ended."""
    events = [r for r in run.seats["a"].events("round_committed") if r["channel"] == CHANNEL]
    times = [r["mono_s"] for r in events if r["round"] < rounds]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    settled = gaps[SETTLED:]
    return {
        "rounds": len(times),
        "aborted": len(run.seats["a"].events("round_aborted")),
        "round_s": [round(gap, 2) for gap in gaps],
        "median_round_s": round(statistics.median(settled), 3),
        "rounds_per_s": len(settled) / sum(settled),
        "rounds_per_s_from_the_first": len(gaps) / sum(gaps),
    }


def measure(kind: str, seed: int, planned: int) -> Document:
    """One run until it has the samples of ``planned`` rounds of four like members."""
    sys.stderr.write(f"seed {seed}, {kind}: begins\n")
    samples = planned * INNER_STEPS * BATCH * len(MEMBERS)
    with tempfile.TemporaryDirectory() as folder:
        with Run(Path(folder), kind, seed, planned) as run:
            rounds = run.wait_samples(samples * SHARE_WITHOUT if kind == "without" else samples)
            load = os.getloadavg()[0]
        found = {**rates(run, len(rounds)), "load_average_1_min": round(load, 1)}
        if kind != "without":
            progress = [0.0, *itertools.accumulate(map(samples_of, rounds))]
            losses = run.losses()
            found["members"] = accounts(run, rounds)
            found["loss_by_samples"] = [
                [progress[n], round(losses[n], 5)] for n in sorted(losses) if n < len(progress)
            ]
    return found


def loss_at(curve: list[list[float]], samples: float) -> float:
    """Linear between the evaluations on either side."""
    for (before, low), (after, high) in itertools.pairwise(curve):
        if before <= samples <= after:
            return low + (high - low) * (samples - before) / (after - before)
    raise ValueError(f"nothing was evaluated around {samples} samples")


def compare(seed: int, rounds: int) -> Document:
    """All runs of one seed, in an order of its own."""
    turn = seed % len(KINDS)
    found = {kind: measure(kind, seed, rounds) for kind in (*KINDS[turn:], *KINDS[:turn])}
    alike, unlike = (found[kind]["loss_by_samples"] for kind in ("alike", "unlike"))
    end = min(alike[-1][0], unlike[-1][0])
    points = [point for point in alike if 2 * end / 3 <= point[0] <= end]
    ratios = [loss_at(unlike, samples) / loss for samples, loss in points]
    rate = found["unlike"]["rounds_per_s"]
    return {
        "seed": seed,
        "order": list(found),
        "round_rate_ratio": round(rate / found["alike"]["rounds_per_s"], 4),
        "round_rate_ratio_to_the_two_alone": round(rate / found["without"]["rounds_per_s"], 4),
        "loss_ratio": round(statistics.fmean(ratios), 4),
        "loss_ratios": [
            [samples, round(r, 4)] for (samples, _), r in zip(points, ratios, strict=True)
        ],
        **found,
    }


def tell(one: Document) -> None:
    for kind in KINDS:
        run = one[kind]
        print(
            f"seed {one['seed']}, {kind}: {1 / run['rounds_per_s']:.2f} s a round "
            f"(median {run['median_round_s']:.2f}), {run['rounds']} rounds, "
            f"{run['aborted']} aborted"
        )
        for name, member in run.get("members", {}).items():
            print(
                f"  {name}: {member['handed_over']:.0f} samples handed over in phases of "
                f"{member['median_steps_per_phase']:g} steps, {member['counted']:.0f} counted in "
                f"{member['rounds']} rounds, {member['waiting']} wait, {member['lost']} lost"
            )
    print(
        f"round rate ratio {one['round_rate_ratio']:.3f} to four alike, "
        f"{one['round_rate_ratio_to_the_two_alone']:.3f} to the two alone (bar {RATE_BAR}); "
        f"loss ratio at equal samples {one['loss_ratio']:.4f} (bar {LOSS_BAR})",
        flush=True,
    )


def main() -> None:
    """Measure every seed; write and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="of four like members")
    parser.add_argument("--seeds", default="1", help="comma separated")
    parser.add_argument("--add", action="store_true", help="to the seeds in the output file")
    parser.add_argument("--output", type=Path, default=RESULTS / "unlike-members.json")
    parser.add_argument("--trainer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pause-s", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--thetas", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trainer is not None:
        train(given.trainer, given.pause_s, given.thetas)
        return
    known = json.loads(given.output.read_text())["seeds"] if given.add else []
    seeds = [int(seed) for seed in given.seeds.split(",")]
    results = [one for one in known if one["seed"] not in seeds]
    for seed in seeds:
        results.append(compare(seed, given.rounds))
        tell(results[-1])
    names = ("round_rate_ratio", "round_rate_ratio_to_the_two_alone", "loss_ratio")
    mean = {name: round(statistics.fmean(one[name] for one in results), 4) for name in names}
    document = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
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
    given.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"mean: {mean}; written to {given.output}")


if __name__ == "__main__":
    main()
