"""What a simulated site keeps on its disk, and what it makes of a disk that is full or damaged.

It does as ``swarmtrain_peer.keeper`` and ``swarmtrain_peer.store`` do: every file is checked when
it is loaded; a result that is on disk counts as durable only if everything that leads up to it is;
after a gap the next state is saved in any case; a state that there was no space for is tried again,
and another attempt of the only round that is missing closes the gap. What is served is not checked
again: whoever fetches looks at every chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

import msgspec
from blake3 import blake3

from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.merkle import Blob, merkle_root
from swarmtrain_protocols.state import CanonicalState
from swarmtrain_protocols.testing.disk import Disk

RESULTS_KEPT = 16


class SavedResult(msgspec.Struct, frozen=True):
    """Encoded result of a round, with the leaf hashes that were proven when it was made.

    ``check`` covers what no leaf hash does, as the header's does in the store's files.
    """

    channel: str
    round: int
    root: bytes
    values: int
    codec: str
    chunks: tuple[bytes, ...]
    leaves: tuple[bytes, ...]
    check: bytes = b""

    def checked(self) -> bytes:
        """What ``check`` has to be."""
        head = (self.channel, self.round, self.root, self.values, self.codec)
        return blake3(msgspec.msgpack.encode(head)).digest()


class _SavedState(msgspec.Struct, frozen=True):
    channel: str
    round: int
    root: bytes
    values: int
    chunks: tuple[bytes, ...]


S = TypeVar("S", SavedResult, _SavedState)


class SiteDisk:
    """States and results of one site; ``rounds[channel]`` is the newest state that is durable."""

    def __init__(self, disk: Disk, plane: DataPlane, seen: Counter[str]) -> None:
        self._disk = disk
        self._plane = plane
        self._seen = seen
        self.rounds: dict[str, int] = {}
        self._gaps: dict[str, tuple[int, int]] = {}
        """First and last round whose result, or what it follows, is not on disk, by channel."""
        self._waiting: dict[str, tuple[int, bytes]] = {}
        """The newest state that there was no space for, by channel: its round, and the file."""

    # --- states ----------------------------------------------------------------------------------

    def load(self) -> Iterator[CanonicalState]:
        """All states that are on disk and whole."""
        for name in sorted(self._disk.files):
            saved = self._read(name, _SavedState) if name.startswith("state/") else None
            if saved is None:
                continue
            try:
                state = self._plane.new_state(saved.channel, saved.round, saved.values)
                for index, chunk in enumerate(saved.chunks):
                    state.load_chunk(index, chunk)
            except (LocalProtocolError, PeerFault):
                self._refuse(name)
                continue
            if state.root() != saved.root or "state/" + state.channel != name:
                self._refuse(name)
                continue
            self.rounds[state.channel] = state.round
            yield state

    def due(self, channel: str, round_number: int, every: int) -> bool:
        """Whether the state before ``round_number`` is to be saved."""
        last = self.rounds.get(channel, -every)
        return round_number >= last + every or channel in self._gaps

    def save(self, state: CanonicalState, *, sync: bool) -> bool:
        """Write a state; without ``sync`` a crash may find the older one. False: no space."""
        chunks = tuple(bytes(chunk) for chunk in state.blob().chunks)
        assert chunks[0] == state.header
        root, channel = state.root(), state.channel
        saved = _SavedState(channel, state.round, root, state.theta.size, chunks)
        self._waiting[channel] = state.round, msgspec.msgpack.encode(saved)
        if not self._put(channel, sync=sync):
            if channel not in self.rounds:
                self._miss(channel, state.round - 1)  # results alone lead nowhere
            return False
        return True

    def _put(self, channel: str, *, sync: bool) -> bool:
        """Write the state that waits, if one does and there is space."""
        if channel not in self._waiting:
            return False
        round_number, data = self._waiting[channel]
        if not self._disk.write("state/" + channel, data):
            return False
        del self._waiting[channel]
        if sync:
            self._disk.sync_file("state/" + channel)
            self._durable(channel, round_number)
        return True

    def _durable(self, channel: str, saved: int) -> None:
        """The results before the last checkpoint are not needed any more."""
        oldest = self.rounds.get(channel, 0)
        self.rounds[channel] = saved
        if self._gaps.get(channel, (0, saved))[1] < saved:
            del self._gaps[channel]
        for round_number in range(max(0, oldest - RESULTS_KEPT), oldest):
            self._disk.write(f"result/{channel}/{round_number}", None)

    def drop(self, channel: str) -> None:
        """The site serves this channel no more."""
        self.rounds.pop(channel, None)
        self._gaps.pop(channel, None)
        self._waiting.pop(channel, None)
        for name in sorted(self._disk.files):
            if name == "state/" + channel or name.startswith(f"result/{channel}/"):
                self._disk.write(name, None)

    # --- results ---------------------------------------------------------------------------------

    def save_result(
        self, channel: str, round_number: int, blob: Blob, values: int, codec: str
    ) -> bool:
        """Write a result; True if it is on disk, and all that leads up to it."""
        chunks = tuple(bytes(chunk) for chunk in blob.chunks)
        leaves = tuple(blob.leaves)
        saved = SavedResult(channel, round_number, blob.root, values, codec, chunks, leaves)
        saved = msgspec.structs.replace(saved, check=saved.checked())
        name = f"result/{channel}/{round_number}"
        if not self._disk.write(name, msgspec.msgpack.encode(saved)):
            self._miss(channel, round_number)
            return False
        self._disk.sync_file(name)
        self._put(channel, sync=True)
        if self._gaps.get(channel) == (round_number, round_number):
            del self._gaps[channel]  # another attempt of the only one that is missing
        return channel not in self._gaps

    def results_after(self, state: CanonicalState) -> Iterator[SavedResult]:
        """Whole results that follow a state, without a gap.

        They may be of attempts that were aborted: the core applies one only if the log has
        committed this very root.
        """
        round_number = state.round
        while True:
            name = f"result/{state.channel}/{round_number}"
            saved = self._result(name)
            if saved is None:
                return
            if Blob.of(saved.chunks).root != saved.root:
                self._refuse(name)
                return
            yield saved
            round_number += 1

    def served(self, root: bytes) -> Blob | None:
        """A result by its root, with its true leaves and whatever bytes the disk gives."""
        for name in sorted(self._disk.files):
            saved = self._result(name) if name.startswith("result/") else None
            if saved is None or saved.root != root:
                continue
            if len(saved.leaves) == len(saved.chunks) and merkle_root(saved.leaves) == root:
                return Blob(saved.chunks, saved.leaves)
        return None

    def _read(self, name: str, kind: type[S]) -> S | None:
        data = self._disk.read(name)
        if data is None:
            return None
        try:
            return msgspec.msgpack.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._refuse(name)
            return None

    def _result(self, name: str) -> SavedResult | None:
        """A result whose header is whole; its chunks are not looked at."""
        saved = self._read(name, SavedResult)
        if saved is not None and saved.check != saved.checked():
            self._refuse(name)
            return None
        return saved

    def _refuse(self, name: str) -> None:
        self._seen["rot:refused-" + name.partition("/")[0]] += 1

    def _miss(self, channel: str, round_number: int) -> None:
        first, last = self._gaps.get(channel, (round_number, round_number))
        self._gaps[channel] = min(first, round_number), max(last, round_number)
