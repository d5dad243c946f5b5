"""Queues of a control link: who goes first, and what credit holds back."""

from __future__ import annotations

from swarmtrain_protocols import limits
from swarmtrain_protocols.outbox import RESERVED_BYTES, Outbox

ALL = 1 << 40


def test_the_sessions_own_frames_go_first_and_chunks_last() -> None:
    box = Outbox()
    assert box.put(b"chunk", chunk=True) and box.put(b"message", chunk=False)
    box.put_first(b"pong")
    box.put_last(b"bye")
    assert (box.nbytes, box.urgent_frames) == (len(b"pongmessagebyechunk"), 1)
    assert box.take(1) == b"pong", "one frame at least"
    assert box.take(ALL) == b"messagebyechunk"
    assert (box.nbytes, box.sent_frames) == (0, 4)


def test_chunks_leave_credit_for_messages() -> None:
    box, kib = Outbox(), b"x" * 1024
    while box.put(kib, chunk=True):
        pass
    assert box.nbytes == limits.SEND_QUEUE_BYTES_MAX
    assert not box.put(kib, chunk=False), "full"
    sent = len(box.take(ALL))
    assert sent == limits.CREDIT_WINDOW_BYTES - RESERVED_BYTES
    assert box.put(kib, chunk=False)
    assert box.take(ALL) == kib
    assert box.take(ALL) == b"", "nothing else has credit"
    assert box.granted(2048)
    assert box.take(ALL) == kib, "the message took some of it"


def test_nobody_grants_more_than_it_was_sent() -> None:
    box = Outbox()
    box.put(b"x" * 100, chunk=False)
    box.take(ALL)
    assert box.granted(100)
    assert not box.granted(1)


def test_a_link_that_ends_sends_its_messages_and_no_chunks() -> None:
    box = Outbox()
    while box.put(b"m" * 1024, chunk=False):
        pass
    waiting = len(box.take(ALL))
    box.put(b"chunk", chunk=True)
    rest = box.nbytes - len(b"chunk")
    assert rest > 0 and waiting == limits.CREDIT_WINDOW_BYTES
    box.drop_chunks()
    box.put_last(b"bye")
    assert box.take(ALL, everything=True)[-3:] == b"bye"
    assert box.nbytes == 0
