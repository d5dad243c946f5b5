"""A peer process on a bad machine: its wall clock is off, its disk fails or takes its time.

``python -m tests.chaos.machine SITE_FOLDER`` is ``python -m swarmtrain_peer SITE_FOLDER`` with
calls of the system replaced; nothing of the product knows. What is wrong stands in ``machine.json``
beside the site's files and may change at any moment:

``offset_s``, ``drift``, ``since_mono_s``   the wall clock is off by that, and by more with time
``disk``                                    ``broken``: EIO, ``readonly``: EROFS, ``slow``
``sync_s``                                  how long each sync takes on a slow disk
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swarmtrain_peer import host

FILE = "machine.json"
LOOK_S = 0.1
FAILS = {"broken": errno.EIO, "readonly": errno.EROFS}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Trouble:
    """What ``machine.json`` says now, looked at every tenth of a second."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.device = folder.stat().st_dev
        self._looked_s = -1.0
        self._stamp = 0
        self._now: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __call__(self) -> dict[str, Any]:
        now_s = time.monotonic()
        if now_s - self._looked_s > LOOK_S:
            with self._lock:
                self._looked_s = now_s
                try:
                    stamp = self._path.stat().st_mtime_ns
                    if stamp != self._stamp:
                        self._now, self._stamp = json.loads(self._path.read_text()), stamp
                except (OSError, ValueError):
                    return self._now  # not there, or just being written
        return self._now


def tell(folder: Path, **trouble: Any) -> None:
    """Change what is wrong with a machine; the rest stays as it is."""
    path = folder / FILE
    known = json.loads(path.read_text()) if path.exists() else {}
    partial = path.with_name(FILE + ".new")
    partial.write_text(json.dumps({**known, **trouble}))
    os.replace(partial, path)


def wrong_clock(trouble: Trouble) -> None:
    """Have ``host.wall_s`` lie."""
    honest = host.wall_s

    def wall_s() -> float:
        now = trouble()
        since_s = host.mono_s() - now.get("since_mono_s", 0.0)
        return honest() + float(now.get("offset_s", 0.0) + now.get("drift", 0.0) * since_s)

    host.wall_s = wall_s


def bad_disk(trouble: Trouble) -> None:
    """Have what changes regular files fail, or take its time."""

    def refuse(path: object) -> None:
        number = FAILS.get(trouble().get("disk", ""))
        if number is not None:
            raise OSError(number, os.strerror(number), str(path))

    def is_file(descriptor: int) -> bool:
        status = os.fstat(descriptor)
        return stat.S_ISREG(status.st_mode) and status.st_dev == trouble.device

    def writing(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(descriptor: int, *rest: Any) -> Any:
            if is_file(descriptor):
                refuse(descriptor)
            return call(descriptor, *rest)

        return wrapped

    def syncing(call: Callable[[int], None]) -> Callable[[int], None]:
        def wrapped(descriptor: int) -> None:
            now = trouble()
            if now.get("disk") == "slow" and is_file(descriptor):
                time.sleep(now["sync_s"])  # tidy: allowed because the disk takes that long
            elif is_file(descriptor):
                refuse(descriptor)
            call(descriptor)

        return wrapped

    def on_disk(path: Any) -> bool:
        return not os.fsdecode(path).startswith("/dev/")

    def naming(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *rest: Any, **named: Any) -> Any:
            if on_disk(path):  # shared memory is none
                refuse(path)
            return call(path, *rest, **named)

        return wrapped

    honest_open = os.open

    def opening(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & WRITES and on_disk(path):
            refuse(path)
        return honest_open(path, flags, *rest, **named)

    os.write, os.ftruncate = writing(os.write), writing(os.ftruncate)
    os.fsync, os.fdatasync = syncing(os.fsync), syncing(os.fdatasync)
    os.replace, os.unlink, os.mkdir = naming(os.replace), naming(os.unlink), naming(os.mkdir)
    os.open = opening


def main(arguments: list[str]) -> int:
    """Serve the site; returns the exit code."""
    trouble = Trouble(Path(arguments[0]).resolve())
    wrong_clock(trouble)
    bad_disk(trouble)
    # Not before: modules that are imported now take the calls above for the system's.
    from swarmtrain_peer.process import main as serve

    return serve(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
