"""Shards of the data, for this site's trainer and for people (spec 13).

The trainer says what its data are; this has them logged, and tells it which positions are its own
whenever that changes. Reads the ledger, decides nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.controlserver import ControlConnection
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import ConfigError, LocalProtocolError, QuorumLost, RunMismatch
from swarmtrain_protocols.messages.common import Span, Spans
from swarmtrain_protocols.messages.member import Propose
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.rounds.offer import Offer
from swarmtrain_protocols.shards import DataState

Document = dict[str, Any]

LOG_DATA_TIMEOUT_S = 600.0
LOG_DATA_RETRY_S = 1.0


class ShardDesk:
    """One per peer process whose run deals its data. All methods run on the loop's thread."""

    def __init__(self, runtime: PeerRuntime) -> None:
        self._runtime = runtime
        self._connections: list[ControlConnection] = []
        self._told: Document = {}
        self._epoch = 0
        self._holders: dict[bytes, int] = {}
        runtime.listeners.append(self._on_core_event)

    @property
    def _data(self) -> DataState:
        return self._runtime.node.ledger.data

    async def data(self, args: Document, connection: ControlConnection) -> Document:
        """The trainer's data: ``samples`` in an epoch and ``digest``, hex of 32 bytes.

        Answers and from then on pushes what ``leases`` says.

        Raises:
            ConfigError: this run deals no data. RunMismatch: these are not the data of the run.
            QuorumLost: they could not be logged.
        """
        samples, digest = int(args["samples"]), bytes.fromhex(str(args["digest"]))
        if not self._runtime.manifest.keys.shards:
            raise ConfigError("the data of this run are not dealt", "run key shards = 0", "")
        if not self._data.accepts(samples) or len(digest) != 32:
            raise ConfigError(f"data of {samples} samples", "they cannot be dealt in shards", "")
        await self._log(samples, digest)
        if (self._data.samples, self._data.digest) != (samples, digest):
            raise RunMismatch(
                "these are not the data of the run",
                f"{samples} samples here named {digest.hex()[:16]}, the run trains on "
                f"{self._data.samples} named {self._data.digest.hex()[:16]}",
                "give the same data, tokenizer and context as the trainer that was first",
            )
        if connection not in self._connections:
            self._connections.append(connection)
            connection.on_close(partial(self._connections.remove, connection))
        connection.push({"event": "leases", **self.leases()})
        return self.leases()

    async def _log(self, samples: int, digest: bytes) -> None:
        node, runtime = self._runtime.node, self._runtime
        body = e.DataDefined(samples, digest, node.me)
        deadline_s = host.mono_s() + LOG_DATA_TIMEOUT_S
        while not node.ledger.data.dealt:
            if host.mono_s() > deadline_s:
                raise QuorumLost("the data could not be logged", "no leader answers", "")
            if node.log.leader is not None and node.ledger.model is not None:
                runtime.driver.run(node.propose, Propose(e.encode_body(body)))
            await runtime.until(lambda: node.ledger.data.dealt, LOG_DATA_RETRY_S)

    def leases(self) -> Document:
        """What this site may train on, as ``shards.LeaseBook.update`` takes it."""
        ledger, me, data = self._runtime.node.ledger, self._runtime.node.me, self._data
        return {
            "generation": ledger.generation,
            "round": data.round,
            "held": _pairs(data.held(me)),
            "listed": _pairs(data.claimed.get(me, ())),
        }

    def _on_core_event(self, event: object) -> None:
        if not isinstance(event, LedgerChanged) or not self._data.dealt:
            return
        left = [
            body.member
            for _, body, accepted in event.entries
            if accepted and isinstance(body, e.MemberLeft | e.MemberBanned)
        ]
        self._narrate(left)
        told = self.leases()
        if told != self._told:
            self._told = told
            for connection in self._connections:
                connection.push({"event": "leases", **told})

    def _narrate(self, left: list[bytes]) -> None:
        data, emit = self._data, self._runtime.events.emit
        for member in left:
            if self._holders.get(member) and member not in data.leases:
                emit("shards_returned", peer=member.hex(), shards=self._holders[member])
        self._holders = {member: len(held) for member, held in data.leases.items()}
        epoch, _ = data.epoch()
        for number in range(self._epoch, epoch):
            emit("epoch_finished", epoch=number, samples=data.samples, counted=data.counted)
        self._epoch = epoch

    # -- for people ---------------------------------------------------------------------------

    def document(self) -> Document:
        """``data`` of ``status``."""
        data = self._data
        epoch, done = data.epoch()
        return {
            "shards": data.shards,
            "samples": data.samples or None,
            "digest": data.digest.hex() or None,
            "epoch": epoch,
            "shards_done": done,
            "samples_counted": data.counted,
            "shards_held": sum(len(held) for held in data.leases.values()),
            "shards_free": len(data.free),
            "epochs": data.counted / data.samples if data.samples else 0.0,
        }

    def of_member(self, member: bytes) -> Document:
        """What ``peers`` says of one member."""
        held = self._data.held(member)
        return {
            "shards": sorted(self._data.leases.get(member, {})),
            "samples_left": sum(span.count for span in held),
            "samples_last": self._data.pace.get(member),
        }


def _pairs(spans: Spans) -> list[list[int]]:
    return [[span.first, span.count] for span in spans]


def claiming(offer: Offer, args: Document) -> Offer:
    """``offer`` with the claims of its hand-over, and with what an earlier one returned (08 §2.8).

    Raises:
        LocalProtocolError: they are no pairs of whole numbers, or no samples of so many phases.
    """
    try:
        pairs = [(int(first), int(count)) for first, count in args.get("claims") or ()]
        carried, age = float(args.get("carried") or 0.0), int(args.get("age") or 0)
    except (TypeError, ValueError) as error:
        raise LocalProtocolError("claims of a hand-over", str(error)) from None
    if not 0.0 <= carried <= limits.SAMPLES_MAX or age < 0:
        raise LocalProtocolError("a hand-over", f"it carries {carried} samples of {age} phases")
    offer.claims = tuple(Span(first, count) for first, count in pairs)
    offer.samples, offer.age = offer.samples + carried, age
    return offer
