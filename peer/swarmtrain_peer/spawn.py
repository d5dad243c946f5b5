"""Starting peer processes and trainers, and starting them again when they die.

No secret is ever in an argument list: a peer process gets the path of its site folder and reads
the rest there. A started process holds the reading end of a pipe as standard input; when whoever
started it dies, even by a kill, the pipe ends and ``watch_owner`` tells the process.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.control import ControlClosed, ControlTimeout
from swarmtrain_peer.site import Site
from swarmtrain_protocols import errors, limits
from swarmtrain_protocols.errors import SwarmError

RESTART_CODES = (1, 4, 12, 75)
"""Exit codes after which starting again may help; so may it after any signal."""
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
STABLE_S = 60.0
"""A process that lived this long has its restarts forgiven."""
STOP_TIMEOUT_S = 10.0
OUTPUT_TAIL_BYTES = 2000
SECRET_VARIABLES = ("SWARMTRAIN_TICKET", "SWARMTRAIN_TOKEN")
"""Not handed on: a started process finds what it needs in the files of its site."""


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with its import path, so that a checkout works uninstalled.

    Secrets of this process's own environment are left out; ``extra`` is taken as it is.
    """
    environment = {k: v for k, v in os.environ.items() if k not in SECRET_VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment.update(extra or {})
    return environment


def start_process(
    arguments: Sequence[str],
    output: Path | None,
    *,
    environment: Mapping[str, str] | None = None,
    nice: int = 0,
) -> subprocess.Popen[bytes]:
    """Start a process in a process group of its own.

    What it prints is appended to ``output``, or goes where this process's goes if that is None.

    A group of its own, because Ctrl-C must reach the command line only, which then leaves
    politely. ``nice``: how much lower its priority is.
    """
    prefix = ["nice", "-n", str(nice)] if nice and sys.platform != "win32" else []
    with contextlib.ExitStack() as stack:
        file = None if output is None else stack.enter_context(open(output, "ab"))
        return subprocess.Popen(
            [*prefix, *arguments],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=None if file is None else subprocess.STDOUT,
            env={**child_environment(environment), "SWARMTRAIN_OWNED": "1"},
            process_group=0,
        )


def is_owned() -> bool:
    """Whether this process was started by ``start_process``."""
    return os.environ.get("SWARMTRAIN_OWNED") == "1"


def watch_owner(on_gone: Callable[[], None]) -> None:
    """In a started process: call ``on_gone`` on a thread when whoever started it is gone.

    Does nothing if this process was not started by ``start_process``.
    """
    if not is_owned():
        return

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        on_gone()

    threading.Thread(target=wait, name="owner-watch", daemon=True).start()


def output_tail(path: Path) -> str:
    """The end of what a process printed, for an error message."""
    try:
        data = path.read_bytes()[-OUTPUT_TAIL_BYTES:]
    except FileNotFoundError:
        return ""
    return data.decode("utf-8", "replace").strip()


def error_for_exit(what: str, exit_code: int, why: str, todo: str = "") -> SwarmError:
    """A typed error for a process that ended with ``exit_code``."""
    classes = [
        errors.UsageError,
        errors.ConfigError,
        errors.NoPeerReachable,
        errors.NotAuthorised,
        errors.VersionMismatch,
        errors.RunMismatch,
        errors.NoDevice,
        errors.DataUnavailable,
        errors.CheckpointError,
        errors.QuorumLost,
        errors.Diverged,
        errors.DiskFull,
    ]
    for kind in classes:
        if kind.exit_code == exit_code:
            return kind(what, why, todo)
    error = SwarmError(what, why, todo)
    error.exit_code = exit_code if 0 < exit_code < 128 else 1
    return error


def spawn_peer(
    site: Site, *, timeout_s: float = limits.SPAWN_TIMEOUT_S, nice: int = 0
) -> subprocess.Popen[bytes]:
    """Start the peer process of ``site`` and wait until its control socket answers ``ping``.

    Raises:
        SwarmError: it ended early (with the error of its exit code), or did not answer in time.
    """
    process = start_process(
        [sys.executable, "-m", "swarmtrain_peer", str(site.folder)], site.output_path, nice=nice
    )
    try:
        wait_ready(site, process, timeout_s)
    except BaseException:
        stop_process(process)
        raise
    return process


def wait_ready(site: Site, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Wait until the control socket of ``site`` answers ``ping``; see ``spawn_peer``."""
    deadline_s = host.mono_s() + timeout_s
    while host.mono_s() < deadline_s:
        with contextlib.suppress(ControlClosed, ControlTimeout), site.connect() as client:
            client.call("ping", timeout_s=max(0.1, deadline_s - host.mono_s()))
            return
        try:
            exit_code = process.wait(timeout=0.02)
        except subprocess.TimeoutExpired:
            continue
        lines = output_tail(site.output_path).splitlines()
        raise error_for_exit(
            "the peer process did not start",
            exit_code,
            " | ".join(lines[-3:]) or f"exit code {exit_code}",
            f"see {site.output_path}",
        )
    raise errors.QuorumLost(
        "the peer process did not answer",
        f"waited {timeout_s:g} s on {site.control_path}",
        f"see {site.output_path}",
    )


def stop_process(process: subprocess.Popen[Any], timeout_s: float = STOP_TIMEOUT_S) -> int:
    """End a process: SIGTERM, then SIGKILL after ``timeout_s``. Returns its exit code."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    return process.returncode


def may_restart(exit_code: int) -> bool:
    """True if a process that ended so is worth starting again; negative codes are signals."""
    return exit_code < 0 or exit_code in RESTART_CODES


@dataclass(slots=True)
class Supervised:
    """One process and what is known about its lives."""

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes]
    started_s: float
    restarts: int = 0
    restart_at_s: float | None = None
    exit_code: int | None = None
    """Set once it ended for good."""
    stopping: bool = False


Report = Callable[[str, dict[str, object]], None]
"""Called with an event's name and fields: ``process_restarted`` or ``process_ended``."""


@dataclass(slots=True)
class Supervisor:
    """Keeps processes alive as their exit codes allow. ``poll`` never blocks on a live process.

    A restart that fails counts as another death. Times come from ``mono_s``, so tests need none.
    """

    report: Report
    mono_s: Callable[[], float] = host.mono_s
    restart_helps: Callable[[int], bool] = may_restart
    """Of an exit code, negative for signals."""
    processes: dict[str, Supervised] = field(default_factory=dict)

    def add(self, name: str, start: Callable[[], subprocess.Popen[bytes]]) -> Supervised:
        """Start a process now and watch it.

        Raises:
            SwarmError: whatever ``start`` raises; the first start is never retried.
        """
        one = Supervised(name, start, start(), self.mono_s())
        self.processes[name] = one
        return one

    def poll(self) -> None:
        """Notice deaths, decide about restarts, carry out those that are due."""
        now = self.mono_s()
        for one in self.processes.values():
            if one.exit_code is not None:
                continue
            if one.restart_at_s is not None:
                if now >= one.restart_at_s:
                    self._restart(one)
                continue
            exit_code = one.process.poll()
            if exit_code is not None:
                self._died(one, exit_code, now)

    def all_ended(self) -> bool:
        return all(one.exit_code is not None for one in self.processes.values())

    def expect_end(self, name: str | None = None) -> None:
        """From now on an end is an end: of one process, or of all."""
        for one in self.processes.values():
            if name in (None, one.name):
                one.stopping = True

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End all processes, the newest first."""
        self.expect_end()
        for one in reversed(self.processes.values()):
            one.exit_code = stop_process(one.process, timeout_s)

    def _died(self, one: Supervised, exit_code: int, now: float) -> None:
        if exit_code == 0 or one.stopping:
            one.exit_code = exit_code
            return
        if now - one.started_s >= STABLE_S:
            one.restarts = 0
        helps = self.restart_helps(exit_code)
        if not helps or one.restarts >= limits.RESTARTS_MAX:
            one.exit_code = exit_code
            why = "too many restarts" if helps else "restarting does not help"
            self.report(
                "process_ended", {"process": one.name, "exit_code": exit_code, "reason": why}
            )
            return
        wait_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**one.restarts)
        one.restarts += 1
        one.restart_at_s = now + wait_s
        self.report(
            "process_restarted",
            {
                "process": one.name,
                "exit_code": exit_code,
                "restarts": one.restarts,
                "wait_s": wait_s,
            },
        )

    def _restart(self, one: Supervised) -> None:
        one.restart_at_s = None
        if one.stopping:
            one.exit_code = one.process.returncode
            return
        try:
            one.process = one.start()
            one.started_s = self.mono_s()
        except SwarmError as error:
            self._died(one, error.exit_code, self.mono_s())
