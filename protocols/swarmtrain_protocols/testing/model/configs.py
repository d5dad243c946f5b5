"""Which configurations are explored, and the smallest one in which each guard is missed."""

from __future__ import annotations

from swarmtrain_protocols.testing.model import consensus, once
from swarmtrain_protocols.testing.model.consensus import Config as Log
from swarmtrain_protocols.testing.model.consensus import Consensus
from swarmtrain_protocols.testing.model.decision import Config as Round
from swarmtrain_protocols.testing.model.decision import Decision
from swarmtrain_protocols.testing.model.explore import Model
from swarmtrain_protocols.testing.model.once import Config as Count
from swarmtrain_protocols.testing.model.once import Once

Configs = tuple[Log | Round | Count, ...]


def model_of(config: Log | Round | Count) -> tuple[str, Model]:
    """A name and the model of a configuration."""
    if isinstance(config, Log):
        return "log: " + config.name, Consensus(config)
    if isinstance(config, Round):
        return "round: " + config.name, Decision(config)
    return "once: " + config.name, Once(config)


_SMALL: Configs = (
    Log("3 stewards, 2 terms", terms=2, entries=2, crashes=0),
    Round("3 members, no faults", crashes=0, moves=0, attempts=1),
    Round("2 members, a crash", members=2, holders=3, volatile=True, moves=0, attempts=1),
    Count("1 member, 3 contributions", members=1, cards=3, breaks=0),
    Count("1 member, a link breaks", members=1, cards=2, breaks=1),
)
_MEDIUM: tuple[Log | Round | Count, ...] = (
    Log("3 stewards, 2 terms, a crash", terms=2, entries=2),
    Log("longer logs", terms=2, entries=3),
    Round("3 members, a crash", moves=0, attempts=1),
    Round("the same, no deadline helps", moves=0, attempts=1, patient=True),
    Round("2 attempts behind, no faults", crashes=0, moves=0),
    Round("2 members, another leader", members=2, holders=3, crashes=0, attempts=1),
    Round("3 members, one vanishes", crashes=0, vanishing=1, moves=0, attempts=1),
    Round("2 parts, no faults", crashes=0, moves=0, attempts=1, parts=2),
)
_LARGE: tuple[Log | Round | Count, ...] = (
    Log("3 stewards, 3 terms", terms=3, entries=3, crashes=0),
    Count("2 members, 2 attempts", cards=2, attempts=2, breaks=0),
    Round("3 members, another leader", crashes=0, attempts=1),
    Round("3 members, two crashes", crashes=2, moves=0, attempts=1),
    Round("not synced at first, a crash", moves=0, attempts=1, volatile=True),
    Round("4 members, no faults", members=4, holders=15, crashes=0, moves=0, attempts=1),
    Round("4 members, 2 hold, a crash", members=4, holders=3, moves=0, attempts=1),
    Round("a crash and another leader", attempts=1),
    Log("3 stewards, 3 terms, a crash", terms=3, entries=3),
)
SMALL = tuple(map(model_of, _SMALL))
"""Seconds, all together."""
MEDIUM = tuple(map(model_of, _MEDIUM))
"""Minutes."""
LARGE = tuple(map(model_of, _LARGE))
"""Not all of them have been run to their end: millions of states each, gigabytes."""

_TERMS = {name: Log(name, terms=2, entries=2, without=(name,)) for name in consensus.GUARDS}
_CARDS = {name: Count(name, members=1, breaks=0, without=(name,)) for name in once.GUARDS}
_MUTANTS: Configs = (
    *(_TERMS[name] for name in ("majority", "vote", "newest", "term", "synced")),
    Round("holders", crashes=0, vanishing=1, moves=0, attempts=1, without=("holders",)),
    Round(
        "durable",
        members=2,
        holders=3,
        crashes=2,
        moves=0,
        attempts=1,
        volatile=True,
        without=("durable",),
    ),
    # The ledger, and a new leader that waits for its first entry, back each other up.
    Round("first", members=2, holders=3, crashes=0, attempts=1, without=("first", "early")),
    Round("certified", members=2, holders=3, crashes=0, attempts=1, without=("certified",)),
    Round("chosen", crashes=0, moves=0, attempts=1, parts=2, without=("chosen",)),
    Round("everywhere", moves=0, attempts=1, parts=2, without=("everywhere",)),
    Round("key", crashes=0, moves=0, without=("key",)),
    Round("root", crashes=0, moves=0, without=("root",)),
    Round("catch-up", moves=0, attempts=1, without=("catch-up",)),
    Round("deadline", moves=0, attempts=1, without=("deadline",)),
    Round("deputy", crashes=0, vanishing=1, moves=0, attempts=1, without=("deputy",)),
    Round("link", moves=0, attempts=1, patient=True, without=("link",)),
    *(_CARDS[name] for name in ("seen", "any", "taken out", "undecided")),
)
MUTANTS = tuple(map(model_of, _MUTANTS))
