"""Shared memory between a trainer and its peer process: the layout (an ABI) and both sides of it.

One mapped file per peer process. All words are little-endian and eight-byte aligned; every vector
is f32 and starts on a page. Byte offsets below are pinned by a test.

=========  ======  =================================================================
header     0       page 0
           0       magic ``SWTRNSHM``
           8       u32 ABI version, 12 u32 number of channels
           16      schema hash, 32 bytes
           48      u64 bytes of the whole file
           56      u64 1 once the creator has written everything else
           64      u64 heartbeat of the peer process, monotonic ns
           72      u64 1 if training should stop, written after the reason
           80      u32 bytes of the reason, 84 the reason in UTF-8
channel i  4096·(1+i), one page each
           0       name, 64 bytes UTF-8, NUL padded
           64      u64 n; 72, 80 u64 offsets of θ slots 0 and 1; 88 u64 offset of the hand-over slot
           96      u64 number of ranges
           128     u64 ×2 generation of θ slot 0 and 1, odd while it is written
           160     u64 published: 0 for nothing, else ``(round << 1 | slot) + 1``, written last
           192     u64 generation of the decision words, odd while they are written
           200     u64 decided hand-over; 208 u64 outcome; 216 f64 coefficient; 224 u64 round
           256     u64 hand-over that the peer process reads, 0 if none
           320     of θ slot 0, then of slot 1: u64 overlap mode (0 not said, 1 off, 2 delayed,
                   3 eager), f64 outer learning rate, f64 outer momentum, all of θ's round
           384     of θ slot 0, then of slot 1: u64 1 if said, then of a phase that begins from θ:
                   u64 inner steps, f64 learning rate, weight decay, largest norm, u64 warm-up and
                   total steps, f64 extra steps as a multiple
           512     ranges, 64 bytes each: u64 rank, first, count, generation (``2·seq - 1`` while
                   hand-over ``seq`` is written, ``2·seq`` once it is complete: written last),
                   u64 base round, f64 samples, u64 steps, u64 unused
vectors    θ slot 0, θ slot 1, hand-over slot of channel 0, then of channel 1, …
=========  ======  =================================================================

A trainer that dies in the middle of a write leaves an odd generation, and so has contributed
nothing. A hand-over is complete when the ranges of *all* ranks are. The slot may be written again
once the previous hand-over is decided and no longer held.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swarmtrain_peer.shm_layout import (
    ABI_VERSION,
    AT_COEFFICIENT,
    AT_DECIDED_ROUND,
    AT_DECIDED_SEQ,
    AT_DECISION,
    AT_HANDOVER,
    AT_HELD,
    AT_INNER,
    AT_N,
    AT_OUTCOME,
    AT_OUTER,
    AT_PUBLISHED,
    AT_RANGE_COUNT,
    AT_RANGE_WORDS,
    AT_SLOT_GENERATION,
    AT_THETA,
    HEADER_BEAT,
    HEADER_READY,
    HEADER_STOP,
    INNER_WORDS,
    MAGIC,
    OUTCOMES,
    OVERLAPS,
    PAGE,
    RANGE_BYTES,
    ChannelPlaces,
    Decision,
    HandoverInfo,
    Places,
    Range,
    places,
    read_places,
)
from swarmtrain_protocols import limits
from swarmtrain_protocols.changes import InnerStep
from swarmtrain_protocols.errors import (
    DiskFull,
    LocalProtocolError,
    RunMismatch,
    VersionMismatch,
)
from swarmtrain_protocols.schedule import OuterStep

F32 = NDArray[np.float32]

_fence_lock = threading.Lock()


def _fence() -> None:
    """Keep the processor from moving stores (or loads) across this point.

    Two lock round trips are an acquire and a release on each side of it; x86 needs neither, other
    processors do. Readers in another process are ordered by the same call on their side.
    """
    for _ in range(2):
        _fence_lock.acquire()
        _fence_lock.release()


class _Channel:
    """Views of one channel: its words, its two θ slots and its hand-over slot."""

    def __init__(self, mapped: mmap.mmap, at: ChannelPlaces) -> None:
        self.at = at
        self.words = np.frombuffer(mapped, "<u8", PAGE // 8, at.page)
        self.doubles = np.frombuffer(mapped, "<f8", PAGE // 8, at.page)
        self.theta = tuple(np.frombuffer(mapped, "<f4", at.n, offset) for offset in at.theta)
        self.handover: F32 = np.frombuffer(mapped, "<f4", at.n, at.handover)

    def word(self, index: int) -> int:
        return int(self.words[index])

    def range_word(self, index: int, field: int) -> int:
        return AT_RANGE_WORDS + index * (RANGE_BYTES // 8) + field


class _Side:
    """What both sides share: the mapping and its channels by name."""

    def __init__(self, path: Path, fd: int, where: Places) -> None:
        self.path = path
        self.places = where
        self._mapped = mmap.mmap(fd, where.nbytes)
        self._header = np.frombuffer(self._mapped, "<u8", PAGE // 8, 0)
        self._channels = {at.name: _Channel(self._mapped, at) for at in where.channels}

    def channel(self, name: str) -> _Channel:
        found = self._channels.get(name)
        if found is None:
            raise LocalProtocolError("shared memory", f"no channel {name!r}")
        return found

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._channels)

    def values(self, name: str) -> int:
        """Number of f32 values of a channel."""
        return self.channel(name).at.n


class PeerSide(_Side):
    """The side of the peer process: makes the file, publishes θ, reads hand-overs."""

    @classmethod
    def create(cls, path: Path, schema_hash: bytes, where: Places) -> PeerSide:
        """Make the file at ``path`` (0600, must not exist) with its whole size reserved.

        Raises:
            DiskFull: not enough room; the file is gone again.
            FileExistsError: somebody else has that name.
        """
        if len(schema_hash) != 32:
            raise LocalProtocolError("shared memory", "a schema hash has 32 bytes")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
        try:
            _reserve(fd, path, where.nbytes)
            side = cls(path, fd, where)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        side._write_header(schema_hash)
        return side

    def _write_header(self, schema_hash: bytes) -> None:
        head = struct.pack(
            "<8sII32sQ", MAGIC, ABI_VERSION, len(self._channels), schema_hash, self.places.nbytes
        )
        self._mapped[: len(head)] = head
        for channel in self._channels.values():
            at = channel.at
            self._mapped[at.page : at.page + 64] = at.name.encode().ljust(64, b"\0")
            channel.words[AT_N] = at.n
            channel.words[AT_THETA : AT_THETA + 2] = at.theta
            channel.words[AT_HANDOVER] = at.handover
            channel.words[AT_RANGE_COUNT] = len(at.ranges)
            for index, part in enumerate(at.ranges):
                first = channel.range_word(index, 0)
                channel.words[first : first + 3] = (part.rank, part.first, part.count)
        _fence()
        self._header[HEADER_READY] = 1

    def publish(
        self,
        name: str,
        round: int,
        theta: F32,
        outer: OuterStep | None = None,
        inner: InnerStep | None = None,
    ) -> None:
        """Copy θ (f32[n]) of ``round`` into the slot nobody is told to read, then point at it.

        ``outer`` is the outer step of that round, whose result θ does not have yet; ``inner`` is
        how a phase is trained that begins from θ.
        """
        channel = self.channel(name)
        if theta.shape != (channel.at.n,) or theta.dtype != np.float32:
            raise LocalProtocolError("publish", f"{name}: {theta.dtype}{theta.shape}")
        slot = 1 - ((channel.word(AT_PUBLISHED) - 1) & 1) if channel.word(AT_PUBLISHED) else 0
        generation = channel.word(AT_SLOT_GENERATION + slot)
        channel.words[AT_SLOT_GENERATION + slot] = generation | 1
        _fence()
        np.copyto(channel.theta[slot], theta)
        at = AT_OUTER + 3 * slot
        channel.words[at] = 0 if outer is None else OVERLAPS.index(outer.overlap)
        channel.doubles[at + 1 : at + 3] = (0.0, 0.0) if outer is None else outer[1:]
        _write_inner(channel, slot, inner)
        _fence()
        channel.words[AT_SLOT_GENERATION + slot] = (generation | 1) + 1
        channel.words[AT_PUBLISHED] = (round << 1 | slot) + 1

    def handover(self, name: str, seq: int) -> tuple[F32, HandoverInfo] | None:
        """A read-only view (f32[n]) of hand-over ``seq``, or ``None`` if it is not complete.

        The view stays what it is until ``release`` or ``decide``: the trainer does not write while
        it is held.
        """
        channel = self.channel(name)
        if seq <= 0:
            raise LocalProtocolError("hand-over", f"sequence number {seq}")
        channel.words[AT_HELD] = seq
        _fence()
        samples, steps, base_round = 0.0, 0, -1
        for index in range(len(channel.at.ranges)):
            if channel.word(channel.range_word(index, 3)) != 2 * seq:
                channel.words[AT_HELD] = 0
                return None
            samples += float(channel.doubles[channel.range_word(index, 5)])
            steps = max(steps, channel.word(channel.range_word(index, 6)))
            base_round = max(base_round, channel.word(channel.range_word(index, 4)))
        view = channel.handover.view()
        view.flags.writeable = False
        return view, HandoverInfo(seq, base_round, samples, steps)

    def intact(self, name: str, seq: int) -> bool:
        """Whether hand-over ``seq`` is still what the slot holds, after it was read."""
        channel = self.channel(name)
        _fence()
        return all(
            channel.word(channel.range_word(index, 3)) == 2 * seq
            for index in range(len(channel.at.ranges))
        )

    def release(self, name: str) -> None:
        """The peer process has what it needs; the slot may be written again."""
        self.channel(name).words[AT_HELD] = 0

    def decide(self, name: str, decision: Decision) -> None:
        """Tell the trainer how a hand-over ended, and release its slot."""
        channel = self.channel(name)
        if decision.outcome not in OUTCOMES[1:]:
            raise LocalProtocolError("decision", f"outcome {decision.outcome!r}")
        generation = channel.word(AT_DECISION)
        channel.words[AT_DECISION] = generation | 1
        _fence()
        channel.words[AT_DECIDED_SEQ] = decision.seq
        channel.words[AT_OUTCOME] = OUTCOMES.index(decision.outcome)
        channel.doubles[AT_COEFFICIENT] = decision.coefficient
        channel.words[AT_DECIDED_ROUND] = decision.round
        channel.words[AT_HELD] = 0
        _fence()
        channel.words[AT_DECISION] = (generation | 1) + 1

    def set_should_stop(self, reason: str) -> None:
        """Ask the trainer to end; the first reason stays."""
        if self._header[HEADER_STOP]:
            return
        text = reason.encode()[: limits.SHM_STOP_REASON_BYTES_MAX]
        self._mapped[80:84] = struct.pack("<I", len(text))
        self._mapped[84 : 84 + len(text)] = text
        _fence()
        self._header[HEADER_STOP] = 1

    def beat(self, now_ns: int) -> None:
        """Show that the peer process lives; ``now_ns`` is the machine's monotonic clock."""
        self._header[HEADER_BEAT] = now_ns


class TrainerSide(_Side):
    """The side of one trainer rank: reads θ and decisions, writes its ranges of hand-overs."""

    def __init__(self, path: Path, fd: int, where: Places, rank: int) -> None:
        super().__init__(path, fd, where)
        self.rank = rank
        self.inner: dict[str, InnerStep | None] = {}
        """By channel, of the θ that was read last."""

    @classmethod
    def open(cls, path: Path, schema_hash: bytes, rank: int = 0) -> TrainerSide:
        """Map the file that a peer process made for exactly this model.

        Raises:
            VersionMismatch: not this ABI.
            RunMismatch: another schema, or a file that is not whole.
        """
        fd = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | os.O_CLOEXEC)
        try:
            head = os.pread(fd, 64, 0)
            if len(head) < 64 or head[:8] != MAGIC:
                raise RunMismatch("shared memory", f"{path} is not a swarmtrain mapping")
            _, version, count, schema, nbytes, ready = struct.unpack("<8sII32sQQ", head)
            if version != ABI_VERSION:
                raise VersionMismatch(
                    "shared memory",
                    f"ABI {version}, this side has {ABI_VERSION}",
                    "run trainer and peer process from one installation",
                )
            if schema != schema_hash:
                raise RunMismatch("shared memory", "made for another list of parameters")
            if os.fstat(fd).st_size != nbytes or not ready or not 0 < count <= limits.CHANNELS_MAX:
                raise RunMismatch("shared memory", f"{path} is not whole")
            where = read_places(os.pread(fd, PAGE * (1 + count), 0), count, nbytes)
            return cls(path, fd, where, rank)
        finally:
            os.close(fd)

    def published_round(self, name: str) -> int | None:
        """Round of the newest θ, or ``None`` before the first."""
        word = self.channel(name).word(AT_PUBLISHED)
        return None if word == 0 else (word - 1) >> 1

    def theta(self, name: str, out: F32) -> int | None:
        """Copy the newest θ into ``out`` (f32[n]) and return its round; ``None`` before the first.

        Raises:
            LocalProtocolError: it changed under every one of a bounded number of tries.
        """
        found = self.theta_and_step(name, out)
        return None if found is None else found[0]

    def theta_and_step(self, name: str, out: F32) -> tuple[int, OuterStep | None] | None:
        """As ``theta``, with the outer step of that round if the peer process says it.

        Raises:
            LocalProtocolError: it changed under every one of a bounded number of tries.
        """
        channel = self.channel(name)
        for _ in range(limits.SHM_READ_TRIES_MAX):
            word = channel.word(AT_PUBLISHED)
            if word == 0:
                return None
            slot = (word - 1) & 1
            before = channel.word(AT_SLOT_GENERATION + slot)
            _fence()
            np.copyto(out, channel.theta[slot])
            step, inner = self._step(channel, slot), _read_inner(channel, slot)
            _fence()
            after = channel.word(AT_SLOT_GENERATION + slot)
            if before == after and before & 1 == 0 and channel.word(AT_PUBLISHED) == word:
                self.inner[name] = inner
                return (word - 1) >> 1, step
        raise LocalProtocolError("theta", f"{name} changed under {limits.SHM_READ_TRIES_MAX} reads")

    @staticmethod
    def _step(channel: _Channel, slot: int) -> OuterStep | None:
        at = AT_OUTER + 3 * slot
        mode = channel.word(at)
        if not 0 < mode < len(OVERLAPS):
            return None
        lr, momentum = (float(value) for value in channel.doubles[at + 1 : at + 3])
        return OuterStep(OVERLAPS[mode], lr, momentum)

    def may_write(self, name: str) -> bool:
        """Whether the peer process has let go of the hand-over slot."""
        return self.channel(name).word(AT_HELD) == 0

    def next_seq(self, name: str) -> int:
        """The lowest hand-over number that no trainer, dead or alive, has begun."""
        channel = self.channel(name)
        last = max(channel.word(channel.range_word(i, 3)) for i, _ in self._ranges(channel))
        return (last + 1) // 2 + 1

    def begin(self, name: str, seq: int) -> list[tuple[int, F32]]:
        """Start writing hand-over ``seq``: (first, view f32[count]) of every range of this rank.

        Raises:
            LocalProtocolError: the slot is still held, or the sequence number is not a new one.
        """
        channel = self.channel(name)
        if not self.may_write(name):
            raise LocalProtocolError("hand-over", f"{name}: the previous one is being read")
        mine = self._ranges(channel)
        for index, _ in mine:
            if channel.word(channel.range_word(index, 3)) >= 2 * seq:
                raise LocalProtocolError("hand-over", f"{name}: {seq} is not a new number")
        for index, _ in mine:
            channel.words[channel.range_word(index, 3)] = 2 * seq - 1
        _fence()
        return [(r.first, channel.handover[r.first : r.first + r.count]) for _, r in mine]

    def commit(self, name: str, info: HandoverInfo) -> None:
        """Everything is written: metadata first, the generation word last."""
        channel = self.channel(name)
        for index, _ in self._ranges(channel):
            word = channel.range_word(index, 3)
            if channel.word(word) != 2 * info.seq - 1:
                raise LocalProtocolError("hand-over", f"{name}: {info.seq} was not begun")
            channel.words[channel.range_word(index, 4)] = info.base_round
            channel.doubles[channel.range_word(index, 5)] = info.samples
            channel.words[channel.range_word(index, 6)] = info.steps
            _fence()
            channel.words[word] = 2 * info.seq

    def _ranges(self, channel: _Channel) -> list[tuple[int, Range]]:
        found = [(i, r) for i, r in enumerate(channel.at.ranges) if r.rank == self.rank]
        if not found:
            raise LocalProtocolError("hand-over", f"rank {self.rank} has no range here")
        return found

    def decision(self, name: str) -> Decision | None:
        """The last decision, or ``None`` if there is none yet or it is just being written."""
        channel = self.channel(name)
        before = channel.word(AT_DECISION)
        if before == 0 or before & 1:
            return None
        _fence()
        found = Decision(
            channel.word(AT_DECIDED_SEQ),
            OUTCOMES[channel.word(AT_OUTCOME)],
            float(channel.doubles[AT_COEFFICIENT]),
            channel.word(AT_DECIDED_ROUND),
        )
        _fence()
        return found if channel.word(AT_DECISION) == before else None

    def should_stop(self) -> str | None:
        """The reason to stop training, or ``None``."""
        if not self._header[HEADER_STOP]:
            return None
        _fence()
        (length,) = struct.unpack("<I", self._mapped[80:84])
        return bytes(self._mapped[84 : 84 + length]).decode(errors="replace")

    def beat_ns(self) -> int:
        """Monotonic ns of the peer process's last heartbeat, 0 before the first."""
        return int(self._header[HEADER_BEAT])


def _write_inner(channel: _Channel, slot: int, inner: InnerStep | None) -> None:
    at = AT_INNER + INNER_WORDS * slot
    channel.words[at] = inner is not None
    for index, value in enumerate(inner or ()):
        (channel.words if isinstance(value, int) else channel.doubles)[at + 1 + index] = value


def _read_inner(channel: _Channel, slot: int) -> InnerStep | None:
    at = AT_INNER + INNER_WORDS * slot
    if channel.word(at) != 1:
        return None
    whole, real = channel.words[at + 1 :], channel.doubles[at + 1 :]
    lr, decay, clip, extra = (float(real[index]) for index in (1, 2, 3, 6))
    return InnerStep(int(whole[0]), lr, decay, clip, int(whole[4]), int(whole[5]), extra)


def _reserve(fd: int, path: Path, nbytes: int) -> None:
    """Give the file all its bytes now: a hole would be a bus error in the middle of training."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, nbytes)
        else:
            os.ftruncate(fd, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise DiskFull(
            "shared memory", f"{nbytes} bytes do not fit in {path.parent}", "free some space there"
        ) from None


__all__ = [
    "ABI_VERSION",
    "MAGIC",
    "OUTCOMES",
    "PAGE",
    "Decision",
    "HandoverInfo",
    "PeerSide",
    "Places",
    "Range",
    "TrainerSide",
    "places",
]
