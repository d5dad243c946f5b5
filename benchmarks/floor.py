"""What an all-reduce must cost on the processor, from measured costs of its parts.

A butterfly all-reduce of n values among N peers, encoded in e bytes, makes each peer send and
receive 2e(N-1)/N bytes, each encrypted or decrypted and copied once; hash its own e bytes, the part
results it made (e/N) and everything it received; and encode, accumulate and decode n(1 + 1/N), n
and n values. The floor is the sum over all peers divided by the cores they share: no waiting, no
scheduling, no interpreter, no kernel time of the sockets. It says how much of a measured time is
work that the design asks for, and how much is overhead.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs import get_codec

BUFFER_BYTES = 32 << 20  # larger than the caches, as a real gradient is


@dataclass(frozen=True)
class Costs:
    """Measured on one thread: seconds per byte, and per value for the codec."""

    aead_s_per_byte: float
    hash_s_per_byte: float
    copy_s_per_byte: float
    encode_s_per_value: float
    accumulate_s_per_value: float
    decode_s_per_value: float


def _seconds(call: Callable[[], object], repeats: int = 5) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(codec_name: str) -> Costs:
    """Time each part on this machine; about a second."""
    buffer = np.arange(BUFFER_BYTES // 4, dtype=np.float32)
    raw = buffer.view(np.uint8)
    other = np.empty_like(raw)
    cipher, nonce, frame = AESGCM(bytes(32)), bytes(12), limits.FRAME_BYTES_BULK_MAX - 16
    frames = range(0, BUFFER_BYTES - frame, frame)

    def encrypt() -> None:
        for start in frames:
            cipher.encrypt(nonce, raw[start : start + frame], None)

    def digest() -> None:
        for start in range(0, BUFFER_BYTES, limits.FRAME_BYTES_BULK_MAX):
            blake3(raw[start : start + limits.FRAME_BYTES_BULK_MAX]).digest()

    codec, count = get_codec(codec_name), limits.CHUNK_VALUES
    chunks = [slice(start, start + count) for start in range(0, len(buffer), count)]
    encoded = [np.empty(codec.encoded_nbytes(count), np.uint8) for _ in chunks]
    out = np.empty_like(buffer)

    def encode() -> None:
        for chunk, data in zip(chunks, encoded, strict=True):
            codec.encode(buffer[chunk], data)

    def decode() -> None:
        for chunk, data in zip(chunks, encoded, strict=True):
            codec.decode(data, out[chunk])

    def accumulate() -> None:
        for chunk, data in zip(chunks, encoded, strict=True):
            codec.decode_accumulate(data, np.float32(0.5), out[chunk])

    return Costs(
        aead_s_per_byte=_seconds(encrypt) / (len(frames) * frame),
        hash_s_per_byte=_seconds(digest) / BUFFER_BYTES,
        copy_s_per_byte=_seconds(lambda: np.copyto(other, raw)) / BUFFER_BYTES,
        encode_s_per_value=_seconds(encode) / len(buffer),
        accumulate_s_per_value=_seconds(accumulate) / len(buffer),
        decode_s_per_value=_seconds(decode) / len(buffer),
    )


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def floor_parts_s(
    costs: Costs, peers: int, values: int, nbytes: int, cores_shared: int
) -> dict[str, float]:
    """Seconds of each kind of work for one all-reduce, spread perfectly over the cores.

    Args:
        costs: of this machine and codec.
        peers: N, all on this machine.
        values: n, the length of the vector.
        nbytes: e, the encoded vector.
        cores_shared: cores that the N peers share.
    """
    moved = 2 * nbytes * (peers - 1) / peers
    each = {
        "aead": 2 * moved * costs.aead_s_per_byte,
        "copy": 2 * moved * costs.copy_s_per_byte,
        "hash": (nbytes + nbytes / peers + moved) * costs.hash_s_per_byte,
        "encode": values * (1 + 1 / peers) * costs.encode_s_per_value,
        "sum": values * costs.accumulate_s_per_value,
        "decode": values * costs.decode_s_per_value,
    }
    parallel = min(cores_shared, peers) if peers else 1
    return {name: seconds * peers / parallel for name, seconds in each.items()}


if __name__ == "__main__":
    for name in ("fp32", "int8"):
        costs = measure(name)
        print(name, {key: f"{value * 1e9:.3f} ns" for key, value in asdict(costs).items()})
