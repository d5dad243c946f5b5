"""160-bit identifiers and the XOR metric (Maymounkov & Mazières, Kademlia, 2002, §2.1).

Identifiers are hashes, so that nobody chooses where in the space they stand. Inside the DHT they
are integers, because the metric is integer XOR; on the wire they are 20 big-endian bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from blake3 import blake3

from swarmtrain_protocols import limits
from swarmtrain_protocols.addresses import is_private, subnet
from swarmtrain_protocols.core import PeerId

ID_BITS = limits.DHT_ID_BYTES * 8


@lru_cache(maxsize=4096)
def node_id(peer: bytes) -> int:
    """First 160 bits of BLAKE3(public key)."""
    return int.from_bytes(blake3(peer).digest(limits.DHT_ID_BYTES), "big")


def key_id(name: bytes) -> int:
    """First 160 bits of BLAKE3(``dht key`` NUL name); the prefix keeps names apart from peers."""
    return int.from_bytes(key_bytes(name), "big")


@lru_cache(maxsize=4096)
def key_bytes(name: bytes) -> bytes:
    """``key_id`` as 20 big-endian bytes, as on the wire."""
    return blake3(b"dht key\0" + name).digest(limits.DHT_ID_BYTES)


def id_bytes(identifier: int) -> bytes:
    """20 big-endian bytes, as on the wire."""
    return identifier.to_bytes(limits.DHT_ID_BYTES, "big")


def id_from_bytes(data: bytes) -> int:
    """The inverse of ``id_bytes``."""
    assert len(data) == limits.DHT_ID_BYTES
    return int.from_bytes(data, "big")


def bucket_index(own: int, other: int) -> int:
    """0 … 159: position of the highest bit in which two different identifiers differ."""
    assert own != other
    return (own ^ other).bit_length() - 1


@lru_cache(maxsize=4096)
def subnets(addresses: tuple[str, ...]) -> tuple[str, ...]:
    """The public blocks (/24, /48) of some addresses, each once; private ones are not counted."""
    found: dict[str, None] = {}
    for address in addresses:
        if not is_private(address):
            found[subnet(address)] = None
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Contact:
    """A peer, where it stands in the identifier space and where it may be dialled."""

    peer: PeerId
    addresses: tuple[str, ...] = ()
    id: int = field(default=-1, compare=False)

    def __post_init__(self) -> None:
        if self.id < 0:
            object.__setattr__(self, "id", node_id(self.peer))


@lru_cache(maxsize=1024)
def contact_of(peer: PeerId, addresses: tuple[str, ...] = ()) -> Contact:
    """The contact; made once, though every message and every name in an answer asks for one."""
    return Contact(peer, addresses)
