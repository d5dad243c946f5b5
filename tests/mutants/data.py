"""Planted bugs of dealt data: which samples count, once."""

from __future__ import annotations

from tests.mutants.catalogue import Finder, Mutant, find
from tests.mutants.patching import patch

ALONE = find("data: shards alone", 0, 150)


def _code(name: str, where: str, old: str, new: str, finder: Finder = ALONE) -> Mutant:
    return Mutant(name, "data", "shards.py", False, (patch(where, old, new),), (finder,))


def _spec(
    name: str, section: str, where: str, old: str, new: str, finder: Finder = ALONE
) -> Mutant:
    return Mutant(name, "data", f"13 {section}", True, (patch(where, old, new),), (finder,))


def _also(name: str, section: str, where: str, old: str, new: str) -> Mutant:
    """A sentence of the specification whose code was read before."""
    return Mutant(name, "data", f"13 {section}", False, (patch(where, old, new),), (ALONE,))


MUTANTS = (
    _spec(
        "what an open attempt lists stays where it is",
        "§2.3.1",
        "shards:DataState.deal",
        "if member not in self.claimed and (",
        "if (",
    ),
    _spec(
        "only what is in the set counts",
        "§2.3",
        "shards:DataState.decided",
        "if member in chosen:",
        "if True:",
    ),
    _also(
        "a rewind takes back what counted",
        "§2.3",
        "shards:DataState.rewound",
        "self.next, self.counted, self.round = mark.next, mark.counted, round_number",
        "self.round = round_number",
    ),
    _code(
        "a claim begins where its shard was left",
        "shards:DataState.refusal",
        "if held.get(shard) != first:",
        "if shard not in held:",
    ),
    _code(
        "a shard that lost its holder is dealt again",
        "shards:DataState.deal",
        "self.free.update(self.leases.pop(member))",
        "self.leases.pop(member)",
    ),
    _code(
        "a shard goes on where its holder left it",
        "shards:DataState._supply",
        "done = self.free.pop(shard)",
        "done = self.first(shard) + 0 * self.free.pop(shard)",
    ),
    _code(
        "what was aborted goes into the next claim",
        "shards:LeaseBook.decided",
        "self._queued = joined([*self._queued, *flying])",
        "pass",
    ),
    _code(
        "what counted is not trained on again before the log's news of it",
        "shards:LeaseBook.decided",
        "self._settled.append((round_number, flying))",
        "pass",
    ),
    _code(
        "progress on what is somebody else's is given up",
        "shards:LeaseBook.boundary",
        "if self._void or without(claims, self._held):",
        "if False:",
    ),
    _code(
        "progress that is thrown away is trained on again",
        "shards:LeaseBook.dropped",
        "self._fresh = ()",
        "pass",
    ),
    _code(
        "a commit counts what it contains",
        "ledger:_committed",
        "if ledger.counts_data(channel.name):",
        "if False:",
        find("data", 0, 4),
    ),
)
