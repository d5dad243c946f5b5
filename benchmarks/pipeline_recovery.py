"""What a stage costs whose last holder is gone, against other ways to go on.

``python benchmarks/pipeline_recovery.py`` trains a decoder in four stages on the built-in corpus,
in one process, and takes the weights and the optimizer of an inner stage away three times. Every
way to go on starts from the same weights, sees the same text and has the same time:

- ``best``: the product. Candidates from ``pipeline.candidates`` and the buddy's copy, 20 steps old;
  the least loss on 8 held-out micro-batches is taken; the stage's optimizer starts anew with a
  raised learning rate. ``best, no copy``: the buddy is gone as well.
- ``checkfree``: the average of both neighbours by squared gradient norms (arXiv 2506.15461), alone.
- ``fresh``: new random weights for the stage.
- ``rollback-N``: all stages return to a checkpoint, taken every N steps, and repeat what is lost.
- ``none``: nothing is ever lost.

Time is counted in steps, not seconds. A step has 16 micro-batches, as by default, of one sequence;
they are computed eight at a time, which changes nothing but speed. A micro-batch of a step is four
forwards' worth (forward, its recomputation, and a backward of two), one that scores a candidate is
one. Rollback pays for the steps it repeats, on the text it saw before, so it ends as a shorter run
without failures would, and its learning rate decays over just the steps it gets. Writing and
loading checkpoints, copies and neighbours is free for everybody.

Exits with 1 unless (1) whatever the product chose is, on held-out text that did not choose it, at
most 0.02 nat worse than the best alternative at hand, each time, and (2) the final loss of ``best``
is within 1 % of ``none`` in the mean over the seeds. Exits with 2 if leaving out the stage costs
``none`` less than 0.1 nat at more than one of the three losses of any seed: then nothing was lost
that matters. Writes JSON into ``results/``.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from local_training import Trainer, single_thread, write_result

from swarmtrain.training.data import Corpus, load_corpus
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.codecs.boundary import I32
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.pipeline.buddy import COPY_STEPS
from swarmtrain_protocols.pipeline.candidates import from_neighbours
from swarmtrain_protocols.pipeline.hops import plain_path, skipped_path
from swarmtrain_protocols.pipeline.rebuild import CALIBRATION_BATCHES

SIZES = {"d_model": 96, "layers": 4, "heads": 4, "context": 64}
STAGES = 4
LOST_AT = (0.44, 0.62, 0.80)
"""Share of the time at each loss."""
LOST = "3,3,3"
"""Stage of each loss; of the two inner ones, the one whose loss costs most (docs/log.md)."""
FORWARDS_PER_MICRO_BATCH = 4
MICRO_BATCHES = 16
AT_ONCE = 8
"""Micro-batches of one sequence that are computed in one call."""
TEST_CALLS = 32
INSTALL_NATS_MAX = 0.02
FINAL_RATIO_MAX = 1.01
BYPASS_NATS_MIN = 0.1
OURS = {"best": True, "best, no copy": False}
"""Whether the buddy's copy is there."""
ALONE = {"checkfree": "average-squared", "fresh": "fresh"}
ROLLBACK_STEPS = (100, 20)


class Run:
    """A trainer, the time it has used up (in steps), and what it needs for the loss of a stage.

    Args:
        copied: stages that their buddies keep copies of.
    """

    def __init__(self, keys: RunKeys, corpus: Corpus, copied: Iterable[int]) -> None:
        self.trainer = Trainer(keys, corpus)
        self.clock = 0.0
        self.copied = tuple(copied)
        self.past: deque[dict[int, F32]] = deque(maxlen=COPY_STEPS)
        calls = CALIBRATION_BATCHES // AT_ONCE + TEST_CALLS
        self.calibration, self.test = split(self.trainer.held_out(calls))

    def train(self, until: float) -> None:
        """Step until the clock says ``until``."""
        while self.clock + 1 <= until:
            self.past.append({s: self.trainer.theta[s].copy() for s in self.copied})
            self.trainer.step()
            self.clock += 1

    def fork(self) -> Run:
        """The same run once more, to go on differently."""
        other = copy.copy(self)
        other.trainer, other.past = copy.copy(self.trainer), self.past.copy()
        other.trainer.restore(self.trainer.saved())
        return other

    def candidates(self, stage: int, with_copy: bool) -> dict[str, F32]:
        """What the stage could go on with, as a recovery host builds it."""
        trainer, norms = self.trainer, self.trainer.square_norms
        blocks = range(1, trainer.keys.stages + 1)
        left, right = (trainer.theta[s] if s in blocks else None for s in (stage - 1, stage + 1))
        found = {"snapshot": self.past[0][stage]} if with_copy else {}
        return found | from_neighbours(
            left,
            right,
            (math.sqrt(norms[stage - 1]), math.sqrt(norms[(stage + 1) % len(norms)])),
            trainer.runtime.layout(stage),
            seed=trainer.keys.seed,
            stage=stage,
            depth=trainer.runtime.cut.depth,
        )

    def scored(self, stage: int, candidates: dict[str, F32], on: list[I32]) -> dict[str, float]:
        """The loss of each candidate in the place of the stage."""
        found = {}
        for name, theta in candidates.items():
            self.trainer.runtime.load(stage, theta)
            found[name] = self.trainer.loss(on)
        return found

    def bypass_nats(self, stage: int) -> float:
        """What leaving out a stage costs."""
        around = skipped_path(plain_path(self.trainer.keys.stages), stage)
        return self.trainer.loss(self.test, around) - self.trainer.loss(self.test)

    def lose(self, stage: int, alone: str | None, with_copy: bool = True) -> dict[str, Any]:
        """The stage is gone: go on with the product's choice, or with one candidate ``alone``."""
        before = self.trainer.loss(self.test)
        bypass = self.bypass_nats(stage)
        candidates = self.candidates(stage, with_copy)
        calibrated: dict[str, float] = {}
        if alone is None:
            calibrated = self.scored(stage, candidates, self.calibration)
            choice = min(calibrated, key=lambda name: calibrated[name])
            forwards = len(candidates) * CALIBRATION_BATCHES
            self.clock += forwards / (FORWARDS_PER_MICRO_BATCH * MICRO_BATCHES)
        else:
            choice = alone
            candidates = {choice: candidates[choice]}
        tested = self.scored(stage, candidates, self.test)
        self.trainer.install(stage, candidates[choice])
        return {
            "step": self.trainer.number,
            "stage": stage,
            "bypass_nats": bypass,
            "loss_before": before,
            "choice": choice,
            "calibration": calibrated,
            "test": tested,
        }


def split(held_out: list[I32]) -> tuple[list[I32], list[I32]]:
    """Windows that choose and windows that judge, both spread over the text, by calls."""
    windows = np.concatenate(held_out)
    stride = len(windows) // CALIBRATION_BATCHES
    chosen = np.arange(CALIBRATION_BATCHES) * stride
    judges = np.delete(windows, chosen, axis=0)
    return by_calls(windows[chosen]), by_calls(judges)


def by_calls(windows: I32) -> list[I32]:
    """Windows [n, context + 1] in groups of ``AT_ONCE``."""
    return [windows[k : k + AT_ONCE] for k in range(0, len(windows), AT_ONCE)]


def keys_of(seed: int, steps: int, sizes: dict[str, int]) -> RunKeys:
    """A run whose learning rate decays over ``steps``."""
    return RunKeys(
        seed=seed,
        preset="decoder-tiny",
        model=sizes,
        stages=STAGES,
        micro_batches=MICRO_BATCHES // AT_ONCE,
        batch_size=AT_ONCE,
        boundary_codec="int8",
        inner_warmup_steps=min(50, steps),
        total_steps=steps,
    )


def losses_at(steps: int) -> list[int]:
    """The time of each loss in steps."""
    return [round(share * steps) for share in LOST_AT]


def steps_left_by_rollback(steps: int, every: int) -> int:
    """How far a run gets in the time of ``steps`` that returns to a checkpoint at each loss."""
    done = clock = 0
    for at in losses_at(steps):
        done += at - clock
        clock = at
        done -= done % every
    return done + steps - clock


def run_seed(
    seed: int, steps: int, sizes: dict[str, int], corpus: Corpus, lost: list[int], alone: list[str]
) -> list[dict[str, Any]]:
    """Every way to go on, from one beginning. ``alone``: those of ``ALONE`` to try."""
    at = list(zip(losses_at(steps), lost, strict=True))
    beginning = Run(keys_of(seed, steps, sizes), corpus, lost)
    beginning.train(at[0][0])
    found = []
    for way in ("none", *OURS, *alone):
        run = beginning.fork()
        events, bypasses = [], []
        for time_of_loss, stage in at:
            run.train(time_of_loss)
            if way == "none":
                bypasses.append(run.bypass_nats(stage))
            else:
                events.append(run.lose(stage, ALONE.get(way), OURS.get(way, True)))
        run.train(steps)
        found.append({**result(seed, way, run, events), "bypass_nats": bypasses})
    for every in ROLLBACK_STEPS if alone else ():
        left = steps_left_by_rollback(steps, every)
        run = Run(keys_of(seed, left, sizes), corpus, ())
        run.train(left)
        found.append(result(seed, f"rollback-{every}", run, []))
    return found


def result(seed: int, way: str, run: Run, events: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run that is over; printed as well."""
    found = {
        "seed": seed,
        "way": way,
        "steps": run.trainer.number,
        "loss_last": run.trainer.loss(run.test),
        "failures": events,
    }
    brief = [(e["choice"], round(e["test"][e["choice"]] - e["loss_before"], 3)) for e in events]
    print(
        f"seed {seed} {way:14} {found['steps']:5} steps {found['loss_last']:.4f} {brief}",
        flush=True,
    )
    return found


def installs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each choice of the product beside what else was at hand, on text that did not choose."""
    found = []
    for run in runs:
        for event in run["failures"] if run["way"] in OURS else ():
            others = {n: v for n, v in event["test"].items() if n != event["choice"]}
            best = min(others, key=lambda name: others[name])
            found.append(
                {
                    "seed": run["seed"],
                    "way": run["way"],
                    "stage": event["stage"],
                    "bypass_nats": event["bypass_nats"],
                    "choice": event["choice"],
                    "jump_nats": event["test"][event["choice"]] - event["loss_before"],
                    "best_other": best,
                    "excess_nats": event["test"][event["choice"]] - others[best],
                }
            )
    return found


def finals(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By way to go on: the final loss, its ratio to that without failures, and the jumps."""
    base = {r["seed"]: r["loss_last"] for r in runs if r["way"] == "none"}
    found = {}
    for way in dict.fromkeys(r["way"] for r in runs):
        own = [r for r in runs if r["way"] == way]
        ratios = [r["loss_last"] / base[r["seed"]] for r in own]
        jumps = [e["test"][e["choice"]] - e["loss_before"] for r in own for e in r["failures"]]
        found[way] = {
            "steps": statistics.mean(r["steps"] for r in own),
            "loss": statistics.mean(r["loss_last"] for r in own),
            "ratio": statistics.mean(ratios),
            "ratio_worst_seed": max(ratios),
            "jump_mean_nats": statistics.mean(jumps) if jumps else 0.0,
        }
    return found


def verdict(
    bypasses: list[list[float]], chosen: list[dict[str, Any]], final: dict[str, dict[str, float]]
) -> int:
    """The exit code, with a line for each bar.

    Args:
        bypasses: by seed, what leaving out the stage cost at the time of each loss.
    """
    for each in bypasses:
        costs = ", ".join(f"{nats:.3f}" for nats in each)
        print(f"leaving out the stages costs {costs} nat (at least {BYPASS_NATS_MIN}, but for one)")
    if any(sum(nats < BYPASS_NATS_MIN for nats in each) > 1 for each in bypasses):
        return 2
    worst = max(each["excess_nats"] for each in chosen)
    print(f"a choice is at worst {worst:+.4f} nat above the best other (bar {INSTALL_NATS_MAX})")
    ratio = final["best"]["ratio"]
    print(f"the final loss of best is {ratio - 1:+.2%} of none (bar {FINAL_RATIO_MAX - 1:.0%})")
    fine = worst <= INSTALL_NATS_MAX and ratio <= FINAL_RATIO_MAX
    return 0 if fine else 1


def main(arguments: list[str] | None = None, sizes: dict[str, int] = SIZES) -> int:
    """Run everything, print the tables, write the result; the exit code of the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--lost", default=LOST, help="the stage of each loss")
    parser.add_argument("--only-ours", action="store_true", help="leave out the rivals")
    options = parser.parse_args(arguments)
    single_thread()
    corpus = load_corpus("stdlib")
    lost = [int(stage) for stage in options.lost.split(",")]
    alone = [] if options.only_ours else list(ALONE)
    runs = []
    for seed in options.seeds.split(","):
        runs += run_seed(int(seed), options.steps, sizes, corpus, lost, alone)
    chosen, final = installs(runs), finals(runs)
    print(f"\n{'way':14}{'steps':>7}{'loss':>9}{'vs none':>9}{'worst':>9}{'jump':>9}")
    for way, row in final.items():
        print(
            f"{way:14}{row['steps']:7.0f}{row['loss']:9.4f}{row['ratio'] - 1:+9.2%}"
            f"{row['ratio_worst_seed'] - 1:+9.2%}{row['jump_mean_nats']:+9.3f}"
        )
    code = verdict([r["bypass_nats"] for r in runs if r["way"] == "none"], chosen, final)
    document = {
        "what": "an inner stage lost three times: ways to go on, in the same time",
        "model": sizes,
        "steps": options.steps,
        "lost": lost,
        "final": final,
        "chosen": chosen,
        "runs": runs,
    }
    write_result("pipeline-recovery", document, options.output)
    return code


if __name__ == "__main__":
    sys.exit(main())
