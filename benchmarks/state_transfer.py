"""Does a member that joins over a slow, long path delay the rounds of the others?

    python -m benchmarks.state_transfer [--up-mbit 40] [--minutes 9] [--output FILE]

Three members train on machines of their own (network namespaces of this one; as root, on Linux). A
fourth joins from behind 20 Mbit/s and 200 ms, fetches the whole state and leaves again, several
times in one run. Rounds with and without a joiner are from the same run, in turns and about as
many of each, so that what else the machine does meets both. Rounds in which its process starts (on
a machine of its own it would take nobody's processor) or in which it leaves are of neither kind.

Compared are the seconds from commit to commit (``interval_s``) and from ROUND_OPENED to commit
(``exchange_s``): mean, median, 90th percentile and largest with a joiner, to those without. The bar
is that no round is delayed by more than 5 %: the ratio of the largest intervals, and that of the
medians, which one busy moment of the machine does not move. ``beyond`` says how many rounds of each
kind took more than 1.05 times the median without a joiner.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.slowpath import FAR_ADDRESS, Town, within
from swarmtrain_peer.spawn import spawn_peer
from tests.swarm.harness import CHANNEL, Seat, Swarm, closing_all, poll_until
from tests.swarm.synthetic import Plan, Trainer

MEMBERS = 3
FAR_BYTES_PER_S = 20e6 / 8
FAR_ROUND_TRIP_S = 0.2
VALUES = 4 << 20
PHASE_S = 3.0
WARM_ROUNDS = 3
CYCLES_MIN = 2
ROUNDS_BEFORE = 6
"""Without a joiner, before the first; after each as many as it met."""
BAR = 1.05
WAIT_S = 120.0


def start_in(seat: Seat, namespace: str, *, nice: int = 0) -> Seat:
    """Start the peer process of a site on another machine, so to speak."""
    with within(namespace):
        seat.process = spawn_peer(seat.site, timeout_s=WAIT_S, nice=nice)
    seat.follow()
    return seat


def build(swarm: Swarm, town: Town) -> list[Seat]:
    """The members, in step. The first leads, alone: no vote depends on timing."""
    keys = {
        "codec_scatter": "int8",
        "codec_gather": "int8",
        "start_peers": MEMBERS,
        "checkpoint_every_rounds": 8,
        "grace_s": 20.0,
    }
    config = {"listen": f"{town.address(0)}:0", "dashboard": ""}
    first = start_in(swarm.found(start=False, config=config, **keys), town.names[0])
    for number in range(1, MEMBERS):
        config = {"listen": f"{town.address(number)}:0", "votes": False, "dashboard": ""}
        ticket = first.ticket(vote=False)
        seat = swarm.enter(f"member{number}", ticket, start=False, config=config)
        start_in(seat, town.names[number])
    return list(swarm.seats)


def committed(seat: Seat) -> list[dict[str, Any]]:
    return [r for r in seat.events("round_committed") if r["channel"] == CHANNEL]


def wait_rounds(seat: Seat, count: int) -> None:
    """Until that many more rounds have been committed."""
    wanted = len(committed(seat)) + count
    poll_until(lambda: len(committed(seat)) >= wanted, f"{count} rounds", WAIT_S)


def join_once(swarm: Swarm, town: Town, number: int) -> dict[str, float]:
    """A new member comes, is in step and leaves; when it did so, monotonic seconds."""
    ticket = swarm.seats[0].ticket(vote=False)
    config = {
        "listen": f"{FAR_ADDRESS}:0",
        "votes": False,
        "trains": False,
        "dashboard": "",
    }
    seat = swarm.enter(f"far{number}", ticket, start=False, config=config)
    # On a machine of its own it would not take the others' processor time.
    spawned_s = time.monotonic()
    start_in(seat, town.far, nice=19)
    begun = seat.events("peer_started")[-1]["mono_s"]
    fetched = seat.wait_event("state_fetched", timeout_s=WAIT_S)
    least = max(r["round"] for r in committed(swarm.seats[0]))
    applied = seat.wait_event("state_applied", lambda r: r["round"] >= least, timeout_s=WAIT_S)
    sys.stderr.write(f"joiner {number}: in step after {applied['mono_s'] - begun:.1f} s\n")
    dropped = [(r["reason"], r["round"]) for r in seat.events("donor_dropped")]
    sys.stderr.write(f"  fetched in {fetched['fetch_s']:.1f} s, donors dropped: {dropped}\n")
    seat.call("leave", {"now": True})
    assert seat.process is not None
    seat.process.wait(WAIT_S)
    seat.stop()
    swarm.seats.remove(seat)
    shutil.rmtree(seat.site.folder)
    return {
        "spawned_s": spawned_s,
        "begin_s": begun,
        "fetched_s": fetched["mono_s"],
        "end_s": applied["mono_s"],
        "left_s": time.monotonic(),
        "fetch_s": fetched["fetch_s"],
        "donors": fetched["donors"],
    }


def split(
    leader: Seat, joins: list[dict[str, float]], since_s: float
) -> dict[str, dict[str, list[float]]]:
    """Seconds of rounds by kind: ``with`` a joiner at any moment of it, ``without`` at all.

    A round in which a joiner's process starts or which it leaves in is of neither kind.
    """
    opened = {r["round"]: r["mono_s"] for r in leader.events("round_opened")}
    found: dict[str, dict[str, list[float]]] = {
        kind: {"interval_s": [], "exchange_s": []} for kind in ("with", "without")
    }
    rounds = committed(leader)
    for before, this in itertools.pairwise(rounds):
        first_s, last_s = before["mono_s"], this["mono_s"]
        if first_s < since_s or this["round"] != before["round"] + 1:
            continue
        meets = [j for j in joins if j["begin_s"] < last_s and first_s < j["end_s"]]
        leaving = any(j["end_s"] <= last_s and first_s < j["left_s"] for j in joins)
        starting = any(first_s < j["begin_s"] and j["spawned_s"] < last_s for j in joins)
        if leaving or starting:
            continue
        kind = found["with" if meets else "without"]
        kind["interval_s"].append(last_s - first_s)
        kind["exchange_s"].append(last_s - opened[this["round"]])
    return found


def summary(seconds: list[float]) -> dict[str, float]:
    """Mean, median and largest of some seconds."""
    return {
        "rounds": len(seconds),
        "mean_s": round(statistics.fmean(seconds), 4),
        "median_s": round(statistics.median(seconds), 4),
        "p90_s": round(statistics.quantiles(seconds, n=10)[-1], 4),
        "max_s": round(max(seconds), 4),
    }


def measure(up_mbit: float, minutes: float, values: int = VALUES) -> dict[str, Any]:
    """One run of about so many minutes; see the module."""
    end_s = time.monotonic() + 60 * minutes
    with (
        tempfile.TemporaryDirectory() as folder,
        Town(
            MEMBERS,
            up_bit_per_s=int(up_mbit * 1e6),
            far_bytes_per_s=FAR_BYTES_PER_S,
            far_delay_s=FAR_ROUND_TRIP_S / 2,
        ) as town,
        Swarm(Path(folder)) as swarm,
    ):
        seats = build(swarm, town)
        plans = [Plan(key=k, values=values, phase_s=PHASE_S) for k in range(1, MEMBERS + 1)]
        trainers = [
            Trainer(seat.site, plan).start() for seat, plan in zip(seats, plans, strict=True)
        ]
        joins: list[dict[str, float]] = []
        with closing_all(*trainers):
            wait_rounds(seats[0], WARM_ROUNDS)
            since_s = committed(seats[0])[-1]["mono_s"]
            wait_rounds(seats[0], ROUNDS_BEFORE)
            cycle_s = 0.0
            while len(joins) < CYCLES_MIN or time.monotonic() + cycle_s < end_s:
                before, begun_s = len(committed(seats[0])), time.monotonic()
                joins.append(join_once(swarm, town, len(joins)))
                wait_rounds(seats[0], len(committed(seats[0])) - before)
                cycle_s = max(cycle_s, time.monotonic() - begun_s)
            aborted = seats[0].status()["rounds_aborted"]
            found = split(seats[0], joins, since_s)
        state_bytes = 8 * values  # theta and momentum
        hashes = swarm.check_hashes()
    return report(found, joins, aborted, state_bytes, up_mbit, len(hashes))


def report(
    found: dict[str, dict[str, list[float]]],
    joins: list[dict[str, float]],
    aborted: int,
    state_bytes: int,
    up_mbit: float,
    states: int,
) -> dict[str, Any]:
    """Figures as JSON has them."""
    document: dict[str, Any] = {
        "uplink_mbit_per_s": up_mbit or "as fast as the machine",
        "joiner": {
            "mbit_per_s": FAR_BYTES_PER_S * 8 / 1e6,
            "round_trip_s": FAR_ROUND_TRIP_S,
            "state_bytes": state_bytes,
            "shortest_s": round(state_bytes / FAR_BYTES_PER_S, 1),
            "fetch_s": [round(join["fetch_s"], 1) for join in joins],
            "in_step_s": [round(join["end_s"] - join["begin_s"], 1) for join in joins],
            "donors": [join["donors"] for join in joins],
        },
        "rounds_aborted": aborted,
        "states_with_one_hash": states,
    }
    for figure in ("interval_s", "exchange_s"):
        both = {kind: summary(found[kind][figure]) for kind in ("without", "with")}
        both["ratio"] = {
            key: round(both["with"][f"{key}_s"] / both["without"][f"{key}_s"], 4)
            for key in ("mean", "median", "p90", "max")
        }
        usual_s = statistics.median(found["without"][figure])
        both["beyond"] = {
            kind: sum(s > BAR * usual_s for s in found[kind][figure]) for kind in found
        }
        document[figure] = both
    return document


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit code says nothing about the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--up-mbit", type=float, nargs="+", default=[40.0])
    parser.add_argument("--minutes", type=float, default=9.0, help="of all runs together")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces are removed
    document = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, everything on one machine",
        "members": MEMBERS,
        "values": VALUES,
        "phase_s": PHASE_S,
        "bar": BAR,
        "runs": [measure(up, options.minutes / len(options.up_mbit)) for up in options.up_mbit],
        "load_average_5_min": round(os.getloadavg()[1], 1),
    }
    text = json.dumps(document, indent=1)
    sys.stdout.write(text + "\n")
    if options.output is not None:
        options.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
