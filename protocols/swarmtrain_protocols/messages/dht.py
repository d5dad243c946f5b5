"""Messages of the DHT (spec 03). A reply carries the asker's request number and goes to the asker.

Records are signed by their publisher, so anybody may pass them on.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from swarmtrain_protocols import limits
from swarmtrain_protocols.messages.common import Addresses, Count, Key, Signature

NodeId = Annotated[bytes, Meta(min_length=limits.DHT_ID_BYTES, max_length=limits.DHT_ID_BYTES)]


class SignedRecord(msgspec.Struct, frozen=True, array_like=True):
    """A value that ``publisher`` stands for; its sub-key under ``key`` is the publisher.

    ``expires_s`` is Unix wall clock in whole seconds. The signature (domain ``dht record``) covers
    the MessagePack array [run, key, publisher, sequence, expires_s, value].
    """

    key: NodeId
    publisher: Key
    sequence: Count
    expires_s: Count
    value: Annotated[bytes, Meta(max_length=limits.DHT_VALUE_BYTES_MAX)]
    signature: Signature


class NodeInfo(msgspec.Struct, frozen=True, array_like=True):
    """A peer and where it may be dialled; a hint until the link has proven the key."""

    peer: Key
    addresses: Addresses


Contacts = Annotated[tuple[NodeInfo, ...], Meta(max_length=limits.DHT_K)]


class FindNode(msgspec.Struct, frozen=True, tag="dht-node?"):
    """Asks for the k contacts nearest to ``target``; also the DHT's ping."""

    request: Count
    target: NodeId


class Nodes(msgspec.Struct, frozen=True, tag="dht-nodes"):
    request: Count
    contacts: Contacts


class FindValue(msgspec.Struct, frozen=True, tag="dht-value?"):
    """Asks for the records under ``key`` whose publisher sorts behind ``after``.

    ``after`` is empty on the first page, else the last publisher of the page before.
    """

    request: Count
    key: NodeId
    after: Annotated[bytes, Meta(max_length=32)] = b""


class Values(msgspec.Struct, frozen=True, tag="dht-values"):
    """One page of records in order of publisher; contacts near the key on the first page only."""

    request: Count
    records: Annotated[tuple[SignedRecord, ...], Meta(max_length=limits.DHT_RECORDS_PER_KEY_MAX)]
    contacts: Contacts
    more: bool = False


class StoreRecord(msgspec.Struct, frozen=True, tag="dht-store?"):
    request: Count
    record: SignedRecord


class StoreReply(msgspec.Struct, frozen=True, tag="dht-store"):
    """``code``: ok, stale, expired, far, full, forged, malformed. ``sequence``: highest seen."""

    request: Count
    code: Annotated[str, Meta(max_length=32)]
    sequence: Count = 0
