"""Orders: entries that only the holder of the founder's key may ask for (spec 05 §1.5).

An order is signed over the run, the entry and how far the log had come for whoever gave it; it is
void once the log has moved on by ``ORDER_ENTRIES``, so that an old one cannot be played again.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.messages.member import Propose

ORDERS = (
    e.Paused
    | e.Resumed
    | e.RunEnded
    | e.MemberBanned
    | e.MemberLeft
    | e.TicketRevoked
    | e.AllowChanged
    | e.FounderChanged
    | e.ConfigChanged
    | e.Rewound
)
DOMAIN = b"order"
EVICTED = "evicted"
"""How the reason of a MEMBER_LEFT by order begins; the member may come back by starting again."""

_encoder = msgspec.msgpack.Encoder()


def sign_order(founder: Keyring, run: bytes, index: int, body: e.EntryBody) -> Propose:
    """What to send to the leader; ``index`` is that of the last entry applied here."""
    data, at = e.encode_body(body), max(0, index)
    return Propose(data, at, founder.sign(DOMAIN, _signed(run, at, data)))


def is_authorised(
    order: Propose,
    *,
    founder: bytes,
    run: bytes,
    index: int,
    verify: Callable[[bytes, bytes, bytes, bytes], bool],
) -> bool:
    """Whether the founder signed it, for this run, not long ago. ``index``: last entry here."""
    if not index - limits.ORDER_ENTRIES <= order.at <= index + limits.ORDER_ENTRIES:
        return False
    return verify(founder, DOMAIN, _signed(run, order.at, order.body), order.signature)


def _signed(run: bytes, at: int, body: bytes) -> bytes:
    return _encoder.encode([run, at, body])
