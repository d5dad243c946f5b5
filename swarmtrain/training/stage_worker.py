"""The trainer of a pipeline run: computes hops for its peer process until that goes away for good.

One loop on one thread: receive a command on the stage line, carry it out, answer. What the commands
mean is in ``swarmtrain_peer/stage_link.py``; what is computed is in ``stages/runtime.py``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from swarmtrain.training.data import I64, Corpus, announce_corpus, obtain_corpus, position_of
from swarmtrain.training.stages.cut import Cut, plain_ranges
from swarmtrain.training.stages.runtime import HopResult, StageRuntime
from swarmtrain_peer import host
from swarmtrain_peer import stage_link as sl
from swarmtrain_peer.control import ControlClosed
from swarmtrain_peer.site import Site
from swarmtrain_protocols.codecs.boundary import encode_tokens
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault, SwarmError
from swarmtrain_protocols.manifest import RunKeys

BYTES_PER_VALUE = 24
"""Memory that a served parameter takes here and in the peer process: weights, gradients, slots and
copies of them on the way, fp32."""
BYTES_PER_VALUE_LOCAL = 40
"""As above in mode ``diloco``, with weights of its own and their moments beside the state."""
RECONNECT_S = 0.2
AWAY_S_MAX = 120.0
"""A peer process that is away for longer will not come back."""
NOTHING = memoryview(b"")
HELD_OUT_BATCHES = 32
"""Batches of the held-out set; evaluation takes them in turn."""


class RunOver(Exception):
    """The peer process has said that there is nothing more to do."""


class Texts(Protocol):
    """What is trained on: ``data.Corpus``, or a script's own."""

    def batch(self, seed: int, position: int, batch_size: int, context: int) -> tuple[I64, I64]:
        """(tokens, next tokens) at a position, [batch_size, context] each."""

    def evaluation(self, windows: int, context: int) -> tuple[I64, I64]:
        """The same of the held-out set, [windows, context] each."""


class StageWorker:
    """Answers the commands of one peer process after another."""

    def __init__(
        self, runtime: StageRuntime, keys: RunKeys, corpus: Texts, values_max: int
    ) -> None:
        self.runtime = runtime
        self._keys = keys
        self._corpus = corpus
        self._values_max = values_max

    def hello(self) -> sl.Hello:
        """The greeting of this trainer."""
        runtime = self.runtime
        return sl.Hello(
            os.getpid(),
            str(runtime.device),
            runtime.schema_hash,
            runtime.values,
            self._values_max,
            tuple(plain_ranges(runtime.layout(stage)) for stage in range(len(runtime.values))),
            runtime.cut.context,
            runtime.cut.vocabulary,
        )

    def serve(self, line: sl.StageLine) -> None:
        """Greet, then answer commands in order.

        Raises:
            ControlClosed: the peer process went away.
            RunOver: it says that this is the end.
        """
        self.runtime.serve(())  # what an earlier peer process had asked for is not this one's
        line.send(self.hello())
        while True:
            command, payload = line.receive()
            began_s = host.mono_s()
            try:
                done, output = self._carry_out(command, memoryview(payload))
            except SwarmError as error:
                line.send(sl.Failed(_code(error), str(error)[:512]))
                continue
            except torch.OutOfMemoryError as error:
                line.send(sl.Failed("busy", str(error)[:512]))
                continue
            done = msgspec.structs.replace(done, service_s=host.mono_s() - began_s)
            line.send(done, [output])
            if isinstance(command, sl.End):
                raise RunOver(command.reason)

    def _carry_out(self, command: msgspec.Struct, payload: memoryview) -> tuple[sl.Done, sl.Buffer]:
        runtime = self.runtime
        if isinstance(command, sl.Run):
            result = self._run(command, payload)
            return sl.Done(loss=result.loss), result.output
        if isinstance(command, sl.Load):
            runtime.load(command.stage, np.frombuffer(payload, "<f4"))
        elif isinstance(command, sl.Gradient):
            return sl.Done(), _bytes_of(runtime.accumulator(command.stage))
        elif isinstance(command, sl.Delta):
            return sl.Done(), _bytes_of(runtime.delta(command.stage))
        elif isinstance(command, sl.Define):
            return sl.Done(), _bytes_of(runtime.theta0(command.stage))
        elif isinstance(command, sl.Describe):
            return sl.Done(), self.shapes(command.stage)
        elif isinstance(command, sl.Tokens):
            return sl.Done(), self.tokens(command)
        elif isinstance(command, sl.Step):
            runtime.step(command.stage, command.step)
        elif isinstance(command, sl.Clear):
            runtime.clear(command.stages)
        elif isinstance(command, sl.Serve):
            runtime.serve(command.stages)
        elif not isinstance(command, sl.End):
            raise LocalProtocolError("stage line", f"{type(command).__name__} is no command")
        return sl.Done(), NOTHING

    def shapes(self, stage: int) -> bytes:
        """The tensors of a stage, encoded."""
        if not 0 <= stage <= self.runtime.cut.stages:
            raise LocalProtocolError(f"stage {stage}", f"the model has {self.runtime.cut.stages}")
        layout = tuple((name, tuple(shape)) for name, shape in self.runtime.layout(stage))
        return msgspec.msgpack.encode(sl.Shapes(self.runtime.cut.depth, layout))

    def tokens(self, command: sl.Tokens) -> bytes:
        """The encoded tokens of a micro-batch, i32 [batch_size, context + 1]."""
        keys, context = self._keys, self.runtime.cut.context
        if command.held_out:
            count = HELD_OUT_BATCHES * keys.batch_size
            first = command.micro_batch % HELD_OUT_BATCHES * keys.batch_size
            inputs, targets = self._corpus.evaluation(count, context)
            rows = slice(first, first + keys.batch_size)
            inputs, targets = inputs[rows], targets[rows]
        else:
            position = command.step * keys.micro_batches + command.micro_batch
            if keys.pipeline_mode == "diloco":
                position = position_of(command.step, command.micro_batch)
            inputs, targets = self._corpus.batch(keys.seed, position, keys.batch_size, context)
        return encode_tokens(np.concatenate([inputs, targets[:, -1:]], 1).astype(np.int32))

    def _run(self, command: sl.Run, payload: memoryview) -> HopResult:
        ends = np.cumsum([command.inputs, command.gradient, command.tokens])
        if int(ends[-1]) != payload.nbytes:
            raise LocalProtocolError("stage line", "the payload has another length than it says")
        inputs, gradient = payload[: ends[0]], payload[ends[0] : ends[1]]
        tokens = payload[ends[1] :]
        return self.runtime.run(command.kind, command.hop, inputs, gradient, tokens, command.sign)


def _bytes_of(values: NDArray[np.float32]) -> memoryview:
    return memoryview(np.ascontiguousarray(values, "<f4").data).cast("B")


def _code(error: SwarmError) -> str:
    """The code of a refusal, as in ``HopRefused``."""
    if isinstance(error, PeerFault):
        return "malformed"
    return "not_served" if isinstance(error, LocalProtocolError) else "failed"


def room_for_values(device: torch.device, *, local: bool = False) -> int:
    """Parameters that the memory of this machine, or of its device, has room for now.

    Args:
        local: stages step by themselves (mode ``diloco``).
    """
    free = psutil.virtual_memory().available // 2
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0] * 2 // 3)
    return int(free // (BYTES_PER_VALUE_LOCAL if local else BYTES_PER_VALUE))


def run_stages(
    site: Site,
    keys: RunKeys,
    device: torch.device,
    stop: threading.Event,
    wait_s: float,
    *,
    cut: Cut | None = None,
    texts: Texts | None = None,
) -> str:
    """Compute stages for the peer process of ``site`` until ``stop`` is set or it is gone for good.

    Args:
        wait_s: how long the first peer process may take to come up.
        cut: the model in pieces; default: the run's preset.
        texts: what is trained on; default: the run's corpus.

    Returns:
        Why it is over, if the peer process has said so.

    Raises:
        SwarmError: the model cannot be cut, or no peer process came.
        Diverged: what a stage computes is not finite any more.
    """
    fields = {name: getattr(keys, name) for name in RunKeys.__struct_fields__}
    corpus = texts or obtain_corpus(site, keys, wait_s, stop)
    runtime = StageRuntime.build(fields, (), device=str(device), cut=cut)
    if isinstance(corpus, Corpus):
        corpus.check_vocabulary(runtime.cut.vocabulary)
    room = room_for_values(device, local=keys.pipeline_mode == "diloco")
    worker = StageWorker(runtime, keys, corpus, room)
    patience_s = max(wait_s, RECONNECT_S)
    announced = texts is not None
    while not stop.is_set():
        line = _connect(site, patience_s, stop)
        if line is None:
            return ""
        if not announced:
            announce_corpus(site, keys)
            announced = True
        closing = _close_on(stop, line)
        try:
            worker.serve(line)
        except RunOver as over:
            return str(over)
        except ControlClosed:
            patience_s = AWAY_S_MAX
        finally:
            closing()
            line.close()
    return ""


def _connect(site: Site, patience_s: float, stop: threading.Event) -> sl.StageLine | None:
    """A line to the peer process, or None if this trainer is told to end.

    Raises:
        ControlClosed: nobody came in time.
    """
    deadline_s = host.mono_s() + patience_s
    while True:
        try:
            return sl.connect(site.stages_path)
        except ControlClosed:
            if stop.wait(RECONNECT_S):
                return None
            if host.mono_s() > deadline_s:
                raise


def _close_on(stop: threading.Event, line: sl.StageLine) -> Callable[[], None]:
    """Close ``line`` when ``stop`` is set; the function returned ends the watch."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(RECONNECT_S):
            if stop.is_set():
                line.close()
                return

    thread = threading.Thread(target=watch, name="swarm-stop", daemon=True)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    return end
