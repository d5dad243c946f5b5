"""Readiness: given to one thread, once, until armed again; on both implementations."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from swarmtrain_peer.poller import EpollPoller, Poller, SelectorPoller, make_poller

WAIT_S = 10.0


@pytest.fixture(params=[EpollPoller, SelectorPoller])
def poller(request: pytest.FixtureRequest) -> Iterator[Poller]:
    made: Callable[[], Poller] = request.param
    poller = made()
    yield poller
    poller.close()


def _next(poller: Poller) -> int:
    while (fd := poller.wait()) is None:
        pass
    return fd


def test_the_best_of_the_platform() -> None:
    poller = make_poller()
    assert isinstance(poller, EpollPoller) == hasattr(select, "epoll")
    poller.close()


def test_ready_is_given_out_once_until_armed_again(poller: Poller) -> None:
    left, right = socket.socketpair()
    other, far = socket.socketpair()
    with left, right, other, far:
        for sock in (left, other):
            poller.add(sock.fileno())
        far.send(b"x")
        right.send(b"x")
        poller.arm(left.fileno(), write=False)
        assert _next(poller) == left.fileno()
        poller.arm(other.fileno(), write=False)
        assert _next(poller) == other.fileno()  # left is still readable, but not armed
        poller.arm(left.fileno(), write=False)
        assert _next(poller) == left.fileno()
        poller.arm(other.fileno(), write=True)
        assert _next(poller) == other.fileno()
        poller.remove(left.fileno())
        poller.remove(other.fileno())


def test_arming_wakes_a_thread_that_already_waits(poller: Poller) -> None:
    left, right = socket.socketpair()
    with left, right:
        poller.add(left.fileno())
        right.send(b"x")
        got: list[int] = []
        thread = threading.Thread(target=lambda: got.append(_next(poller)))
        thread.start()
        poller.arm(left.fileno(), write=False)
        thread.join(WAIT_S)
        assert got == [left.fileno()]
        poller.remove(left.fileno())


def test_many_threads_share_the_work_without_giving_anything_twice(poller: Poller) -> None:
    pairs = [socket.socketpair() for _ in range(20)]
    by_fd = {left.fileno(): left for left, _ in pairs}
    counts = dict.fromkeys(by_fd, 0)
    done = threading.Semaphore(0)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            fd = poller.wait()
            if fd is None or fd not in by_fd:
                continue
            assert by_fd[fd].recv(1) == b"x"
            counts[fd] += 1  # safe: nobody else has it
            poller.arm(fd, write=False)
            done.release()

    for fd in by_fd:
        poller.add(fd)
        poller.arm(fd, write=False)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        for _, right in pairs:
            right.send(b"x")
    for _ in range(50 * len(pairs)):
        assert done.acquire(timeout=WAIT_S)
    stop.set()
    for _, right in pairs:
        right.send(b"x")  # lets every thread see that it is over
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert all(50 <= count <= 51 for count in counts.values())
    for left, right in pairs:
        poller.remove(left.fileno())
        left.close()
        right.close()
