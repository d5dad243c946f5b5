"""Shared field types of the closed schema: every length is bounded before memory is taken."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from swarmtrain_protocols import limits

Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
"""A peer id (Ed25519 public key)."""
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
"""A BLAKE3 hash."""
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Count = Annotated[int, Meta(ge=0, le=(1 << 53))]
Name = Annotated[str, Meta(max_length=limits.NAME_CHARS_MAX)]
Channel = Annotated[str, Meta(min_length=1, max_length=limits.CHANNEL_NAME_CHARS_MAX)]
Reason = Annotated[str, Meta(max_length=256)]
Address = Annotated[str, Meta(max_length=limits.ADDRESS_CHARS_MAX)]
Addresses = Annotated[tuple[Address, ...], Meta(max_length=limits.ADDRESSES_PER_PEER_MAX)]
Keys = Annotated[tuple[Key, ...], Meta(max_length=limits.MEMBERS_MAX)]
Hashes = Annotated[tuple[Hash, ...], Meta(max_length=limits.CHUNKS_PER_FETCH_MAX)]
Capability = Annotated[bytes, Meta(max_length=limits.CAPABILITY_BYTES_MAX)]


class RoundKey(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Names one attempt of one round; every message about a round carries it."""

    generation: Count
    channel: Channel
    round: Count
    attempt: Count

    def __str__(self) -> str:
        return f"{self.channel}#{self.round}.{self.attempt}"


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Positions ``first`` to ``first + count`` - 1 in the data of the run (13)."""

    first: Count
    count: Count


Spans = Annotated[tuple[Span, ...], Meta(max_length=limits.CLAIM_SPANS_MAX)]
