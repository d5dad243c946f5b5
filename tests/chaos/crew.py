"""The processes of a chaos run: started without waiting, watched, killed, started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import psutil

from swarmtrain_peer.spawn import RESTART_CODES, output_tail, start_process
from swarmtrain_protocols.errors import CheckpointError, SwarmError
from swarmtrain_protocols.tickets import Ticket
from tests.chaos.book import Book, Tail
from tests.chaos.ground import Plain
from tests.swarm.harness import Seat, Swarm
from tests.swarm.synthetic import Plan
from tests.swarm.synthetic import Trainer as Synthetic

Document = dict[str, Any]
Kind = Literal["peer", "trainer"]
CALL_S = 5.0
AGAIN_S = 1.0
"""After a process that ended by itself, as whoever supervises it would wait."""
DECISION_S = 3600.0
"""Synthetic trainers wait for ever: how long they do is for the checker to judge."""
NICE = 5


@dataclass
class Home:
    """One site and its two processes. ``due_s``: when a process is to be started (again)."""

    number: int
    seat: Seat
    tail: Tail
    peer: subprocess.Popen[bytes] | None = None
    trainer: subprocess.Popen[bytes] | Synthetic | None = None
    due_s: dict[Kind, float] = field(default_factory=dict)
    ended_by: dict[Kind, str] = field(default_factory=dict)
    frozen: bool = False
    gone: bool = False
    started_s: float = 0.0
    handed: int = 0
    """Hand-overs of synthetic trainers that are gone."""
    applied: dict[str, int] = field(default_factory=dict)
    """By channel the newest state that it has logged."""
    damaged: tuple[Path, bytes] | None = None
    """A file that was changed, and what it was."""
    broken_until_s: float = 0.0
    """Its disk fails until then; whoever operates it starts it again afterwards."""

    @property
    def name(self) -> str:
        return self.seat.name

    @property
    def lives(self) -> bool:
        """Its peer process runs and can answer."""
        return self.peer is not None and not self.frozen

    def ask(self, call: str, args: Document | None = None, timeout_s: float = CALL_S) -> Document:
        """A call on the control socket.

        Raises:
            SwarmError: no answer, or an error.
        """
        with self.seat.site.connect() as client:
            found: Document = client.call(call, args or {}, timeout_s)
            return found


@dataclass(frozen=True)
class Ways:
    """How processes are started. ``trainers``: synthetic, real or stages."""

    trainers: str
    phase_s: float = 0.5
    """What a synthetic trainer's inner steps take."""
    pause_s: float = 0.0
    """What each inner step of a real one takes beyond itself."""
    machine: bool = False
    """Peer processes on machines whose clock and disk can be bad."""


class Crew:
    """All homes of a run."""

    def __init__(self, folder: Path, ground: Plain, book: Book, ways: Ways) -> None:
        self.swarm = Swarm(folder)
        self.ground = ground
        self.book = book
        self.ways = ways
        self.homes: list[Home] = []
        self._retired: list[Synthetic] = []
        self.training = True
        self.own_bytes_max = 0
        """Of the largest peer process when they were last looked at."""

    # Members

    def found(self, trains: bool, **keys: Any) -> Home:
        config = self.ground.config("site-0")
        if not trains:
            config |= {"trains": False, "holds_state": False}
        seat = self.swarm.found(start=False, config=config, **keys)
        seat.name = "site-0"
        return self._add(seat, trains)

    def ticket(self, home: Home, vote: bool) -> Ticket:
        args = {"vote": True} if vote and home.seat.site.is_founder else {}
        return Ticket.parse(home.ask("ticket", args, 30.0)["ticket"])

    def join(self, ticket: Ticket, votes: bool) -> Home:
        name = f"site-{len(self.homes)}"
        config = self.ground.config(name) | {"votes": votes}
        return self._add(self.swarm.enter(name, ticket, start=False, config=config), True)

    def _add(self, seat: Seat, trains: bool) -> Home:
        home = Home(len(self.homes), seat, self.book.tail(seat.name, seat.site))
        self.homes.append(home)
        home.due_s = {"peer": 0.0, "trainer": 0.0} if trains else {"peer": 0.0}
        self.book.write("site", site=seat.name, id=seat.id)
        return home

    def there(self) -> list[Home]:
        """Homes that are members, whether they run or not."""
        return [home for home in self.homes if not home.gone]

    def alive(self) -> list[Home]:
        return [home for home in self.there() if home.lives]

    def pids(self) -> dict[str, int]:
        return {home.name: home.peer.pid for home in self.homes if home.peer is not None}

    def leader(self) -> Home | None:
        """Whoever leads, by its own word."""
        for home in self.alive():
            with contextlib.suppress(SwarmError):
                if home.ask("status", timeout_s=2.0)["is_leader"]:
                    return home
        return None

    # Processes

    def turn(self) -> None:
        """See who has ended, start who is due, read what was logged."""
        now = time.monotonic()
        for home in self.homes:
            self._reap(home, "peer")
            self._reap(home, "trainer")
            for kind in ("peer", "trainer"):
                due = home.due_s.get(kind)
                if due is not None and due <= now and (kind == "peer" or self.training):
                    del home.due_s[kind]
                    self._start(home, kind)
            self._listens(home)
            home.tail.read()
            for record in home.tail.take():
                if record["name"] == "state_applied":
                    home.applied[record["channel"]] = record["round"]

    def _start(self, home: Home, kind: Kind) -> None:
        folder = home.seat.site.folder
        home.ended_by.pop(kind, None)
        if kind == "peer":
            module = "tests.chaos.machine" if self.ways.machine else "swarmtrain_peer"
            command = [sys.executable, "-m", module, str(folder)]
            with self.ground.launching(home.name):
                home.peer = start_process(command, home.seat.site.output_path)
            pid = home.peer.pid
            home.started_s = time.monotonic()
        elif self.ways.trainers == "synthetic":
            plan = Plan(
                key=home.number + 1,
                phase_s=self.ways.phase_s,
                decision_s=DECISION_S,
                first=home.handed,
            )
            home.trainer = Synthetic(home.seat.site, plan).start()
            pid = os.getpid()
        else:
            arguments = [str(folder), "--device", "cpu", "--wait-s", "120"]
            if self.ways.trainers == "real":
                arguments = ["tests.chaos.paced", str(self.ways.pause_s), *arguments]
            else:
                arguments = ["swarmtrain.training.trainer", *arguments]
            command = [sys.executable, "-m", *arguments]
            home.trainer = start_process(command, folder / "trainer.log", nice=NICE)
            pid = home.trainer.pid
        self.book.write("start", site=home.name, process=kind, pid=pid)

    def _reap(self, home: Home, kind: Kind) -> None:
        process = home.peer if kind == "peer" else home.trainer
        last = ""
        if isinstance(process, Synthetic):
            failure = process.failure
            if failure is None:
                return
            code = failure.exit_code if isinstance(failure, SwarmError) else 1
            last = repr(failure)
            home.handed += process.handed + 1
        elif process is None or process.poll() is None:
            return
        else:
            code = process.returncode
            path = home.seat.site.folder / f"{kind}.log"
            last = " | ".join(output_tail(path).splitlines()[-3:])
        by = home.ended_by.pop(kind, "itself")
        if home.damaged is not None and kind == "peer" and by == "itself" and "damaged" in last:
            by, (path, data), home.damaged = "damage", home.damaged, None
            path.write_bytes(data)  # restored from a backup, as it says
        elif by == "itself" and code == CheckpointError.exit_code and self._disk_is_broken(home):
            by = "disk"
        elif by == "itself" and code not in RESTART_CODES and code >= 0:
            home.gone |= kind == "peer" and code != 0
        self.book.write("exit", site=home.name, process=kind, code=code, by=by, last=last[-300:])
        if kind == "peer":
            home.peer, home.frozen = None, False
        else:
            home.trainer = None
        if by in ("itself", "damage", "disk") and not home.gone:
            home.due_s[kind] = max(time.monotonic(), home.broken_until_s) + AGAIN_S

    @staticmethod
    def _disk_is_broken(home: Home) -> bool:
        return time.monotonic() < home.broken_until_s + AGAIN_S

    def _listens(self, home: Home) -> None:
        if home.peer is not None:
            with contextlib.suppress(OSError, ValueError):
                self.ground.listens(home.name, int(home.seat.site.port_path.read_text()))

    def kill(self, home: Home, what: str, by: str = "kill") -> None:
        """SIGKILL to the peer process, the trainer, or both. They are not started again."""
        if what in ("trainer", "both"):
            home.due_s.pop("trainer", None)
            trainer, home.trainer = home.trainer, None
            if isinstance(trainer, Synthetic):
                trainer.stopped.set()
                # One more may be under way: numbers may be left out, never used twice.
                home.handed += trainer.handed + 1
                self._retired.append(trainer)
            elif trainer is not None:
                trainer.kill()
                trainer.wait(30.0)
                fields: Document = {"code": trainer.returncode, "by": by, "last": ""}
                self.book.write("exit", site=home.name, process="trainer", **fields)
        if what in ("peer", "both"):
            home.due_s.pop("peer", None)
            if home.peer is not None:
                home.ended_by["peer"] = by
                home.peer.kill()
                home.peer.wait(30.0)
                self._reap(home, "peer")

    def freeze(self, home: Home, frozen: bool) -> None:
        """SIGSTOP or SIGCONT."""
        if home.peer is not None and home.frozen != frozen:
            home.peer.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)
            home.frozen = frozen

    # What is seen

    def sample(self) -> None:
        """Memory and descriptors of every peer process."""
        self.own_bytes_max = 0
        for home in self.homes:
            if home.peer is not None:
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(home.peer.pid)
                    memory = process.memory_info()
                    # Pages of mapped files go when the machine needs them; the rest is its own.
                    own = memory.rss - getattr(memory, "shared", 0)
                    self.own_bytes_max = max(self.own_bytes_max, own)
                    seen = {"rss_bytes": memory.rss, "own_bytes": own, "fds": process.num_fds()}
                    self.book.write("sample", site=home.name, pid=home.peer.pid, **seen)

    def list_rounds(self) -> None:
        """Have somebody who answers list the newest rounds."""
        for home in sorted(self.alive(), key=lambda home: home.started_s):
            with contextlib.suppress(SwarmError):
                self.book.listed(home.ask("rounds", {"last": 64}, 3.0)["rounds"])
                return

    def stands(self) -> dict[str, dict[str, tuple[int, str]]]:
        """By site and channel (round, hash) of the states held now, of all who answer."""
        found: dict[str, dict[str, tuple[int, str]]] = {}
        for home in self.alive():
            with contextlib.suppress(SwarmError):
                channels = home.ask("status")["channels"]
                found[home.name] = {
                    name: (one["state_round"], one["state_hash"])
                    for name, one in channels.items()
                    if one["state_hash"] is not None
                }
        return found

    def left_over(self) -> None:
        """Temporary files and shared mappings of every site that is still a member."""
        now = time.time()
        for home in self.there():
            folder = home.seat.site.folder
            files = [
                {"name": path.name, "age_s": round(now - path.stat().st_mtime, 1)}
                for path in folder.rglob("*")
                if path.name.endswith(".partial") or path.name.startswith(".")
            ]
            fields: Document = {"files": files, "mappings": len(self._mappings(folder))}
            self.book.write("left over", site=home.name, **fields)

    @staticmethod
    def _mappings(folder: Path) -> list[Path]:
        digest = blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
        return list(Path("/dev/shm").glob(f"swarmtrain-{digest}-*"))

    def rest(self) -> None:
        """End all trainers at once, as a kill would."""
        self.training = False
        for home in self.homes:
            self.kill(home, "trainer", by="stop")

    def close(self, timeout_s: float) -> None:
        """Ask all to end, end those who do not, and leave nothing behind."""
        self.rest()
        for home in self.homes:
            self.freeze(home, False)
            home.due_s.clear()
            if home.peer is not None:
                home.ended_by["peer"] = "stop"
                with contextlib.suppress(ProcessLookupError):
                    home.peer.terminate()
        deadline_s = time.monotonic() + timeout_s
        while any(h.peer is not None for h in self.homes) and time.monotonic() < deadline_s:
            for home in self.homes:
                self._reap(home, "peer")
            time.sleep(0.05)  # tidy: allowed because a process that ends is not waited for alone
        for home in self.homes:
            self.kill(home, "both", by="stop")
            home.tail.close()
            self.book.keep_output(home.name, home.seat.site)
            for path in self._mappings(home.seat.site.folder):
                path.unlink(missing_ok=True)
        for trainer in self._retired:
            trainer.close()
        self.ground.close()
