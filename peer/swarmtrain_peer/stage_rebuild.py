"""What a site does when stages are lost: copies, candidates, trials, adoption (spec 11 §2.7).

The cores decide; the arithmetic is that of ``pipeline.candidates``. A candidate that is tried
stands in the trainer's module, and other weights of that stage wait until the trial is over.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from swarmtrain_peer import host
from swarmtrain_peer import stage_link as sl
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.core import Effect
from swarmtrain_protocols.errors import LocalProtocolError, SwarmError
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.candidates import makers
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.state import CanonicalState

CALIBRATION_FIRST = 8
"""The held-out batches before this one measure the run: no candidate is chosen by those."""
TRAINER_AGAIN_S = 0.5
"""Between questions to a trainer that is away."""

Ask = Callable[[sl.Command], Awaitable[tuple[sl.Done | sl.Failed, bytearray]]]
Load = Callable[[int, F32, int], Awaitable[tuple[sl.Done | sl.Failed, bytearray]]]


@dataclass(slots=True)
class _Rebuild:
    """What is known of one lost stage, as long as this node is its host."""

    found: dict[str, Callable[[], F32]] = field(default_factory=dict)
    """Makes the weights of a candidate, by its name: all at once might not fit into memory."""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class StageRebuild:
    """One per peer process of a pipeline run. On the loop, except ``on_trial``.

    Args:
        ask: sends a command to the trainer at once; ``load`` weights (stage, f32[n], version).
        reload: gives the trainer the canonical weights of a stage again, if they are here.
        served: stages that the trainer has modules of.
    """

    def __init__(
        self,
        runtime: PeerRuntime,
        *,
        ask: Ask,
        load: Load,
        reload: Callable[[int], None],
        served: Callable[[], tuple[int, ...]],
    ) -> None:
        self._runtime = runtime
        self._ask = ask
        self._load = load
        self._reload = reload
        self._served = served
        self._loop = asyncio.get_running_loop()
        self._rebuilds: dict[int, _Rebuild] = {}
        self._adopting: list[asyncio.Task[None]] = []
        self.lock = threading.Lock()
        """Held while weights of a stage are handed to the trainer, by whoever does it."""
        self._trials: dict[int, str] = {}

    def on_trial(self, stage: int) -> bool:
        """A candidate stands in the trainer's module of ``stage``. Any thread, with ``lock``."""
        return stage in self._trials

    def execute(self, effect: Effect) -> bool:
        """Carry out an effect; False if it is none of recovery."""
        if isinstance(effect, px.KeepCopy):
            self._keep_copy(effect.snapshot)
        elif isinstance(effect, px.DropCopy):
            if self._runtime.keeper is not None:
                self._runtime.keeper.copies.drop(effect.channel)
        elif isinstance(effect, px.NeedCalibration):
            self._start(effect.stage, self._calibrate(effect))
        elif isinstance(effect, px.BuildCandidates):
            self._start(effect.stage, self._build(effect))
        elif isinstance(effect, px.TryCandidate):
            self._start(effect.stage, self._try(effect))
        elif isinstance(effect, px.AdoptCandidate):
            self._adopt(effect)
        elif isinstance(effect, px.DropCandidates):
            self._drop(effect.stage)
        else:
            return False
        return True

    def _start(self, stage: int, work: Coroutine[Any, Any, None]) -> None:
        """Begin something that ends with the candidates of this stage."""
        tasks = self._rebuilds.setdefault(stage, _Rebuild()).tasks
        task = asyncio.ensure_future(work)
        tasks.append(task)
        task.add_done_callback(partial(self._ended, tasks))

    def _ended(self, tasks: list[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
        tasks.remove(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._runtime.fail(error)

    async def _on_pool(self, work: Callable[[], Any]) -> Any:
        return await self._loop.run_in_executor(self._runtime.pool, work)

    def _run(self, method: Callable[..., Any], *args: Any) -> None:
        self._runtime.driver.run(method, *args)

    def _fallback(self, what: str, why: str) -> None:
        self._runtime.events.emit("fallback", what=what, why=why)

    # -- copies for others ---------------------------------------------------------------------

    def _keep_copy(self, snapshot: fx.Snapshot) -> None:
        """A state of a stage that others serve goes to the disk; it is never in use here."""

        def failed(error: SwarmError) -> None:
            self._fallback(f"no copy of {snapshot.channel}", str(error))

        def done(state: CanonicalState) -> None:
            keeper = self._runtime.keeper
            if keeper is None:
                self._fallback(f"no copy of {snapshot.channel}", "this site keeps no state")
            else:
                keeper.copies.keep(state)

        work = partial(self._runtime.data.fetched_state, snapshot)
        self._runtime.driver.offload(work, done, failed)

    # -- what candidates are made of -----------------------------------------------------------

    async def _calibrate(self, effect: px.NeedCalibration) -> None:
        """Held-out batches that no step trains on. A trainer that is away is waited for."""
        batches: list[bytes] = []
        while len(batches) < effect.count:
            number = CALIBRATION_FIRST + len(batches)
            header, payload = await self._ask(sl.Tokens(0, number, True))
            if isinstance(header, sl.Done):
                batches.append(bytes(payload))
            elif header.code == "no_trainer":
                await asyncio.sleep(TRAINER_AGAIN_S)
            else:
                self._fallback(f"stage {effect.stage} without held-out data", header.why)
                batches.clear()
                break
        self._run(self._runtime.node.pipeline.calibration, effect.stage, batches)

    async def _shapes(self, stage: int) -> sl.Shapes:
        """The tensors of a stage, from the trainer, which is waited for."""
        while True:
            header, payload = await self._ask(sl.Describe(stage))
            if isinstance(header, sl.Done):
                return msgspec.msgpack.decode(payload, type=sl.Shapes)
            if header.code != "no_trainer":
                raise LocalProtocolError(f"the tensors of stage {stage}", header.why)
            await asyncio.sleep(TRAINER_AGAIN_S)

    async def _build(self, effect: px.BuildCandidates) -> None:
        began_s = host.mono_s()
        inputs: dict[str, F32] = {}
        for item in effect.inputs:
            try:
                inputs[item.what] = await self._on_pool(partial(self._input, item))
            except SwarmError as error:
                self._fallback(f"{item.what} is no help to stage {effect.stage}", str(error))
        shapes = await self._shapes(effect.stage)
        left, right = inputs.get("left"), inputs.get("right")
        found: dict[str, Callable[[], F32]] = {}
        if "snapshot" in inputs:
            found["snapshot"] = inputs["snapshot"].copy
        found |= makers(
            left,
            right,
            effect.norms,
            shapes.tensors,
            seed=self._runtime.manifest.keys.seed,
            stage=effect.stage,
            depth=shapes.depth,
        )
        self._rebuilds[effect.stage].found = found
        self._runtime.events.emit(
            "candidates_built",
            stage=effect.stage,
            candidates=list(found),
            inputs={item.what: item.snapshot.round for item in effect.inputs},
            build_s=round(host.mono_s() - began_s, 6),
        )
        self._run(self._runtime.node.pipeline.candidates_built, effect.stage, list(found))

    def _input(self, item: px.CandidateInput) -> F32:
        """The weights of an input, which have the hash that the log will name. On the pool.

        Raises:
            SwarmError: they are not there, or have moved on.
        """
        if not item.here:
            return self._runtime.data.fetched_state(item.snapshot).theta
        state = self._runtime.data.states.get(item.snapshot.channel)
        if state is None:
            raise LocalProtocolError("a state is gone", item.snapshot.channel)
        slots = {name: array.copy() for name, array in state.slots.items()}
        parts = state.channel, item.snapshot.round, state.theta.copy(), slots
        copied = CanonicalState(*parts, chunk_values=state.layout.chunk_values)
        # Stages that are not lost may go on training (mode diloco) while this is copied.
        if copied.root() != item.snapshot.root:
            raise LocalProtocolError("a state has moved on", item.snapshot.channel)
        return copied.theta

    # -- trials --------------------------------------------------------------------------------

    def _state(
        self, stage: int, make: Callable[[], F32], round_number: int
    ) -> tuple[CanonicalState, bytes]:
        """The canonical state with these weights, its optimizer new, and its hash. On the pool."""
        theta = make()
        state = self._runtime.data.new_state(stage_channel(stage), round_number, theta.size)
        state.theta[:] = theta
        return state, state.root()

    async def _try(self, effect: px.TryCandidate) -> None:
        stage, name, pipeline = effect.stage, effect.name, self._runtime.node.pipeline
        make = self._rebuilds[stage].found[name]
        state, root = await self._on_pool(partial(self._state, stage, make, effect.round))
        if stage not in self._served():
            why = "this site has no module of the stage"
            self._run(pipeline.candidate_failed, stage, name, why)
            return
        with self.lock:
            self._trials[stage] = name
            loaded = self._load(stage, state.theta, effect.round)
        header, _ = await loaded
        if isinstance(header, sl.Done):
            self._run(pipeline.candidate_ready, stage, name, root)
        elif header.code != "no_trainer":  # the next trainer tries this one again
            self._run(pipeline.candidate_failed, stage, name, header.why)

    # -- the choice ----------------------------------------------------------------------------

    def _adopt(self, effect: px.AdoptCandidate) -> None:
        make = self._rebuilds[effect.stage].found[effect.name]
        task = asyncio.ensure_future(self._install(effect, make))
        self._adopting.append(task)
        task.add_done_callback(partial(self._ended, self._adopting))

    async def _install(self, effect: px.AdoptCandidate, make: Callable[[], F32]) -> None:
        """On disk and on offer first, since nobody else has it; then in use."""
        runtime, began_s = self._runtime, host.mono_s()
        work = partial(self._state, effect.stage, make, effect.round)
        state, root = await self._on_pool(work)
        assert root == effect.root, effect
        if runtime.keeper is not None:
            await runtime.keeper.adopt(state)
        channel = runtime.node.ledger.channels.get(state.channel)
        if channel is None or (channel.round, channel.start_hash) != (effect.round, root):
            self._fallback(f"{effect.name} of stage {effect.stage} is not used", "it is outdated")
            return
        runtime.data.states[state.channel] = state
        runtime.events.emit(
            "stage_adopted",
            stage=effect.stage,
            step=effect.round,
            choice=effect.name,
            state_hash=root.hex(),
            bytes=state.nbytes,
            adopt_s=round(host.mono_s() - began_s, 6),
        )
        self._reload(effect.stage)
        self._run(runtime.node.restore, state.channel, effect.round, root)

    def _drop(self, stage: int) -> None:
        """Forget all candidates; the module gets the weights that the run has for it."""
        rebuild = self._rebuilds.pop(stage, None)
        for task in list(rebuild.tasks) if rebuild is not None else ():
            task.cancel()
        with self.lock:
            tried = self._trials.pop(stage, None)
        if tried is not None:
            self._reload(stage)

    def close(self) -> None:
        for stage in list(self._rebuilds):
            for task in list(self._rebuilds[stage].tasks):
                task.cancel()
        for task in list(self._adopting):
            task.cancel()
