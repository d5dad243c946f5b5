"""Serves the trainer that computes stages, and carries out what the pipeline cores ask for.

Everything goes over one stage line in order, so weights that are sent before a request are those
that it is computed with. Bytes of tensors pass through ``tensors.TensorStore``.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from swarmtrain_peer import host
from swarmtrain_peer import stage_link as sl
from swarmtrain_peer.model import log_model
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_peer.stage_port import StagePort
from swarmtrain_peer.stage_rebuild import StageRebuild
from swarmtrain_peer.tensors import TensorStore, blob_of
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.errors import Diverged, LocalProtocolError, RunMismatch, SwarmError
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages.pipeline import EMPTY, HopReply, HopRequest, Tensor
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.core import PipelineCore
from swarmtrain_protocols.pipeline.generation import TextModel
from swarmtrain_protocols.state import CanonicalState

Document = dict[str, Any]


class StageDesk:
    """One per peer process of a pipeline run. All methods run on the loop except the state hook."""

    def __init__(self, runtime: PeerRuntime, path: Path, tensors: TensorStore) -> None:
        self._runtime = runtime
        self._tensors = tensors
        self._loop = asyncio.get_running_loop()
        self._served: tuple[int, ...] = ()
        self._shown: tuple[int, ...] = ()
        """Stages that the trainer serves, as far as it was told."""
        self._local = runtime.manifest.keys.pipeline_mode == "diloco"
        self._hello: sl.Hello | None = None
        self._defining: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.busy_s = 0.0
        self._parting = False
        self.attached_at_s = math.nan
        self.worked: Callable[[float, int, int, str, float], None] = lambda *unused: None
        self._port = StagePort(path, self._attached, self._lost)
        self._rebuild = StageRebuild(
            runtime,
            ask=self._ask,
            load=self._load_values,
            reload=self._reload,
            served=lambda: self._served,
        )
        runtime.state_hooks.append(self._on_state)

    @property
    def attached(self) -> bool:
        return self._hello is not None

    @property
    def device(self) -> str:
        return self._hello.device if self._hello is not None else ""

    @property
    def text_model(self) -> TextModel | None:
        """What the model of this site's trainer reads."""
        hello = self._hello
        if hello is None or not hello.context:
            return None
        return TextModel(hello.context, hello.vocabulary)

    # -- the trainer comes and goes ------------------------------------------------------------

    def _attached(self, hello: sl.Hello) -> None:
        runtime = self._runtime
        self._hello, self._shown = hello, ()
        if math.isnan(self.attached_at_s):
            self.attached_at_s = host.mono_s()
        runtime.events.emit("trainer_attached", ranks=1, device=hello.device)
        self._defining = asyncio.ensure_future(self._welcome(hello))
        self._defining.add_done_callback(self._welcomed)

    def _welcomed(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._runtime.events.emit("trainer_refused", reason=str(error))
            self._runtime.fail(error)

    async def _welcome(self, hello: sl.Hello) -> None:
        """Check or define the model, show what is here, and offer the trainer to the swarm."""
        runtime = self._runtime
        await runtime.wait_member()
        stages = runtime.manifest.keys.stages
        if len(hello.values) != stages + 1:
            raise RunMismatch(
                "this trainer cuts another model", f"{len(hello.values) - 1} of {stages} stages"
            )
        if runtime.node.ledger.model is None:
            await self._define(hello)
        model = runtime.node.ledger.model
        assert model is not None
        mine = [(stage_channel(stage), n) for stage, n in enumerate(hello.values)]
        theirs = [(item.channel, item.values) for item in model.layout]
        if model.schema_hash != hello.schema_hash or mine != theirs:
            raise RunMismatch(
                "this model is not the run's model",
                "the list of (name, shape, dtype) differs",
                "train with the versions that the founder used",
            )
        self._serve(self._served)
        self._run(self._pipeline.set_worker, hello.values_max)
        self._run(self._pipeline.set_driver, True)

    async def _define(self, hello: sl.Hello) -> None:
        """Offer θ⁰ of all stages, one at a time; another member's may win."""
        roots: list[bytes] = []
        for stage in range(len(hello.values)):
            state = await self._first_state(stage, hello.values[stage])
            roots.append(await self._loop.run_in_executor(self._runtime.pool, state.root))
        plain = hello.plain or ((),) * len(hello.values)
        layout = tuple(
            e.ChannelLayout(stage_channel(stage), values, plain[stage])
            for stage, values in enumerate(hello.values)
        )
        body = e.ModelDefined(hello.schema_hash, layout, tuple(roots), self._runtime.node.me)
        await log_model(self._runtime, body)

    async def _first_state(self, stage: int, values: int) -> CanonicalState:
        header, payload = await self._ask(sl.Define(stage))
        if isinstance(header, sl.Failed) or len(payload) != 4 * values:
            raise RunMismatch("the first weights of a stage", f"stage {stage}: {header}")
        state = self._runtime.data.new_state(stage_channel(stage), 0, values)
        state.theta[:] = np.frombuffer(payload, "<f4")
        return state

    def _ask(
        self, command: sl.Command, payload: Sequence[sl.Buffer] = ()
    ) -> asyncio.Future[tuple[sl.Done | sl.Failed, bytearray]]:
        """Send a command now; the answer is the future's result."""
        answered: asyncio.Future[tuple[sl.Done | sl.Failed, bytearray]] = self._loop.create_future()

        def answer(header: sl.Done | sl.Failed, data: bytearray) -> None:
            if not answered.done():
                answered.set_result((header, data))

        self._port.submit(command, payload, answer)
        return answered

    async def held_out(self, number: int) -> bytes | None:
        """Encoded tokens of a batch of the held-out set; None without a trainer."""
        header, payload = await self._ask(sl.Tokens(0, number, True))
        return bytes(payload) if isinstance(header, sl.Done) else None

    async def end(self, reason: str) -> None:
        """Tell the trainer that there is nothing more to do."""
        if self._hello is not None:
            self._parting = True
            await self._ask(sl.End(reason))

    def _lost(self, why: str) -> None:
        self._hello = None
        self._runtime.changed()
        if self._defining is not None:
            self._defining.cancel()
        runtime = self._runtime
        if not self._parting:
            runtime.events.emit("trainer_lost", reason=why)
        self._parting = False
        self._run(self._pipeline.set_driver, False)
        self._run(self._pipeline.set_worker, 0)

    # -- effects of the pipeline cores -----------------------------------------------------------

    def execute(self, effect: Effect) -> bool:
        """Carry out an effect; False if it is none of a pipeline."""
        if isinstance(effect, px.OfTrainer) and self._is_late(effect):
            return True
        if isinstance(effect, px.Compute):
            self._compute(effect)
        elif isinstance(effect, px.Undo):
            self._undo(effect)
        elif isinstance(effect, px.LocalStep):
            self._port.submit(sl.Step(effect.stage, effect.step), (), self._check)
        elif isinstance(effect, px.HandOver):
            self._hand_over(effect)
        elif isinstance(effect, px.ClearGradients):
            self._port.submit(sl.Clear(effect.stages), (), self._check)
        elif isinstance(effect, px.ServeStages):
            self._serve(effect.stages)
        elif isinstance(effect, px.ServeTensor):
            self._tensors.serve(effect.tensor, effect.step)
        elif isinstance(effect, px.NeedTokens):
            self._need_tokens(effect)
        elif not isinstance(effect, px.CancelCompute):
            return self._rebuild.execute(effect)
        # What is cancelled has been sent already: the core ignores its answer.
        return True

    def _is_late(self, effect: px.OfTrainer) -> bool:
        """Its trainer is gone, as ``trainer_lost`` has told, and its claims with it."""
        return effect.life != self._pipeline.worker.life

    @property
    def _pipeline(self) -> PipelineCore:
        return self._runtime.node.pipeline

    def arrived(self, peer: PeerId, message: HopRequest | HopReply) -> None:
        """A hop's request or reply: it goes to the node once its tensors are here."""
        driver = self._runtime.driver

        def failed(reason: str) -> None:
            self._runtime.events.emit(
                "hop_failed", peer=peer.hex(), hop=message.id.hop, reason=f"its tensor: {reason}"
            )
            self._run(self._pipeline.unresolved, peer, message)

        self._tensors.resolve(peer, message, partial(driver.deliver, peer, message), failed)

    def fetched(self, ticket: int, leaves: Sequence[bytes]) -> None:
        self._tensors.fetched(ticket, leaves)

    def fetch_failed(self, ticket: int, reason: str) -> None:
        self._tensors.fetch_failed(ticket, reason)

    def _run(self, method: Callable[..., Any], *args: Any) -> None:
        self._runtime.driver.run(method, *args)

    def _compute(self, effect: px.Compute) -> None:
        pipeline = self._pipeline
        sign = int(effect.accumulate)

        def failed(header: sl.Failed) -> None:
            self._run(pipeline.compute_failed, effect.job, f"{header.code}: {header.why}")

        def done(header: sl.Done, tensor: Tensor) -> None:
            self._run(pipeline.computed, effect.job, tensor, header.loss, header.service_s)

        self._hop(
            effect.stage,
            effect.hop,
            effect.kind,
            sign,
            (effect.inputs, effect.gradient),
            effect.tokens,
            effect.step,
            done,
            failed,
        )

    def _undo(self, effect: px.Undo) -> None:
        pipeline, request = self._pipeline, effect.request

        def failed(header: sl.Failed) -> None:
            self._run(pipeline.compute_failed, effect.job, f"{header.code}: {header.why}")

        def done(header: sl.Done, tensor: Tensor) -> None:
            self._run(pipeline.computed, effect.job, EMPTY, header.loss, header.service_s)

        self._hop(
            effect.stage,
            request.id.hop,
            "backward",
            -1,
            (request.inputs, request.gradient),
            request.tokens,
            request.id.step,
            done,
            failed,
        )

    def _hop(
        self,
        stage: int,
        hop: int,
        kind: Any,
        sign: int,
        tensors: tuple[Tensor, Tensor],
        tokens: bytes,
        step: int,
        done: Callable[[sl.Done, Tensor], None],
        failed: Callable[[sl.Failed], None],
    ) -> None:
        """Have one hop computed; its output becomes a tensor of ``step``."""
        if sign > 0 and not self._tensors.has_room:  # what is undone was made before
            self._loop.call_soon(failed, sl.Failed("busy", "no room for its output"))
            return
        try:
            parts = [*(self._tensors.data_of(each) for each in tensors), tokens]
        except LocalProtocolError as error:
            self._loop.call_soon(failed, sl.Failed("failed", str(error)[:512]))
            return
        command = sl.Run(stage, hop, kind, sign, *(len(part) for part in parts))

        def answer(header: sl.Done | sl.Failed, payload: bytearray) -> None:
            if isinstance(header, sl.Failed):
                failed(header)
                return
            self.busy_s += header.service_s
            self.worked(host.mono_s(), stage, hop, kind, header.service_s)
            self._name(payload, step, partial(done, header))

        self._port.submit(command, parts, answer)

    def _name(
        self,
        payload: bytearray,
        step: int,
        done: Callable[[Tensor], None],
    ) -> None:
        """Make a tensor of an output: hashed on the pool if it is large."""

        def kept(blob: Blob) -> None:
            done(self._tensors.keep(payload, blob, step))

        self._runtime.driver.offload(partial(blob_of, payload), kept, nbytes=len(payload))

    def _hand_over(self, effect: px.HandOver) -> None:
        runtime, pipeline = self._runtime, self._pipeline

        def encoded(blob: Blob) -> None:
            pledged = runtime.node.member.undecided(stage_channel(effect.stage))
            if not self._is_late(effect):
                self._run(pipeline.handed_over, effect.stage, effect.key, blob.root)
            elif pledged is None or pledged.root != blob.root:
                runtime.data.drop(blob.root)

        def answer(header: sl.Done | sl.Failed, payload: bytearray) -> None:
            if isinstance(header, sl.Failed):
                why = f"the gradient of stage {effect.stage}: {header.why}"
                runtime.events.emit("fallback", what="hand-over of a stage", why=why)
                return  # the trainer is gone or broken: its claims go with it
            values = np.frombuffer(payload, "<f4")
            encode = partial(runtime.data.encode, values, effect.codec)
            runtime.driver.offload(encode, encoded, nbytes=len(payload), failed=refused)

        def refused(error: SwarmError) -> None:
            runtime.events.emit(
                "non_finite", channel=stage_channel(effect.stage), reason=str(error)
            )
            runtime.fail(Diverged("the gradient of a stage is not finite", str(error)))

        command = sl.Delta if self._local else sl.Gradient
        self._port.submit(command(effect.stage), (), answer)

    def _need_tokens(self, effect: px.NeedTokens) -> None:
        def answer(header: sl.Done | sl.Failed, payload: bytearray) -> None:
            if isinstance(header, sl.Done):
                tokens = bytes(payload)
                self._run(self._pipeline.tokens, effect.step, effect.micro_batch, tokens)
            # Without a trainer this site drives nothing: the lease passes on.

        step = effect.step
        if self._local:
            node = self._runtime.node
            step = node.ledger.members[node.me].ordinal  # drivers are members
        self._port.submit(sl.Tokens(step, effect.micro_batch), (), answer)

    # -- stages and their weights ------------------------------------------------------------------

    def _serve(self, stages: tuple[int, ...]) -> None:
        """Serve these stages from now on; weights that are here follow at once.

        A stage that the trainer serves already keeps its weights, which may be ahead of the state.
        """
        self._served = stages
        if self._hello is None:
            return
        self._port.submit(sl.Serve(stages), (), self._check)
        fresh = [stage for stage in stages if stage not in self._shown]
        self._shown = stages
        for stage in fresh:
            state = self._runtime.data.states.get(stage_channel(stage))
            if state is not None:
                self._load(stage, state)
            elif self._may_begin(stage):
                task = asyncio.ensure_future(self._begin(stage))
                self._tasks.append(task)
                task.add_done_callback(self._tasks.remove)

    def _may_begin(self, stage: int) -> bool:
        channel = self._runtime.node.ledger.channels.get(stage_channel(stage))
        return channel is not None and channel.round == 0

    async def _begin(self, stage: int) -> None:
        """At step 0 every worker can make the weights of its stages by itself."""
        runtime, hello = self._runtime, self._hello
        if hello is None:
            return
        try:
            state = await self._first_state(stage, hello.values[stage])
        except SwarmError as error:
            runtime.events.emit("fallback", what="first weights of a stage", why=str(error))
            return
        root = await self._loop.run_in_executor(runtime.pool, state.root)
        channel = runtime.node.ledger.channels[stage_channel(stage)]
        if channel.round or root != channel.start_hash or channel.name in runtime.data.states:
            return  # others were faster, or began elsewhere: the state is fetched
        runtime.data.states[channel.name] = state
        if runtime.keeper is not None:
            runtime.keeper.advanced(state)
        self._on_state(state)
        runtime.driver.run(runtime.node.restore, channel.name, 0, root)

    def _on_state(self, state: CanonicalState) -> None:
        """On a pool thread, while the state holds still: the trainer's next work uses it."""
        stage = int(state.channel.split("/")[1])
        if stage in self._served and self._hello is not None:
            self._load(stage, state)

    def _load(self, stage: int, state: CanonicalState) -> None:
        copied = state.theta.astype("<f4", copy=True)
        with self._rebuild.lock:
            if not self._rebuild.on_trial(stage):
                self._port.submit(sl.Load(stage, state.round), [copied.data], self._check)

    def _load_values(
        self, stage: int, theta: F32, version: int
    ) -> asyncio.Future[tuple[sl.Done | sl.Failed, bytearray]]:
        """Weights that are no state of this node, for a trial; they must hold still."""
        return self._ask(sl.Load(stage, version), [theta.astype("<f4", copy=False).data])

    def _reload(self, stage: int) -> None:
        """The canonical weights again, if they are here and the trainer serves the stage."""
        state = self._runtime.data.states.get(stage_channel(stage))
        if state is not None:
            self._on_state(state)

    def _check(self, header: sl.Done | sl.Failed, payload: bytearray) -> None:
        if isinstance(header, sl.Failed) and header.code != "no_trainer":
            self._runtime.fail(SwarmError("the trainer of the stages failed", header.why))

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._defining is not None:
            self._defining.cancel()
        self._rebuild.close()
        self._port.close()
