"""Durable records."""

from __future__ import annotations

import pytest

from swarmtrain_protocols.errors import CheckpointError
from swarmtrain_protocols.log.records import (
    EntriesRecord,
    SnapshotRecord,
    VoteRecord,
    decode_record,
    encode_record,
)
from swarmtrain_protocols.messages.log import Certificate, Endorsement, WireEntry

CERTIFICATE = Certificate(0, 2, 5, b"c" * 32, b"s" * 32, (Endorsement(b"k" * 32, b"g" * 64),))
VOTE = VoteRecord(3, b"v" * 32)
ENTRIES = EntriesRecord(4, (WireEntry(1, b"a"), WireEntry(2, b"b")), (CERTIFICATE,))


@pytest.mark.parametrize("record", [VOTE, ENTRIES, SnapshotRecord(VOTE, b"file", ENTRIES)])
def test_what_is_written_is_read(record: VoteRecord | EntriesRecord | SnapshotRecord) -> None:
    assert decode_record(encode_record(record)) == record


@pytest.mark.parametrize("data", [b"", b"\xc1", encode_record(VOTE)[:-1], b"\x81\xa4type\xa1x"])
def test_what_is_no_record_says_so(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        decode_record(data)
