"""Real sites for tests: peer processes on loopback that are started, watched, killed and restarted.

Every wait has a deadline and waits for something that the site itself says: its event log, which
arrives by subscription, or an answer on its control socket.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.control import ControlClient
from swarmtrain_peer.events import Record
from swarmtrain_peer.site import Site, enter_site, found_site
from swarmtrain_peer.spawn import output_tail, spawn_peer, stop_process
from swarmtrain_protocols.errors import SwarmError
from swarmtrain_protocols.manifest import RunKeys, Ticket

F32 = NDArray[np.float32]
Document = dict[str, Any]

WAIT_S = 30.0
"""Far more than anything here takes on a busy machine; a test that needs it all has failed."""
CHANNEL = "train/0/0"


def poll_until(done: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """Ask ``done`` until it gives something true; for facts that no event announces."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = done()
        if found:
            return found
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:g} s"
        threading.Event().wait(0.02)


class Seat:
    """One site, the process that serves it now, and all that it has logged."""

    def __init__(self, site: Site, name: str) -> None:
        self.site = site
        self.name = name
        self.process: subprocess.Popen[bytes] | None = None
        self._records: dict[int, Record] = {}
        self._news = threading.Condition()
        self._client: ControlClient | None = None

    # Life

    def start(self, timeout_s: float = WAIT_S) -> Seat:
        self.process = spawn_peer(self.site, timeout_s=timeout_s)
        self.follow()
        return self

    def follow(self) -> None:
        """Subscribe to the event log of the process that serves the site now."""
        client = self.site.connect()
        client.subscribe(self._pushed)
        for record in client.call("events", {"follow": True}, WAIT_S)["events"]:
            self._take(record)
        self._client = client

    def kill(self) -> None:
        """SIGKILL: nothing is written, nothing is said."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)
        self._forget_client()

    def stop(self) -> int:
        code = 0
        if self.process is not None:
            code = stop_process(self.process)
            self.process = None
        self._forget_client()
        return code

    def _forget_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    # What it says

    def _pushed(self, push: Document) -> None:
        if push.get("event") == "event":
            self._take(push["record"])

    def _take(self, record: Record) -> None:
        with self._news:
            self._records[record["seq"]] = record
            self._news.notify_all()

    @property
    def last_seq(self) -> int:
        with self._news:
            return max(self._records, default=0)

    def events(self, name: str | None = None, since_seq: int = 0) -> list[Record]:
        """Records in order, also those of earlier processes of this site."""
        with self._news:
            return [
                self._records[seq]
                for seq in sorted(self._records)
                if seq > since_seq and name in (None, self._records[seq]["name"])
            ]

    def wait_event(
        self,
        name: str,
        wanted: Callable[[Record], bool] = lambda record: True,
        since_seq: int = 0,
        timeout_s: float = WAIT_S,
    ) -> Record:
        """The first record of that name that is wanted, past or future."""
        deadline_s = time.monotonic() + timeout_s
        with self._news:
            while True:
                for record in self.events(name, since_seq):
                    if wanted(record):
                        return record
                left_s = deadline_s - time.monotonic()
                assert left_s > 0, f"{self.name}: no {name} within {timeout_s:g} s\n{self.tail()}"
                self._news.wait(left_s)

    def call(self, name: str, args: Document | None = None) -> Document:
        assert self._client is not None, f"{self.name} is not running"
        return self._client.call(name, args, WAIT_S)

    def status(self) -> Document:
        return self.call("status")

    @property
    def id(self) -> str:
        return self.site.identity().peer_id.hex()

    @property
    def address(self) -> str:
        return str(self.status()["listen"][0])

    def ticket(self, vote: bool = True) -> Ticket:
        """A ticket that holds this member's address and no other."""
        args = {"vote": True} if vote and self.site.is_founder else {}
        return Ticket.parse(self.call("ticket", args)["ticket"])

    def stand(self, channel: str = CHANNEL) -> tuple[int, str]:
        """(round, state hash) of the state that this site holds; (-1, "") before it knows any."""
        found = self.status()["channels"].get(channel)
        if found is None or found["state_hash"] is None:
            return -1, ""
        return found["state_round"], found["state_hash"]

    def hashes(self, channel: str = CHANNEL) -> dict[int, set[str]]:
        """Every state hash that this site has ever reported, by round."""
        found: dict[int, set[str]] = {}
        for record in self.events("state_applied"):
            if record["channel"] == channel:
                found.setdefault(record["round"], set()).add(record["state_hash"])
        return found

    def wait_applied(self, round_: int, since_seq: int = 0, timeout_s: float = WAIT_S) -> str:
        """The state hash once the state is the one before ``round_`` or a later one."""
        found = self.wait_event(
            "state_applied", lambda r: r["round"] >= round_, since_seq, timeout_s
        )
        return str(found["state_hash"])

    def tail(self) -> str:
        """The end of the log, for the message of a failed assertion."""
        lines = [
            " ".join(
                str(value)[:60]
                for key, value in record.items()
                if key not in ("v", "site", "code", "severity", "wall_s") and value is not None
            )
            for record in self.events()[-40:]
        ]
        return "\n".join([f"--- {self.name}", *lines, output_tail(self.site.output_path)])


class Swarm:
    """A run on loopback: seats in the order of their coming. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seats: list[Seat] = []

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for seat in self.seats:
            if seat.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(seat.process.pid, signal.SIGKILL)
        for seat in self.seats:
            seat.stop()

    def found(self, *, start: bool = True, config: Document | None = None, **keys: Any) -> Seat:
        """The first site. Rounds are fp32 and without overlap unless ``keys`` say otherwise."""
        run = RunKeys(
            **{
                "codec_scatter": "fp32",
                "codec_gather": "fp32",
                "overlap": "off",
                "outer_lr": 0.5,
                "outer_momentum": 0.75,
                "grace_s": 1.0,
                **keys,
            }
        )
        site = found_site(self.folder / "seed", run, _config("seed", config))
        return self._add(site, "seed", start)

    def enter(
        self,
        name: str,
        ticket: Ticket,
        *,
        start: bool = True,
        config: Document | None = None,
    ) -> Seat:
        site = enter_site(self.folder / name, ticket, _config(name, config))
        return self._add(site, name, start)

    def _add(self, site: Site, name: str, start: bool) -> Seat:
        seat = Seat(site, name)
        self.seats.append(seat)
        return seat.start() if start else seat

    def leader(self) -> Seat:
        """Whoever leads, by its own word."""

        def look() -> Seat | None:
            for seat in self.alive():
                with contextlib.suppress(SwarmError):
                    if seat.status()["is_leader"]:
                        return seat
            return None

        found: Seat = poll_until(look, "no leader")
        return found

    def alive(self) -> list[Seat]:
        return [s for s in self.seats if s.process is not None and s.process.poll() is None]

    def check_hashes(self) -> dict[int, str]:
        """No two sites, and no two lives of one site, ever had different states of one round."""
        found: dict[int, set[str]] = {}
        for seat in self.seats:
            for round_, hashes in seat.hashes().items():
                found.setdefault(round_, set()).update(hashes)
        torn = {round_: hashes for round_, hashes in found.items() if len(hashes) > 1}
        assert not torn, f"different states of one round: {torn}"
        return {round_: next(iter(hashes)) for round_, hashes in found.items()}


def wait_same_stand(seats: list[Seat], least: int = 0) -> tuple[int, str]:
    """(round, state hash) once all have the same, at round ``least`` or later."""

    def look() -> tuple[int, str] | None:
        stands = {seat.stand() for seat in seats}
        found = stands.pop()
        return found if not stands and found[0] >= least else None

    found: tuple[int, str] = poll_until(look, f"one state everywhere, at {least} or later")
    return found


def _config(name: str, more: Document | None) -> PeerConfig:
    base: Document = {"name": name, "listen": "127.0.0.1:0", "votes": True, "leave_grace_s": 5.0}
    return PeerConfig(**{**base, **(more or {})})


@contextlib.contextmanager
def closing_all(*things: Any) -> Iterator[None]:
    """Close trainers and the like, the newest first, whatever happens."""
    try:
        yield
    finally:
        for thing in reversed(things):
            thing.close()
