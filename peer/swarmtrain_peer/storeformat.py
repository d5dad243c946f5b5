"""The bytes of the store's files: manifest, state file, result file.

- Manifest: 64 hex digits of the BLAKE3 hash of the rest, newline, JSON.
- State file: safetensors. One tensor ``chunk.<i>`` of shape [1 + slots, k] per chunk, theta then
  the slots, back to back, so that each tensor's bytes are one chunk of the state blob. The header
  follows from the manifest entry and must be equal to it byte by byte; the data must hash to the
  state's root.
- Result file: magic, length of header (u32, little-endian), header (MessagePack), BLAKE3 hash of
  all that, chunks. The chunks must have the Merkle root that the header names.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from blake3 import blake3
from msgspec import Meta

from swarmtrain_peer.mapping import map_readonly
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import CheckpointError
from swarmtrain_protocols.merkle import HASH_BYTES
from swarmtrain_protocols.messages.common import Channel, Count, Hash
from swarmtrain_protocols.state import MOMENTUM, SLOTS_MAX, THETA, CanonicalState, Layout

RESULT_MAGIC = b"swres\x00\x00\x01"
HEADER_ALIGNMENT = 64
CHUNKS_MAX = limits.VALUES_PER_CHANNEL_MAX // limits.CHUNK_VALUES
RESULT_HEADER_BYTES_MAX = 1024 + 8 * CHUNKS_MAX
MANIFEST_BYTES_MAX = 1024 * limits.CHANNELS_MAX


class Entry(msgspec.Struct, frozen=True):
    """One channel in a checkpoint's manifest."""

    channel: Channel
    round: Count
    values: Annotated[int, Meta(ge=1, le=limits.VALUES_PER_CHANNEL_MAX)]
    chunk_values: Annotated[int, Meta(ge=1, le=limits.CHUNK_VALUES)]
    root_hex: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    file: Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]+$", max_length=128)]
    slots: Annotated[
        tuple[Annotated[str, Meta(pattern="^[a-z]{1,16}$")], ...], Meta(max_length=SLOTS_MAX)
    ] = MOMENTUM

    @property
    def root(self) -> bytes:
        """The state hash, 32 bytes."""
        return bytes.fromhex(self.root_hex)

    @property
    def layout(self) -> Layout:
        """How the values fall into chunks."""
        return Layout(self.values, self.chunk_values)


class Manifest(msgspec.Struct, frozen=True):
    """The JSON of a checkpoint's manifest."""

    format: Annotated[int, Meta(ge=1, le=1)]
    channels: Annotated[tuple[Entry, ...], Meta(min_length=1, max_length=limits.CHANNELS_MAX)]


class ResultHeader(msgspec.Struct, frozen=True):
    """What stands before the chunks of a result file."""

    channel: Channel
    round: Count
    root: Hash
    codec: Annotated[str, Meta(max_length=16)]
    chunk_nbytes: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=CHUNKS_MAX)]


_manifest_decoder = msgspec.json.Decoder(Manifest)
_result_decoder = msgspec.msgpack.Decoder(ResultHeader)


def refusal(path: Path, why: str) -> CheckpointError:
    """The error for a file that is not used."""
    todo = "The one before it is used; if there is none, join again to fetch the state."
    return CheckpointError(f"refused {path}", why, todo)


def file_name(channel: str) -> str:
    """A name for a channel that every file system can store, distinct for distinct channels."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in channel)
    return f"{plain}.{blake3(channel.encode()).hexdigest()[:16]}"


def map_file(path: Path) -> memoryview:
    """Map a file read-only; the mapping lives as long as views of it.

    Raises:
        CheckpointError: it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            return map_readonly(file.fileno())
    except OSError as error:
        raise refusal(path, error.strerror or str(error)) from error


# Manifest


def entry_of(state: CanonicalState) -> Entry:
    """The manifest entry of a state; hashes it if it has not been."""
    layout = state.layout
    name = f"{file_name(state.channel)}.safetensors"
    root = state.root().hex()
    return Entry(
        state.channel,
        state.round,
        layout.values,
        layout.chunk_values,
        root,
        name,
        state.slot_names,
    )


def encode_manifest(entries: tuple[Entry, ...]) -> bytes:
    """The manifest file of these entries."""
    body = msgspec.json.format(msgspec.json.encode(Manifest(1, entries)), indent=1) + b"\n"
    return blake3(body).hexdigest().encode() + b"\n" + body


def read_manifest(path: Path) -> tuple[Entry, ...]:
    """Read and verify a manifest.

    Raises:
        CheckpointError: missing, damaged or of an unknown format.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MANIFEST_BYTES_MAX + 1)
    except OSError as error:
        raise refusal(path, error.strerror or str(error)) from error
    digest, _, body = data.partition(b"\n")
    if len(data) > MANIFEST_BYTES_MAX or blake3(body).hexdigest().encode() != digest:
        raise refusal(path, "its checksum is wrong")
    try:
        return _manifest_decoder.decode(body).channels
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refusal(path, str(error)) from error


# State files


def state_header(entry: Entry) -> bytes:
    """The safetensors header, length included, padded so that the data is aligned."""
    layout = entry.layout
    metadata = {
        "channel": entry.channel,
        "round": str(entry.round),
        "root": entry.root_hex,
        "slots": ",".join((THETA, *entry.slots)),
    }
    tensors: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for index in range(layout.chunks):
        start, end = end, end + layout.state_nbytes(index, entry.slots)
        tensors[f"chunk.{index:06d}"] = {
            "dtype": "F32",
            "shape": [1 + len(entry.slots), layout.nvalues(index)],
            "data_offsets": [start, end],
        }
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def state_pieces(state: CanonicalState, entry: Entry) -> Iterator[bytes | memoryview]:
    """What to write into a state file, without copying the arrays."""
    yield state_header(entry)
    for index in range(state.layout.chunks):
        part = state.layout.part(index)
        for array in state.arrays:
            yield array[part].data


def state_chunks(path: Path, data: memoryview, entry: Entry) -> list[memoryview]:
    """Views of the array chunks of a state file whose header has been compared; data unverified.

    Raises:
        CheckpointError: another length or header than the entry asks for.
    """
    layout = entry.layout
    header = state_header(entry)
    nbytes = len(header) + (1 + len(entry.slots)) * 4 * entry.values
    if data.nbytes != nbytes:
        raise refusal(path, f"it has {data.nbytes} bytes instead of {nbytes}")
    if data[: len(header)] != header:
        raise refusal(path, "its header differs from the manifest")
    chunks: list[memoryview] = []
    start = len(header)
    for index in range(layout.chunks):
        stop = start + layout.state_nbytes(index, entry.slots)
        chunks.append(data[start:stop])
        start = stop
    return chunks


def read_state(path: Path, entry: Entry) -> CanonicalState:
    """Read a state file into fresh arrays and verify its hash.

    Raises:
        CheckpointError: missing, truncated, or a hash that is not the manifest's.
    """
    data = map_file(path)
    chunks = state_chunks(path, data, entry)
    state = CanonicalState.first(
        entry.channel,
        np.empty(entry.values, np.float32),
        entry.slots,
        round=entry.round,
        chunk_values=entry.chunk_values,
    )
    for index, chunk in enumerate(chunks):
        state.load_chunk(index + 1, chunk)
    if state.root() != entry.root:
        raise refusal(path, "its hash is wrong")
    return state


# Result files


def encode_result_header(header: ResultHeader) -> bytes:
    """Everything before the chunks."""
    body = msgspec.msgpack.encode(header)
    front = RESULT_MAGIC + struct.pack("<I", len(body)) + body
    return front + blake3(front).digest()


def parse_result(path: Path, data: memoryview) -> tuple[ResultHeader, list[memoryview]]:
    """Header and chunk views of a result file; the chunks are not verified yet.

    Raises:
        CheckpointError: truncated, damaged or too long.
    """
    start = len(RESULT_MAGIC) + 4
    if data.nbytes < start or data[: len(RESULT_MAGIC)] != RESULT_MAGIC:
        raise refusal(path, "it is not a result file, or cut short")
    (length,) = struct.unpack("<I", data[len(RESULT_MAGIC) : start])
    end = start + length
    if length > RESULT_HEADER_BYTES_MAX or data.nbytes < end + HASH_BYTES:
        raise refusal(path, "its header is cut short")
    if blake3(data[:end]).digest() != data[end : end + HASH_BYTES]:
        raise refusal(path, "the checksum of its header is wrong")
    try:
        header = _result_decoder.decode(data[start:end])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refusal(path, str(error)) from error
    position = end + HASH_BYTES
    if data.nbytes != position + sum(header.chunk_nbytes):
        raise refusal(path, f"it has {data.nbytes} bytes, its header says otherwise")
    chunks: list[memoryview] = []
    for nbytes in header.chunk_nbytes:
        chunks.append(data[position : position + nbytes])
        position += nbytes
    return header, chunks
