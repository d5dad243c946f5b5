"""Messages of one link: hello, refusal, keepalive, credit."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from swarmtrain_protocols.messages.common import (
    Addresses,
    Capability,
    Count,
    Hash,
    Name,
    Reason,
)


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message each way inside the Noise link.

    ``wall_s``: the sender's Unix wall clock in whole seconds, 0: not told (03 §2.9).
    """

    version: Count
    run: Hash
    name: Name
    listen: Addresses
    capability: Capability = b""
    features: Annotated[tuple[Name, ...], Meta(max_length=32)] = ()
    wall_s: Count = 0


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Why the link is closed.

    wrong_run, version, expired, not_authorised, banned, duplicate or what a policy adds.
    """

    code: Name
    reason: Reason


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    nonce: Count


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    nonce: Count


class Credit(msgspec.Struct, frozen=True, tag="credit"):
    """Allows the other side to send ``nbytes`` more bytes of control frames."""

    nbytes: Count


class Goodbye(msgspec.Struct, frozen=True, tag="bye"):
    """Polite end of a link."""

    code: Name
    reason: Reason = ""
