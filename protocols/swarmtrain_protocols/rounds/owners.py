"""Who computes each part of an open attempt, and who is suspected of not doing it. Spec 08 §2.4.

A link that breaks is news at once. An owner that stays connected and silent is suspected after a
time that the other owners set: several times what they took. Nobody is suspected on the word of
one member: a result is bad if the leader sees so itself or a majority of its receivers does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.attempt import PART_DOMAIN, part_statement
from swarmtrain_protocols.rounds.clip import legal_squares
from swarmtrain_protocols.rounds.phases import Phase
from swarmtrain_protocols.suspension import is_suspended

SILENT_S_MIN = 5.0
SILENT_ALONE_S = 10.0
"""Where no other owner says how long it takes."""
TIMES_SLOWER = 4.0
REASON_MAX = 256


@dataclass(frozen=True, slots=True)
class Suspect:
    """A member that the attempt should do without, and why."""

    member: bytes
    reason: str


class Owners:
    """Bound to one leader; what it knows of an attempt is in its ``Phase``."""

    def __init__(
        self,
        *,
        me: PeerId,
        out: list[Effect],
        propose: Callable[[float, e.EntryBody], bool],
        verify: Callable[[bytes, bytes, bytes, bytes], bool],
    ) -> None:
        self._me = me
        self._out = out
        self._propose = propose
        self._verify = verify

    # -- what members say ------------------------------------------------------------------

    def held(self, now: float, phase: Phase, peer: bytes, said: m.PartsHeld) -> str:
        """What a part has; returns the code of what is wrong with it.

        Only those who may compute a part know who has delivered it. A deputy of a former leader is
        refused like any other, and heard once it is one of this leader's: whoever is told to take
        over says again what it has.
        """
        if said.part >= len(phase.opened.parts):
            return "bad_part"
        part = phase.opened.parts[said.part]
        if peer not in (part.owner, part.deputy, phase.deputies.get(said.part)):
            return "not_an_owner"
        total = len(phase.opened.contributors)
        if phase.weighs and not legal_squares(said.squares, len(said.contributors)):
            return "malformed"  # no report: whoever goes on like this is silent
        if phase.weighs:
            sums = dict(zip(said.contributors, said.squares, strict=True))
            phase.squares.setdefault(said.part, {})[peer] = sums
        phase.held.setdefault(said.part, {})[peer] = said.contributors
        phase.refused.update(dict.fromkeys(i for i in said.refused if i < total))
        phase.first_said.setdefault(peer, now)
        if len({*said.contributors, *phase.refused}) >= total:
            phase.full_at.setdefault(said.part, now)
        return ""

    def complained(self, phase: Phase, peer: bytes, said: m.Complaint, run: bytes) -> str:
        """Somebody lacks results, or has bad ones; returns the code of what is wrong with that."""
        if peer not in self._receivers(phase):
            return "not_a_receiver"
        parts = phase.opened.parts
        phase.missing[peer] = tuple(i for i in said.missing if i < len(parts))
        self.tell_again(phase, peer, phase.missing[peer])
        for result in said.spoiled:
            if result.key != phase.key or result.part >= len(parts):
                return "bad_part"
            part = parts[result.part]
            if result.owner not in (part.owner, part.deputy, phase.deputies.get(result.part)):
                continue
            statement = part_statement(run, phase.key, result.part, result.root)
            if not self._verify(result.owner, PART_DOMAIN, statement, result.signature):
                return "bad_signature"
            phase.spoiled.setdefault((result.part, result.owner), {})[peer] = None
        return ""

    @staticmethod
    def _receivers(phase: Phase) -> dict[bytes, None]:
        people = [c.member for c in phase.opened.contributors] + list(phase.opened.holders)
        return dict.fromkeys(people)

    # -- suspicion -------------------------------------------------------------------------

    def look(
        self,
        now: float,
        phase: Phase,
        ledger: Ledger,
        present: Collection[bytes],
        last: list[bytes],
    ) -> str:
        """Do without owners that are gone, silent or liars; why the attempt is over, or empty.

        ``last``: members that become deputies only if nobody else is there.
        """
        chosen = ledger.channels[phase.key.channel].chosen is not None
        if chosen:
            phase.chosen_at = min(phase.chosen_at, now)
        if phase.proposed:
            return ""
        for suspect in self.silent(now, phase, chosen, present):
            phase.silenced[suspect.member] = None
            self._suspend(now, ledger, suspect)
        liar = self.liar(phase)
        if liar is not None:
            self._suspend(now, ledger, liar)
            return liar.reason
        return self._replace(now, phase, ledger, present, last)

    def _suspend(self, now: float, ledger: Ledger, suspect: Suspect) -> None:
        """Nothing shall depend on this member for a while; the log agrees on it."""
        known = suspect.member in ledger.members and suspect.member != self._me
        if known and not is_suspended(ledger, suspect.member):
            self._propose(now, e.MemberSuspended(suspect.member, suspect.reason[:REASON_MAX]))

    def liar(self, phase: Phase) -> Suspect | None:
        """Who has signed a part that is no legal result, if that is sure enough."""
        receivers = self._receivers(phase)
        for (part, signer), accusers in phase.spoiled.items():
            others = [k for k in receivers if k != signer]
            if self._me in accusers or 2 * sum(k in accusers for k in others) > len(others):
                return Suspect(signer, f"part {part} of {phase.key} is no legal result")
        return None

    def silent(
        self, now: float, phase: Phase, chosen: bool, present: Collection[bytes]
    ) -> list[Suspect]:
        """Owners with a link that do not do their part, as measured by the others."""
        found = self._no_result(now, phase, present) if chosen else self._no_report(now, phase)
        mine = [s for s in found if s.member != self._me and s.member not in phase.silenced]
        return list({s.member: s for s in mine}.values())

    def _no_report(self, now: float, phase: Phase) -> list[Suspect]:
        suspects = []
        for index, part in enumerate(phase.opened.parts):
            owner = phase.deputies.get(index, part.owner)
            first_by, full_by = self._report_by(phase, index, owner)
            if now >= first_by:
                suspects.append(Suspect(owner, f"silent as an owner in {phase.key}"))
            elif now >= full_by:
                suspects.append(Suspect(owner, f"stalled as an owner in {phase.key}"))
        return suspects

    @staticmethod
    def _report_by(phase: Phase, index: int, owner: bytes) -> tuple[float, float]:
        """When the owner of a part should have said something, and have had everything.

        Other owners set the measure: what they have, the contributors have sent.
        """
        since = phase.appointed.get(index, phase.started)
        first_by = full_by = math.inf
        if owner not in phase.first_said:
            took = [at - phase.started for k, at in phase.first_said.items() if k != owner]
            first_by = since + _patience(took)
        elif index not in phase.full_at and phase.full_at:
            took = [at - phase.started for at in phase.full_at.values()]
            full_by = since + max(SILENT_ALONE_S, _patience(took))
        return first_by, full_by

    def _no_result(self, now: float, phase: Phase, present: Collection[bytes]) -> list[Suspect]:
        everybody = self._receivers(phase)  # who is gone cannot complain
        receivers = [k for k in everybody if k in present and k not in phase.holding]
        suspects = []
        for index, part in enumerate(phase.opened.parts):
            owner = phase.deputies.get(index, part.owner)
            others = [k for k in receivers if k != owner]
            lacking = sum(index in phase.missing.get(k, ()) for k in others)
            late = now >= self._result_by(phase, index)
            if late and not phase.result_here() and lacking and 2 * lacking > len(others):
                suspects.append(Suspect(owner, f"no result as an owner in {phase.key}"))
        return suspects

    @staticmethod
    def _result_by(phase: Phase, index: int) -> float:
        """When a part should have a result: gathering it took as many bytes."""
        since = max(phase.appointed.get(index, 0.0), phase.chosen_at)
        return since + _patience([phase.chosen_at - phase.started])

    def deadline(self, phase: Phase) -> float:
        """When silence of somebody becomes suspicious; ``math.inf``: not by time alone."""
        times = [math.inf]
        for index, part in enumerate(phase.opened.parts):
            owner = phase.deputies.get(index, part.owner)
            if owner == self._me or owner in phase.silenced:
                continue
            if phase.chosen_at == math.inf:
                times.append(min(self._report_by(phase, index, owner)))
            elif any(index in lacks for lacks in phase.missing.values()):
                times.append(self._result_by(phase, index))
        return min(times)

    # -- deputies --------------------------------------------------------------------------

    def _replace(
        self,
        now: float,
        phase: Phase,
        ledger: Ledger,
        present: Collection[bytes],
        last: list[bytes],
    ) -> str:
        """Appoint deputies for owners that are gone or silent; why that cannot be, or empty."""
        able = [k for k in present if k not in phase.silenced]
        for index, part in enumerate(phase.opened.parts):
            current = phase.deputies.get(index, part.owner)
            if current in able:
                continue
            reachable = [k for k in able if ledger.members[k].reachable]
            reachable.sort(key=lambda k: (is_suspended(ledger, k), k in last))
            choices = [k for k in (part.deputy, *reachable) if k in able]
            if not choices:
                return "owner lost, no deputy"
            self._appoint(now, phase, index, choices[0], "silent" if current in present else "lost")
        return ""

    def tell_again(self, phase: Phase, peer: bytes, parts: Collection[int] | None = None) -> None:
        """Who has a new link, or lacks ``parts``, may not have heard who took over."""
        for index, deputy in sorted(phase.deputies.items()):
            asked = parts is None or index in parts
            if asked and (peer == deputy or peer in self._receivers(phase)):
                self._out.append(Send(PeerId(peer), m.TakeOver(phase.key, index, deputy)))

    def _appoint(self, now: float, phase: Phase, index: int, deputy: bytes, how: str) -> None:
        phase.deputies[index] = deputy
        phase.appointed[index] = now
        for peer in sorted({*self._receivers(phase), deputy}):
            self._out.append(Send(PeerId(peer), m.TakeOver(phase.key, index, deputy)))
        why = f"the owner of part {index} of {phase.key} is {how}"
        fields: dict[str, object] = {"what": "deputy", "why": why, "using": deputy.hex()}
        self._out.append(Emit(fx.Notice("fallback", fields)))


def _patience(took: list[float]) -> float:
    """Seconds that the slowest may take where others took these."""
    return max(SILENT_S_MIN, TIMES_SLOWER * max(took)) if took else SILENT_ALONE_S
