"""Where everything lies in the shared memory of ``shm.py``: offsets, check, reading back.

Nothing here touches memory; ``shm.py`` has the table and the reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import ConfigError, RunMismatch

MAGIC = b"SWTRNSHM"
ABI_VERSION = 3
PAGE = 4096
RANGES_OFFSET = 512
RANGE_BYTES = 64
OUTCOMES = ("", "committed", "aborted", "excluded")
OVERLAPS = ("", "off", "delayed", "eager")

# Indices of eight-byte words inside a channel page.
AT_N, AT_THETA, AT_HANDOVER, AT_RANGE_COUNT = 8, 9, 11, 12
AT_SLOT_GENERATION, AT_PUBLISHED = 16, 20
AT_DECISION, AT_DECIDED_SEQ, AT_OUTCOME, AT_COEFFICIENT, AT_DECIDED_ROUND = 24, 25, 26, 27, 28
AT_HELD = 32
AT_OUTER = 40
"""Three words per θ slot: overlap mode, outer learning rate, outer momentum."""
AT_INNER = 48
"""Eight words per θ slot: 1 if said, then the fields of ``changes.InnerStep``."""
INNER_WORDS = 8
AT_RANGE_WORDS = RANGES_OFFSET // 8
HEADER_READY, HEADER_BEAT, HEADER_STOP = 7, 8, 9

assert RANGES_OFFSET + limits.SHM_RANGES_MAX * RANGE_BYTES <= PAGE
assert AT_INNER + 2 * INNER_WORDS <= RANGES_OFFSET // 8
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


def read_places(head: bytes, count: int, nbytes: int) -> Places:
    """Read the channel pages of a file and check them against what ``places`` says."""
    layout: list[tuple[str, int]] = []
    ranges: dict[str, Sequence[Range]] = {}
    for index in range(count):
        page = head[PAGE * (1 + index) : PAGE * (2 + index)]
        name = page[:64].rstrip(b"\0").decode(errors="replace")
        words = np.frombuffer(page, "<u8")
        parts = []
        for k in range(min(int(words[AT_RANGE_COUNT]), limits.SHM_RANGES_MAX)):
            first = AT_RANGE_WORDS + k * (RANGE_BYTES // 8)
            parts.append(Range(int(words[first]), int(words[first + 1]), int(words[first + 2])))
        layout.append((name, int(words[AT_N])))
        ranges[name] = parts
    try:
        where = places(layout, ranges)
    except ConfigError as error:
        raise RunMismatch("shared memory", f"damaged header ({error.why})") from None
    if where.nbytes != nbytes:
        raise RunMismatch("shared memory", "damaged header (size)")
    return where
