"""The trainer of a pipeline run: what it answers on its line, with a real model behind it."""

from __future__ import annotations

import socket
import threading

import msgspec
import numpy as np
import pytest
import torch

from swarmtrain.training.data import Corpus
from swarmtrain.training.stage_worker import (
    HELD_OUT_BATCHES,
    RunOver,
    StageWorker,
    room_for_values,
)
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_peer import stage_link as sl
from swarmtrain_peer.control import ControlClosed
from swarmtrain_peer.stage_life import EVALUATION_BATCHES
from swarmtrain_peer.stage_rebuild import CALIBRATION_FIRST
from swarmtrain_protocols.codecs.boundary import decode_tokens
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.pipeline.rebuild import CALIBRATION_BATCHES

KEYS = RunKeys(
    stages=2,
    model={"layers": 2, "d_model": 16, "heads": 2, "context": 8},
    batch_size=2,
    micro_batches=4,
    boundary_codec="fp32",
)


class Line:
    """The peer process's end, and the worker on a thread."""

    def __init__(self) -> None:
        text = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
        fields = {name: getattr(KEYS, name) for name in RunKeys.__struct_fields__}
        runtime = StageRuntime.build(fields, ())
        self.worker = StageWorker(runtime, KEYS, Corpus(text[:3000], text[3000:]), 10**6)
        ours, theirs = socket.socketpair()
        self.line = sl.StageLine(ours)
        self.ended: list[BaseException] = []
        self._their = sl.StageLine(theirs)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        self.hello, _ = self.line.receive()

    def _serve(self) -> None:
        try:
            self.worker.serve(self._their)
        except (ControlClosed, RunOver) as error:
            self.ended.append(error)

    def ask(self, command: msgspec.Struct, *payload: bytes) -> tuple[object, bytes]:
        self.line.send(command, payload)
        header, data = self.line.receive()
        return header, bytes(data)

    def run(self, stage, hop, kind, inputs=b"", gradient=b"", tokens=b"", sign=0):
        sizes = [len(part) for part in (inputs, gradient, tokens)]
        return self.ask(sl.Run(stage, hop, kind, sign, *sizes), inputs, gradient, tokens)

    def close(self) -> None:
        self.line.close()
        self.thread.join()


@pytest.fixture
def line():
    made = Line()
    yield made
    made.close()


def test_a_micro_batch_there_and_back(line: Line) -> None:
    assert isinstance(line.hello, sl.Hello) and line.hello.values == line.worker.runtime.values
    cut = line.worker.runtime.cut
    assert (line.hello.context, line.hello.vocabulary) == (cut.context, cut.vocabulary)
    assert isinstance(line.ask(sl.Serve((0, 1, 2)))[0], sl.Done)
    theta = {}
    for stage in range(3):
        theta[stage] = line.ask(sl.Define(stage))[1]
        assert len(theta[stage]) == 4 * line.hello.values[stage]
        assert isinstance(line.ask(sl.Load(stage, 0), theta[stage])[0], sl.Done)
    _, tokens = line.ask(sl.Tokens(3, 1))
    x, inputs = b"", {}
    for hop in range(3):
        inputs[hop] = x
        _, x = line.run(min(hop, 2), hop, "forward", x, b"", tokens if hop == 0 else b"")
    done, gradient = line.run(0, 3, "backward", x, b"", tokens, sign=1)
    assert isinstance(done, sl.Done) and 5 < done.loss < 7, "near the logarithm of 256"
    assert done.service_s > 0
    for hop in (2, 1, 0):
        _, gradient = line.run(
            min(hop, 2), hop, "backward", inputs[hop], gradient, tokens if hop == 0 else b"", 1
        )
    assert gradient == b""
    sums = [np.frombuffer(line.ask(sl.Gradient(stage))[1], "<f4") for stage in range(3)]
    assert all(np.abs(one).max() > 0 for one in sums)
    # What is taken out again leaves nothing but rounding.
    line.run(0, 3, "backward", x, b"", tokens, sign=-1)
    assert isinstance(line.ask(sl.Clear((1, 2)))[0], sl.Done)
    assert not np.frombuffer(line.ask(sl.Gradient(1))[1], "<f4").any()


def test_tokens_are_a_function_of_step_and_micro_batch(line: Line) -> None:
    def ids(*where):
        return decode_tokens(line.ask(sl.Tokens(*where))[1], 2, 9, 256)

    assert ids(0, 0).shape == (2, 9)
    assert np.array_equal(ids(5, 2), ids(5, 2))
    seen = {ids(step, k).tobytes() for step in range(4) for k in range(4)}
    assert len(seen) == 16, "every position of the run is another batch"
    held = ids(0, 3, True)
    assert not np.array_equal(held, ids(0, 3))
    assert np.array_equal(held, ids(9, 3, True)), "the held-out set does not move with the step"


def test_tensors_of_a_stage_are_described(line: Line) -> None:
    found = msgspec.msgpack.decode(line.ask(sl.Describe(2))[1], type=sl.Shapes)
    assert found.depth == 2 and found.tensors == tuple(line.worker.runtime.layout(2))
    assert sum(int(np.prod(shape)) for _, shape in found.tensors) == line.hello.values[2]
    assert line.ask(sl.Describe(3))[0].code == "not_served"  # type: ignore[attr-defined]


def test_candidates_are_scored_on_data_that_measure_nothing_else() -> None:
    """Held-out batches: the first ones evaluate the run, others judge candidates, none is taken
    twice."""
    assert CALIBRATION_FIRST >= EVALUATION_BATCHES
    assert CALIBRATION_FIRST + CALIBRATION_BATCHES <= HELD_OUT_BATCHES


def test_what_cannot_be_done_is_answered_and_changes_nothing(line: Line) -> None:
    line.ask(sl.Serve((1,)))
    before = line.ask(sl.Gradient(1))[1]
    assert line.run(2, 2, "forward", b"x")[0].code == "not_served"  # type: ignore[attr-defined]
    assert line.run(1, 1, "backward", b"x", b"y", sign=1)[0].code == "malformed"  # type: ignore[attr-defined]
    lying = sl.Run(1, 1, "forward", 0, 5, 0, 0)
    assert isinstance(line.ask(lying, b"four")[0], sl.Failed)
    assert isinstance(line.ask(sl.Load(1, 0), b"abcd")[0], sl.Failed)
    assert line.ask(sl.Gradient(1))[1] == before


def test_the_end_is_answered_and_then_it_is(line: Line) -> None:
    assert isinstance(line.ask(sl.End("run ended"))[0], sl.Done)
    line.thread.join(10)
    assert isinstance(line.ended[0], RunOver)


def test_room_is_measured() -> None:
    assert room_for_values(torch.device("cpu")) > 10**6
