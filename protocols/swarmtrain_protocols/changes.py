"""Run keys that change in flight: a pure function of manifest, log and round. Spec 05 §1.6.

A change is an entry of the log that says from which round on a key has another value, and it must
be logged before anybody can have opened that round. So whoever knows the state before a round knows
every key of it, and all members change at the same round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.manifest import RunKeys, run_keys_from_mapping

if TYPE_CHECKING:
    from swarmtrain_protocols.ledger import Ledger

NOTICE_ROUNDS = 2
"""How far ahead a change is by default: it must be logged before its round is opened."""
ANYWHERE = ("max_rounds", "checkpoint_every_rounds")
IN_FLIGHT = (
    "inner_steps",
    "inner_lr",
    "inner_weight_decay",
    "inner_clip",
    "inner_warmup_steps",
    "total_steps",
    "outer_lr",
    "outer_momentum",
    "max_extra_steps_factor",
    "min_peers",
    "grace_s",
    "round_timeout_s",
    *ANYWHERE,
)


class InnerStep(NamedTuple):
    """How a site trains between two rounds; the fields are run keys."""

    inner_steps: int
    inner_lr: float
    inner_weight_decay: float
    inner_clip: float
    inner_warmup_steps: int
    total_steps: int
    max_extra_steps_factor: float


def inner_step(keys: RunKeys) -> InnerStep:
    """What ``keys`` say of a phase."""
    return InnerStep(*(getattr(keys, name) for name in InnerStep._fields))


def check_changeable(key: str, stages: int) -> None:
    """Say why a key cannot change while the run goes on.

    Raises:
        ConfigError: no such key, or one that is fixed (in pipelines most are).
    """
    run_keys_from_mapping({key: getattr(RunKeys(), key, "")})  # an unknown one gets a suggestion
    if key not in IN_FLIGHT:
        todo = f"these can: {', '.join(IN_FLIGHT)}"
        raise ConfigError(f"run key {key}", "it is fixed for the whole run", todo)
    if stages and key not in ANYWHERE:
        todo = f"these can: {', '.join(ANYWHERE)}"
        raise ConfigError(f"run key {key}", "in a pipeline it is fixed for the whole run", todo)


def parse_change(key: str, text: str) -> object:
    """The value of run key ``key`` that ``text`` means.

    Raises:
        ConfigError: what is allowed.
    """
    return getattr(run_keys_from_mapping({key: text}), key)


def value_text(key: str, value: object) -> str:
    """The one text of a value, which is what the log holds: digits, or ``auto``."""
    if value is None or (key in ("grace_s", "round_timeout_s") and value == 0):
        return "auto"
    return repr(value)


def fits(ledger: Ledger, key: str, text: str) -> bool:
    """Whether a change of ``key`` to ``text`` may stand in the log of this run."""
    if key not in (ANYWHERE if ledger.pipeline.stages else IN_FLIGHT):
        return False
    try:
        return value_text(key, parse_change(key, text)) == text
    except ConfigError:
        return False


def add(ledger: Ledger, at_round: int, key: str, text: str) -> None:
    """Keep a change that fits; of each key the newest few are remembered."""
    same = [item for item in ledger.changes if item[1] == key and item[0] != at_round]
    others = [item for item in ledger.changes if item[1] != key]
    same = sorted([*same, (at_round, key, text)])[-limits.CONFIG_CHANGES_KEPT :]
    ledger.changes = [*others, *same]


def forget_beyond(ledger: Ledger, latest: int) -> None:
    """The run went back: what was to change later than round ``latest`` does not."""
    ledger.changes = [item for item in ledger.changes if item[0] <= latest]


def changed_at(ledger: Ledger, round_number: int) -> dict[str, Any]:
    """The keys that have another value than the manifest's in ``round_number``, and their value."""
    found: dict[str, Any] = {}
    for first, key, text in sorted(ledger.changes, key=lambda item: item[0]):
        if first <= round_number:
            found[key] = parse_change(key, text)
    return found


def keys_at(keys: RunKeys, ledger: Ledger, round_number: int) -> RunKeys:
    """The run's keys in ``round_number``.

    Changes that exclude each other or a key of the manifest are left out, the later ones first:
    whoever orders them is told, and this keeps every member's answer the same.
    """
    changed = changed_at(ledger, round_number)
    while changed:
        try:
            return msgspec.structs.replace(keys, **changed)
        except ConfigError:
            changed.popitem()
    return keys


def front(ledger: Ledger) -> int:
    """The newest round that anybody works on."""
    return max((channel.round for channel in ledger.train_channels()), default=0)


def check_change(keys: RunKeys, ledger: Ledger, at_round: int, key: str, text: str) -> str:
    """The text to log for a change that is wanted.

    Raises:
        ConfigError: the key is fixed, the value is not allowed (alone or with the other keys), or
            the round is not ahead.
    """
    check_changeable(key, keys.stages)
    value = parse_change(key, text)
    if not ledger.train_channels():
        why = "there is no model yet, so no round that a change could be for"
        raise ConfigError(f"run key {key}", why, "wait for the first trainer")
    if at_round <= front(ledger):
        why = f"round {front(ledger)} is under way already"
        raise ConfigError(f"--at-round {at_round}", why, f"at least {front(ledger) + 1}")
    msgspec.structs.replace(keys_at(keys, ledger, at_round), **{key: value})
    return value_text(key, value)
