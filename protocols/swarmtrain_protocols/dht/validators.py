"""Rules for the values under names with a certain prefix: checked before a record is kept or read.

Any other name may hold any MessagePack value of any publisher. A record that breaks the rule of its
prefix is a fault of whoever sends it, because honest nodes check before they send.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from swarmtrain_protocols.addresses import split_address
from swarmtrain_protocols.messages.common import Addresses

MEMBER_PREFIX = b"member/"

_addresses = msgspec.msgpack.Decoder(Addresses)


def _own_addresses(rest: bytes, publisher: bytes, value: bytes) -> bool:
    """``member/`` and a peer id: only that peer says where it is, in addresses that can be read."""
    if rest != publisher:
        return False
    try:
        for address in _addresses.decode(value):
            split_address(address)
    except (ValueError, RecursionError):
        return False
    return True


_RULES: dict[bytes, Callable[[bytes, bytes, bytes], bool]] = {MEMBER_PREFIX: _own_addresses}
"""Prefix of the name, and what must hold for (rest of the name, publisher, value)."""


def breaks_its_rule(name: bytes, publisher: bytes, value: bytes) -> bool:
    """True if the name has a prefix with a rule, and this publisher or value is against it."""
    return any(
        name.startswith(prefix) and not rule(name[len(prefix) :], publisher, value)
        for prefix, rule in _RULES.items()
    )
