"""Data dealt in shards among real processes: a site dies and each sample still counts once.

What counts is read back from the founder's log on disk, entry by entry, by this file's own account.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmtrain_peer.recordfile import RecordFile
from swarmtrain_peer.spawn import start_process, stop_process
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.log.records import EntriesRecord, decode_record
from swarmtrain_protocols.messages.common import RoundKey
from tests.swarm.harness import WAIT_S, Seat, Swarm, poll_until

pytestmark = pytest.mark.slow

KEYS = {
    "shards": 48,
    "inner_steps": 50,
    "batch_size": 4,
    "inner_warmup_steps": 2,
    "model": {"d_model": 16, "heads": 2, "context": 32},
    "grace_s": 1.0,
}


def text(folder: Path) -> str:
    """Words that a model can learn something from, about 2,800 windows of them."""
    luck = random.Random(3)
    folder.mkdir()
    words = [f"{luck.choice('bdfgklmnprst')}{luck.choice('aeiou')}" for _ in range(40)]
    for number in range(6):
        said = " ".join(luck.choice(words) for _ in range(5000))
        (folder / f"{number}.txt").write_text(said, encoding="utf-8")
    return f"path:{folder}"


def trainer(seat: Seat) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "swarmtrain.training.trainer", str(seat.site.folder)]
    return start_process(
        [*arguments, "--device", "cpu", "--wait-s", "20"], seat.site.folder / "trainer.log"
    )


def logged(seat: Seat) -> Iterator[e.EntryBody]:
    """The entries of a stopped site's log, in order."""
    found: dict[int, bytes] = {}
    for data in RecordFile(seat.site.log_path).load():
        record = decode_record(data)
        if isinstance(record, EntriesRecord):
            found = {index: body for index, body in found.items() if index < record.start}
            for number, entry in enumerate(record.entries):
                found[record.start + number] = entry.body
    assert sorted(found) == list(range(len(found))), "nothing of it was compacted away"
    return (e.decode_body(found[index]) for index in sorted(found))


def counted(seat: Seat) -> tuple[Counter[int], dict[int, bytes]]:
    """How often each position has counted, and whose it was last, by the log alone."""
    times: Counter[int] = Counter()
    whose: dict[int, bytes] = {}
    opened: dict[RoundKey, e.RoundOpened] = {}
    chosen: dict[RoundKey, list[int]] = {}
    for body in logged(seat):
        if isinstance(body, e.RoundOpened):
            opened[body.key] = body
        elif isinstance(body, e.RoundSet):
            chosen[body.key] = [c.index for c in body.coefficients if c.value > 0]
        elif isinstance(body, e.RoundCommitted):
            for index in chosen[body.key]:
                one = opened[body.key].contributors[index]
                for span in one.claims:
                    for position in range(span.first, span.first + span.count):
                        times[position] += 1
                        whose[position] = one.member
    return times, whose


@pytest.mark.timeout(200)
def test_each_sample_of_an_epoch_counts_once_though_a_site_is_killed(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        corpus = text(tmp_path / "text")
        founder = swarm.found(corpus=corpus, **KEYS)
        others = [swarm.enter(f"site-{n}", founder.ticket()) for n in (1, 2)]
        processes = [trainer(seat) for seat in (founder, *others)]
        try:
            poll_until(
                lambda: founder.status()["data"]["samples_counted"] > 200, "nothing counts", 60
            )
            victim = others[1]
            held = next(p for p in founder.call("peers")["peers"] if p["id"] == victim.id)
            assert held["shards"] and held["samples_left"] > 0
            victim.kill()
            processes[2].kill()
            returned = founder.wait_event("shards_returned", timeout_s=2 * WAIT_S)
            assert returned["peer"] == victim.id and returned["shards"] >= 1
            founder.wait_event("epoch_finished", lambda r: r["epoch"] >= 1, timeout_s=90)
            status = founder.status()["data"]
        finally:
            for process in processes:
                stop_process(process)
        for seat in (founder, others[0]):
            seat.stop()
        times, whose = counted(founder)
    samples = status["samples"]
    assert set(times.values()) == {1}
    assert all(times[position] for position in range(2 * samples))
    assert sum(times.values()) >= status["samples_counted"] >= 2 * samples
    members = {whose[position] for position in range(2 * samples)}
    assert len(members) == 3, "the one that died had counted, too"
