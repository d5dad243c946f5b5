"""One-shot readiness for several threads at once.

A descriptor that was armed is given to exactly one thread, once, when it is ready; then it must be
armed again. epoll does all of that in the kernel. Elsewhere (macOS) threads take turns with a
selector: one waits, takes one ready descriptor out and lets the next thread wait.
"""

from __future__ import annotations

import select
import selectors
import socket
import threading
from typing import Protocol


class Poller(Protocol):
    """Thread-safe; ``wait`` may be called by many threads."""

    def add(self, fd: int) -> None:
        """Know a descriptor, not armed."""

    def arm(self, fd: int, *, write: bool) -> None:
        """Have it given out once when it can be read (or written)."""

    def remove(self, fd: int) -> None:
        """Forget it, before it is closed."""

    def wait(self) -> int | None:
        """Block until a descriptor is ready; None: nothing, ask again."""

    def close(self) -> None: ...


class EpollPoller:
    """Linux."""

    def __init__(self) -> None:
        self._epoll = select.epoll()

    def add(self, fd: int) -> None:
        self._epoll.register(fd, select.EPOLLONESHOT)

    def arm(self, fd: int, *, write: bool) -> None:
        events = select.EPOLLOUT if write else select.EPOLLIN
        self._epoll.modify(fd, events | select.EPOLLONESHOT)

    def remove(self, fd: int) -> None:
        self._epoll.unregister(fd)

    def wait(self) -> int | None:
        ready = self._epoll.poll(maxevents=1)
        return ready[0][0] if ready else None

    def close(self) -> None:
        self._epoll.close()


class SelectorPoller:
    """Anywhere else, by taking turns."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._change = threading.Lock()
        self._turn = threading.Lock()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._wake_fd = self._wake_read.fileno()
        self._selector.register(self._wake_fd, selectors.EVENT_READ)

    def add(self, fd: int) -> None:
        """Nothing to do: a selector knows only what is armed."""

    def arm(self, fd: int, *, write: bool) -> None:
        events = selectors.EVENT_WRITE if write else selectors.EVENT_READ
        with self._change:
            if fd in self._selector.get_map():
                self._selector.modify(fd, events)
            else:
                self._selector.register(fd, events)
        self._wake()

    def remove(self, fd: int) -> None:
        with self._change:
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        self._wake()

    def wait(self) -> int | None:
        with self._turn:
            ready = [key.fd for key, _ in self._selector.select()]
            for fd in ready:
                if fd == self._wake_fd:
                    self._drain()
                    continue
                with self._change:
                    if fd in self._selector.get_map():
                        self._selector.unregister(fd)
                        return fd
        return None

    def close(self) -> None:
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    def _wake(self) -> None:
        try:
            self._wake_write.send(b"x")
        except BlockingIOError:
            return  # full of wake-ups: one of them will do

    def _drain(self) -> None:
        try:
            self._wake_read.recv(4096)
        except BlockingIOError:
            return  # another turn took them


def make_poller() -> Poller:
    """The best one of this platform."""
    return EpollPoller() if hasattr(select, "epoll") else SelectorPoller()
