"""Fetches: chunks of a blob named by its Merkle root, moved at a rate, verified, handed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarmtrain_protocols import core, merkle
from swarmtrain_protocols.rounds.effects import SnapshotLeaves
from swarmtrain_protocols.testing.draws import Stream
from swarmtrain_protocols.testing.faults import NOISY
from swarmtrain_protocols.testing.network import Packet

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World


@dataclass(eq=False, slots=True)
class Transfer:
    """One fetch under way at its asker."""

    effect: core.Fetch
    provider: str


class Transfers:
    """All fetches of a world; uplinks and downlinks are queues with a rate."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._free_at: dict[tuple[str, str], float] = {}
        self._luck: dict[str, Stream] = {}
        self.up_share: dict[str, float] = {}
        """Of the weather's rate, by host: the uplinks that are slower."""

    def start(self, asker: Host, effect: core.Fetch) -> None:
        """Ask ``effect.peer``; the answer comes as ``fetched`` or ``fetch_failed``."""
        if effect.ticket in asker.fetches:
            self.world.violation("fetch", f"{asker.name} uses ticket {effect.ticket} twice")
        if effect.count < 1:
            self.world.violation("fetch", f"{asker.name} fetches nothing: {effect}")
        provider = self.world.by_peer.get(effect.peer)
        if provider is None or provider is asker:
            self.world.violation("fetch", f"{asker.name} fetches from an odd peer: {effect}")
            return
        transfer = Transfer(effect, provider.name)
        asker.fetches[effect.ticket] = transfer
        packet = Packet(
            "fetch?",
            effect.root,
            lambda host: self._asked(host, asker, transfer),
            lambda: self._failed(asker, transfer, "disconnected"),
            bulk=True,
        )
        self.world.network.send(asker, provider, packet)

    def cancel(self, asker: Host, ticket: int) -> None:
        """Forget a fetch; a ticket that is unknown or over is fine."""
        asker.fetches.pop(ticket, None)

    def lost_link(self, asker: Host, provider: str) -> None:
        """The connection is gone: all fetches over it fail."""
        lost = [t for t in asker.fetches.values() if t.provider == provider]
        for transfer in lost:
            self._failed(asker, transfer, "disconnected")

    def _asked(self, provider: Host, asker: Host, transfer: Transfer) -> None:
        effect = transfer.effect
        blobs: list[merkle.Blob | None] = []
        self.world.guarded(provider, lambda: blobs.append(provider.node.provide(effect.root)))
        blob = blobs[0]
        code = ""
        chunks: list[bytes] = []
        leaves: list[bytes] = []
        if blob is None:
            code = "refused:unknown"
        elif effect.first + effect.count > len(blob.leaves):
            code = "refused:range"
        else:
            self._check(provider, blob, effect)
            wanted = slice(effect.first, effect.first + effect.count)
            leaves = list(blob.leaves[wanted])
            if not isinstance(effect.purpose, SnapshotLeaves):
                chunks = [bytes(c) for c in blob.chunks[wanted]]
        if code:
            self.world.seen["fetch:" + code] += 1
        packet = Packet(
            "fetch",
            effect.root,
            lambda host: self._arrived(host, transfer, code, chunks, leaves),
            bulk=True,
            extra_s=self._queue_s(provider, asker, sum(map(len, chunks))),
        )
        self.world.network.send(provider, asker, packet)

    def _check(self, provider: Host, blob: merkle.Blob, effect: core.Fetch) -> None:
        """An honest node must never offer bytes that do not belong to the root."""
        if provider.name in self.world.trouble.spoilt:
            return  # a bit has flipped there: whoever fetches looks at every chunk
        fresh = merkle.Blob.of(blob.chunks)
        if not fresh.root == blob.root == effect.root:
            self.world.violation("blob", f"{provider.name} provides bytes that do not fit the root")

    def _queue_s(self, provider: Host, asker: Host, nbytes: int) -> float:
        now, took_s = self.world.now, nbytes / self.world.model.rate_bytes_per_s
        up_s = took_s / self.up_share.get(provider.name, 1.0)
        sent_at = max(now, self._free_at.get(("up", provider.name), 0.0)) + up_s
        self._free_at["up", provider.name] = sent_at
        free_at = self._free_at.get(("down", asker.name), 0.0)
        here_at = max(sent_at, free_at + took_s)
        # What comes slowly leaves room for the rest.
        self._free_at["down", asker.name] = max(now, free_at) + took_s if self.up_share else here_at
        self.world.bytes_moved[provider.name] += nbytes
        return here_at - now

    def _arrived(
        self, asker: Host, transfer: Transfer, code: str, chunks: list[bytes], leaves: list[bytes]
    ) -> None:
        effect = transfer.effect
        if asker.fetches.get(effect.ticket) is not transfer:
            return
        if code:
            self._failed(asker, transfer, code)
            return
        if isinstance(effect.purpose, SnapshotLeaves):
            self._done(asker, effect, leaves)
            return
        luck = self._luck.setdefault(asker.name, Stream(self.world.seed, asker.name, "corrupt"))
        noisy = self.world.network.noisy(transfer.provider, asker.name)
        if luck.chance(max(self.world.model.corrupt, NOISY if noisy else 0.0)):
            index = luck.integer(len(chunks))
            place = luck.integer(max(1, len(chunks[index])))
            broken = bytearray(chunks[index])
            broken[place] ^= 1 << luck.integer(8)
            chunks = [*chunks[:index], bytes(broken), *chunks[index + 1 :]]
        if any(merkle.leaf_hash(c) != leaf for c, leaf in zip(chunks, leaves, strict=True)):
            self.world.seen["fetch:corrupt"] += 1
            self._failed(asker, transfer, "corrupt")
            return
        self._done(asker, effect, chunks)

    def _done(self, asker: Host, effect: core.Fetch, chunks: list[bytes]) -> None:
        del asker.fetches[effect.ticket]
        data = b"".join(chunks)
        self.world.trace.record(self.world.now, asker.name, "fetched", data)
        self.world.seen["fetch:done"] += 1
        self.world.guarded(asker, asker.node.accept, effect.purpose, effect.first, chunks)
        asker.call("fetched", effect.ticket)
        if self.world.trouble.aims:
            self.world.trouble.hit(asker, "fetched")

    def _failed(self, asker: Host, transfer: Transfer, reason: str) -> None:
        ticket = transfer.effect.ticket
        if not asker.alive or asker.fetches.get(ticket) is not transfer:
            return
        del asker.fetches[ticket]
        self.world.trace.record(self.world.now, asker.name, "fetch-failed", reason.encode())
        self.world.seen["fetch:" + reason] += 1
        asker.call("fetch_failed", ticket, reason)
