"""The book of what was computed: shares of time, micro-batches per second, spans of a step."""

from __future__ import annotations

import msgspec
import pytest

from swarmtrain_peer.stage_work import WINDOW_S, StageRow, StagesBody, WorkLog
from swarmtrain_protocols import limits


def test_shares_and_rates_are_of_the_window() -> None:
    log = WorkLog(100.0)
    log.worked(101.0, 1, 1, "forward", 0.5)
    log.worked(102.0, 1, 1, "backward", 0.5)
    log.worked(104.0, 2, 2, "backward", 1.0)
    assert log.shares(104.0) == {1: (0.25, 0.25), 2: (0.25, 0.25)}, "of the four seconds so far"
    later = 104.0 + WINDOW_S - 0.5
    assert log.shares(later) == {2: (0.5 / WINDOW_S, 1 / WINDOW_S)}, "half of it is in the window"
    assert log.shares(later + 1.0) == {}


def test_at_the_ends_the_embeddings_backward_is_a_micro_batch_and_the_heads_is_not() -> None:
    log = WorkLog(0.0)
    log.worked(1.0, 0, 0, "forward", 0.1)
    log.worked(2.0, 0, 4, "backward", 0.1)
    log.worked(3.0, 0, 0, "backward", 0.1)
    log.worked(4.0, 0, 4, "evaluate", 0.1)
    ((share, rate),) = log.shares(5.0).values()
    assert share == pytest.approx(0.4 / 5)
    assert rate == 1 / 5


def test_spans_are_clipped_and_joined() -> None:
    log = WorkLog(0.0)
    for end in (1.0, 1.4, 3.0, 9.0):
        log.worked(end, 1, 1, "forward", 0.5)
    assert log.spans(0.75, 8.75) == [(0.75, 1.4), (2.5, 3.0), (8.5, 8.75)]
    assert log.spans(4.0, 8.0) == []


def test_what_is_told_is_small_at_its_largest() -> None:
    row = StageRow(limits.HOPS_MAX - 1, 1 << 40, True, 0.1234, 1234.5678, 0.123456)
    body = StagesBody(1 << 20, [row] * limits.CHANNELS_SERVED_MAX, 256, True, 4096, "x" * 32)
    data = msgspec.msgpack.encode(body)
    assert len(data) < 4096
    assert msgspec.msgpack.decode(data, type=StagesBody) == body
