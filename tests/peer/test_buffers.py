"""``swarmtrain_peer.buffers``: nobody gets what somebody else has; few idle ones are kept."""

from __future__ import annotations

from swarmtrain_peer.buffers import BUFFERS_KEPT, Buffers


def test_what_is_lent_is_nobody_elses_until_it_is_back() -> None:
    buffers = Buffers(64)
    one, other = buffers.lend(), buffers.lend()
    one[:], other[:] = bytes(64), b"x" * 64
    assert bytes(one) == bytes(64)
    buffers.back(one)
    buffers.back(None)
    assert buffers.lend() is one
    assert buffers.lend() is not other


def test_few_of_many_are_kept() -> None:
    buffers = Buffers(64)
    lent = [buffers.lend() for _ in range(3 * BUFFERS_KEPT)]
    for one in lent:
        buffers.back(one)
    again = [buffers.lend() for _ in lent]
    assert sum(any(one is old for old in lent) for one in again) == BUFFERS_KEPT
