"""Many schedules in a row: ``python -m swarmtrain_protocols.testing.nightly --schedules N``.

Prints every violation with its seed, its shrunk schedule and the last events, then the counters.
Exit status 1 if there was a violation, or if a "sometimes" point fired too rarely: in fewer than
one of a hundred schedules, rounded up, so that a hundred schedules or fewer must show each point
once. One process; ``make sim-nightly`` (``tests/nightly.py``) runs shards of all kinds beside each
other and adds them up. ``--kind`` says what is simulated: rounds, pipelines, pipelines that step
by themselves (local) or lose whole stages (losses), dealt data, members that differ (unlike), three
sites (small). ``--schedule FILE`` runs the schedule of a file (``schedules``; ``-``: standard
input) and no other. ``--traces`` also tells the hash of what happened in each schedule.
"""

from __future__ import annotations

import argparse
import fileinput
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from swarmtrain_protocols.testing.checks.base import missing
from swarmtrain_protocols.testing.faults import Fault, shrink
from swarmtrain_protocols.testing.local_swarm import run_local
from swarmtrain_protocols.testing.pipeline_losses import run_losses
from swarmtrain_protocols.testing.pipeline_swarm import run_pipeline
from swarmtrain_protocols.testing.schedules import from_json, to_json
from swarmtrain_protocols.testing.shard_swarm import run_data_swarm
from swarmtrain_protocols.testing.small import run_small
from swarmtrain_protocols.testing.swarm import Outcome, run_swarm
from swarmtrain_protocols.testing.unlike_swarm import run_unlike
from swarmtrain_protocols.testing.world import Violation

SHRINK_RUNS_MAX = 80

SOMETIMES = (
    *("fault:crash", "fault:pause", "fault:cut", "fault:cut1", "fault:isolate", "fault:split"),
    *("fault:slow", "fault:lossy", "fault:duplicate", "fault:slowdisk", "fault:vanish"),
    *("fault:aim-crash", "fault:aim-cut", "fault:aim-pause", "fault:aim-power"),
    *("fault:power", "fault:sleep", "fault:flap", "fault:slownode", "fault:reorder", "fault:tail"),
    *("fault:noisy", "fault:wall", "fault:drift", "fault:jump", "fault:diskfull", "fault:rot"),
    *("fault:flip", "flip:named", "flip:mended", "spoilt:rot", "disk:full", "disk:full-relied"),
    *("net:lost", "net:reset", "net:doubled", "net:dial-failed", "net:lost-in-cut"),
    *("net:flipped", "net:held-back", "net:tail", "disk:lost", "disk:file-lost"),
    *("fetch:done", "fetch:disconnected", "fetch:corrupt", "fetch:refused:unknown"),
    *("round:train", "round:group", "round:partial", "round:later-attempt", "group:done"),
    *("decided:committed", "decided:excluded", "decided:aborted"),
    *("abort:contributions did not arrive", "abort:holders did not report in time"),
    *("abort:too many holders lost", "abort:a chosen contribution is lost"),
    "notice:fallback:deputy",
    *("notice:fallback:result by committed root", "resync:nobody serves the result of round"),
    *("overlap:eager", "entry:MemberJoined", "entry:StewardsChanged", "entry:RoundAborted"),
    *("send:vote", "send:takeover", "send:round?", "send:redirect", "send:withdraw"),
    *("send:state-snapshot", "aim:send:holding", "aim:do:ReducePart", "aim:do:StoreResult"),
)
"""Points that must fire in at least one of a hundred schedules, or too little is tested."""

PIPELINE_SOMETIMES = (
    *("fault:crash", "fault:pause", "fault:cut", "fault:cut1", "fault:isolate", "fault:split"),
    *("fault:slow", "fault:lossy", "fault:duplicate", "fault:slowdisk"),
    *("fault:aim-crash", "fault:aim-cut", "fault:aim-pause", "trainer:killed"),
    *("fault:power", "fault:sleep", "fault:flap", "fault:slownode", "fault:reorder", "fault:tail"),
    *("fault:noisy", "fault:wall", "fault:drift", "fault:jump", "fault:diskfull"),
    *("net:lost", "net:reset", "net:doubled", "net:dial-failed", "net:lost-in-cut"),
    *("step:committed", "step:aborted", "step:partial", "pipeline:undo", "send:reopen"),
    *("event:HopDone:timeout", "event:HopDone:closing", "event:HopDone:not_ready"),
    *("event:HopDone:disconnected", "event:HopDone:failed", "event:HopDone:not_served"),
    *("notice:fallback:deputy", "fetch:corrupt", "tensor:corrupt"),
    *("aim:send:hop", "aim:do:Compute", "aim:do:HandOver", "aim:send:step-ready"),
)
"""The same for pipelines."""

DATA_SOMETIMES = (
    *("fault:crash", "fault:cut", "fault:split", "fault:vanish", "fault:aim-crash"),
    *("data:committed", "data:aborted", "data:excluded", "data:starved", "entry:MemberLeft"),
    "notice:message_ignored:stale_claim",
)
"""The same where data are dealt in shards."""

UNLIKE_SOMETIMES = (
    *("fault:crash", "fault:pause", "fault:cut", "fault:slow", "late:0", "late:1"),
    *("round:train", "round:partial", "decided:committed", "decided:excluded", "decided:aborted"),
)
"""The same for members that differ."""

LOCAL_SOMETIMES = (
    *("fault:crash", "fault:pause", "fault:cut", "fault:isolate", "fault:split", "fault:lossy"),
    *("local:step", "trainer:killed", "round:train", "round:partial", "entry:RoundAborted"),
    *("decided:committed", "decided:excluded", "decided:aborted"),
)
"""The same where stages step by themselves."""

LOSSES_SOMETIMES = (
    *("entry:StageLost", "entry:StageRecovered", "recovered:kept", "recovered:snapshot"),
    *("fault:crash", "fault:pause", "fault:split", "step:aborted", "step:committed"),
)
"""The same where all workers of a stage die at once."""


def lose_stages(seed: int, schedule: Sequence[Fault] | None = None) -> Outcome:
    """A pipeline that loses whole stages, as one schedule among others; it has only its own."""
    outcome = Outcome(seed, [])
    try:
        swarm = run_losses(seed)
    except Violation as broken:
        outcome.violation, outcome.text = broken.kind, str(broken)
        return outcome
    outcome.seen, outcome.committed = swarm.world.seen, len(swarm.steps.committed)
    outcome.aborted, outcome.simulated_s = swarm.steps.aborted, swarm.world.now
    outcome.trace = swarm.world.trace.digest()
    return outcome


Run = Callable[..., Outcome]
"""(seed, schedule or nothing) -> what came of it."""
KINDS: dict[str, tuple[Run, Sequence[str]]] = {
    "rounds": (run_swarm, SOMETIMES),
    "pipelines": (run_pipeline, PIPELINE_SOMETIMES),
    "local": (run_local, LOCAL_SOMETIMES),
    "losses": (lose_stages, LOSSES_SOMETIMES),
    "data": (run_data_swarm, DATA_SOMETIMES),
    "unlike": (run_unlike, UNLIKE_SOMETIMES),
    "small": (run_small, ()),
}


@dataclass
class Report:
    """Sums over many schedules."""

    sometimes: Sequence[str] = SOMETIMES
    schedules: int = 0
    committed: int = 0
    aborted: int = 0
    simulated_s: float = 0.0
    recovery_s_max: float = 0.0
    failures: list[Outcome] = field(default_factory=list)
    seen: list[dict[str, int]] = field(default_factory=list)
    traces: dict[int, str] = field(default_factory=dict)
    """By seed."""

    def add(self, outcome: Outcome) -> None:
        self.schedules += 1
        self.committed += outcome.committed
        self.aborted += outcome.aborted
        self.simulated_s += outcome.simulated_s
        self.recovery_s_max = max(self.recovery_s_max, outcome.recovery_s)
        self.seen.append(dict.fromkeys(sorted(n for n in outcome.seen if outcome.seen[n] > 0), 1))
        self.traces[outcome.seed] = outcome.trace
        if outcome.violation:
            self.failures.append(outcome)

    def missing(self) -> list[str]:
        return missing(self.seen, self.sometimes)

    def counters(self) -> list[tuple[str, int]]:
        total: Counter[str] = Counter()
        for names in self.seen:
            total.update(names)
        return sorted(total.items())

    def as_json(self, kind: str, *, traces: bool = False) -> str:
        """One line for whoever adds up shards: figures, and in how many schedules a point fired.

        ``traces``: also the hash of each schedule's trace, by its seed.
        """
        figures: dict[str, object] = {
            "kind": kind,
            "schedules": self.schedules,
            "violations": [[item.seed, item.violation] for item in self.failures],
            "committed": self.committed,
            "aborted": self.aborted,
            "simulated_s": self.simulated_s,
            "recovery_s_max": self.recovery_s_max,
            "fired": dict(self.counters()),
            "sometimes": list(self.sometimes),
            **({"traces": self.traces} if traces else {}),
        }
        return json.dumps(figures)

    def summary(self) -> str:
        return (
            f"schedules={self.schedules} violations={len(self.failures)} "
            f"committed={self.committed} aborted={self.aborted} "
            f"simulated_s={self.simulated_s:.0f} recovery_s_max={self.recovery_s_max:.1f}"
        )


def run_many(
    seeds: Iterable[int],
    tell: Callable[[str], None] = lambda text: None,
    *,
    shrunk: bool = False,
    run: Run = run_swarm,
    sometimes: Sequence[str] = SOMETIMES,
) -> Report:
    """Run the schedule of each seed; ``tell`` gets a line of text per violation."""
    report = Report(sometimes)
    for seed in seeds:
        outcome = run(seed)
        report.add(outcome)
        if outcome.violation:
            tell(explain(outcome, shrunk=shrunk, run=run))
    return report


def explain(outcome: Outcome, *, shrunk: bool = False, run: Run = run_swarm) -> str:
    """All that is needed to replay and to understand a violation."""
    schedule = outcome.schedule
    note = f"{len(schedule)} faults"
    if shrunk:

        def fails(faults: list[Fault]) -> str | None:
            return run(outcome.seed, faults).violation or None

        schedule, runs = shrink(fails, schedule, SHRINK_RUNS_MAX)
        note += f", shrunk to {len(schedule)} in {runs} runs"
    kind = next((name for name, (known, _) in KINDS.items() if known is run), run.__name__)
    return (
        f"seed {outcome.seed}: {outcome.text}\n{note}; replay with nightly --schedule FILE\n"
        f"{to_json(kind, outcome.seed, schedule, outcome.violation)}last events:\n"
        + "\n".join(outcome.tail)
    )


def replay(text: str, tell: Callable[[str], None], *, shrunk: bool = False) -> Outcome:
    """Run the schedule of a file; ``tell`` gets what came of it."""
    wanted = from_json(text)
    run = KINDS[wanted.kind][0]
    outcome = run(wanted.seed, wanted.listed())
    if outcome.violation:
        tell(explain(outcome, shrunk=shrunk, run=run))
    tell(f"{wanted.kind} {wanted.seed}: {outcome.violation or 'no violation'}")
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="nightly", description=__doc__)
    parser.add_argument("--schedules", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th seed, from the I-th")
    parser.add_argument("--shrink", action="store_true", help="shrink what fails")
    parser.add_argument("--kind", choices=sorted(KINDS), default="rounds")
    parser.add_argument("--json", action="store_true", help="figures as JSON; the rest to stderr")
    parser.add_argument("--traces", action="store_true", help="hashes of what happened")
    parser.add_argument("--schedule", metavar="FILE", help="run this one; - for standard input")
    given = parser.parse_args(argv)
    index, count = (int(part) for part in given.shard.split("/"))
    seeds = range(given.seed + index, given.seed + given.schedules, count)

    out = sys.stderr if given.json else sys.stdout

    def tell(text: str) -> None:
        out.write(text + "\n")
        out.flush()

    if given.schedule:
        with fileinput.input(given.schedule) as lines:
            text = "".join(lines)
        return 1 if replay(text, tell, shrunk=given.shrink).violation else 0
    run, sometimes = KINDS[given.kind]
    report = run_many(seeds, tell, shrunk=given.shrink, run=run, sometimes=sometimes)
    if given.json:
        sys.stdout.write(report.as_json(given.kind, traces=given.traces) + "\n")
        return 1 if report.failures else 0
    for name, fired in report.counters():
        tell(f"{fired:7} {name}")
    if given.traces:
        for seed, digest in report.traces.items():
            tell(f"trace of {given.kind} {seed}: {digest}")
    rare = report.missing()
    for line in rare:
        tell(f"too rare: {line}")
    tell(f"{given.kind}: {report.summary()}")
    return 1 if report.failures or rare else 0


if __name__ == "__main__":
    sys.exit(main())
