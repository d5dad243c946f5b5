"""Frames on their way: who drips one is cut off, and what nobody will get is given back."""

from __future__ import annotations

from swarmtrain_protocols import limits
from swarmtrain_protocols.messages.fetch import FetchChunk
from swarmtrain_protocols.session_events import Closed, Received
from swarmtrain_protocols.wire import encode_frame
from tests.protocols.test_session import ASK, Pair


def test_a_frame_that_drips_ends_the_link_though_nobody_is_silent() -> None:
    """Slowloris behind a good key: each sealed message is whole and brings one byte of a frame."""
    pair = Pair().run()
    frame = b"".join(encode_frame(ASK)) * 40
    cipher, now, at = pair.cores[0]._tx, 0.0, 0
    assert cipher is not None
    while not pair.cores[1].closed and now < 60.0:
        now += 1.0
        sealed = cipher.encrypt(frame[at : at + 1])
        at += 1
        pair.cores[1].receive_bytes(now, len(sealed).to_bytes(2, "little") + sealed)
        if now >= pair.cores[1].deadline():
            pair.cores[1].tick(now)
    (closed,) = [e for e in pair.cores[1].events() if isinstance(e, Closed)]
    assert (closed.code, closed.by_peer) == ("stalled", False)
    assert limits.FRAME_TIMEOUT_S <= now <= limits.FRAME_TIMEOUT_S + 2


def test_frames_that_follow_each_other_slowly_are_no_drip() -> None:
    pair = Pair().run()
    frame = b"".join(encode_frame(ASK))
    cipher, now = pair.cores[0]._tx, 0.0
    assert cipher is not None
    half = len(frame) // 2
    pieces = [frame[:half]] + [frame[half:] + frame[:half]] * 12  # one is always begun
    for piece in pieces:
        now += limits.FRAME_TIMEOUT_S / 2
        sealed = cipher.encrypt(piece)
        pair.cores[1].receive_bytes(now, len(sealed).to_bytes(2, "little") + sealed)
        pair.cores[1].tick(now)
    assert pair.cores[1].is_open
    assert len([e for e in pair.cores[1].events() if isinstance(e, Received)]) == 12


def test_what_waits_on_a_lost_connection_is_given_back() -> None:
    pair = Pair().run()
    a = pair.cores[0]
    budget = a._outbox._budget
    while a.send(FetchChunk(request=0, index=0), b"c" * 16000):
        pass
    assert budget.taken_bytes > limits.SEND_QUEUE_BYTES_MAX // 2
    a.close(1.0, "left")
    assert a.queued_bytes < limits.SEND_QUEUE_RESERVED_BYTES  # chunks go, the goodbye stays
    a.lost(1.0, "gone")
    assert (a.queued_bytes, budget.taken_bytes) == (0, 0)
