"""What is durable of a log: records that rebuild it when read in order (spec 04, §7)."""

from __future__ import annotations

from typing import Annotated, Union

import msgspec
from msgspec import Meta

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import CheckpointError
from swarmtrain_protocols.messages.common import Count
from swarmtrain_protocols.messages.log import Certificate, WireEntry

_VotedFor = Annotated[bytes, Meta(max_length=32)]


class VoteRecord(msgspec.Struct, frozen=True, tag="vote"):
    """The term and the vote given in it (empty: none yet)."""

    term: Count
    voted_for: _VotedFor


class EntriesRecord(msgspec.Struct, frozen=True, tag="entries"):
    """Forget entries from ``start`` on, then hold these. Certificates apply afterwards."""

    start: Count
    entries: tuple[WireEntry, ...]
    certificates: tuple[Certificate, ...]


class SnapshotRecord(msgspec.Struct, frozen=True, tag="snapshot"):
    """Everything, after compaction: vote, snapshot file and the entries after it."""

    vote: VoteRecord
    file: Annotated[bytes, Meta(max_length=limits.SNAPSHOT_BYTES_MAX)]
    tail: EntriesRecord


Record = Union[VoteRecord, EntriesRecord, SnapshotRecord]  # noqa: UP007
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


def encode_record(record: Record) -> bytes:
    """MessagePack bytes of a durable record."""
    return _encoder.encode(record)


def decode_record(data: bytes) -> Record:
    """Decode a durable record.

    Raises:
        CheckpointError: the bytes are no record of this version.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            "the log on disk cannot be read",
            str(error),
            "move the site's log away; a member without votes catches up by itself",
        ) from None
