"""The way of one micro-batch there and back, and the tensors it keeps."""

from __future__ import annotations

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages.pipeline import EMPTY
from swarmtrain_protocols.pipeline.microbatch import MicroBatch
from tests.protocols.pipeline.driver_kit import tensor

MAKER = PeerId(b"m" * 32)


def walk(batch: MicroBatch, places: int) -> list[tuple[int, bool]]:
    seen = []
    for place in range(places):
        here = batch.now
        assert here is not None
        seen.append(here)
        batch.answered(tensor(f"t{place}"), float(place), MAKER)
    return seen


def test_requests_follow_the_path_and_come_back() -> None:
    batch = MicroBatch(3, (0, 2, 1, 3))
    assert batch.requests == 7
    assert walk(batch, 7) == [
        *((0, False), (2, False), (1, False)),
        *((3, True), (1, True), (2, True), (0, True)),
    ]
    assert batch.done and batch.now is None
    assert batch.loss == 3.0  # the head's


def test_inputs_and_gradients_are_those_of_the_neighbours_on_the_path() -> None:
    batch = MicroBatch(3, (0, 2, 1, 3))
    walk(batch, 7)
    assert batch.inputs == {0: EMPTY, 2: tensor("t0"), 1: tensor("t1"), 3: tensor("t2")}
    assert batch.gradients == {3: EMPTY, 1: tensor("t3"), 2: tensor("t4"), 0: tensor("t5")}
    assert batch.nbytes == 6 * 2


def test_a_hop_is_passed_once_its_backward_is_answered() -> None:
    batch = MicroBatch(0, (0, 1, 2))
    walk(batch, 2)
    assert not any(batch.passed(hop) for hop in (0, 1, 2))
    walk(batch, 2)
    assert [batch.passed(hop) for hop in (0, 1, 2)] == [False, True, True]


def test_stepping_back_asks_again_for_the_newest_tensor_and_names_its_maker() -> None:
    batch = MicroBatch(0, (0, 1, 2))
    assert batch.step_back() is None
    walk(batch, 3)
    assert batch.now == (1, True)
    assert batch.step_back() == MAKER
    assert batch.now == (2, True)
    before = batch.nbytes
    batch.answered(tensor("longer"), 0.5, PeerId(b"n" * 32))
    assert batch.gradients[1] == tensor("longer")
    assert batch.nbytes == before + 4
    assert batch.loss == 0.5
