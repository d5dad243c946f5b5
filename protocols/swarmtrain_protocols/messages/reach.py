"""Messages about who can be dialled, and of streams through a third member (spec 14)."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from swarmtrain_protocols import limits
from swarmtrain_protocols.messages.common import Address, Count, Key, Name

Port = Annotated[int, Meta(ge=1, le=65535)]
Ports = Annotated[tuple[Port, ...], Meta(max_length=limits.DIAL_BACK_PORTS_MAX)]
Secret = Annotated[bytes, Meta(min_length=16, max_length=16)]
Token = Annotated[bytes, Meta(max_length=16)]


class DialBackRequest(msgspec.Struct, frozen=True, tag="dial-back?"):
    """Asks the receiver to dial the sender: at the host its link comes from, at these ports.

    There is no host in it, so nobody can have somebody else dialled. ``knock`` is what the dialler
    says first, ``answer`` what only the sender of this message can say to that.
    """

    request: Count
    ports: Ports
    knock: Secret
    answer: Secret


class DialBack(msgspec.Struct, frozen=True, tag="dial-back"):
    """``seen``: the host that the link comes from. ``open``: the ports that answered.

    ``code``: empty, or why nothing was dialled: ``busy``, ``unknown`` (the host is not known here).
    """

    request: Count
    seen: Address
    open: Ports
    code: Name = ""


class RelayRequest(msgspec.Struct, frozen=True, tag="relay?"):
    """Asks the receiver for a stream to ``target``, to which it has a link.

    ``reverse``: the sender can be dialled; the target need only be told to dial it.
    """

    request: Count
    target: Key
    reverse: bool = False


class RelayReply(msgspec.Struct, frozen=True, tag="relay"):
    """``token`` opens the sender's end. ``code``: empty, or one of ``relay.REFUSALS``."""

    request: Count
    token: Token = b""
    code: Name = ""


class RelayOffer(msgspec.Struct, frozen=True, tag="relay-offer"):
    """``source`` wants a link; ``token`` opens this end. No token: it asks to be dialled."""

    source: Key
    token: Token = b""
