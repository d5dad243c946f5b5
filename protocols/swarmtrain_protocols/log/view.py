"""Who votes, as a function of the log: an immutable view that each entry maps to the next.

A view belongs to a position of the log. Truncating the log therefore takes the right view back
without any bookkeeping, and a certificate is checked against the view at its own index.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import blake3

from swarmtrain_protocols import limits
from swarmtrain_protocols.entries import (
    EntryBody,
    Genesis,
    MemberBanned,
    MemberJoined,
    MemberLeft,
    Rewound,
    StewardsChanged,
)
from swarmtrain_protocols.errors import PeerFault

_HEAD = struct.Struct("<QQ")
SIZES = tuple(range(1, limits.VOTERS_MAX + 1, 2))
"""Allowed numbers of voters; two would double the risk of a stop and tolerate nothing."""


def chained(previous: bytes, index: int, term: int, body: bytes) -> bytes:
    """BLAKE3 over ``previous`` (32 bytes), u64 index, u64 term (little-endian), body bytes."""
    return blake3.blake3(previous + _HEAD.pack(index, term) + body).digest()


@dataclass(frozen=True, slots=True)
class View:
    """The stewards in force at one index of the log.

    ``joint`` is the previous set while both must agree, else empty. ``digest`` chains all changes
    of the set since genesis. ``capable`` are the members with the founder's grant to vote; the
    steward that genesis names, ``founding``, needs no other.
    """

    generation: int
    voters: tuple[bytes, ...]
    joint: tuple[bytes, ...]
    digest: bytes
    capable: frozenset[bytes]
    founding: bytes

    @staticmethod
    def first(genesis: Genesis, body: bytes) -> View:
        """The view after entry 0."""
        digest = blake3.blake3(body).digest()
        return View(0, (genesis.steward,), (), digest, frozenset(), genesis.steward)

    def has_voter(self, peer: bytes) -> bool:
        return peer in self.voters or peer in self.joint

    def trusts(self, peer: bytes) -> bool:
        """True if ``peer`` may vote, lead or stand for election as far as this view knows."""
        return self.has_voter(peer) or peer in self.capable or peer == self.founding

    def everyone(self) -> tuple[bytes, ...]:
        """Voters of both sets in key order, each once."""
        return tuple(sorted({*self.voters, *self.joint}))

    def quorum(self, agrees: Callable[[bytes], bool]) -> bool:
        """True if a majority agrees: of the voters, and while joint also of the previous set."""
        for group in (self.voters, self.joint):
            if group and 2 * sum(1 for peer in group if agrees(peer)) <= len(group):
                return False
        return True

    def check_voters(self, voters: Iterable[bytes]) -> None:
        """Check a set that is to follow this view's.

        Raises:
            PeerFault: ``bad_stewards``.
        """
        listed = tuple(voters)
        if len(listed) not in SIZES or list(listed) != sorted(set(listed)):
            raise PeerFault("bad_stewards", f"{len(listed)} voters, unsorted or not one of {SIZES}")
        strangers = [v for v in listed if not self.trusts(v)]
        if strangers:
            raise PeerFault("bad_stewards", f"{strangers[0].hex()[:8]} has no grant to vote")

    def after(self, index: int, term: int, data: bytes, body: EntryBody) -> View:
        """The view after one more entry.

        Raises:
            PeerFault: ``bad_stewards`` if the entry may not change the set as it does.
        """
        if isinstance(body, StewardsChanged):
            self.check_voters(body.voters)
            if body.joint != (() if self.joint else self.voters):
                raise PeerFault("bad_stewards", "the change is not joint with the set in force")
            if self.joint and body.voters != self.voters:
                raise PeerFault("bad_stewards", "the change ends in another set")
            return replace(
                self,
                voters=body.voters,
                joint=body.joint,
                digest=chained(self.digest, index, term, data),
            )
        if isinstance(body, MemberJoined):
            if body.may_vote and len(self.capable) < limits.MEMBERS_MAX:
                return replace(self, capable=self.capable | {body.member})
            return self if body.may_vote else self._without(body.member)
        if isinstance(body, MemberLeft | MemberBanned):
            return self._without(body.member)
        if isinstance(body, Rewound) and body.generation == self.generation + 1:
            return replace(self, generation=body.generation)
        if isinstance(body, Genesis):
            raise PeerFault("bad_genesis", f"a second genesis at index {index}")
        return self

    def _without(self, member: bytes) -> View:
        if member not in self.capable:
            return self
        return replace(self, capable=self.capable - {member})
