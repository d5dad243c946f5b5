"""Planted bugs of clipping (spec 15): loud members, owners that die before they have summed."""

from __future__ import annotations

from tests.mutants.catalogue import Mutant, find
from tests.mutants.patching import Patch, patch

SUITE = "rounds: owners die"
IN_TURN = "rounds: owners die in turn"


def _bug(name: str, source: str, item: Patch, first: int, stop: int, suite: str = SUITE) -> Mutant:
    return Mutant(name, "rounds", source, False, (item,), (find(suite, first, stop),))


MUTANTS = (
    _bug(
        "a deputy applies the clip factor too",
        "15 §2.5: clip not applied by the deputy",
        patch(
            "rounds.attempt:Attempt.step",
            "self.out.append(fx.ReducePart(self.key, part, self.chosen))",
            "mine = self.opened.parts[part].owner == self.me\n"
            "                from swarmtrain_protocols.rounds import clip\n"
            "                bare = clip.coefficients(self.opened, needed, (), ())\n"
            "                chosen = self.chosen if mine else RoundSet(self.key, bare)\n"
            "                self.out.append(fx.ReducePart(self.key, part, chosen))",
        ),
        0,
        30,
        IN_TURN,
    ),
    _bug(
        "the leader clips what is loud",
        "15 §2.4",
        patch("rounds.clip:factor_of", "else bound / length", "else 1.0"),
        1,
        8,
    ),
    _bug(
        "a norm is of all parts",
        "15 §2.2",
        patch("rounds.phases:Phase.norms", "for of_part in said])", "for of_part in said[:1]])"),
        1,
        8,
    ),
    _bug(
        "what a channel keeps is what was counted",
        "15 §2.6",
        patch("rounds.clip:kept_after", "factor_of(length, reference) * length for", "length for"),
        0,
        4,
        "rounds: two left",
    ),
    _bug(
        "an old contribution may be longer, by its discount",
        "15 §2.2",
        patch("rounds.clip:_lengths", "n * opened.contributors[i].discount", "n"),
        0,
        6,
        "unlike: loud",
    ),
    _bug(
        "what an owner says of each contributor is of that contributor",
        "15 §1",
        patch(
            "rounds.attempt:Attempt.reports",
            "self.squares[part, i] for i in here",
            "self.squares[part, i] for i in reversed(here)",
        ),
        1,
        8,
    ),
)
