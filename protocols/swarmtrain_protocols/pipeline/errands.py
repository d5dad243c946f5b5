"""Errands: forward passes through the stages that are no part of a step (spec 11).

An errand evaluates a loss (held-out data, calibration of a recovered stage) or answers the logits
of the next token. It visits the hops one after the other, keeps every hop's input until the next
one has answered, and goes to another worker when one fails: a worker's death costs one hop. All
hops see weights of one version; if a step is committed in between, the errand begins again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.pipeline import (
    EMPTY,
    HopId,
    HopRefused,
    HopReply,
    HopRequest,
    Kind,
    Tensor,
)
from swarmtrain_protocols.pipeline.hops import stage_of

ERRANDS_FROM = 1 << 32
"""Micro-batch numbers from here on name errands; those of steps are below."""
RETRY_S = 0.2
"""Pause before all workers of a hop are asked again."""
RESTART_CODES = ("stale", "not_ready")


@dataclass(frozen=True, slots=True)
class ErrandDone:
    """Event: the head has answered. ``output`` holds logits of a ``generate`` errand."""

    handle: int
    output: Tensor
    loss: float
    version: int


@dataclass(frozen=True, slots=True)
class ErrandFailed:
    """Event: no answer in time; ``reason`` is the last trouble.

    ``code``: as in ``HopRefused``, or ``no_worker`` (nobody to ask), ``gone``, ``timeout``.
    """

    handle: int
    reason: str
    code: str = ""
    hop: int = 0


Done = Callable[[float, "ErrandDone | ErrandFailed"], None]


@dataclass(slots=True)
class _Errand:
    handle: int
    kind: Kind
    tokens: bytes
    path: tuple[int, ...]
    pinned: dict[int, PeerId]
    expires: float
    version: int
    at: int = 0
    inputs: Tensor = EMPTY
    attempt: int = 0
    asked: PeerId | None = None
    asked_at: float = 0.0
    retry_at: float = math.inf
    tried: dict[PeerId, None] = field(default_factory=dict)
    trouble: str = "nobody has answered yet"
    code: str = "timeout"
    done: Done | None = None


class Errands:
    """All errands of one node.

    Args:
        workers: peers to ask for a hop, the best first; asked again at every try.
        version: the number of optimizer steps that all stages have now.
        stage_generation: of a stage, from the ledger.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        out: list[Effect],
        stages: int,
        workers: Callable[[int], Sequence[PeerId]],
        version: Callable[[], int],
        stage_generation: Callable[[int], int],
        hop_timeout_s: Callable[[int], float],
    ) -> None:
        self.ledger = ledger
        self._out = out
        self._stages = stages
        self._workers = workers
        self._version = version
        self._stage_generation = stage_generation
        self._hop_timeout_s = hop_timeout_s
        self._errands: dict[int, _Errand] = {}
        self._next = ERRANDS_FROM

    def start(
        self,
        now: float,
        kind: Kind,
        tokens: bytes,
        path: tuple[int, ...],
        *,
        timeout_s: float,
        pinned: Mapping[int, PeerId] | None = None,
        done: Done | None = None,
    ) -> int:
        """Begin an errand; ``ErrandDone`` or ``ErrandFailed`` carry the handle returned.

        Args:
            tokens: encoded ids, as in ``HopRequest``.
            pinned: peers that must serve a hop (a candidate for a lost stage is only at its host).
            done: called with (now, event) instead of telling the layer above.

        Raises:
            LocalProtocolError: too many at once, or a kind that belongs to steps.
        """
        if kind not in ("evaluate", "generate"):
            raise LocalProtocolError(f"an errand of kind {kind}", "it belongs to a step")
        if len(self._errands) >= limits.ERRANDS_MAX:
            raise LocalProtocolError("too many errands", f"{limits.ERRANDS_MAX} are under way")
        handle, self._next = self._next, self._next + 1
        errand = _Errand(
            handle, kind, tokens, path, dict(pinned or {}), now + timeout_s, self._version()
        )
        errand.done = done
        self._errands[handle] = errand
        self._ask(now, errand)
        return handle

    @property
    def busy(self) -> bool:
        """Any errand is under way."""
        return bool(self._errands)

    def cancel(self, handle: int) -> None:
        """Forget an errand; no event will come."""
        self._errands.pop(handle, None)

    def receive(self, now: float, peer: PeerId, message: HopReply | HopRefused) -> None:
        """An answer; late ones and those of others are ignored."""
        errand = self._errands.get(message.id.micro_batch)
        if errand is None or errand.asked != peer or message.id != self._id(errand):
            return
        if isinstance(message, HopRefused):
            errand.code = message.code
            errand.trouble = f"{message.code} {message.reason}".strip()
            if message.code in RESTART_CODES and self._version() != errand.version:
                self._restart(now, errand)
            else:
                self._failed(now, errand)
            return
        if errand.at == len(errand.path) - 1:
            result = ErrandDone(errand.handle, message.output, message.loss, errand.version)
            self._end(now, errand, result)
            return
        errand.at += 1
        errand.inputs = message.output
        errand.tried.clear()
        self._ask(now, errand)

    def disconnected(self, now: float, peer: PeerId) -> None:
        for errand in list(self._errands.values()):
            if errand.asked == peer:
                errand.code, errand.trouble = "gone", "its worker is gone"
                self._failed(now, errand)

    def reconcile(self, now: float) -> None:
        """The ledger moved: errands under way at older weights begin again."""
        for errand in list(self._errands.values()):
            if errand.at and errand.version != self._version():
                self._restart(now, errand)

    def tick(self, now: float) -> None:
        for errand in list(self._errands.values()):
            if errand.handle not in self._errands:
                continue  # what an earlier one led to
            if now >= errand.expires:
                failed = ErrandFailed(
                    errand.handle, errand.trouble, errand.code, errand.path[errand.at]
                )
                self._end(now, errand, failed)
            elif errand.asked is not None and now >= self._due(errand):
                errand.code, errand.trouble = "timeout", "no answer in time"
                self._failed(now, errand)
            elif errand.asked is None and now >= errand.retry_at:
                self._ask(now, errand)

    def deadline(self) -> float:
        if not self._errands:
            return math.inf
        times = [
            min(e.expires, e.retry_at if e.asked is None else self._due(e))
            for e in self._errands.values()
        ]
        return min(times)

    # -- inside ----------------------------------------------------------------------------

    def _end(self, now: float, errand: _Errand, event: ErrandDone | ErrandFailed) -> None:
        del self._errands[errand.handle]
        if errand.done is not None:
            errand.done(now, event)
        else:
            self._out.append(Emit(event))

    def _due(self, errand: _Errand) -> float:
        return errand.asked_at + self._hop_timeout_s(errand.path[errand.at])

    def _id(self, errand: _Errand) -> HopId:
        hop = errand.path[errand.at]
        return HopId(
            self.ledger.generation, errand.version, errand.handle, hop, False, errand.attempt
        )

    def _restart(self, now: float, errand: _Errand) -> None:
        errand.version = self._version()
        errand.at, errand.inputs = 0, EMPTY
        errand.tried.clear()
        self._ask(now, errand)

    def _failed(self, now: float, errand: _Errand) -> None:
        if errand.asked is not None:
            errand.tried[errand.asked] = None
        self._ask(now, errand)

    def _ask(self, now: float, errand: _Errand) -> None:
        hop = errand.path[errand.at]
        pinned = errand.pinned.get(hop)
        choices = [pinned] if pinned is not None else self._workers(hop)
        fresh = [peer for peer in choices if peer not in errand.tried]
        errand.attempt += 1
        if not fresh:
            # All have been tried: again, after a breath, until the errand expires.
            errand.asked, errand.retry_at = None, now + RETRY_S
            errand.tried.clear()
            if not choices:
                errand.code, errand.trouble = "no_worker", f"nobody in reach serves hop {hop}"
            return
        if errand.at == 0:
            errand.version = self._version()
        errand.asked, errand.asked_at, errand.retry_at = fresh[0], now, math.inf
        ends = errand.at == 0 or (errand.at == len(errand.path) - 1 and errand.kind == "evaluate")
        stage = stage_of(hop, self._stages)
        request = HopRequest(
            self._id(errand),
            errand.kind,
            errand.version,
            self._stage_generation(stage),
            errand.path,
            errand.inputs,
            EMPTY,
            errand.tokens if ends else b"",
        )
        self._out.append(Send(fresh[0], request))
