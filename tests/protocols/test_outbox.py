"""Queues of a control link: who goes first, and what credit holds back."""

from __future__ import annotations

from swarmtrain_protocols import limits
from swarmtrain_protocols.outbox import RESERVED_BYTES, Outbox, SendBudget

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


def test_all_links_together_are_bounded_and_each_keeps_some_room() -> None:
    budget, mib = SendBudget(20 * 1024 * 1024), b"x" * (1 << 20)
    deaf = [Outbox(budget) for _ in range(4)]
    for box in deaf:
        while box.put(mib, chunk=False):
            pass
    held = sum(box.nbytes for box in deaf)
    room = len(deaf) * limits.SEND_QUEUE_RESERVED_BYTES
    assert 20 * len(mib) - len(mib) < held <= budget.total_bytes + room
    assert budget.taken_bytes <= budget.total_bytes
    honest = Outbox(budget)
    own = b"y" * limits.SEND_QUEUE_RESERVED_BYTES
    assert honest.put(own, chunk=False) and not honest.put(mib, chunk=False)
    before = budget.taken_bytes
    deaf[0].discard()
    assert deaf[0].nbytes == 0 and budget.taken_bytes < before
    assert honest.put(mib, chunk=False)
    assert honest.take(ALL) == own + mib
    for box in deaf:
        box.take(ALL)
        box.drop_chunks()
        box.discard()
    assert budget.taken_bytes == 0, "nothing is left behind"
