"""Logits of the whole model, in a run without stages: has the trainer of this site compute them.

The trainer says once that it can (``offer``) and is then pushed ``generate`` events, which it
answers between two of its steps (``logits``). What is computed when, and for whom, is decided in
``swarmtrain_protocols/pipeline/whole.py``.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from swarmtrain_peer.controlserver import ControlConnection
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_peer.tensors import TensorStore, blob_of
from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs.boundary import decode_tokens, pack_header
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.errors import ConfigError, LocalProtocolError, PeerFault
from swarmtrain_protocols.messages.pipeline import HopReply, HopRequest
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.core import PipelineCore
from swarmtrain_protocols.pipeline.generation import TextModel

Document = dict[str, Any]

TENSOR_BYTES_MAX = 64 << 20
FP32_CODE = 1
ROUNDS_KEPT = 2


class TokenDesk:
    """One per peer process of a run without stages. Use from the loop's thread only."""

    def __init__(self, runtime: PeerRuntime) -> None:
        self._runtime = runtime
        self.tensors = TensorStore(runtime.transport, runtime.data, TENSOR_BYTES_MAX)
        self._trainer: ControlConnection | None = None
        self.model: TextModel | None = None
        """What the trainer of this site reads, if it answers prompts."""
        runtime.driver.stages = self

    # -- the trainer ---------------------------------------------------------------------------

    async def offer(self, args: Document, connection: ControlConnection) -> Document:
        """A trainer computes logits for up to ``context`` tokens below ``vocabulary``.

        Raises:
            ConfigError: sizes that cannot be.
        """
        model = TextModel(int(args["context"]), int(args["vocabulary"]))
        if model.context < 1 or not 1 <= model.vocabulary <= limits.VOCABULARY_MAX:
            raise ConfigError(f"a model that reads {model}", "a context, and a vocabulary")
        self.model, self._trainer = model, connection
        connection.on_close(partial(self._gone, connection))
        self._run(self._pipeline.set_answers, True)
        return {}

    def _gone(self, connection: ControlConnection) -> None:
        if self._trainer is connection:
            self._trainer = self.model = None
            self._run(self._pipeline.set_answers, False)

    async def logits(self, args: Document, connection: ControlConnection) -> Document:
        """The trainer's answer to a job: ``logits`` (f32 LE in base64) of ``round``, or ``error``.

        Raises:
            LocalProtocolError: values that are none.
        """
        job = int(args["job"])
        if connection is not self._trainer or self.model is None:
            return {}  # of a trainer before this one
        if args.get("error"):
            self._failed(job, "failed", str(args["error"]))
            return {}
        wanted, found = int(args["wanted"]), int(args["round"])
        if found != wanted:
            code = "stale" if found > wanted else "not_ready"
            self._failed(job, code, f"the weights here are of round {found}")
            return {}
        try:
            values = base64.b64decode(args["logits"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise LocalProtocolError("logits", str(error)) from None
        if len(values) != 4 * self.model.vocabulary:
            raise LocalProtocolError("logits", f"{len(values)} bytes")
        payload = pack_header(FP32_CODE, (1, 1, self.model.vocabulary)) + values
        self.tensors.over(found - ROUNDS_KEPT)
        tensor = self.tensors.keep(payload, blob_of(payload), found)
        self._run(self._pipeline.answered, job, tensor, float(args["service_s"]))
        return {}

    # -- satisfies driver.Stages -----------------------------------------------------------------

    def execute(self, effect: Effect) -> bool:
        """Carry out an effect; False if it is none of generation."""
        if isinstance(effect, px.Compute):
            self._compute(effect)
        return isinstance(effect, px.Compute)

    def arrived(self, peer: PeerId, message: HopRequest | HopReply) -> None:
        """A request or an answer: it goes to the node once its tensors are here."""

        def failed(reason: str) -> None:
            self._runtime.events.emit(
                "hop_failed", peer=peer.hex(), hop=message.id.hop, reason=f"its tensor: {reason}"
            )
            self._run(self._pipeline.unresolved, peer, message)

        deliver = partial(self._runtime.driver.deliver, peer, message)
        self.tensors.resolve(peer, message, deliver, failed)

    def fetched(self, ticket: int, leaves: Sequence[bytes]) -> None:
        self.tensors.fetched(ticket, leaves)

    def fetch_failed(self, ticket: int, reason: str) -> None:
        self.tensors.fetch_failed(ticket, reason)

    # -- inside ----------------------------------------------------------------------------------

    @property
    def _pipeline(self) -> PipelineCore:
        return self._runtime.node.pipeline

    def _run(self, method: Callable[..., Any], *args: Any) -> None:
        self._runtime.driver.run(method, *args)

    def _failed(self, job: int, code: str, reason: str) -> None:
        self._run(self._pipeline.not_answered, job, code, reason)

    def _compute(self, effect: px.Compute) -> None:
        model, trainer = self.model, self._trainer
        if model is None or trainer is None:
            self._failed(effect.job, "not_ready", "no trainer here computes logits")
            return
        try:
            ids = decode_tokens(effect.tokens, 1, model.context, model.vocabulary)
        except PeerFault as fault:
            self._failed(effect.job, "malformed", f"{fault} (context {model.context})")
            return
        trainer.push(
            {
                "event": "generate",
                "job": effect.job,
                "wanted": effect.step,
                "tokens": ids[0].tolist(),
            }
        )
