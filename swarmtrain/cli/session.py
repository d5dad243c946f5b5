"""One member in the foreground: its peer process, its trainer, its events, its end.

Ctrl-C once leaves politely after the round; twice leaves now, with a goodbye; three times kills.
SIGTERM is a polite leave with a deadline (``PeerConfig.leave_grace_s``), as spot machines need.
"""

from __future__ import annotations

import contextlib
import math
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from swarmtrain.cli.output import EXIT_SCRIPT, EXIT_SIGINT, EXIT_SIGTERM, Output
from swarmtrain.trackers import Follower, Tracker
from swarmtrain_peer import host
from swarmtrain_peer.control import ControlClient, ControlClosed
from swarmtrain_peer.shifts import rest_of
from swarmtrain_peer.site import Site
from swarmtrain_peer.spawn import (
    Supervisor,
    error_for_exit,
    output_tail,
    spawn_peer,
    start_process,
    stop_process,
)
from swarmtrain_protocols.errors import SwarmError

POLL_S = 0.1
INBOX_MAX = 4096
STEP_LINES_S = 2.0
"""Steps of a pipeline are told at most so often."""
TRAINER_END_S = 15.0
"""How long a trainer may take to end after its peer process has."""
GOODBYE_S = 10.0
"""How long leaving *now* may take before the processes are killed."""


@dataclass(frozen=True, slots=True)
class TrainerCommand:
    """How to start the trainer of a site. ``script``: the user's own command, output untouched."""

    arguments: Sequence[str]
    script: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self, site: Site) -> subprocess.Popen[bytes]:
        extra = {"SWARMTRAIN_SITE": str(site.folder), **self.environment}
        if self.script:
            return start_process(self.arguments, None, environment=extra)
        return start_process(self.arguments, site.folder / "trainer.log", environment=extra)


def preset_trainer(site: Site, device: str, wait_s: float = 0.0) -> TrainerCommand:
    """The trainer of the manifest's preset model and data; it waits for its peer process."""
    arguments = [
        sys.executable,
        "-m",
        "swarmtrain.training.trainer",
        str(site.folder),
        "--device",
        device,
        *(["--wait-s", f"{wait_s:g}"] if wait_s else []),
    ]
    return TrainerCommand(arguments)


def trainer_error(site: Site, exit_code: int) -> SwarmError:
    """Why the preset trainer ended, in its own words: what it printed is in a file."""
    path = site.folder / "trainer.log"
    lines = output_tail(path).splitlines()
    said: dict[str, str] = {}
    for line in lines[-8:]:
        head, colon, rest = line.partition(":")
        if colon and head in ("error", "why", "do"):
            said[head] = rest.strip()
    if "error" in said:
        return error_for_exit(said["error"], exit_code, said.get("why", ""), said.get("do", ""))
    return error_for_exit("the trainer ended", exit_code, " | ".join(lines[-3:]), f"see {path}")


class MemberSession:
    """Runs one member until the run ends, its trainer is done, or somebody says leave."""

    def __init__(
        self,
        site: Site,
        output: Output,
        trainer: TrainerCommand | None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.site = site
        self._follower = Follower(site.connect, trackers, output.note)
        self._output = output
        self._trainer = trainer
        self._inbox: queue.Queue[tuple[str, Any]] = queue.Queue(INBOX_MAX)
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._supervisor = Supervisor(self._report)
        self._client: ControlClient | None = None
        self._last_seq = 0
        self._interrupts = 0
        self._terminated = False
        self._kill_at_s: float | None = None
        self._now_at_s: float | None = None
        self._exit_code = 0
        self._commit: dict[str, Any] | None = None
        self._next_step_s = -math.inf
        self._checkpoint: int | None = None
        self._resting = ""

    @property
    def client(self) -> ControlClient:
        """The control connection; ``start`` opens it.

        Raises:
            ControlClosed: the peer process is gone.
        """
        if self._client is None or self._client.closed:
            self._connect()
        assert self._client is not None
        return self._client

    def start(self) -> None:
        """Start the peer process, as soon as its site may work, and follow its events.

        Raises:
            SwarmError: it did not start.
        """
        while True:
            while self._rests():
                host.doze(POLL_S)
            try:
                self._supervisor.add("peer", lambda: spawn_peer(self.site))
            except SwarmError:
                if not self._rests():  # its hours may have ended at this very moment
                    raise
                continue
            self._connect()
            return

    def run(self) -> int:
        """Start the trainer, wait for the end, clean up. Returns the exit code.

        A site that rests is not at its end: it is started again when it may work.
        """
        with self._signal_handlers():
            try:
                self._follower.start()
                self._work()
                while self._rested():
                    self._work()
            finally:
                self._follower.close()
                self.close()
        return self._exit_code

    def _work(self) -> None:
        if self._trainer is not None:
            trainer = self._trainer
            self._supervisor.add("trainer", lambda: trainer.start(self.site))
        while not self._step():
            pass

    def _rested(self) -> bool:
        """Whether the site left for a rest, which is over now, and works again."""
        if self._exit_code or not self._rests():
            return False
        self.close()
        while self._rests():
            if self._interrupts or self._terminated or not self._signals.empty():
                return False
            host.doze(POLL_S)
        self._supervisor = Supervisor(self._report)
        self.start()
        return not (self._interrupts or self._terminated)

    def _rests(self) -> bool:
        """Whether the site may not work now; says so when that begins."""
        rest = rest_of(self.site, host.local_now())
        sentence = "" if rest is None else rest.sentence
        if sentence and sentence != self._resting:
            self._output.note(sentence)
        self._resting = sentence
        return bool(sentence)

    def close(self) -> None:
        """End whatever still runs."""
        if self._client is not None:
            self._client.close()
        self._supervisor.stop()

    def _step(self) -> bool:
        """One turn of the loop; true at the end."""
        with contextlib.suppress(queue.Empty):
            self._tell(self._inbox.get(timeout=POLL_S)[1])
        while not self._signals.empty():
            self._on_signal(self._signals.get())
        self._supervisor.poll()
        now = host.mono_s()
        if self._now_at_s is not None and now >= self._now_at_s:
            self._now_at_s = None
            self._exit_code = EXIT_SIGTERM
            self._leave(now=True)
        if self._kill_at_s is not None and now >= self._kill_at_s:
            return True
        return self._ended()

    def _tell(self, record: dict[str, Any]) -> None:
        """Show an event; of many commits that wait, as after joining an old run, only the last."""
        self._last_seq = max(self._last_seq, int(record.get("seq", 0)))
        name = record.get("name")
        if name == "run_ended" and self._commit is not None:
            self._output.event(self._commit)
            self._commit = None
        if not self._output.as_json and name in ("round_committed", "step_committed"):
            self._commit = record
        elif self._output.as_json or name != "checkpoint_saved" or self._is_first(record):
            self._output.event(record)
        if self._commit is not None and self._inbox.empty():
            if self._commit["name"] == "step_committed" and host.mono_s() < self._next_step_s:
                return  # steps may take less time than reading a line
            self._next_step_s = host.mono_s() + STEP_LINES_S
            self._output.event(self._commit)
            self._commit = None

    def _is_first(self, record: dict[str, Any]) -> bool:
        """Every stage has a checkpoint of its own; one line tells of all of a round."""
        before, self._checkpoint = self._checkpoint, record.get("round")
        return before != self._checkpoint

    def _ended(self) -> bool:
        peer = self._supervisor.processes["peer"]
        trainer = self._supervisor.processes.get("trainer")
        if peer.exit_code is not None:
            if self._exit_code == 0 and peer.exit_code > 0:
                self._exit_code = peer.exit_code
            if trainer is not None and trainer.exit_code is None:
                self._supervisor.expect_end("trainer")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    trainer.process.wait(timeout=TRAINER_END_S)
                trainer.exit_code = stop_process(trainer.process)
            while not self._inbox.empty():
                self._tell(self._inbox.get()[1])
            return True
        if self._client is not None and self._client.closed and peer.restart_at_s is None:
            with contextlib.suppress(ControlClosed):
                self._connect()
        if trainer is not None and trainer.exit_code is not None and not peer.stopping:
            if trainer.exit_code != 0:
                script = self._trainer is not None and self._trainer.script
                self._exit_code = EXIT_SCRIPT if script else max(1, trainer.exit_code)
                if not script:  # a script says itself what is wrong
                    self._output.error(trainer_error(self.site, self._exit_code))
            self._leave(now=False)
        return False

    def _connect(self) -> None:
        client = self.site.connect()
        client.subscribe(self._on_push)
        answer = client.call("events", {"since_seq": self._last_seq, "last": 100, "follow": True})
        for record in answer.get("events", []):
            self._inbox.put(("event", record))
        self._client = client

    def _on_push(self, document: dict[str, Any]) -> None:
        if document.get("event") == "event":
            self._inbox.put(("event", document["record"]))

    def _report(self, name: str, fields: dict[str, object]) -> None:
        self._output.event({"name": name, "severity": "warning", **fields})

    def _leave(self, *, now: bool) -> None:
        """Ask the peer process to leave, without waiting for it."""
        self._supervisor.expect_end()
        if now:
            self._kill_at_s = host.mono_s() + GOODBYE_S

        def ask() -> None:
            try:
                self.client.call("leave", {"now": now}, timeout_s=GOODBYE_S)
            except SwarmError as error:
                if not isinstance(error, ControlClosed):  # closed: it has left already
                    self._output.note(f"leave: {error}")

        threading.Thread(target=ask, name="leave", daemon=True).start()

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGTERM:
            if not self._terminated:
                self._terminated = True
                grace_s = self.site.config().leave_grace_s
                self._now_at_s = host.mono_s() + grace_s
                self._output.note(f"leaving after this round, at the latest in {grace_s:g} s")
                self._leave(now=False)
            return
        self._interrupts += 1
        if self._interrupts == 1:
            self._output.note("leaving after this round; Ctrl-C again to leave now")
            self._leave(now=False)
        elif self._interrupts == 2:
            self._output.note("leaving now; Ctrl-C again to kill")
            self._exit_code = EXIT_SIGINT
            self._leave(now=True)
        else:
            self._exit_code = EXIT_SIGINT
            for one in self._supervisor.processes.values():
                one.process.kill()
            self._kill_at_s = host.mono_s()

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        def handler(number: int, frame: FrameType | None) -> None:
            self._signals.put(number)  # SimpleQueue.put may run inside a signal handler

        before = {one: signal.signal(one, handler) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, old in before.items():
                signal.signal(one, old)
