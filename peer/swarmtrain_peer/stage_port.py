"""The peer process's end of the stage line: one thread that talks to the trainer, in order.

The event loop puts commands in; answers come back on the loop. A trainer that goes away fails all
commands that wait, and the next one that comes is welcomed.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from swarmtrain_peer import stage_link as sl
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import LocalProtocolError, SwarmError

Answer = Callable[[sl.Done | sl.Failed, bytearray], None]


class _Task:
    """A command and who wants its answer."""

    __slots__ = ("answer", "command", "payload")

    def __init__(self, command: sl.Command, payload: Sequence[sl.Buffer], answer: Answer) -> None:
        self.command = command
        self.payload = payload
        self.answer = answer


class StagePort:
    """Listens for the trainer of this site.

    Args:
        attached: called on the loop with the greeting of a trainer that has come.
        lost: called on the loop when it is gone; every command it had not answered has failed.
    """

    def __init__(
        self, path: Path, attached: Callable[[sl.Hello], None], lost: Callable[[str], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._path = path
        self._attached = attached
        self._lost = lost
        self._tasks: queue.Queue[_Task | None] = queue.Queue(limits.STAGE_COMMANDS_MAX)
        self._lock = threading.Lock()
        self._alive = False
        self._closed = False
        self._line: sl.StageLine | None = None
        self._listener = sl.listen(path)
        self._thread = threading.Thread(target=self._run, name="swarmtrain-stages", daemon=True)
        self._thread.start()

    def submit(self, command: sl.Command, payload: Sequence[sl.Buffer], answer: Answer) -> None:
        """Send ``command`` after all those before it. Thread-safe; ``answer`` comes on the loop.

        Without a trainer the answer is ``Failed("no_trainer", …)``.
        """
        task = _Task(command, payload, answer)
        with self._lock:
            if self._alive:
                try:
                    self._tasks.put_nowait(task)
                except queue.Full:
                    raise LocalProtocolError(
                        "too many commands wait for the trainer", str(limits.STAGE_COMMANDS_MAX)
                    ) from None
                return
        self._answer(task, sl.Failed("no_trainer", "no trainer is attached"), bytearray())

    def close(self) -> None:
        """End; nothing is called back any more."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._line is not None:
            self._line.close()
        with contextlib.suppress(queue.Full):
            self._tasks.put_nowait(None)
        self._path.unlink(missing_ok=True)

    # -- on the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            self._line = line = sl.StageLine(end)
            why = "it went away"
            try:
                hello, _ = line.receive()
                if not isinstance(hello, sl.Hello):
                    raise LocalProtocolError("stage line", f"{type(hello).__name__} for a greeting")
                with self._lock:
                    self._alive = True
                self._call(self._attached, hello)
                self._serve(line)
            except SwarmError as error:
                why = str(error)
            finally:
                line.close()
                self._give_up()
                self._call(self._lost, why)

    def _serve(self, line: sl.StageLine) -> None:
        """Until the trainer is gone; that is noticed while nothing is asked of it, too."""
        while not self._closed:
            try:
                task = self._tasks.get(timeout=limits.STAGE_WATCH_S)
            except queue.Empty:
                line.probe()
                continue
            if task is None:
                return
            try:
                line.send(task.command, task.payload)
                header, payload = line.receive()
                if not isinstance(header, sl.Done | sl.Failed):
                    raise LocalProtocolError("stage line", f"{type(header).__name__} for an answer")
            except SwarmError as error:
                self._answer(task, sl.Failed("no_trainer", str(error)[:512]), bytearray())
                raise
            self._answer(task, header, payload)

    def _give_up(self) -> None:
        with self._lock:
            self._alive = False
            waiting: list[_Task] = []
            with contextlib.suppress(queue.Empty):
                while True:
                    task = self._tasks.get_nowait()
                    if task is not None:
                        waiting.append(task)
        for task in waiting:
            self._answer(task, sl.Failed("no_trainer", "the trainer went away"), bytearray())

    def _answer(self, task: _Task, header: sl.Done | sl.Failed, payload: bytearray) -> None:
        self._call(task.answer, header, payload)

    def _call(self, callback: Callable[..., None], *args: object) -> None:
        if not self._closed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *args)
