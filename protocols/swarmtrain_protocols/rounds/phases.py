"""What the leader knows of an attempt that is open, and who decides it. Spec 08."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.rounds.clip import norm_of
from swarmtrain_protocols.rounds.unlike import closing_grace_s, half_of


class Decider(Protocol):
    """Decides attempts whose outcome is not logged channel by channel: steps of a pipeline (11).

    Both calls may come any number of times for one attempt.
    """

    def committable(
        self, now: float, key: RoundKey, root: bytes, held_by: tuple[bytes, ...], norm: float
    ) -> None:
        """Enough holders have this result; ``norm`` is its square norm."""

    def cannot(self, now: float, key: RoundKey, reason: str) -> None:
        """The attempt will never be committable."""


@dataclass(slots=True)
class Phase:
    """What the leader knows of the attempt that is open in one channel."""

    key: RoundKey
    opened: e.RoundOpened
    started: float
    deadline: float
    held: dict[int, dict[bytes, tuple[int, ...]]] = field(default_factory=dict)
    refused: dict[int, None] = field(default_factory=dict)
    deputies: dict[int, bytes] = field(default_factory=dict)
    holding: dict[bytes, m.Holding] = field(default_factory=dict)
    parted: dict[bytes, None] = field(default_factory=dict)
    """Whose link broke after it had reported to hold the result; it may have lost it since."""
    lost_since: float = math.inf
    proposed: str = ""
    first_said: dict[bytes, float] = field(default_factory=dict)
    """When each owner reported for the first time."""
    full_at: dict[int, float] = field(default_factory=dict)
    """When a part had all that is wanted."""
    appointed: dict[int, float] = field(default_factory=dict)
    chosen_at: float = math.inf
    missing: dict[bytes, tuple[int, ...]] = field(default_factory=dict)
    """Parts whose results a receiver still lacks, by its own word."""
    spoiled: dict[tuple[int, bytes], dict[bytes, None]] = field(default_factory=dict)
    """By part and signer: who says that the result is not legal."""
    silenced: dict[bytes, None] = field(default_factory=dict)
    """Owners that are waited for no longer."""
    close_at: float = math.inf
    """When the set is closed without those that are late: half were delivered long before."""
    patient: bool = False
    """It is the turn of slow links: the set waits for them."""
    hopeless: tuple[int, ...] = ()
    """Contributions that are in if they arrive, and not waited for."""
    weighs: bool = False
    """Norms count here (15): what an owner holds is reported with its sums of squares."""
    squares: dict[int, dict[bytes, dict[int, float]]] = field(default_factory=dict)
    """By part and who computes it: the sum of squares of each contributor's part."""

    def lost(self, peer: bytes, message: m.Withdraw) -> None:
        """A contributor has lost the bytes that are listed here: it is done without them."""
        if self.key.generation != message.generation:
            return
        for index, item in enumerate(self.opened.contributors):
            if (item.member, item.root) == (peer, message.root):
                self.refused[index] = None

    def norms(self, indices: list[int]) -> list[float]:
        """Of contributions that every part's computer has; empty where norms do not count."""
        if not self.weighs:
            return []
        computers = [self.deputies.get(i, part.owner) for i, part in enumerate(self.opened.parts)]
        said = [self.squares[i][computer] for i, computer in enumerate(computers)]
        return [norm_of([of_part[index] for of_part in said]) for index in indices]

    def note_half(self, now: float, delivered: int, wanted: int, hidden: bool) -> None:
        """Half of the contributions are where they are summed: the others have this long left."""
        if delivered < half_of(wanted) or not delivered:
            self.close_at = math.inf
        elif self.close_at == math.inf and self.opened.phase_s and not self.patient:
            took_s = now - self.started
            self.close_at = now + closing_grace_s(self.opened.phase_s, took_s, hidden)

    def result_here(self, present: Collection[bytes] | None = None) -> bool:
        """Somebody with a link holds the result: others can fetch it.

        ``present``: who else would not do at the moment is not among them.
        """
        here = self.holding if present is None else [k for k in self.holding if k in present]
        return any(member not in self.parted for member in here)

    def waited(self, chosen: bool) -> dict[bytes, None]:
        """Who has to say or send something before the attempt goes on."""
        if self.proposed:
            return {}
        computers = [self.deputies.get(i, part.owner) for i, part in enumerate(self.opened.parts)]
        if not chosen:
            delivered = set(self.delivered()[0])
            late = [i for i in range(len(self.opened.contributors)) if i not in delivered]
            people = [self.opened.contributors[i].member for i in late if i not in self.refused]
        else:
            people = [holder for holder in self.opened.holders if holder not in self.holding]
        return dict.fromkeys([*computers, *people])

    def delivered(self) -> tuple[list[int], bool]:
        """Contributors that every part's computer has, and whether every part has a computer."""
        common = set(range(len(self.opened.contributors)))
        complete = True
        for index, part in enumerate(self.opened.parts):
            current = self.deputies.get(index, part.owner)
            held = self.held.get(index, {}).get(current)
            if held is None:
                complete = False
                common = set()
            else:
                common &= set(held)
        return sorted(common), complete

    def undeliverable(self, present: Collection[bytes]) -> bool:
        """A contribution of a fixed set is missing at a part, and will not come any more."""
        for index, item in enumerate(self.opened.contributors):
            if item.member in present and index not in self.refused:
                continue
            for number, part in enumerate(self.opened.parts):
                current = self.deputies.get(number, part.owner)
                if index not in self.held.get(number, {}).get(current, ()):
                    return True
        return False

    def broken(self, present: Collection[bytes], chosen: e.RoundSet) -> bool:
        """A part's computer says that it lacks a chosen contribution, whose maker is gone.

        Its owner was lost together with the only copy of the bytes: no deputy can compute the part.
        """
        for coefficient in chosen.coefficients:
            index = coefficient.index
            if self.opened.contributors[index].member in present and index not in self.refused:
                continue
            for number, part in enumerate(self.opened.parts):
                said = self.held.get(number, {}).get(self.deputies.get(number, part.owner))
                if said is not None and index not in said:
                    return True
        return False
