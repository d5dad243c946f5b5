"""Memory that others may make this process take, reserved before any of it is allocated.

Three nested bounds: of all peers together, of each peer, and of each connection (credit and frames,
``limits``). The sizes of states and of contributions to them follow from the model, which was held
against this machine before it was joined (``budget``). The sizes in groups are chosen by whoever
calls: a site that has not called with the same size itself sums them only as far as they fit.
"""

from __future__ import annotations

from pathlib import Path

import psutil

from swarmtrain_peer.budget import CGROUP
from swarmtrain_protocols import limits
from swarmtrain_protocols.rounds import effects as fx


def machine_bytes(cgroup: Path = CGROUP) -> int:
    """Memory of the machine, or of this process's control group if that has less."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        return total if limit == "max" else min(total, int(limit))
    except (OSError, ValueError):
        return total


class Allotment:
    """What is reserved for contributions to groups, by purpose."""

    def __init__(self, total_bytes: int | None = None) -> None:
        whole = int(limits.GUEST_MEMORY_SHARE * machine_bytes())
        self.total_bytes = whole if total_bytes is None else total_bytes
        self.peer_bytes = int(limits.GUEST_MEMORY_PEER_SHARE * self.total_bytes)
        self._taken: dict[fx.ContributionPart, tuple[bytes, int]] = {}

    def reserved_bytes(self, peer: bytes | None = None) -> int:
        """For one peer, or for all."""
        return sum(n for whose, n in self._taken.values() if peer is None or whose == peer)

    def reserve(self, purpose: fx.ContributionPart, peer: bytes, nbytes: int) -> bool:
        """Whether ``peer`` may send so much; what was reserved for a purpose is so but once."""
        if purpose in self._taken:
            return True
        if self.reserved_bytes(peer) + nbytes > self.peer_bytes:
            return False
        if self.reserved_bytes() + nbytes > self.total_bytes:
            return False
        self._taken[purpose] = peer, nbytes
        return True

    def release(self, key: object) -> None:
        """An attempt is over, and its memory free."""
        for purpose in [p for p in self._taken if p.key == key]:
            del self._taken[purpose]
