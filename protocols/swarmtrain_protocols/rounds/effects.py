"""Data-plane work that the round core asks for, and where fetched bytes go.

The core sees roots, indices and part handles, never values. A shell (or the simulator) does the
work with ``dataplane.DataPlane`` and answers with the method named in each docstring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from swarmtrain_protocols.entries import RoundOpened, RoundSet
from swarmtrain_protocols.messages.common import RoundKey


@dataclass(frozen=True, slots=True)
class BeginAttempt:
    """An attempt begins in which this node owns or needs parts. No answer."""

    opened: RoundOpened


@dataclass(frozen=True, slots=True)
class ReducePart:
    """Sum ``part`` over the logged set; answer ``reduced(now, key, part, root)``."""

    key: RoundKey
    part: int
    chosen: RoundSet


@dataclass(frozen=True, slots=True)
class MeasurePart:
    """Sum the squares of contributor ``index``'s ``part``, decoded; the bytes are here.

    Answer ``measured(now, effect, square)``.
    """

    key: RoundKey
    part: int
    index: int


@dataclass(frozen=True, slots=True)
class StoreResult:
    """All parts are in place: hash them as one blob and, for state channels, write them to disk.

    Answer ``stored(now, key, root, durable)``.
    """

    key: RoundKey


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """Apply the committed result of ``round`` to the canonical state.

    ``scale``, ``recovered`` and ``plain`` are for optimizers of stages (``stageopt.StepTerms``),
    ``lr`` and ``momentum``, those of the round (``schedule``), for the outer step of all others.
    Answer ``applied(now, channel, round + 1, state_hash)``.
    """

    channel: str
    round: int
    root: bytes
    scale: float = 1.0
    recovered: int = -1
    plain: tuple[tuple[int, int], ...] = ()
    lr: float = math.nan
    momentum: float = math.nan


@dataclass(frozen=True, slots=True)
class DropState:
    """This node serves the stage no more and others are further: forget its state and files.

    No answer.
    """

    channel: str


@dataclass(frozen=True, slots=True)
class PrepareSnapshot:
    """Make room for a snapshot, and see which of its chunks are here already.

    They may lie where an earlier life has put them, or, once the leaf hashes of all chunks were
    fetched, be equal to chunks of the own old state. Answer ``prepared(now, channel, root, have,
    compare)``; ``compare``: the hashes are wanted, then this effect comes again.
    """

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class InstallSnapshot:
    """All chunks of a snapshot are in place: make it the canonical state.

    Answer ``applied(now, channel, round, state_hash)`` or ``install_failed(now, channel, why)``.
    """

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class CompleteResult:
    """All chunks of a missed result are in place: hash and store it. Answer ``completed``."""

    result: WholeResult


@dataclass(frozen=True, slots=True)
class ReleaseAttempt:
    """Forget the buffers of an attempt, except a stored result that was committed."""

    key: RoundKey


@dataclass(frozen=True, slots=True)
class ReleaseContribution:
    """The encoded contribution ``root`` is decided; its memory may go."""

    channel: str
    root: bytes


@dataclass(frozen=True, slots=True)
class ContributionPart:
    """Purpose of a fetch: contributor ``index``'s chunks of ``part``."""

    key: RoundKey
    part: int
    index: int


@dataclass(frozen=True, slots=True)
class ResultPart:
    """Purpose of a fetch: the encoded result of ``part``."""

    key: RoundKey
    part: int


@dataclass(frozen=True, slots=True)
class WholeResult:
    """Purpose of a fetch: chunks of a committed result that this node missed.

    Sizes follow from ``values`` and ``codec``, which come from the log.
    """

    channel: str
    round: int
    root: bytes
    values: int
    codec: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Purpose of a fetch: chunks of the state before ``round``, ``values`` long.

    ``foreign``: what for, if it will not be this node's own state; it then has memory of its own.
    """

    channel: str
    round: int
    root: bytes
    values: int
    foreign: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotLeaves:
    """Purpose of a fetch: the leaf hashes of a snapshot's chunks, without the chunks."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class ContributionDecided:
    """Event: what became of an own contribution.

    ``outcome`` is ``committed``, ``excluded`` (the round went on without it) or ``aborted``.
    """

    channel: str
    root: bytes
    outcome: str
    coefficient: float
    key: RoundKey


@dataclass(frozen=True, slots=True)
class GroupDone:
    """Event: the agreed result of a group round is here.

    ``contributors`` are (member, weight, coefficient) of the set.
    """

    key: RoundKey
    root: bytes
    contributors: tuple[tuple[bytes, float, float], ...]


@dataclass(frozen=True, slots=True)
class StateAdvanced:
    """Event: the canonical state of a channel is now the one before ``round``."""

    channel: str
    round: int
    state_hash: bytes
    caught_up: bool


@dataclass(frozen=True, slots=True)
class Resync:
    """Event: the own state differs from the pinned hash, or is too old; a snapshot is fetched."""

    channel: str
    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Event for the event log: ``name`` is in the catalogue of events, fields are plain values."""

    name: str
    fields: dict[str, object]
