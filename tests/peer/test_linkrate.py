"""The rate of a connection is measured while its buffer is full, and decides about packing."""

from __future__ import annotations

import random

import pytest

from swarmtrain_peer.linkrate import FAST_BYTES_PER_S, WINDOW_S, LinkRate, pays
from swarmtrain_protocols.packing import unpack

TEXT = memoryview(b"".join(b"%d bottles of beer on the wall\n" % i for i in range(40_000)))
NOISE = memoryview(random.Random(1).randbytes(1 << 20))


def test_what_the_buffer_swallows_at_once_is_no_rate() -> None:
    rate = LinkRate()
    assert rate.bytes_per_s is None
    rate.full(10.0, 4_000_000)  # taken in no time by an empty buffer
    assert rate.bytes_per_s is None
    rate.full(10.0 + WINDOW_S / 2, 4_050_000)
    assert rate.bytes_per_s is None
    rate.full(10.5, 4_500_000)
    assert rate.bytes_per_s == pytest.approx(1e6)
    rate.full(11.5, 4_750_000)
    assert rate.bytes_per_s == pytest.approx(0.25e6)
    rate.idle()  # the buffer may run empty now: the next window begins when it is full again
    rate.full(20.0, 9_000_000)
    assert rate.bytes_per_s == pytest.approx(0.25e6)
    rate.full(21.0, 11_000_000)
    assert rate.bytes_per_s == pytest.approx(2e6)


def test_unknown_and_fast_paths_pack_nothing() -> None:
    rate = LinkRate()
    assert rate.packed(TEXT) is None
    rate.bytes_per_s = FAST_BYTES_PER_S + 1
    assert rate.packed(TEXT) is None


def test_a_slow_path_packs_what_shrinks() -> None:
    rate = LinkRate()
    rate.bytes_per_s = 100e3
    packed = rate.packed(TEXT)
    assert packed is not None and len(packed) < TEXT.nbytes // 3
    into = bytearray(TEXT.nbytes)
    unpack(packed, memoryview(into))
    assert into == TEXT
    assert rate.packed(NOISE) is None


def test_the_pay_off() -> None:
    """1.6 times three times the packing of a byte at 480 MB/s is 10 ns."""
    assert pays(0.5, 480e6, 49e6) and not pays(0.5, 480e6, 51e6)
    assert pays(0.1, 480e6, 9.9e6) and not pays(0.1, 480e6, 10.1e6)
    assert not pays(0.04, 480e6, 1.0)


def test_a_path_that_stands_still_has_no_rate_until_it_moves() -> None:
    rate = LinkRate()
    rate.full(10.0, 5000)
    rate.full(10.0 + 3 * WINDOW_S, 5000)
    assert rate.bytes_per_s is None
    assert rate.packed(memoryview(bytes(100_000))) is None
    rate.full(10.0 + 4 * WINDOW_S, 5000 + 8000)
    assert rate.bytes_per_s is not None and abs(rate.bytes_per_s - 8000 / (4 * WINDOW_S)) < 1.0
