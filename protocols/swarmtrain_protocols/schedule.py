"""Which overlap mode and which outer step are for which round: a pure function of log and round.

Everybody who applies the result of a round must use the same outer step, whether at once, after a
restart or years later in a replay. Run keys say it, and where they say ``auto`` the log does: an
entry CONFIG_CHANGED stands before every round that it is for has been opened, so whoever knows the
outcome of a round knows its mode. Spec 07 §2.2.
"""

from __future__ import annotations

from typing import NamedTuple

from swarmtrain_protocols.changes import keys_at
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.manifest import RunKeys

SHORT_RUN_ROUNDS = 50
"""Momentum 0.9 needs many times 1 / (1 - 0.9) rounds to pay; below this it only hurts."""


class OuterStep(NamedTuple):
    """How the result of a round is applied, and how trainers overlap that round's exchange."""

    overlap: str
    lr: float
    momentum: float


def is_measured(keys: RunKeys) -> bool:
    """The overlap mode of this run follows from what members measure.

    Streaming hides the exchange itself: with ``delay`` the mode is off and stays so. So it is in a
    pipeline, whose other stages go on while one exchanges.
    """
    return keys.overlap == "auto" and not keys.delay and not keys.stages


def overlap_at(keys: RunKeys, ledger: Ledger, round_number: int) -> str:
    """``off``, ``delayed`` or ``eager``, for a round that is decided, open or next."""
    return mode_at(keys.overlap, is_measured(keys), ledger, round_number)


def mode_at(named: str, measured: bool, ledger: Ledger, round_number: int) -> str:
    """As ``overlap_at``, of the run key ``named`` and whether the mode is measured."""
    if named != "auto":
        return named
    mode = "off"
    if measured:
        for first, value in ledger.overlaps:
            if first <= round_number:
                mode = value
    return mode


def outer_at(keys: RunKeys, ledger: Ledger, round_number: int) -> OuterStep:
    """The outer step that the result of ``round_number`` is applied with, in any channel."""
    overlap = overlap_at(keys, ledger, round_number)
    lr, momentum = auto_outer(overlap, max(keys.start_peers, 2), keys.max_rounds)
    keys = keys_at(keys, ledger, round_number)
    return OuterStep(
        overlap,
        lr if keys.outer_lr is None else keys.outer_lr,
        momentum if keys.outer_momentum is None else keys.outer_momentum,
    )


def auto_outer(overlap: str, members: int, rounds: int) -> tuple[float, float]:
    """Outer learning rate and momentum that are stable for a mode, a swarm and a length of run.

    Short runs average (1, 0). Long runs take the published (0.7, 0.9) without overlap, and lower
    gains under delay: with momentum 0.9 and inner phases that go all the way, the linear model is
    stable up to 1.36 (off), 0.42 (eager, four members), 0.26 (eager, many) and 0.25 (delayed).

    Args:
        overlap: ``off``, ``delayed`` or ``eager``.
        members: expected number of contributors, at least 1.
        rounds: planned rounds; 0 if the run has no planned end.

    Raises:
        ConfigError: unknown overlap.
    """
    if overlap not in ("off", "delayed", "eager"):
        raise ConfigError(f"unknown overlap {overlap!r}", todo="Use off, delayed or eager.")
    assert members >= 1 and rounds >= 0
    if 0 < rounds < SHORT_RUN_ROUNDS:
        return 1.0, 0.0
    if overlap == "off":
        return 0.7, 0.9
    if overlap == "delayed":
        return 0.2, 0.9
    return (0.4, 0.9) if members <= 4 else (0.25, 0.9)
