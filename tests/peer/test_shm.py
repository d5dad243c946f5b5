"""The layout is an ABI: byte offsets are pinned here, and every torn state is told apart."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from swarmtrain_peer.shm import (
    Decision,
    HandoverInfo,
    PeerSide,
    Range,
    TrainerSide,
    places,
)
from swarmtrain_protocols.changes import InnerStep
from swarmtrain_protocols.errors import (
    ConfigError,
    LocalProtocolError,
    RunMismatch,
    VersionMismatch,
)
from swarmtrain_protocols.schedule import OuterStep

LATER = InnerStep(7, 1e-4, 0.0, 0.0, 0, 9_000_000, 0.5)

SCHEMA = bytes(range(32))
LAYOUT = [("train/0/0", 1500), ("train/0/1", 3)]


def make(tmp_path: Path, layout=LAYOUT, ranges=None) -> tuple[PeerSide, TrainerSide]:
    path = tmp_path / "shm"
    peer = PeerSide.create(path, SCHEMA, places(layout, ranges))
    return peer, TrainerSide.open(path, SCHEMA)


def test_places_are_pinned():
    where = places(LAYOUT)
    first, second = where.channels
    assert (first.page, first.theta, first.handover) == (4096, (12288, 20480), 28672)
    assert (second.page, second.theta, second.handover) == (8192, (36864, 40960), 45056)
    assert where.nbytes == 49152


def test_bytes_are_pinned(tmp_path):
    peer, trainer = make(tmp_path)
    step = OuterStep("eager", 0.5, 0.875)
    inner = InnerStep(20, 0.5, 0.25, 1.0, 50, 1000, 2.0)
    peer.publish("train/0/1", 7, np.array([1, 2, 3], np.float32), step, inner)
    ((_, view),) = trainer.begin("train/0/1", 5)
    view[:] = [4, 5, 6]
    trainer.commit("train/0/1", HandoverInfo(5, 7, 80.0, 20))
    peer.decide("train/0/1", Decision(5, "excluded", 0.25, 9))
    peer.beat(123456789)
    peer.set_should_stop("done")
    raw = (tmp_path / "shm").read_bytes()

    def u64(offset: int) -> int:
        return struct.unpack_from("<Q", raw, offset)[0]

    assert raw[:8] == b"SWTRNSHM"
    assert struct.unpack_from("<II", raw, 8) == (3, 2)
    assert raw[16:48] == SCHEMA
    assert [u64(48), u64(56), u64(64), u64(72)] == [49152, 1, 123456789, 1]
    assert struct.unpack_from("<I", raw, 80) == (4,) and raw[84:88] == b"done"
    page = 8192
    assert raw[page : page + 64] == b"train/0/1".ljust(64, b"\0")
    assert [u64(page + at) for at in (64, 72, 80, 88, 96)] == [3, 36864, 40960, 45056, 1]
    assert [u64(page + at) for at in (128, 136)] == [2, 0]
    assert u64(page + 160) == (7 << 1 | 0) + 1
    assert [u64(page + at) for at in (192, 200, 208, 224)] == [2, 5, 3, 9]
    assert struct.unpack_from("<d", raw, page + 216) == (0.25,)
    assert u64(page + 256) == 0
    assert struct.unpack_from("<Qdd", raw, page + 320) == (3, 0.5, 0.875)
    assert struct.unpack_from("<QQdddQQd", raw, page + 384) == (1, *inner)
    assert [u64(page + 512 + 8 * k) for k in (0, 1, 2, 3, 4, 6)] == [0, 0, 3, 10, 7, 20]
    assert struct.unpack_from("<d", raw, page + 512 + 40) == (80.0,)
    assert struct.unpack_from("<3f", raw, 36864) == (1, 2, 3)
    assert struct.unpack_from("<3f", raw, 45056) == (4, 5, 6)


def test_each_theta_comes_with_the_outer_step_of_its_round(tmp_path):
    peer, trainer = make(tmp_path)
    out, name = np.zeros(3, np.float32), "train/0/1"
    assert trainer.theta_and_step(name, out) is None
    for round_, step in enumerate(
        [OuterStep("off", 0.75, 0.5), None, OuterStep("delayed", 0.25, 0.0)]
    ):
        peer.publish(name, round_, np.full(3, round_, np.float32), step)
        assert trainer.theta_and_step(name, out) == (round_, step)
        assert trainer.theta(name, out) == round_
    damage(peer.path, 8192 + 320, struct.pack("<Q", 99))
    assert trainer.theta_and_step(name, out) == (2, None)


def test_each_theta_comes_with_how_a_phase_is_trained_from_it(tmp_path):
    peer, trainer = make(tmp_path)
    out, name = np.zeros(3, np.float32), "train/0/1"
    for round_, inner in enumerate([InnerStep(20, 3e-3, 0.1, 1.0, 50, 0, 2.0), None, LATER, LATER]):
        peer.publish(name, round_, np.full(3, round_, np.float32), None, inner)
        assert trainer.theta(name, out) == round_
        assert trainer.inner[name] == inner


def test_file_is_private_exclusive_and_reserved(tmp_path):
    peer, _ = make(tmp_path)
    found = os.stat(peer.path)
    assert found.st_mode & 0o777 == 0o600
    assert found.st_size == peer.places.nbytes
    assert found.st_blocks * 512 >= peer.places.nbytes
    with pytest.raises(FileExistsError):
        PeerSide.create(peer.path, SCHEMA, peer.places)


def test_a_link_in_the_way_is_not_followed(tmp_path):
    (tmp_path / "shm").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        PeerSide.create(tmp_path / "shm", SCHEMA, places(LAYOUT))
    assert not (tmp_path / "elsewhere").exists()


def test_theta_alternates_between_two_slots(tmp_path):
    peer, trainer = make(tmp_path)
    out = np.empty(3, np.float32)
    assert trainer.theta("train/0/1", out) is None
    assert trainer.published_round("train/0/1") is None
    for round_ in (0, 1, 2, 1):  # a rewind goes back
        peer.publish("train/0/1", round_, np.full(3, round_ + 0.5, np.float32))
        assert trainer.published_round("train/0/1") == round_
        assert trainer.theta("train/0/1", out) == round_
        assert out.tolist() == [round_ + 0.5] * 3
    slots = [peer.channel("train/0/1").theta[k][0] for k in (0, 1)]
    assert slots == [2.5, 1.5]


def test_theta_that_changes_while_it_is_read_is_read_again(tmp_path):
    peer, trainer = make(tmp_path)
    name = "train/0/1"
    peer.publish(name, 1, np.ones(3, np.float32))
    words = trainer.channel(name).words
    words[16] = 3  # the slot that is published is being overwritten, and nobody ever finishes
    with pytest.raises(LocalProtocolError):
        trainer.theta(name, np.empty(3, np.float32))
    words[16] = 4
    assert trainer.theta(name, np.empty(3, np.float32)) == 1


def test_a_hand_over_counts_only_when_it_is_complete(tmp_path):
    peer, trainer = make(tmp_path)
    name = "train/0/0"
    assert peer.handover(name, 1) is None
    ((first, view),) = trainer.begin(name, 1)
    assert first == 0 and view.shape == (1500,)
    view[:] = 2.0
    assert peer.handover(name, 1) is None
    assert trainer.may_write(name), "a torn hand-over is not held"
    trainer.commit(name, HandoverInfo(1, 4, 32.0, 8))
    assert peer.handover(name, 2) is None
    found = peer.handover(name, 1)
    assert found is not None
    values, info = found
    assert info == HandoverInfo(1, 4, 32.0, 8)
    assert values.tolist() == [2.0] * 1500
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1.0


def test_a_slot_that_is_read_cannot_be_written(tmp_path):
    peer, trainer = make(tmp_path)
    name = "train/0/1"
    trainer.begin(name, 1)
    trainer.commit(name, HandoverInfo(1, 0, 1.0, 1))
    assert peer.handover(name, 1) is not None
    with pytest.raises(LocalProtocolError, match="being read"):
        trainer.begin(name, 2)
    peer.decide(name, Decision(1, "aborted", 0.0, 0))
    assert trainer.may_write(name) and peer.intact(name, 1)
    trainer.begin(name, 2)
    assert not peer.intact(name, 1)
    with pytest.raises(LocalProtocolError, match="not begun"):
        trainer.commit(name, HandoverInfo(3, 0, 1.0, 1))


def test_a_new_trainer_never_reuses_a_number(tmp_path):
    peer, trainer = make(tmp_path)
    name = "train/0/1"
    assert trainer.next_seq(name) == 1
    trainer.begin(name, 1)  # dies here
    assert TrainerSide.open(peer.path, SCHEMA).next_seq(name) == 2
    trainer.commit(name, HandoverInfo(1, 0, 1.0, 1))
    again = TrainerSide.open(peer.path, SCHEMA)
    assert again.next_seq(name) == 2
    with pytest.raises(LocalProtocolError, match="not a new number"):
        again.begin(name, 1)


def test_decisions_are_whole_or_not_there(tmp_path):
    peer, trainer = make(tmp_path)
    name = "train/0/1"
    assert trainer.decision(name) is None
    said = Decision(3, "committed", 1 / 3, 12)
    peer.decide(name, said)
    assert trainer.decision(name) == said
    peer.channel(name).words[24] |= np.uint64(1)
    assert trainer.decision(name) is None
    with pytest.raises(LocalProtocolError):
        peer.decide(name, Decision(4, "maybe", 0.0, 0))


def test_ranks_write_their_ranges_and_all_must(tmp_path):
    ranges = {"a": [Range(0, 0, 2), Range(1, 2, 3)]}
    peer, zero = make(tmp_path, [("a", 5)], ranges)
    one = TrainerSide.open(peer.path, SCHEMA, rank=1)
    ((first, view),) = one.begin("a", 1)
    assert first == 2
    view[:] = [3, 4, 5]
    one.commit("a", HandoverInfo(1, 6, 30.0, 10))
    assert peer.handover("a", 1) is None
    zero.begin("a", 1)[0][1][:] = [1, 2]
    zero.commit("a", HandoverInfo(1, 6, 20.0, 9))
    found = peer.handover("a", 1)
    assert found is not None and found[0].tolist() == [1, 2, 3, 4, 5]
    assert found[1] == HandoverInfo(1, 6, 50.0, 10)
    peer.release("a")
    with pytest.raises(LocalProtocolError, match="no range"):
        TrainerSide.open(peer.path, SCHEMA, rank=2).begin("a", 2)


@pytest.mark.parametrize(
    "layout, ranges",
    [
        ([], None),
        ([("a", 1), ("a", 1)], None),
        ([("", 1)], None),
        ([("a", 0)], None),
        ([("a" * 65, 1)], None),
        ([("a", 5)], {"a": [Range(0, 0, 4)]}),
        ([("a", 5)], {"a": [Range(0, 0, 3), Range(1, 2, 3)]}),
        ([("a", 5)], {"a": [Range(0, 0, 2), Range(1, 3, 2)]}),
        ([("a", 57)], {"a": [Range(k, k, 1) for k in range(57)]}),
    ],
)
def test_bad_layouts_are_refused(layout, ranges):
    with pytest.raises(ConfigError):
        places(layout, ranges)


def damage(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    "offset, data, error",
    [
        (0, b"X", RunMismatch),
        (8, b"\x04", VersionMismatch),
        (12, struct.pack("<I", 0), RunMismatch),
        (12, struct.pack("<I", 257), RunMismatch),
        (16, b"\xff", RunMismatch),
        (48, struct.pack("<Q", 4096), RunMismatch),
        (56, b"\0", RunMismatch),
        (4096 + 64, struct.pack("<Q", 9000), RunMismatch),
        (4096 + 96, struct.pack("<Q", 1 << 40), RunMismatch),
        (4096 + 512 + 16, struct.pack("<Q", 3), RunMismatch),
    ],
)
def test_damaged_headers_are_refused(tmp_path, offset, data, error):
    peer, _ = make(tmp_path)
    damage(peer.path, offset, data)
    with pytest.raises(error):
        TrainerSide.open(peer.path, SCHEMA)


def test_a_short_file_is_refused(tmp_path):
    peer, _ = make(tmp_path)
    os.truncate(peer.path, 100)
    with pytest.raises(RunMismatch):
        TrainerSide.open(peer.path, SCHEMA)


def test_stop_and_heartbeat(tmp_path):
    peer, trainer = make(tmp_path)
    assert trainer.should_stop() is None and trainer.beat_ns() == 0
    peer.beat(99)
    peer.set_should_stop("max_rounds reached")
    peer.set_should_stop("something later")
    assert trainer.beat_ns() == 99
    assert trainer.should_stop() == "max_rounds reached"


def test_wrong_shapes_are_local_misuse(tmp_path):
    peer, trainer = make(tmp_path)
    with pytest.raises(LocalProtocolError):
        peer.publish("train/0/1", 1, np.zeros(4, np.float32))
    with pytest.raises(LocalProtocolError):
        peer.publish("train/0/1", 1, np.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(LocalProtocolError):
        peer.handover("train/0/1", 0)
    with pytest.raises(LocalProtocolError):
        trainer.theta("nope", np.empty(3, np.float32))
