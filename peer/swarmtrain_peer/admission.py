"""Whom to talk to: members, and bearers of a ticket that is good now; and what a refusal means.

The log decides who is a member (spec 05 §2.4). This is the same question, asked before a stranger
costs anything; and the words for those who were turned away.
"""

from __future__ import annotations

from collections.abc import Sequence

from swarmtrain_protocols.access import read_capability, refusal
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import NotAuthorised
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.session import Refused
from swarmtrain_protocols.node import NodeCore

_ANOTHER = "ask the founder for another ticket"
MEANINGS: dict[str, tuple[str, str]] = {
    "banned": ("the founder banned this machine's key", "ask the founder"),
    "expired": ("the ticket has expired", "get a new one, and check this machine's clock"),
    "revoked": ("the ticket was revoked", _ANOTHER),
    "used_up": ("as many members as the ticket was for have come with it", _ANOTHER),
    "not_allowed": (
        "this machine's key is not on the run's allow list",
        "send your key (see `swarmtrain doctor`) to the founder for `swarmtrain allow add`",
    ),
    "role": ("the ticket's role does not allow what this machine wants to do", _ANOTHER),
    "full": ("it has as many members as a run can have", "come back when somebody has left"),
    "not_authorised": ("the ticket is not good for it", _ANOTHER),
    "evicted": (
        "the founder has turned this machine out",
        "ask the founder; starting again asks to be let in again",
    ),
    "duplicate": (
        "another process with the same identity is a member already",
        "stop the other one, or use another --home: an identity is one machine's",
    ),
}
FINAL = ("banned", "duplicate", "expired", "revoked", "used_up", "not_allowed")
"""Refusals of a link after which asking again changes nothing."""


def admit(
    ledger: Ledger, peer: PeerId, capability: bytes, run: bytes, founder: bytes, wall_s: float
) -> Refused | None:
    """Why not to talk to ``peer``, who brings ``capability``; ``founder`` is the manifest's."""
    if peer in ledger.members or peer == ledger.genesis_steward:
        return None
    if peer in ledger.banned:
        return Refused("banned", ledger.banned[peer][:256])
    try:
        found = read_capability(capability, ledger, founder, run, wall_s)
    except NotAuthorised as error:
        code = "expired" if "expired" in error.why else "not_authorised"
        return Refused(code, error.why[:256])
    no = refusal(ledger, peer, found.id, found.uses)
    return None if no is None else Refused(no.code, no.reason[:256])


def refused_error(code: str, by: str = "the run") -> NotAuthorised:
    """What whoever was turned away with ``code`` reads."""
    why, todo = MEANINGS.get(code, ("", _ANOTHER))
    return NotAuthorised(f"{by} refuses this site", f"{code}: {why}" if why else code, todo)


class TurnedAway:
    """Whether this process is refused for good although its log lists the site as a member.

    Another live process may have its identity: each of the others keeps one link to an identity,
    and turns a second one away while the first answers. Or the log on its disk is old, and it has
    been banned since. The leader's word is enough; without it, that of all who were asked.
    """

    def __init__(self) -> None:
        self._refusers: dict[PeerId, None] = {}

    def found(
        self, node: NodeCore, peer: PeerId | None, code: str, linked: Sequence[PeerId]
    ) -> bool:
        """``peer`` has turned this process away with ``code``; ``linked``: who has not."""
        if code not in FINAL or node.joiner.registered or peer is None or peer in linked:
            return False  # the log knows this very process, or both sides have dialled
        self._refusers[peer] = None
        enough = min(2, max(1, len(node.ledger.members) - 1))
        return peer == node.log.leader or (not linked and len(self._refusers) >= enough)
