"""Packed chunks come back exactly, and nothing unfolds into more than was asked for."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.packing import SAMPLE_BYTES, pack, sample_saving, unpack

ROOT = Path(__file__).resolve().parents[2]
VECTORS: dict[str, Any] = json.loads((ROOT / "protocols" / "vectors" / "packing.json").read_text())
TEXT = b"".join(b"line %d of a text that says little\n" % i for i in range(20_000))


def opened(packed: bytes, nbytes: int) -> bytes:
    into = bytearray(nbytes)
    unpack(packed, memoryview(into))
    return bytes(into)


def test_text_shrinks_and_comes_back() -> None:
    packed = pack(TEXT)
    assert packed is not None and len(packed) < len(TEXT) // 3
    assert opened(packed, len(TEXT)) == TEXT
    assert zstandard.decompress(packed) == TEXT  # a plain zstd frame


def test_noise_stays_as_it_is() -> None:
    noise = random.Random(1).randbytes(1 << 20)
    assert pack(noise) is None and sample_saving(noise) < 0.01


@pytest.mark.parametrize("share", [0.04, 0.07])
def test_five_per_cent_decide(share: float) -> None:
    noise, zeros = random.Random(1).randbytes(100_000), bytes(round(100_000 * share / (1 - share)))
    assert (pack(noise + zeros) is not None) == (share > 0.05)


def test_the_sample_sees_both_halves() -> None:
    noise = random.Random(1).randbytes(1 << 20)
    assert 0.4 < sample_saving(noise + bytes(1 << 20)) < 0.6
    assert 0.4 < sample_saving(bytes(1 << 20) + noise) < 0.6
    assert sample_saving(TEXT[: SAMPLE_BYTES // 2]) > 0.5
    assert sample_saving(memoryview(b"x" * 17_000)) > 0.9


def test_the_saving_of_a_sample_is_near_that_of_the_whole() -> None:
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(1 << 19).astype(np.float32).tobytes()
    packed = pack(weights)
    assert packed is not None
    assert sample_saving(weights) == pytest.approx(1 - len(packed) / len(weights), abs=0.03)


def test_vectors() -> None:
    for case in VECTORS["good"]:
        plain = bytes.fromhex(case["plain"]) * case["times"]
        assert opened(bytes.fromhex(case["packed"]), len(plain)) == plain
    assert len(VECTORS["bad"]) >= 6
    for case in VECTORS["bad"]:
        with pytest.raises(PeerFault, match="malformed"):
            opened(bytes.fromhex(case["packed"]), case["nbytes"])


def test_bombs_are_refused_before_they_unfold() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28))
    assert len(bomb) < 20_000
    with pytest.raises(PeerFault, match="malformed"):
        opened(bomb, 1 << 20)
    # It states 1000 bytes and holds a megabyte: the decoder stops at what is stated.
    head = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(1000)))
    whole = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 20))
    size = zstandard.frame_header_size(bytes(head))
    forged = bytes(head[:size]) + whole[zstandard.frame_header_size(whole) :]
    with pytest.raises(PeerFault, match="malformed"):
        opened(forged, 1000)


def test_a_huge_window_is_refused() -> None:
    """RFC 8878 by hand: a frame of one raw block whose header asks for a window of 2^log bytes."""
    for log, taken in ((20, True), (23, True), (24, False), (41, False)):
        head = struct.pack("<IBBI", 0xFD2FB528, 0x80, (log - 10) << 3, 5)
        packed = head + (5 << 3 | 1).to_bytes(3, "little") + b"hello"
        if taken:
            assert opened(packed, 5) == b"hello"
        else:
            with pytest.raises(PeerFault, match="malformed"):
                opened(packed, 5)


@given(st.binary(max_size=200), st.integers(1, 5000))
def test_hostile_bytes_are_refused_or_exact(data: bytes, nbytes: int) -> None:
    try:
        found = opened(data, nbytes)
    except PeerFault as fault:
        assert fault.code == "malformed"
    else:
        assert zstandard.decompress(data) == found
