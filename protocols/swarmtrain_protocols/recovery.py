"""A run goes on after losing a majority of its stewards: the ledger it goes on with (spec 04 §2.8).

What the survivor's log proves stays: members, channels, rounds and their outcomes. What the lost
stewards alone could have decided is dropped: attempts that are open, and their votes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.ledger import Ledger, load_snapshot
from swarmtrain_protocols.log.certificate import Trust
from swarmtrain_protocols.log.entrylog import EntryLog
from swarmtrain_protocols.log.recovery import Restarted, recover
from swarmtrain_protocols.manifest import Manifest
from swarmtrain_protocols.messages.log import Deed
from swarmtrain_protocols.pipeline import book


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recovery would do, and the record that does it."""

    log: Restarted
    ledger: Ledger
    lost: tuple[bytes, ...]
    """Stewards of the old log that are no members of the new one, in key order."""


def ledger_of(log: EntryLog, manifest: Manifest) -> Ledger:
    """The ledger after the newest certified entry of ``log``."""
    keys = manifest.keys
    ledger = Ledger(pipeline=book.pipeline_state(keys.stages, keys.pipeline_mode))
    if log.snapshot is not None:
        ledger = load_snapshot(log.snapshot.body.ledger)
    for index in range(ledger.index + 1, log.commit + 1):
        ledger.apply(index, log.entry(index).body)
    return ledger


def begin_again(ledger: Ledger, steward: bytes, generation: int, index: int) -> tuple[bytes, ...]:
    """Turn ``ledger`` into that of a new log with one steward; returns the stewards that it lost.

    They may join again, as anybody may; their votes are not in the new log.
    """
    lost = tuple(sorted({*ledger.voters, *ledger.joint} - {steward}))
    for key in lost:
        ledger.members.pop(key, None)
        ledger.pipeline.assigned.pop(key, None)
    ledger.voters, ledger.joint, ledger.genesis_steward = (steward,), (), steward
    ledger.generation, ledger.index = generation, index
    for channel in ledger.channels.values():
        channel.open = channel.chosen = None
        channel.attempt = 0
    if ledger.model is not None:
        book.rewound(ledger)
    return lost


def plan_recovery(
    manifest: Manifest, records: Iterable[bytes], keyring: Keyring, keys: Sequence[Keyring]
) -> Plan:
    """Begin the log in ``records`` again with ``keyring``'s site as its steward.

    Args:
        records: what was durable of the log at that site.
        keys: among them the key that founded the run, or that it was handed over to last.

    Raises:
        ConfigError: the run has ended, or the site was turned out.
        CheckpointError: the log cannot be read.
        LocalProtocolError: the run is that of none of the keys.
    """
    made: list[tuple[Ledger, tuple[bytes, ...]]] = []

    def restart(
        log: EntryLog, generation: int, index: int
    ) -> tuple[bytes, list[bytes], list[Deed]]:
        ledger = ledger_of(log, manifest)
        if ledger.ended:
            raise ConfigError("recovery refused", f"the run has ended: {ledger.ended}")
        if keyring.peer_id in ledger.banned:
            raise ConfigError("recovery refused", "this site is banned", "take another site")
        lost = begin_again(ledger, keyring.peer_id, generation, index)
        made.append((ledger, lost))
        voting = [key for key, member in ledger.members.items() if member.may_vote]
        return ledger.snapshot(), voting, ledger.access.deeds

    trust = Trust(manifest.run_id, manifest.founder, keyring)
    restarted = recover(trust, records, keys, restart)
    ((ledger, lost),) = made
    return Plan(restarted, ledger, lost)
