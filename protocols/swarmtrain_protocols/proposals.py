"""Appends to the log on behalf of a node's cores; what it refuses is an event, never an error."""

from __future__ import annotations

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, Emit, PeerId
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.rounds.effects import Notice


class Proposals:
    """``log`` is set once it exists; before that nothing is taken."""

    def __init__(self, out: list[Effect]) -> None:
        self.log: LogCore | None = None
        self._out = out

    def propose(self, now: float, body: e.EntryBody) -> bool:
        """Append to the log; False if it takes nothing at the moment."""
        if self.log is None or not self.log.is_leader:
            return False
        try:
            self.log.propose(now, body)
        except LocalProtocolError as error:
            # Cut off from a majority, for example: whoever proposes tries again or is replaced.
            self._refused("proposal", error)
            return False
        return True

    def change_voters(self, now: float, voters: tuple[PeerId, ...]) -> bool:
        """Begin a change of the stewards; False if it cannot begin now."""
        if self.log is None:
            return False
        try:
            self.log.change_voters(now, voters)
        except LocalProtocolError as error:
            self._refused("change of stewards", error)
            return False
        return True

    def _refused(self, what: str, error: LocalProtocolError) -> None:
        self._out.append(Emit(Notice("fallback", {"what": what, "why": str(error)})))
