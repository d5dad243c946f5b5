"""What ends a site for good: proof that somebody lied in the log, or a ledger of its own that is
wrong. Going on, or starting again, would only spread it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from swarmtrain_peer.site import write_private
from swarmtrain_protocols.errors import Diverged, PeerFault, SwarmError
from swarmtrain_protocols.log.events import Conflict, LedgerDiverged

PROOF_FILE = "conflict.json"


def halting(event: object, records: Path | None) -> BaseException | None:
    """The error that ``event`` ends this site with, if it does.

    The proof of a conflict is kept beside ``records``: both certificates and the entries that lead
    to them (bytes in base 64); anybody who has the run's manifest can check it.
    """
    if isinstance(event, BaseException):
        # The fault of a remote peer is something to tell, never the end of this process.
        return None if isinstance(event, PeerFault) else event
    if isinstance(event, Conflict):
        where = ""
        if records is not None:
            with contextlib.suppress(SwarmError):  # the alarm of a full disk comes by itself
                path = records.with_name(PROOF_FILE)
                write_private(path, msgspec.json.encode(event.proof))
                where = f"; the proof is in {path}"
        return Diverged(
            "two majorities of stewards have signed different logs",
            f"they part at entry {event.proof.index}{where}",
            "show the proof to the founder: some stewards' keys must not vote again",
        )
    if isinstance(event, LedgerDiverged):
        return Diverged(
            "the ledger of this site is not the run's",
            f"the majority has {event.certified.hex()[:16]} at entry {event.index}, "
            f"this site {event.ours.hex()[:16]}",
            "compare versions with the others, then leave and join again; please report it",
        )
    return None
