"""What goes next on a worker's device."""

from __future__ import annotations

import math
from typing import Any

import pytest

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.pipeline.workqueue import (
    BURST_S,
    EVALUATE_S,
    IDLE_S,
    TOLD_EVERY_S,
    WorkQueue,
)

P, Q = PeerId(b"p" * 32), PeerId(b"q" * 32)


def request(kind: Any, k: int = 0, *, step: int = 0, attempt: int = 0) -> m.HopRequest:
    identity = m.HopId(0, step, k, 1, kind == "backward", attempt)
    return m.HopRequest(identity, kind, step, 0, (0, 1, 2), m.EMPTY, m.EMPTY)


def drained(queue: WorkQueue, now: float = 0.0) -> list[tuple[str, int]]:
    found = []
    while (job := queue.take(now)) is not None:
        found.append((job.request.kind, job.request.id.micro_batch))
    return found


def test_backward_then_older_step_then_lower_attempt_then_first_come() -> None:
    queue = WorkQueue(0.1, 100)
    for item in (
        request("evaluate", 0),
        request("forward", 1, step=4),
        request("forward", 2, step=3, attempt=1),
        request("forward", 3, step=3),
        request("forward", 4, step=3),
        request("backward", 5, step=4),
        request("backward", 6, step=4),
    ):
        assert queue.add(0.0, P, item)
    assert [k for _, k in drained(queue)] == [5, 6, 3, 4, 2, 1, 0]
    assert len(queue) == 0


def test_it_is_bounded_and_one_peer_gets_half() -> None:
    queue = WorkQueue(0.1, 6)
    assert [queue.add(0.0, P, request("forward", k)) for k in range(4)] == [True] * 3 + [False]
    assert [queue.add(0.0, Q, request("forward", k)) for k in range(4)] == [True] * 3 + [False]
    gone = queue.remove(lambda job: job.peer == P)
    assert [job.request.id.micro_batch for job in gone] == [0, 1, 2] and len(queue) == 3
    assert queue.has(Q, request("forward", 1)) and not queue.has(P, request("forward", 1))


def test_what_is_put_back_keeps_its_place() -> None:
    queue = WorkQueue(0.1, 9)
    for k in range(3):
        queue.add(0.0, P, request("forward", k))
    first = queue.take(0.0)
    assert first is not None
    queue.put_back([first])
    assert [k for _, k in drained(queue)] == [0, 1, 2]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_generation_gets_its_share_of_a_busy_device_and_no_more(share: float) -> None:
    """Forty jobs of each kind always wait; each takes 50 ms of the device."""
    queue = WorkQueue(share, 1000)
    now, used, ends = 0.0, {"forward": 0.0, "generate": 0.0}, 400.0
    while now < ends:
        for kind in used:
            while sum(job.request.kind == kind for job in queue._jobs) < 40:
                queue.add(now, P if kind == "forward" else Q, request(kind))
        job = queue.take(now)
        assert job is not None
        now += 0.05
        used[job.request.kind] += 0.05
        queue.spent(now, job.request, 0.05)
    assert used["generate"] / ends == pytest.approx(share, abs=0.01)


def test_an_idle_device_generates_freely_and_says_when() -> None:
    queue = WorkQueue(0.01, 100)
    queue.add(0.0, P, request("forward", 1))
    queue.add(0.0, P, request("generate", 2))
    queue.add(0.0, P, request("generate", 3))
    assert drained(queue) == [("forward", 1)], "nothing is saved up yet"
    queue.spent(0.5, request("forward", 1), 0.5)
    assert drained(queue, 0.5) == [("generate", 2), ("generate", 3)], "half a second saved 5 ms"
    queue.spent(1.0, request("generate", 2), 5.0)
    queue.add(1.0, P, request("generate", 4))
    assert queue.take(1.0) is None
    assert queue.next_at() == pytest.approx(0.5 + IDLE_S), "nothing else came since"
    assert drained(queue, 0.5 + IDLE_S) == [("generate", 4)]
    assert queue.next_at() == math.inf


def test_what_is_saved_up_is_bounded() -> None:
    queue = WorkQueue(0.5, 100)
    assert queue.take(0.0) is None
    queue.add(1000.0, P, request("forward"))
    queue.add(1000.0, P, request("generate"))
    assert drained(queue, 1000.0)[0] == ("generate", 0)
    queue.spent(1000.0, request("generate"), 0.5 * BURST_S)
    queue.add(1000.0, P, request("forward"))
    queue.add(1000.0, P, request("generate"))
    assert drained(queue, 1000.0) == [("forward", 0)], "a thousand seconds were not saved"


def test_no_share_means_only_when_idle() -> None:
    queue = WorkQueue(0.0, 100)
    queue.add(0.0, P, request("forward"))
    queue.add(0.0, P, request("generate"))
    assert drained(queue) == [("forward", 0)]
    assert queue.next_at() == IDLE_S
    assert drained(queue, IDLE_S) == [("generate", 0)]


def test_a_generate_that_would_wait_for_long_is_refused_and_that_is_told_now_and_then() -> None:
    told: list[tuple[PeerId, float]] = []
    queue = WorkQueue(0.1, 100, lambda peer, share: told.append((peer, share)))
    queue.occupied(math.inf)
    assert queue.admit(0.0, P, request("generate", 1)) is None
    assert drained(queue, 0.1) == [("generate", 1)]
    queue.spent(0.2, request("generate", 1), 0.1)  # 20 ms were saved, so 80 ms are owed
    assert queue.wait_s(0.2) == pytest.approx(0.8)
    assert queue.admit(0.2, P, request("generate", 2)) is None and told == [(P, 0.1)]
    assert drained(queue, 0.2) == []
    # A second one would wait for the first one's 100 ms, too: 1.8 s.
    refused = queue.admit(0.2, Q, request("generate", 3))
    assert refused is not None and refused[0] == "share"
    assert len(told) == 1, "once is enough for a while"
    assert drained(queue, 1.1) == [("generate", 2)]
    assert queue.admit(1.1 + TOLD_EVERY_S, Q, request("generate", 4)) is None
    assert queue.wait_s(1.1 + TOLD_EVERY_S) == 0.0


def test_a_generate_takes_the_place_of_what_its_errand_asked_for_before() -> None:
    queue = WorkQueue(0.1, 100)
    queue.occupied(math.inf)
    assert queue.admit(0.0, P, request("generate", 1, attempt=1)) is None
    assert queue.admit(0.0, Q, request("generate", 1, attempt=1)) is None
    assert queue.admit(0.0, P, request("generate", 1, attempt=2)) is None
    waiting = [(job.peer, job.request.id.attempt) for job in queue._jobs]
    assert waiting == [(Q, 1), (P, 2)]


def test_others_are_refused_only_for_want_of_room() -> None:
    queue = WorkQueue(0.1, 2)
    assert queue.admit(0.0, P, request("forward", 1)) is None
    assert queue.admit(0.0, P, request("forward", 2)) == ("busy", "1 requests wait")


def test_an_evaluation_is_let_through_in_the_end() -> None:
    """Where drivers never pause there is always a backward that waits."""
    queue = WorkQueue(0.1, 100)
    assert queue.add(0.0, P, request("evaluate", 1)) and queue.add(0.4, P, request("evaluate", 2))
    for k in (3, 4):
        assert queue.add(0.4, P, request("backward", k))
    for now, expected in ((0.49, ("backward", 3)), (EVALUATE_S, ("evaluate", 1))):
        job = queue.take(now)
        assert job is not None and (job.request.kind, job.request.id.micro_batch) == expected
    assert drained(queue, 0.6) == [("backward", 4), ("evaluate", 2)]
