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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import (
    ConfigError,
    DiskFull,
    LocalProtocolError,
    RunMismatch,
    VersionMismatch,
)

F32 = NDArray[np.float32]

MAGIC = b"SWTRNSHM"
ABI_VERSION = 1
PAGE = 4096
RANGES_OFFSET = 512
RANGE_BYTES = 64
OUTCOMES = ("", "committed", "aborted", "excluded")

# Indices of eight-byte words inside a channel page.
_N, _THETA, _HANDOVER, _RANGE_COUNT = 8, 9, 11, 12
_SLOT_GENERATION, _PUBLISHED = 16, 20
_DECISION, _DECIDED_SEQ, _OUTCOME, _COEFFICIENT, _DECIDED_ROUND = 24, 25, 26, 27, 28
_HELD = 32
_RANGE_WORDS = RANGES_OFFSET // 8
_HEADER_READY, _HEADER_BEAT, _HEADER_STOP = 7, 8, 9

assert RANGES_OFFSET + limits.SHM_RANGES_MAX * RANGE_BYTES <= PAGE
assert limits.CHANNEL_NAME_CHARS_MAX <= 64


@dataclass(frozen=True, slots=True)
class Range:
    """Values ``first … first+count-1`` of a channel are written by trainer rank ``rank``."""

    rank: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class ChannelPlaces:
    """Byte offsets of one channel in the file."""

    name: str
    n: int
    page: int
    theta: tuple[int, int]
    handover: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Places:
    """Byte offsets of everything."""

    channels: tuple[ChannelPlaces, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class HandoverInfo:
    """What a trainer said about its hand-over; summed or agreed over its ranks."""

    seq: int
    base_round: int
    samples: float
    steps: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Outcome of hand-over ``seq``: ``committed``, ``aborted`` or ``excluded``.

    ``coefficient`` is the weight with which it went into the round (0 unless committed) and
    ``round`` the round of the channel's state after the decision.
    """

    seq: int
    outcome: str
    coefficient: float
    round: int


def places(
    layout: Sequence[tuple[str, int]], ranges: dict[str, Sequence[Range]] | None = None
) -> Places:
    """Where everything lies, for channels ``layout`` = (name, number of values).

    Without ``ranges`` rank 0 covers every channel.

    Raises:
        ConfigError: no channel, too many, a bad name or size, or ranges that do not cover exactly.
    """
    names = {name for name, _ in layout}
    if not 0 < len(layout) <= limits.CHANNELS_MAX or len(names) != len(layout):
        raise ConfigError("shared memory", f"{len(layout)} channels, or two of one name")
    offset = PAGE * (1 + len(layout))
    channels = []
    for index, (name, n) in enumerate(layout):
        if not name or len(name.encode()) > limits.CHANNEL_NAME_CHARS_MAX or "\0" in name:
            raise ConfigError("shared memory", f"channel name {name!r}")
        if not 0 < n <= limits.VALUES_PER_CHANNEL_MAX:
            raise ConfigError("shared memory", f"channel {name} has {n} values")
        mine = tuple((ranges or {}).get(name, (Range(0, 0, n),)))
        _check_cover(name, n, mine)
        step = -(-4 * n // PAGE) * PAGE
        channels.append(
            ChannelPlaces(
                name, n, PAGE * (1 + index), (offset, offset + step), offset + 2 * step, mine
            )
        )
        offset += 3 * step
    return Places(tuple(channels), offset)


def _check_cover(name: str, n: int, ranges: tuple[Range, ...]) -> None:
    if len(ranges) > limits.SHM_RANGES_MAX:
        raise ConfigError("shared memory", f"channel {name} has {len(ranges)} ranges")
    at = 0
    for part in sorted(ranges, key=lambda r: r.first):
        if part.first != at or part.count <= 0:
            raise ConfigError("shared memory", f"ranges of {name} leave a hole or overlap at {at}")
        at += part.count
    if at != n:
        raise ConfigError("shared memory", f"ranges of {name} cover {at} of {n} values")


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
        return _RANGE_WORDS + index * (RANGE_BYTES // 8) + field


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
            channel.words[_N] = at.n
            channel.words[_THETA : _THETA + 2] = at.theta
            channel.words[_HANDOVER] = at.handover
            channel.words[_RANGE_COUNT] = len(at.ranges)
            for index, part in enumerate(at.ranges):
                first = channel.range_word(index, 0)
                channel.words[first : first + 3] = (part.rank, part.first, part.count)
        _fence()
        self._header[_HEADER_READY] = 1

    def publish(self, name: str, round: int, theta: F32) -> None:
        """Copy θ (f32[n]) of ``round`` into the slot nobody is told to read, then point at it."""
        channel = self.channel(name)
        if theta.shape != (channel.at.n,) or theta.dtype != np.float32:
            raise LocalProtocolError("publish", f"{name}: {theta.dtype}{theta.shape}")
        slot = 1 - ((channel.word(_PUBLISHED) - 1) & 1) if channel.word(_PUBLISHED) else 0
        generation = channel.word(_SLOT_GENERATION + slot)
        channel.words[_SLOT_GENERATION + slot] = generation | 1
        _fence()
        np.copyto(channel.theta[slot], theta)
        _fence()
        channel.words[_SLOT_GENERATION + slot] = (generation | 1) + 1
        channel.words[_PUBLISHED] = (round << 1 | slot) + 1

    def handover(self, name: str, seq: int) -> tuple[F32, HandoverInfo] | None:
        """A read-only view (f32[n]) of hand-over ``seq``, or ``None`` if it is not complete.

        The view stays what it is until ``release`` or ``decide``: the trainer does not write while
        it is held.
        """
        channel = self.channel(name)
        if seq <= 0:
            raise LocalProtocolError("hand-over", f"sequence number {seq}")
        channel.words[_HELD] = seq
        _fence()
        samples, steps, base_round = 0.0, 0, -1
        for index in range(len(channel.at.ranges)):
            if channel.word(channel.range_word(index, 3)) != 2 * seq:
                channel.words[_HELD] = 0
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
        self.channel(name).words[_HELD] = 0

    def decide(self, name: str, decision: Decision) -> None:
        """Tell the trainer how a hand-over ended, and release its slot."""
        channel = self.channel(name)
        if decision.outcome not in OUTCOMES[1:]:
            raise LocalProtocolError("decision", f"outcome {decision.outcome!r}")
        generation = channel.word(_DECISION)
        channel.words[_DECISION] = generation | 1
        _fence()
        channel.words[_DECIDED_SEQ] = decision.seq
        channel.words[_OUTCOME] = OUTCOMES.index(decision.outcome)
        channel.doubles[_COEFFICIENT] = decision.coefficient
        channel.words[_DECIDED_ROUND] = decision.round
        channel.words[_HELD] = 0
        _fence()
        channel.words[_DECISION] = (generation | 1) + 1

    def set_should_stop(self, reason: str) -> None:
        """Ask the trainer to end; the first reason stays."""
        if self._header[_HEADER_STOP]:
            return
        text = reason.encode()[: limits.SHM_STOP_REASON_BYTES_MAX]
        self._mapped[80:84] = struct.pack("<I", len(text))
        self._mapped[84 : 84 + len(text)] = text
        _fence()
        self._header[_HEADER_STOP] = 1

    def beat(self, now_ns: int) -> None:
        """Show that the peer process lives; ``now_ns`` is the machine's monotonic clock."""
        self._header[_HEADER_BEAT] = now_ns


class TrainerSide(_Side):
    """The side of one trainer rank: reads θ and decisions, writes its ranges of hand-overs."""

    def __init__(self, path: Path, fd: int, where: Places, rank: int) -> None:
        super().__init__(path, fd, where)
        self.rank = rank

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
            where = _read_places(os.pread(fd, PAGE * (1 + count), 0), count, nbytes)
            return cls(path, fd, where, rank)
        finally:
            os.close(fd)

    def published_round(self, name: str) -> int | None:
        """Round of the newest θ, or ``None`` before the first."""
        word = self.channel(name).word(_PUBLISHED)
        return None if word == 0 else (word - 1) >> 1

    def theta(self, name: str, out: F32) -> int | None:
        """Copy the newest θ into ``out`` (f32[n]) and return its round; ``None`` before the first.

        Raises:
            LocalProtocolError: it changed under every one of a bounded number of tries.
        """
        channel = self.channel(name)
        for _ in range(limits.SHM_READ_TRIES_MAX):
            word = channel.word(_PUBLISHED)
            if word == 0:
                return None
            slot = (word - 1) & 1
            before = channel.word(_SLOT_GENERATION + slot)
            _fence()
            np.copyto(out, channel.theta[slot])
            _fence()
            after = channel.word(_SLOT_GENERATION + slot)
            if before == after and before & 1 == 0 and channel.word(_PUBLISHED) == word:
                return (word - 1) >> 1
        raise LocalProtocolError("theta", f"{name} changed under {limits.SHM_READ_TRIES_MAX} reads")

    def may_write(self, name: str) -> bool:
        """Whether the peer process has let go of the hand-over slot."""
        return self.channel(name).word(_HELD) == 0

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
        before = channel.word(_DECISION)
        if before == 0 or before & 1:
            return None
        _fence()
        found = Decision(
            channel.word(_DECIDED_SEQ),
            OUTCOMES[channel.word(_OUTCOME)],
            float(channel.doubles[_COEFFICIENT]),
            channel.word(_DECIDED_ROUND),
        )
        _fence()
        return found if channel.word(_DECISION) == before else None

    def should_stop(self) -> str | None:
        """The reason to stop training, or ``None``."""
        if not self._header[_HEADER_STOP]:
            return None
        _fence()
        (length,) = struct.unpack("<I", self._mapped[80:84])
        return bytes(self._mapped[84 : 84 + length]).decode(errors="replace")

    def beat_ns(self) -> int:
        """Monotonic ns of the peer process's last heartbeat, 0 before the first."""
        return int(self._header[_HEADER_BEAT])


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


def _read_places(head: bytes, count: int, nbytes: int) -> Places:
    """Read the channel pages of a file and check them against what ``places`` says."""
    layout: list[tuple[str, int]] = []
    ranges: dict[str, Sequence[Range]] = {}
    for index in range(count):
        page: Any = head[PAGE * (1 + index) : PAGE * (2 + index)]
        name = page[:64].rstrip(b"\0").decode(errors="replace")
        words = np.frombuffer(page, "<u8")
        parts = []
        for k in range(min(int(words[_RANGE_COUNT]), limits.SHM_RANGES_MAX)):
            first = _RANGE_WORDS + k * (RANGE_BYTES // 8)
            parts.append(Range(int(words[first]), int(words[first + 1]), int(words[first + 2])))
        layout.append((name, int(words[_N])))
        ranges[name] = parts
    try:
        where = places(layout, ranges)
    except ConfigError as error:
        raise RunMismatch("shared memory", f"damaged header ({error.why})") from None
    if where.nbytes != nbytes:
        raise RunMismatch("shared memory", "damaged header (size)")
    return where
