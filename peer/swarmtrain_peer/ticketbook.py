"""Which tickets this site has made: what each allows, never its secret; and who came with it.

The log counts and revokes; this file only remembers tickets that nobody has used yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from swarmtrain_peer.site import write_private
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.tickets import Capability

Document = dict[str, Any]


class Made(msgspec.Struct, forbid_unknown_fields=True):
    """One ticket. ``*_s``: Unix wall clock in whole seconds; ``expires_s`` 0: never."""

    id: str
    role: str
    vote: bool
    expires_s: int
    uses: int
    made_s: int
    note: str = ""


class TicketBook:
    """``path`` None: nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def read(self) -> list[Made]:
        """The tickets, oldest first.

        Raises:
            ConfigError: the file is damaged.
        """
        if self._path is None:
            return []
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[Made])
        except FileNotFoundError:
            return []
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{self._path}", str(error), "remove it") from None

    def made(self, capability: Capability, wall_s: float, note: str = "") -> None:
        """Remember a ticket; the oldest go if there are too many."""
        if self._path is None:
            return
        c = capability
        item = Made(c.id.hex(), c.role, c.vote, c.expires_s, c.uses, int(wall_s), note[:64])
        kept = [*self.read(), item][-limits.TICKETS_REVOKED_MAX :]
        write_private(self._path, msgspec.json.format(msgspec.json.encode(kept)))

    def rows(self, ledger: Ledger) -> list[Document]:
        """All tickets that are known here, with their bearers: made here, or seen in the log.

        Of a ticket that was made elsewhere only id and bearers are known, the rest is None.
        """
        bearers: dict[str, list[str]] = {}
        for ticket, keys in ledger.bearers.items():
            bearers[ticket.hex()] = [key.hex() for key in keys]
        for member in ledger.ordered_members():
            if member.ticket and member.id.hex() not in bearers.get(member.ticket.hex(), []):
                bearers.setdefault(member.ticket.hex(), []).append(member.id.hex())
        revoked = {ticket.hex(): why for ticket, why in ledger.access.revoked.items()}
        mine = {item.id: msgspec.to_builtins(item) for item in self.read()}
        blank = dict.fromkeys(Made.__struct_fields__[1:])
        return [
            {
                **blank,
                "id": ticket,
                **mine.get(ticket, {}),
                "bearers": bearers.get(ticket, []),
                "revoked": revoked.get(ticket),
            }
            for ticket in dict.fromkeys([*mine, *bearers, *revoked])
        ]
