"""Who may enter a run and who may give it orders, as the log says. Spec 05 §2.4 and §2.5.

State of ``ledger.Ledger`` and the rules on it: tickets that were revoked or are used up, the allow
list, bans, and the keys of founders. All of it is moved by entries alone, so that no two stewards
can both let in the last bearer of a ticket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import NotAuthorised
from swarmtrain_protocols.identity import verify_ed25519
from swarmtrain_protocols.messages.log import Deed
from swarmtrain_protocols.tickets import Capability, parse_capability

if TYPE_CHECKING:
    from swarmtrain_protocols.ledger import Ledger

Verify = Callable[[bytes, bytes, bytes, bytes], bool]


class Access(msgspec.Struct):
    """``former``: earlier founders whose tickets are still good, oldest first.

    ``deeds``: from the key that founded the run to the founder of now.
    ``revoked``: reasons by ticket id. ``listed``: notes by key; only they may enter if ``closed``.
    """

    former: list[bytes] = []
    deeds: list[Deed] = []
    revoked: dict[bytes, str] = {}
    listed: dict[bytes, str] = {}
    closed: bool = False


class Refusal(NamedTuple):
    """Why somebody may not enter: a code that is part of the protocol, and words."""

    code: str
    reason: str


def founder_of(ledger: Ledger, manifest_founder: bytes) -> bytes:
    """Whose signature gives orders now; before the log is known, the manifest's word counts."""
    return ledger.founder if ledger.index >= 0 else manifest_founder


def read_capability(
    data: bytes,
    ledger: Ledger,
    manifest_founder: bytes,
    run: bytes,
    wall_s: float,
    verify: Verify = verify_ed25519,
) -> Capability:
    """The capability in ``data`` if a founder signed it whose tickets count, and it is not over.

    Raises:
        NotAuthorised: why is one of malformed, bad signature, wrong run, expired.
    """
    founder = founder_of(ledger, manifest_founder)
    for key in ledger.access.former:
        try:
            return parse_capability(data, founder=key, run=run, wall_s=wall_s, verify=verify)
        except NotAuthorised:
            continue  # what is wrong with it is said of the founder of now
    return parse_capability(data, founder=founder, run=run, wall_s=wall_s, verify=verify)


def refusal(ledger: Ledger, member: bytes, ticket: bytes, uses: int) -> Refusal | None:
    """Why ``member`` may not enter with a ticket whose signature and expiry are good, if so.

    Whoever is in is not judged by its ticket again: a ban is what turns members out.
    """
    if member in ledger.banned:
        return Refusal("banned", ledger.banned[member])
    access = ledger.access
    if member in ledger.members or member == ledger.genesis_steward:
        return None
    if ticket in access.revoked:
        why = access.revoked[ticket]
        return Refusal("revoked", "the ticket was revoked" + (f": {why}" if why else ""))
    if access.closed and member not in access.listed:
        return Refusal("not_allowed", f"key {member.hex()} is not on the run's allow list")
    if ledger.ticket_used_up(ticket, uses, member):
        return Refusal("used_up", f"the ticket was for {uses} member(s), and they have come")
    return None


def banned(ledger: Ledger, index: int, body: e.MemberBanned) -> bool:
    """Turned out for good, or until that is lifted."""
    if body.lifted:
        return ledger.banned.pop(body.member, None) is not None
    if body.member not in ledger.banned and len(ledger.banned) >= limits.BANS_MAX:
        return False
    ledger.banned[body.member] = body.reason
    ledger.members.pop(body.member, None)
    ledger.pipeline.assigned.pop(body.member, None)
    return True


def revoked(ledger: Ledger, index: int, body: e.TicketRevoked) -> bool:
    """No newcomer enters with this ticket any more."""
    known = ledger.access.revoked
    if body.ticket in known or len(known) >= limits.TICKETS_REVOKED_MAX:
        return False
    known[body.ticket] = body.reason
    return True


def allow_changed(ledger: Ledger, index: int, body: e.AllowChanged) -> bool:
    """The list, and whether it holds."""
    access = ledger.access
    if not body.member:
        changed, access.closed = access.closed == body.allowed, not body.allowed
        return changed
    if len(body.member) != 32:
        return False
    if not body.allowed:
        return access.listed.pop(body.member, None) is not None
    if body.member not in access.listed and len(access.listed) >= limits.ALLOWED_MAX:
        return False
    access.listed[body.member] = body.note
    access.closed = True
    return True


def founder_changed(ledger: Ledger, index: int, body: e.FounderChanged) -> bool:
    """The run is somebody else's."""
    access = ledger.access
    if body.founder == ledger.founder or len(access.deeds) >= limits.HANDOVERS_MAX:
        return False
    access.deeds.append(Deed(body.founder, body.deed))
    former = [*access.former, ledger.founder] if body.tickets else []
    access.former = [key for key in former if key != body.founder][-limits.FOUNDERS_KEPT :]
    ledger.founder = body.founder
    return True
