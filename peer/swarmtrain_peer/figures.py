"""What is measured, here and at other members: figures of rounds, losses, who has the last state.

Figures are never logged by the stewards: a member tells them to those it has links to. Everything
here runs on the loop's thread.
"""

from __future__ import annotations

from typing import Any

import msgspec

from swarmtrain_peer import host
from swarmtrain_peer.runtime import PeerRuntime, total_bytes
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages import RoundKey

Document = dict[str, Any]

ROWS_KEPT = 1024
LOSSES_KEPT = 4096
FIELD_CHARS_MAX = 32


class Figures:
    """One per peer process. ``rows`` are figures by member and round, oldest first."""

    def __init__(self, runtime: PeerRuntime) -> None:
        self._runtime = runtime
        self._bytes_before = (0, 0)
        self._losses: dict[int, float] = {}
        self._final: dict[bytes, None] = {}
        self.rows: list[Document] = []
        runtime.metrics_listeners.append(self._on_metrics)

    # -- rounds -------------------------------------------------------------------------------

    def report(self, channel: str, key: RoundKey | None, outcome: str, figures: Document) -> None:
        """This site's figures of a round: kept, put in the event log, told to the others."""
        stats = self._runtime.transport.stats
        before = self._bytes_before
        now = total_bytes(stats, "sent"), total_bytes(stats, "received")
        self._bytes_before = now
        traffic = {"bytes_sent": now[0] - before[0], "bytes_received": now[1] - before[1]}
        figures = traffic | figures
        self._runtime.events.emit("round_figures", key, **figures)
        body: Document = {"kind": "round", "channel": channel, "outcome": outcome} | figures
        if key is not None:
            body |= {"round": key.round, "attempt": key.attempt}
        self._keep(self._runtime.node.me, body)
        self._runtime.send_metrics(msgspec.msgpack.encode(body))

    def last_of(self, member: bytes) -> Document:
        """The newest figures of a member; empty if it told none."""
        name = member.hex()
        return next((row for row in reversed(self.rows) if row["id"] == name), {})

    def _keep(self, member: bytes, body: Document) -> None:
        self.rows.append({"id": member.hex(), "mono_s": host.mono_s()} | body)
        del self.rows[:-ROWS_KEPT]

    def _on_metrics(self, peer: PeerId, data: bytes) -> None:
        try:
            body = msgspec.msgpack.decode(data)
            kind = body.get("kind")
            if kind == "evaluated":
                self._heard_loss(int(body["round"]), float(body["loss"]), peer)
            elif kind == "final":
                self._final[peer] = None
                self._runtime.changed()
            elif kind == "round":
                self._keep(peer, {str(k)[:FIELD_CHARS_MAX]: v for k, v in body.items()})
        except (msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
            self._runtime.peer_fault(peer, "bad_metrics", str(error))

    # -- losses -------------------------------------------------------------------------------

    def evaluated(self, round_number: int, loss: float) -> None:
        """The own trainer's loss of θ on the fixed held-out set, nats per token."""
        body = {"kind": "evaluated", "round": round_number, "loss": loss}
        self._runtime.send_metrics(msgspec.msgpack.encode(body))
        self._heard_loss(round_number, loss, self._runtime.node.me)

    def _heard_loss(self, round_number: int, loss: float, member: bytes) -> None:
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
        mine = [c.name for c in node.ledger.train_channels()]
        await runtime.until(lambda: all(map(node.catchup.in_step, mine)), timeout_s)

        def all_final() -> bool:
            holders = [m.id for m in node.ledger.ordered_members() if m.holds_state]
            return all(h in self._final or h not in node.linked() for h in holders)

        runtime.send_metrics(msgspec.msgpack.encode({"kind": "final"}))
        await runtime.until(all_final, timeout_s)
