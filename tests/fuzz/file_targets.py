"""Targets on disk: record file, journal records, snapshots, checkpoints, contacts, event log.

Where a checksum stands before what is to be reached, every second input is sealed again, so that
both the checksum and what is behind it are tried.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
from blake3 import blake3

from swarmtrain_peer import storeformat
from swarmtrain_peer.events import read_events
from swarmtrain_peer.recordfile import _HEAD, RecordFile, _framed
from swarmtrain_peer.ticketbook import TicketBook
from swarmtrain_protocols.dht.contacts import BookEntry, decode_book, encode_book
from swarmtrain_protocols.errors import CheckpointError, ConfigError, PeerFault
from swarmtrain_protocols.ledger import load_snapshot
from swarmtrain_protocols.log.certificate import encode_snapshot_file
from swarmtrain_protocols.log.records import decode_record, encode_record
from swarmtrain_protocols.state import CanonicalState
from tests.fuzz.engine import Target
from tests.fuzz.mutate import splice_json, splice_msgpack, splice_text
from tests.protocols.rounds_kit import Net
from tests.protocols.test_log_certificate import TRUST, snapshot_file


class Folder:
    """A folder for the files of one target; inputs are written to ``path``."""

    def __init__(self, name: str = "file") -> None:
        memory = Path("/dev/shm")  # thousands of files a second, and none of them matters
        self._held = TemporaryDirectory(
            prefix="swarmtrain-fuzz-", dir=memory if memory.is_dir() else None
        )
        self.folder = Path(self._held.name)
        self.path = self.folder / name

    def put(self, data: bytes) -> Path:
        self.path.write_bytes(data)
        return self.path

    def close(self) -> None:
        self._held.cleanup()


def _records() -> Target:
    folder = Folder()
    good = [b"one", b"", b"three" * 40]

    def run(data: bytes) -> object:
        """What loads is what was written, in order; a second load agrees with the first."""
        sealed = data[:1] == b"s"
        body = data[1:]
        if sealed:  # one record of these bytes among good ones, with right checksums
            body = _framed(good[0]) + _framed(body) + _framed(good[2])
        folder.put(body)
        found = RecordFile(folder.path).load()
        if sealed:
            assert found == [good[0], data[1:], good[2]]
        assert len(b"".join(found)) + _HEAD.size * len(found) <= len(body)
        assert RecordFile(folder.path).load() == found
        return len(found)

    whole = b"f" + b"".join(_framed(record) for record in good)
    seeds = [whole, whole[:-3], b"s" + good[2]]
    return Target("record_file", run, (CheckpointError,), seeds, None, 1 << 17, close=folder.close)


@functools.cache
def _swarm() -> Net:
    """Three members after two rounds, for what they have written."""
    net = Net(3)
    net.model()
    for _ in range(2):
        for index in range(3):
            net.contribute(index, np.full(20, 1.0, np.float32))
        net.run(2.0)
    return net


def _log_record(data: bytes) -> object:
    record = decode_record(data)
    assert encode_record(decode_record(encode_record(record))) == encode_record(record)
    return type(record).__name__


def log_record() -> Target:
    written = {record for peer in _swarm().peers.values() for record in peer.records}
    seeds = sorted(written)[:: max(1, len(written) // 12)]
    return Target("log_record", _log_record, (CheckpointError,), seeds, splice_msgpack, 1 << 18)


def ledger() -> Target:
    def run(data: bytes) -> object:
        return len(load_snapshot(data).members)

    seeds = [_swarm()[0].node.ledger.snapshot()]
    return Target("ledger", run, (PeerFault,), seeds, splice_msgpack, 1 << 18)


def snapshot() -> Target:
    good = snapshot_file()

    def run(data: bytes) -> object:
        """Signatures beyond a majority may be gone, or others there; what they cover may not."""
        found = TRUST.snapshot(data).file
        assert (found.genesis, found.body) == (good.genesis, good.body), "forged"
        assert [link.entry for link in found.links] == [link.entry for link in good.links]
        return len(found.certificate.endorsements)

    seeds = [encode_snapshot_file(good)]
    return Target("log_snapshot", run, (PeerFault,), seeds, splice_msgpack, 1 << 19)


STATE = CanonicalState.first("train/0/0", np.arange(40, dtype=np.float32), chunk_values=16)
ENTRY = storeformat.entry_of(STATE)
MANIFEST = storeformat.encode_manifest((ENTRY,))


def _sealed_manifest(data: bytes) -> bytes:
    return blake3(data).hexdigest().encode() + b"\n" + data


def manifest() -> Target:
    folder = Folder("manifest")

    def run(data: bytes) -> object:
        sealed = data[:1] == b"s"
        folder.put(_sealed_manifest(data[1:]) if sealed else data[1:])
        found = storeformat.read_manifest(folder.path)
        for entry in found:
            assert "/" not in entry.file and entry.file not in (".", ".."), "leaves its folder"
        return len(found)

    seeds = [b"f" + MANIFEST, b"s" + MANIFEST.partition(b"\n")[2]]
    return Target(
        "checkpoint_manifest", run, (CheckpointError,), seeds, _after(splice_json, 1), 1 << 19,
        close=folder.close, share=0.3)  # fmt: skip


def checkpoint() -> Target:
    folder = Folder("state.safetensors")
    good = b"".join(bytes(piece) for piece in storeformat.state_pieces(STATE, ENTRY))

    def run(data: bytes) -> object:
        found = storeformat.read_state(folder.put(data), ENTRY)
        assert data == good and found.root() == STATE.root(), "forged"
        return "loaded"

    return Target(
        "checkpoint_state", run, (CheckpointError,), [good], splice_text, 1 << 17,
        close=folder.close, share=0.4)  # fmt: skip


RESULT = storeformat.encode_result_header(
    storeformat.ResultHeader("train/0/0", 3, b"r" * 32, "int8", (5, 4))
)


def _result(data: bytes) -> object:
    body = memoryview(data)[1:]  # copied once at most: all of it is weighed, too
    if data[:1] == b"s":  # sealed: the header as given, then as many bytes as it may want
        length = len(body).to_bytes(4, "little")
        seal = blake3(storeformat.RESULT_MAGIC + length).update(body).digest()
        front = (storeformat.RESULT_MAGIC, length, body)
        body = memoryview(b"".join((*front, seal, b"chunkdata")))
    header, chunks = storeformat.parse_result(Path("result"), body)
    assert [chunk.nbytes for chunk in chunks] == list(header.chunk_nbytes)
    assert sum(chunk.nbytes for chunk in chunks) <= len(body)
    return len(chunks)


def result() -> Target:
    start = len(storeformat.RESULT_MAGIC) + 4
    seeds = [b"f" + RESULT + b"chunkdata", b"s" + RESULT[start:-32]]
    return Target(
        "result_file", _result, (CheckpointError,), seeds, _after(splice_msgpack, 1), 1 << 17
    )


def _after(splice: Callable[..., bytes], skip: int) -> Callable[..., bytes]:
    return lambda rng, data: data[:skip] + splice(rng, data[skip:])


def contacts() -> Target:
    from swarmtrain_protocols.dht.contacts import ContactBook

    run_id = b"r" * 32
    entries = [BookEntry(bytes([n]) * 32, (f"10.0.{n}.1:70",), 1000 + n) for n in range(3)]

    def run(data: bytes) -> object:
        found = decode_book(data, run_id)
        ContactBook().load(found, 2000.0)
        return len(found)

    seeds = [encode_book(run_id, entries)]
    return Target("contacts", run, (ValueError,), seeds, splice_msgpack, 1 << 18)


def tickets() -> Target:
    folder = Folder("tickets.json")

    def run(data: bytes) -> object:
        return len(TicketBook(folder.put(data)).read())

    row = {"id": "ab" * 8, "role": "trainer", "vote": True, "expires_s": 5, "uses": 1, "made_s": 2}
    seeds = [msgspec.json.encode([row, {**row, "note": "x"}])]
    return Target(
        "ticket_book",
        run,
        (ConfigError,),
        seeds,
        splice_json,
        1 << 17,
        close=folder.close,
        share=0.3,
    )


def events() -> Target:
    folder = Folder("events.jsonl")

    def run(data: bytes) -> object:
        damaged: list[Path] = []
        found = list(read_events(folder.put(data), damaged.append))
        assert all(isinstance(record, dict) and "seq" in record for record in found)
        assert len(found) + len(damaged) <= data.count(b"\n")
        return len(found), bool(damaged)

    line = msgspec.json.encode({"v": 1, "seq": 7, "name": "member_joined", "code": "M101"}) + b"\n"
    seeds = [line * 3, line + line[:-9]]
    return Target("event_log", run, (), seeds, splice_text, 1 << 18, close=folder.close, share=0.2)


MAKERS = (
    _records, log_record, ledger, snapshot, manifest, checkpoint, result, contacts, tickets, events,
)  # fmt: skip
