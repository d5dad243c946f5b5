"""What dealing data in shards costs, and how hard it was looked for samples lost or counted twice.

Costs: members contribute to round after round of a data set, some die and others come; counted are
the bytes that claims add to the entry that opens a round, the bytes of leases and marks in a
snapshot of the ledger, and the time that applying an entry takes for it. Proof: schedules of the
simulator with faults (``testing/shard_swarm.py``), and orders of events without a network
(``tests/protocols/shards_kit.py``).

    python -m benchmarks.shards [--swarms 200] [--orders 2000] [--rounds 400] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from swarmtrain_protocols.shards import DataState, LeaseBook, Span, data_state
from swarmtrain_protocols.testing.shard_swarm import run_data_swarm
from tests.protocols import shards_kit

RESULTS = Path(__file__).parent / "results"
SAMPLES, SHARDS, PHASE = 1_000_000, 4096, 80
DEATHS_PER_ROUND = 0.02


def costs(members: int, rounds: int) -> dict[str, Any]:
    """A swarm in which two of a hundred members are replaced in a round."""
    luck = random.Random(members)
    data: DataState = data_state(SHARDS, PHASE)
    data.define(SAMPLES, bytes(32), 0)
    alive = [number.to_bytes(32, "big") for number in range(members)]
    books = {member: LeaseBook() for member in alive}
    serial, sizes, pieces, times_s = members, [], [], []
    data.deal(sorted(alive))
    for number in range(1, rounds + 1):
        claims: dict[bytes, tuple[Span, ...]] = {}
        for member in alive:
            books[member].update(0, number - 1, data.held(member))
            books[member].take(luck.randint(PHASE // 2, 3 * PHASE // 2))
            claims[member] = books[member].boundary() or ()
        sizes.append(sum(len(msgspec.msgpack.encode(spans)) for spans in claims.values()))
        pieces.append(statistics.fmean(len(spans) for spans in claims.values()))
        begin_s = time.perf_counter()
        data.opened(claims.items())
        data.decided(list(claims), number)
        for member in alive:
            books[member].decided(True, number)
        for place in range(members):
            if luck.random() < DEATHS_PER_ROUND:
                books.pop(alive[place])
                alive[place] = serial.to_bytes(32, "big")
                books[alive[place]] = LeaseBook()
                serial += 1
        data.deal(sorted(alive))
        times_s.append(time.perf_counter() - begin_s)
    marks = len(msgspec.msgpack.encode(data.marks))
    return {
        "members": members,
        "rounds": rounds,
        "claim_bytes_per_contributor": round(statistics.fmean(sizes) / members, 2),
        "claim_bytes_per_round_max": max(sizes),
        "spans_per_claim": round(statistics.fmean(pieces), 2),
        "lease_bytes_in_snapshot": len(msgspec.msgpack.encode(data)) - marks,
        "mark_bytes_in_snapshot": marks,
        "ms_per_round": round(1e3 * statistics.median(times_s), 3),
        "epochs": round(data.counted / SAMPLES, 3),
    }


def proof(swarms: int, orders: int) -> dict[str, Any]:
    """Schedules, violations, and what happened in them."""
    seen: Counter[str] = Counter()
    violations, recovery_s, counted = [], 0.0, 0
    for seed in range(swarms):
        outcome = run_data_swarm(seed)
        seen += outcome.seen
        counted += outcome.seen["data:counted"]
        recovery_s = max(recovery_s, outcome.recovery_s)
        if outcome.violation:
            violations.append(f"swarm {seed}: {outcome.violation}")
    kit: Counter[str] = Counter()
    for seed in range(orders):
        try:
            world = shards_kit.play(seed)
        except AssertionError as broken:
            violations.append(f"order {seed}: {broken}")
            continue
        kit += world.seen
        counted += world.trained.total()
    told = ("data:committed", "data:aborted", "data:excluded", "data:void", "data:starved")
    return {
        "schedules_of_swarms": swarms,
        "orders_of_events": orders,
        "violations": violations,
        "samples_counted": counted,
        "recovery_s_max": round(recovery_s, 1),
        "in_swarms": {name.removeprefix("data:"): seen[name] for name in told},
        "in_orders": dict(sorted(kit.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--swarms", type=int, default=200)
    parser.add_argument("--orders", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=400)
    file = RESULTS / f"shards-{platform.machine()}.json"
    parser.add_argument("--output", type=Path, default=file)
    given = parser.parse_args()
    found = {
        "samples": SAMPLES,
        "shards": SHARDS,
        "deaths_per_member_and_round": DEATHS_PER_ROUND,
        "costs": [costs(members, given.rounds) for members in (3, 16, 64, 256)],
        "proof": proof(given.swarms, given.orders),
    }
    given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
