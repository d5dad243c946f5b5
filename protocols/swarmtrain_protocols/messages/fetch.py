"""Fetching chunks of a blob by its Merkle root: one way for contributions, results, states."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from swarmtrain_protocols.messages.common import Count, Hash, Hashes, Name


class FetchRequest(msgspec.Struct, frozen=True, tag="fetch?"):
    """Asks for chunks ``first … first+count-1`` of blob ``root``.

    ``request`` is the asker's number, fresh for each fetch of a link; the same number again asks
    again for what may have been lost with a bulk connection. ``packed``: chunks on bulk
    connections may come packed (``packing.py``); absent, they must not. ``hashes``: the answer is
    the leaf hashes and their proof alone, no chunk follows.
    """

    request: Count
    root: Hash
    first: Count
    count: Count
    packed: bool = False
    hashes: bool = False


class FetchAccepted(msgspec.Struct, frozen=True, tag="fetch"):
    """Leaf hashes of the range and the Merkle proof up to the root; the chunks follow.

    ``total`` is the number of chunks of the blob and must equal what the asker computed.
    """

    request: Count
    total: Count
    leaves: Hashes
    proof: Hashes


class FetchRefused(msgspec.Struct, frozen=True, tag="fetch-refused"):
    """unknown (no such blob here), busy, range, lost (with a bulk connection)."""

    request: Count
    code: Name


class FetchChunk(msgspec.Struct, frozen=True, tag="chunk"):
    """A chunk small enough for the control link; its bytes are the frame's payload."""

    request: Count
    index: Count


class BulkClosed(msgspec.Struct, frozen=True, tag="bulk-closed"):
    """The sender has lost the bulk connection that was opened with this initiator's nonce.

    Sent before any request is repeated, so that nothing is sent into a connection that is dead.
    """

    connection: Annotated[bytes, Meta(min_length=16, max_length=16)]


class FetchCancel(msgspec.Struct, frozen=True, tag="fetch-cancel"):
    request: Count
