"""What is measured, here and at other members: figures of rounds, losses, who has the last state.

Figures are never logged by the stewards: a member tells them to those it has links to. Everything
here runs on the loop's thread.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from swarmtrain_peer import host
from swarmtrain_peer.roundclock import SPANS_TOLD
from swarmtrain_peer.runtime import PeerRuntime, total_bytes
from swarmtrain_peer.stage_work import StagesBody
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages import RoundKey
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.rounds import effects as fx

Document = dict[str, Any]

ROWS_KEPT = 1024
LOSSES_KEPT = 4096
SETTLE_S = 0.25
"""Between the end of a round here and its figures: others may still be fetching the result."""
HISTORY_MAX = 200
Seconds = Annotated[float, Meta(ge=-1e7, le=1e7)]
Amount = Annotated[int, Meta(ge=0, le=1 << 60)]
Spans = Annotated[list[tuple[Seconds, Seconds]], Meta(max_length=SPANS_TOLD)]


class RoundBody(msgspec.Struct, tag="round", tag_field="kind", omit_defaults=True):
    """What a member tells of one attempt; unknown fields are for later versions.

    See ``RoundClock.figures`` for times and spans. ``wait_s``: the trainer stood still. Of a step
    of a pipeline (channel ``steps``) the moment of opening is that of its closing, and
    ``compute_spans_s`` says when this site computed for it.
    """

    channel: Annotated[str, Meta(max_length=64)]
    outcome: Annotated[str, Meta(max_length=16)]
    round: Amount
    attempt: Amount
    bytes_sent: Amount
    bytes_received: Amount
    bytes_up: Amount = 0
    bytes_down: Amount = 0
    compute_s: Seconds | None = None
    wait_s: Seconds | None = None
    encode_s: Seconds | None = None
    send_s: Seconds | None = None
    receive_s: Seconds | None = None
    reduce_s: Seconds | None = None
    apply_s: Seconds | None = None
    t_open_offset_s: Seconds | None = None
    t_send_offset_s: Seconds | None = None
    t_receive_offset_s: Seconds | None = None
    t_reduce_offset_s: Seconds | None = None
    t_apply_offset_s: Seconds | None = None
    send_spans_s: Spans = []
    receive_spans_s: Spans = []
    compute_spans_s: Spans = []
    samples: float | None = None
    loss: float | None = None
    compute_utilization: Annotated[float, Meta(ge=0, le=1)] | None = None


class LossBody(msgspec.Struct, tag="evaluated", tag_field="kind"):
    """A loss of θ before ``round`` on the fixed held-out set, nats per token."""

    round: Amount
    loss: float


class HistoryBody(msgspec.Struct, tag="history", tag_field="kind"):
    """Losses that a member knows, as (round, loss): told to whoever has just linked to it."""

    losses: Annotated[list[tuple[Amount, float]], Meta(max_length=HISTORY_MAX)]


class FinalBody(msgspec.Struct, tag="final", tag_field="kind"):
    """The sender has the last state of an ended run."""


_decoder = msgspec.msgpack.Decoder(RoundBody | LossBody | HistoryBody | FinalBody | StagesBody)
_rounds = msgspec.msgpack.Decoder(RoundBody)


def _document(member: bytes, mono_s: float, data: bytes) -> Document:
    """Figures of a member as they are shown."""
    row: Document = msgspec.to_builtins(_rounds.decode(data))
    return {**row, "id": member.hex(), "mono_s": mono_s}


class Figures:
    """One per peer process."""

    def __init__(self, runtime: PeerRuntime) -> None:
        self._runtime = runtime
        self._bytes_before = (0, 0)
        self._losses: dict[int, float] = {}
        self._final: dict[bytes, None] = {}
        self._decided: dict[str, RoundKey] = {}
        self._timers: dict[RoundKey, asyncio.TimerHandle] = {}
        self.on_stages: Callable[[bytes, StagesBody], None] = lambda member, body: None
        # As they came: a row as a document takes eight times the memory.
        self._rows: deque[tuple[bytes, float, bytes]] = deque(maxlen=ROWS_KEPT)
        runtime.metrics_listeners.append(self._on_metrics)
        runtime.listeners.append(self._on_core_event)
        runtime.link_listeners.append(self._on_link)

    # -- rounds -------------------------------------------------------------------------------

    def report(
        self,
        key: RoundKey,
        outcome: str,
        given: Document,
        handed_s: float | None = None,
        parts: Sequence[RoundKey] = (),
    ) -> None:
        """Soon tell this site's figures of an attempt: to the event log and to the others.

        ``given`` are those that only the caller knows; the trainer handed over at ``handed_s``.
        ``parts``: attempts of channels that the attempt consists of, if not of one alone.
        """
        before = self._timers.pop(key, None)
        if before is not None:
            before.cancel()
        loop = asyncio.get_running_loop()
        self._timers[key] = loop.call_later(
            SETTLE_S, self._tell, key, outcome, given, handed_s, parts or (key,)
        )

    def _tell(
        self,
        key: RoundKey,
        outcome: str,
        given: Document,
        handed_s: float | None,
        parts: Sequence[RoundKey],
    ) -> None:
        self._timers.pop(key, None)
        stats = self._runtime.transport.stats
        before = self._bytes_before
        now = total_bytes(stats, "sent"), total_bytes(stats, "received")
        self._bytes_before = now
        traffic = {"bytes_sent": now[0] - before[0], "bytes_received": now[1] - before[1]}
        clocked = self._runtime.clock.figures(parts, handed_s)
        self._runtime.rates.note(clocked)
        self._runtime.node.member.pace.bytes_per_s = self._runtime.rates.bytes_per_s
        figures = traffic | given | clocked
        self._runtime.events.emit("round_figures", key, **figures)
        body = RoundBody(key.channel, outcome, key.round, key.attempt, **figures)
        data = msgspec.msgpack.encode(body)
        self._keep(self._runtime.node.me, data)
        self._runtime.send_metrics(data)

    def _on_core_event(self, event: object) -> None:
        if isinstance(event, LedgerChanged):
            for _, body, accepted in event.entries:
                if accepted:
                    self._entry(body)
        elif isinstance(event, fx.StateAdvanced):
            key = self._decided.get(event.channel)
            if key is not None and event.round > key.round:
                self._helped(self._decided.pop(event.channel), "committed")

    def _entry(self, body: e.EntryBody) -> None:
        if isinstance(body, e.RoundOpened) and body.key.channel.startswith("train/"):
            me = self._runtime.node.me
            own = next((c.root for c in body.contributors if c.member == me), None)
            self._runtime.clock.opened(body.key, host.mono_s(), own)
        elif isinstance(body, e.StepClosed):
            self._closed(body)
        elif isinstance(body, e.RoundCommitted) and self._runtime.settings.holds_state:
            self._decided[body.key.channel] = body.key  # told of once it is applied
        elif isinstance(body, e.RoundCommitted):
            self._helped(body.key, "committed")
        elif isinstance(body, e.RoundAborted):
            self._helped(body.key, "aborted")

    def _closed(self, body: e.StepClosed) -> None:
        """A step of a pipeline: the attempt at it is open in all its channels."""
        me, now = self._runtime.node.me, host.mono_s()
        for item in body.stages:
            key = RoundKey(body.generation, stage_channel(item.stage), body.step, body.attempt)
            own = next((c.root for c in item.contributors if c.member == me), None)
            self._runtime.clock.opened(key, now, own)

    def _helped(self, key: RoundKey, outcome: str) -> None:
        """An attempt is over in which this site may have carried bytes without a trainer's."""
        if self._runtime.clock.is_busy(key) and key not in self._timers:
            self.report(key, outcome, {})

    def bytes_by_attempt(self) -> dict[tuple[str, int, int], int]:
        """(channel, round, attempt) to the bytes that all members together are known to have sent
        for it."""
        out: dict[tuple[str, int, int], int] = {}
        for _, _, data in self._rows:
            row = _rounds.decode(data)
            at = row.channel, row.round, row.attempt
            out[at] = out.get(at, 0) + row.bytes_up
        return out

    def last_of(self, member: bytes) -> Document:
        """The newest figures of a member; empty if it told none."""
        return next((_document(*row) for row in reversed(self._rows) if row[0] == member), {})

    def rows(self, last: int = ROWS_KEPT) -> list[Document]:
        """Figures by member and attempt, the ``last`` newest, oldest first."""
        return [_document(*row) for row in list(self._rows)[-last:]]

    def _keep(self, member: bytes, data: bytes) -> None:
        self._rows.append((member, host.mono_s(), data))

    def _on_metrics(self, peer: PeerId, data: bytes) -> None:
        try:
            body = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._runtime.peer_fault(peer, "bad_metrics", str(error))
            return
        if isinstance(body, RoundBody):
            self._keep(peer, msgspec.msgpack.encode(body))
        elif isinstance(body, LossBody):
            self._heard_loss(body.round, body.loss, peer)
        elif isinstance(body, HistoryBody):
            for number, loss in body.losses:
                if number not in self._losses:
                    self._heard_loss(number, loss, peer)
        elif isinstance(body, StagesBody):
            self.on_stages(peer, body)
        else:
            self._final[peer] = None
            self._runtime.changed()

    # -- losses -------------------------------------------------------------------------------

    def evaluated(self, round_number: int, loss: float) -> None:
        """The own trainer's loss of θ on the fixed held-out set, nats per token."""
        self._runtime.send_metrics(msgspec.msgpack.encode(LossBody(round_number, loss)))
        self._heard_loss(round_number, loss, self._runtime.node.me)

    def _on_link(self, peer: PeerId) -> None:
        """A newcomer, or a dashboard, wants to know how the run went before it came."""
        numbers = sorted(self._losses)
        every = -(-len(numbers) // HISTORY_MAX)
        told = [(n, self._losses[n]) for n in numbers[::-every][::-1]] if numbers else []
        if told:
            self._runtime.send_metrics(msgspec.msgpack.encode(HistoryBody(told)), peer)

    def _heard_loss(self, round_number: int, loss: float, member: bytes) -> None:
        if not math.isfinite(loss):
            return
        self._losses[round_number] = loss
        while len(self._losses) > LOSSES_KEPT:
            del self._losses[next(iter(self._losses))]
        self._runtime.events.emit("evaluated", loss=loss, member=member.hex(), round=round_number)
        self._runtime.changed()

    def has_loss(self, round_number: int) -> bool:
        return round_number in self._losses

    def loss(self) -> float | None:
        """Newest loss of θ on the held-out set that this site knows."""
        return self._losses[max(self._losses)] if self._losses else None

    # -- the end ------------------------------------------------------------------------------

    async def see_everybody_off(self, timeout_s: float) -> None:
        """After the end: stay until every linked state holder says that it has the last state.

        Others may still need entries and results from here.
        """
        node, runtime = self._runtime.node, self._runtime
        mine = node.catchup.followed()
        await runtime.until(lambda: all(map(node.catchup.in_step, mine)), timeout_s)

        def all_final() -> bool:
            holders = [m.id for m in node.ledger.ordered_members() if m.holds_state]
            return all(h in self._final or h not in node.linked() for h in holders)

        runtime.send_metrics(msgspec.msgpack.encode(FinalBody()))
        await runtime.until(all_final, timeout_s)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
