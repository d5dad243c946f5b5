"""The peer process's port: places, restarts, and trainers that die while they write."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from swarmtrain_peer.shm import HandoverInfo, TrainerSide
from swarmtrain_peer.trainer_port import TrainerPort
from swarmtrain_protocols.errors import DiskFull, LocalProtocolError

SCHEMA = b"s" * 32
LAYOUT = [("train/0/0", 200_000)]
NAME = "train/0/0"


@pytest.fixture
def port(tmp_path):
    port = TrainerPort(tmp_path, shared_memory=None)
    yield port
    port.close()


def test_lives_in_shared_memory_where_there_is_room(tmp_path, monkeypatch):
    ram, site = tmp_path / "ram", tmp_path / "site"
    ram.mkdir()
    site.mkdir()
    port = TrainerPort(site, shared_memory=ram)
    assert Path(port.open(SCHEMA, LAYOUT)).parent == ram
    port.close()
    assert list(ram.iterdir()) == []

    def full(fd: int, path: Path, nbytes: int) -> None:
        if path.parent == ram:
            raise DiskFull("shared memory", "full")
        os.ftruncate(fd, nbytes)

    monkeypatch.setattr("swarmtrain_peer.shm._reserve", full)
    assert Path(port.open(SCHEMA, LAYOUT)).parent == site
    assert list(ram.iterdir()) == []
    port.close()
    assert list(site.iterdir()) == []


def test_same_model_keeps_the_mapping_and_another_replaces_it(port):
    path = port.open(SCHEMA, LAYOUT)
    port.publish(NAME, 3, np.ones(200_000, np.float32))
    assert port.open(SCHEMA, LAYOUT) == path
    assert TrainerSide.open(Path(path), SCHEMA).published_round(NAME) == 3
    other = port.open(b"t" * 32, LAYOUT)
    assert other != path and not Path(path).exists() and Path(other).exists()


def test_what_a_dead_peer_process_left_is_removed_and_only_that(tmp_path):
    ram = tmp_path / "ram"
    ram.mkdir()
    (ram / "swarmtrain-other").write_bytes(b"not ours")
    first = TrainerPort(tmp_path, shared_memory=ram)
    left = first.open(SCHEMA, LAYOUT)  # killed: never closed
    second = TrainerPort(tmp_path, shared_memory=ram)
    path = second.open(SCHEMA, LAYOUT)
    assert not Path(left).exists()
    assert sorted(p.name for p in ram.iterdir()) == sorted(["swarmtrain-other", Path(path).name])
    second.close()


def test_before_open_there_is_nothing(port):
    port.beat(1)
    assert not port.is_open
    with pytest.raises(LocalProtocolError):
        port.publish(NAME, 0, np.zeros(200_000, np.float32))


def test_one_hand_over_and_its_decision(port):
    trainer = TrainerSide.open(Path(port.open(SCHEMA, LAYOUT)), SCHEMA)
    assert port.handover(NAME, 1) is None
    trainer.begin(NAME, 1)[0][1][:] = 5.0
    trainer.commit(NAME, HandoverInfo(1, 2, 640.0, 20))
    view = port.handover(NAME, 1)
    assert view is not None and float(view.sum()) == 1_000_000.0
    assert port.handover_info(NAME, 1) == HandoverInfo(1, 2, 640.0, 20)
    assert not trainer.may_write(NAME)
    port.release(NAME)
    assert trainer.may_write(NAME)
    port.decided(NAME, 1, "committed", 0.5, 3)
    decision = trainer.decision(NAME)
    assert decision is not None
    assert (decision.seq, decision.outcome, decision.coefficient, decision.round) == (
        1,
        "committed",
        0.5,
        3,
    )


def test_a_held_slot_survives_the_trainer_that_filled_it(port):
    path = Path(port.open(SCHEMA, LAYOUT))
    trainer = TrainerSide.open(path, SCHEMA)
    trainer.begin(NAME, 1)[0][1][:] = 5.0
    trainer.commit(NAME, HandoverInfo(1, 2, 640.0, 20))
    assert port.handover(NAME, 1) is not None
    port.open(SCHEMA, LAYOUT)  # the next trainer attaches while the hand-over is being encoded
    newcomer = TrainerSide.open(path, SCHEMA)
    assert not newcomer.may_write(NAME)
    port.release(NAME)
    assert newcomer.may_write(NAME)


WRITER = """
import sys
from pathlib import Path
from swarmtrain_peer.shm import HandoverInfo, TrainerSide
side = TrainerSide.open(Path(sys.argv[1]), b"s" * 32)
name, seq = "train/0/0", 0
sys.stdout.write("ready\\n")
sys.stdout.flush()
while True:
    seq += 1
    (_, view), = side.begin(name, seq)
    for first in range(0, view.size, 1000):
        view[first : first + 1000] = seq
    side.commit(name, HandoverInfo(seq, seq, float(seq), seq))
"""


def test_a_trainer_killed_at_any_moment_contributes_whole_or_nothing(port):
    """Kill -9 in a tight loop of hand-overs; what counts as complete is never a mixture."""
    rng = random.Random(7)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    torn = 0
    for _ in range(10):
        path = port.open(SCHEMA, LAYOUT)
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, env=environment
        )
        try:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            select.select([], [], [], rng.uniform(0.0, 0.03))  # the moment of death, not a sync
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        word = port.side.channel(NAME).range_word(0, 3)
        generation = port.side.channel(NAME).word(word)
        if generation & 1:
            torn += 1
            seq = (generation + 1) // 2
            assert port.handover(NAME, seq) is None
            assert seq == 1 or port.handover(NAME, seq - 1) is None, "it is overwritten already"
        elif generation:
            view = port.handover(NAME, generation // 2)
            assert view is not None and np.all(view == generation // 2)
            assert port.handover_info(NAME, generation // 2) == HandoverInfo(
                generation // 2, generation // 2, generation / 2, generation // 2
            )
            port.release(NAME)
        TrainerSide.open(Path(path), SCHEMA).begin(NAME, generation // 2 + 1)  # the next one can
        port.close()
    assert torn > 0, "no kill fell into a write: the test tested nothing"


def test_publishing_never_shows_half_a_theta(port):
    """A reader thread copies while the peer publishes; every copy is one θ."""
    trainer = TrainerSide.open(Path(port.open(SCHEMA, LAYOUT)), SCHEMA)
    port.publish(NAME, 0, np.zeros(200_000, np.float32))

    def read() -> int:
        out = np.empty(200_000, np.float32)
        reads = 0
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            try:
                round_ = trainer.theta(NAME, out)
            except LocalProtocolError:
                continue  # the writer never pauses here; in real life rounds are seconds apart
            assert round_ is not None and np.all(out == round_)
            reads += 1
            if round_ == 200:
                break
        return reads

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        for round_ in range(1, 201):
            port.publish(NAME, round_, np.full(200_000, round_, np.float32))
        assert reading.result() > 0
