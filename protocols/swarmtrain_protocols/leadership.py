"""Who leads the log, as one node sees it: what changes with a leader, and what it must be told.

A leader starts with nothing, and so does the same leader in a later term: everybody repeats what
it needs. What arrives before the leader knows that it knows all that is committed waits, bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence
from typing import Protocol

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Connect, Effect, PeerId, Send
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.messages import pipeline as pm
from swarmtrain_protocols.messages import rounds as rm

EARLY_MESSAGES_MAX = 4 * limits.MEMBERS_MAX
"""What members tell a leader that does not know yet whether it knows all that is committed."""

FOR_ROUND_LEADER = (
    *(rm.Ready, rm.Withdraw, rm.PartsHeld, rm.Holding, rm.Complaint),
    mm.StateReport,
)
FOR_STEP_LEADER = (pm.LeaseRequest, pm.MicroBatchDone, pm.CloseAnswer, pm.StepReady)
FOR_LEADER = (*FOR_ROUND_LEADER, *FOR_STEP_LEADER, pm.WorkerReport, mm.Finished, mm.Propose)


class Leading(Protocol):
    """A core with duties while this node leads."""

    def activate(self, now: float, active: bool) -> None:
        """Leadership begins or ends."""


class Leadership:
    """Keeps the cores of a node up to date with the log's opinion of who leads.

    Args:
        changed: called with every new leader, and again if the same one leads in a later term.
        announce: tells the leader everything that it may need.
        duties: switched on while this node leads and is ready, in this order.
        dispatch: takes the messages that came early.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        ledger: Ledger,
        log: LogCore,
        out: list[Effect],
        linked: Container[PeerId],
        changed: Callable[[float, PeerId | None], None],
        announce: Callable[[float], None],
        duties: Sequence[Leading],
        dispatch: Callable[[float, PeerId, Message], None],
    ) -> None:
        self.ledger = ledger
        self.leader: PeerId | None = None
        self.leading = False
        self.finished = False
        """The trainer of this site has done its planned steps."""
        self._me = me
        self._log = log
        self._out = out
        self._linked = linked
        self._changed = changed
        self._announce = announce
        self._duties = duties
        self._dispatch = dispatch
        self._term = -1
        self._early: deque[tuple[PeerId, Message]] = deque(maxlen=EARLY_MESSAGES_MAX)

    def follow(self, now: float) -> None:
        """Compare with the log, act on the difference."""
        log, leader = self._log, self._log.leader
        if leader != self.leader or log.term != self._term:
            self.leader, self._term = leader, log.term
            self._changed(now, leader)
            if leader is not None and leader != self._me:
                if leader not in self._linked:
                    self._out.append(Connect(leader))
                self.announce(now)
        if not log.is_leader:
            self._early.clear()
        leading = log.is_leader and log.ready
        if leading != self.leading:
            self.leading = leading
            for duty in self._duties:
                duty.activate(now, leading)
            if leading:
                self.announce(now)
                while self._early:
                    self._dispatch(now, *self._early.popleft())

    def too_early(self, peer: PeerId, message: Message) -> bool:
        """True if the message is for a leader that this node is about to be: it is kept."""
        if not self._log.is_leader or self.leading or not isinstance(message, FOR_LEADER):
            return False
        self._early.append((peer, message))
        return True

    def announce(self, now: float) -> None:
        """Tell a leader that knows nothing, or has missed something, all that it may need."""
        self._announce(now)
        if self.finished:
            self.say_finished()

    def say_finished(self) -> None:
        if self.leader is not None:
            message = mm.Finished(self.ledger.generation, self.finished)
            self._out.append(Send(self.leader, message))
