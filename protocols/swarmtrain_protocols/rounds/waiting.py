"""Whom a leader waits for at this moment: those whose silence matters. Spec 08 §2.2, 02 §2.5."""

from __future__ import annotations

from collections.abc import Mapping

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.rounds.lobby import Lobbies
from swarmtrain_protocols.rounds.phases import Phase


def waited_for(
    now: float,
    me: bytes,
    ledger: Ledger,
    phases: Mapping[str, Phase],
    lobbies: Lobbies,
    present: list[bytes],
) -> list[PeerId]:
    """Others whose word, bytes or announcement the open attempts and the next ones need."""
    found: dict[bytes, None] = {}
    for name, phase in phases.items():
        found.update(phase.waited(ledger.channels[name].chosen is not None))
    for name in lobbies.rooms:
        if name not in phases:
            found.update(lobbies.waited(now, ledger, name, present))
    found.pop(me, None)
    return [PeerId(member) for member in found]
