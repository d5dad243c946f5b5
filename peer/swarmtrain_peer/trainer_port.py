"""The peer process's end of the shared memory: where it lies, and what the runtime may do with it.

The file lies in ``/dev/shm`` where that exists and has room, else in the site's own directory (a
disk file that stays in the page cache); ``path`` says which. A site has one peer process at a time
(its lock file), so files that an earlier one of the same site left behind are removed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swarmtrain_peer import host
from swarmtrain_peer.shm import Decision, HandoverInfo, PeerSide, Places, Range, places
from swarmtrain_protocols.changes import InnerStep
from swarmtrain_protocols.errors import DiskFull, LocalProtocolError
from swarmtrain_protocols.schedule import OuterStep

F32 = NDArray[np.float32]

# A folder of RAM, shared by all users: names are random, made exclusively, readable by us alone.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


class TrainerPort:
    """One mapping per site, made when the first trainer attaches.

    Not thread-safe across calls of one channel; the runtime calls it from one thread. ``publish``
    copies 4·n bytes, so large channels belong on a worker thread.
    """

    def __init__(self, directory: Path, shared_memory: Path | None = SHARED_MEMORY) -> None:
        self._directory = directory
        self._shared_memory = shared_memory
        self._side: PeerSide | None = None
        self._schema_hash = b""
        resolved = str(directory.resolve()).encode()
        self._prefix = f"swarmtrain-{blake2b(resolved, digest_size=8).hexdigest()}-"

    def open(
        self,
        schema_hash: bytes,
        layout: Sequence[tuple[str, int]],
        ranges: dict[str, Sequence[Range]] | None = None,
    ) -> str:
        """Make the mapping, or keep the one for the same model, and return its path.

        A trainer that was restarted gets the mapping of its predecessor with θ still in it. A
        hand-over that is being read stays held: the newcomer's first one waits for its release.

        Raises:
            ConfigError: a layout or ranges that cannot be.
            DiskFull: room neither in shared memory nor in the site's directory.
        """
        where = places(layout, ranges)
        if self._side is not None:
            if (schema_hash, where) == (self._schema_hash, self._side.places):
                return str(self._side.path)
            self.close()
        self._remove_stale()
        self._side = self._create(schema_hash, where)
        self._schema_hash = schema_hash
        return str(self._side.path)

    def _folders(self) -> list[Path]:
        shared = self._shared_memory
        if shared is not None and shared.is_dir() and os.access(shared, os.W_OK):
            return [shared, self._directory]
        return [self._directory]

    def _remove_stale(self) -> None:
        for folder in self._folders():
            for left in sorted(folder.glob(self._prefix + "*")):
                left.unlink(missing_ok=True)

    def _create(self, schema_hash: bytes, where: Places) -> PeerSide:
        name = self._prefix + host.entropy(8).hex()
        folders = self._folders()
        for folder in folders[:-1]:
            try:
                return PeerSide.create(folder / name, schema_hash, where)
            except DiskFull:
                continue
        return PeerSide.create(folders[-1] / name, schema_hash, where)

    @property
    def side(self) -> PeerSide:
        """The mapping.

        Raises:
            LocalProtocolError: ``open`` was not called yet.
        """
        if self._side is None:
            raise LocalProtocolError("trainer port", "not open")
        return self._side

    @property
    def is_open(self) -> bool:
        return self._side is not None

    def publish(
        self,
        channel: str,
        round: int,
        theta: F32,
        outer: OuterStep | None = None,
        inner: InnerStep | None = None,
    ) -> None:
        """Show θ (f32[n], copied) of ``round`` to the trainer, and what holds in that round."""
        self.side.publish(channel, round, theta, outer, inner)

    def handover(self, channel: str, seq: int) -> F32 | None:
        """View of hand-over ``seq`` (f32[n], read-only), or ``None`` if it is torn or another.

        It stays as it is until ``release`` or ``decided``.
        """
        found = self.side.handover(channel, seq)
        return None if found is None else found[0]

    def handover_info(self, channel: str, seq: int) -> HandoverInfo | None:
        """Samples, steps and base round that the trainer wrote beside hand-over ``seq``."""
        found = self.side.handover(channel, seq)
        return None if found is None else found[1]

    def release(self, channel: str) -> None:
        """The hand-over is encoded or copied; the trainer may write the slot again."""
        self.side.release(channel)

    def decided(self, channel: str, seq: int, outcome: str, coefficient: float, round: int) -> None:
        """Tell the trainer how hand-over ``seq`` ended.

        Args:
            outcome: ``committed``, ``aborted`` or ``excluded``.
            coefficient: weight in the committed sum; 0 unless committed.
            round: round of the channel's state after this decision. Publish that θ first.
        """
        self.side.decide(channel, Decision(seq, outcome, coefficient, round))

    def set_should_stop(self, reason: str) -> None:
        """Ask trainers to end, now and when they attach later."""
        self.side.set_should_stop(reason)

    def beat(self, now_ns: int) -> None:
        """Show that the peer process lives; nothing happens before ``open``."""
        if self._side is not None:
            self._side.beat(now_ns)

    def close(self) -> None:
        """Remove the file; trainers that have it mapped keep their memory until they let go."""
        if self._side is not None:
            self._side.path.unlink(missing_ok=True)
            self._side = None
