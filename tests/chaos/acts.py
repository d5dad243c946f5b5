"""What each fault of a schedule does to the processes, and how it ends."""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swarmtrain_protocols.errors import SwarmError
from tests.chaos import machine
from tests.chaos.crew import Crew, Home
from tests.chaos.ground import Proxied
from tests.chaos.schedule import Fault

Act = Callable[[Fault], dict[str, Any]]
"""Does it; what to write down."""
COPY_EVERY_S = 20.0
FEWEST = 3
MOST = 10
SAVING_S = 5.0
LEAVES_S = 60.0


class NotNow(Exception):
    """A fault that cannot be done at this moment."""


class Acts:
    """The hands of the conductor."""

    def __init__(self, crew: Crew, seed: int) -> None:
        self._crew = crew
        self._luck = random.Random(f"acts {seed}")
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._copied_s = 0.0
        self._flood: subprocess.Popen[bytes] | None = None
        self._struck = 0
        self._acts: dict[str, Act] = {
            "kill": self._kill,
            "freeze": self._freeze,
            "leave": self._leave,
            "join": self._join,
            "rate": self._rate,
            "cut": self._cut,
            "link": self._link,
            "disk": self._disk,
            "corrupt": self._corrupt,
            "clock": self._clock,
            "old copy": self._old_copy,
            "flood": self._flooded,
            "kill stage": self._kill_stage,
        }

    def do(self, fault: Fault) -> None:
        """Do a fault and write it down; what cannot be done now is written down as that."""
        at_s = time.monotonic()
        try:
            seen = self._acts[fault["kind"]](fault)
        except NotNow as reason:
            self._crew.book.write("skipped", kind=fault["kind"], why=str(reason))
            return
        until_s = time.monotonic() + float(fault.get("for_s", 0.0))
        record = {**fault, "until_s": until_s, **seen}
        record.pop("at_s", None)
        self._crew.book.write("fault", at_s, **record)

    def turn(self) -> None:
        """Whatever is over by now, and copies of logs for later."""
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()
        if now > self._copied_s + COPY_EVERY_S:
            self._copied_s = now
            for home in self._crew.alive():
                with contextlib.suppress(OSError):
                    shutil.copy(home.seat.site.log_path, home.seat.site.folder / "log.copy")

    def heal(self) -> None:
        """End everything at once."""
        while self._later:
            heapq.heappop(self._later)[2]()

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._later, (time.monotonic() + seconds, self._count, call))

    # Whom

    def _whom(self, fault: Fault) -> Home:
        """The site that a fault means; one that is down already is replaced by another."""
        crew = self._crew
        alive, there = crew.alive(), crew.there()
        if 2 * (len(alive) - 1) <= len(there):
            raise NotNow("no majority would be left")
        wanted = fault["site"]
        if wanted == "leader":
            leader = crew.leader()
            if leader is None:
                raise NotNow("nobody leads")
            return leader
        if wanted == "newest":
            return max(alive, key=lambda home: home.started_s)
        if wanted == "any":
            return self._luck.choice(alive[1:] if alive[0].number == 0 else alive)
        found = crew.homes[wanted % len(crew.homes)]
        others = [home for home in alive if not self._founder_idle(home)]
        return found if found in alive else self._luck.choice(others)

    def _again(self, home: Home, what: str, after_s: float) -> None:
        due_s = time.monotonic() + after_s
        if what in ("peer", "both"):
            home.due_s["peer"] = due_s
        if what in ("trainer", "both") and not (home.number == 0 and self._founder_idle(home)):
            home.due_s["trainer"] = due_s

    @staticmethod
    def _founder_idle(home: Home) -> bool:
        return not home.seat.site.config().trains

    # Processes

    def _kill(self, fault: Fault) -> dict[str, Any]:
        home = self._whom(fault)
        if "saving" in fault:
            self._wait_saving(home, fault["saving"])
        self._crew.kill(home, fault["process"])
        seen: dict[str, Any] = {"site": home.name, "leader": fault["site"] == "leader"}
        if fault.get("wipe"):
            shutil.rmtree(home.seat.site.state_path)
            home.seat.site.state_path.mkdir(mode=0o700)
        if "truncate" in fault:
            seen["truncated"] = _truncate_newest(home.seat.site.state_path, fault["truncate"])
        self._again(home, fault["process"], fault["for_s"])
        return seen

    def _wait_saving(self, home: Home, more_s: float) -> None:
        """Until it has applied a state, which it saves next, and a moment longer."""
        before, deadline_s = dict(home.applied), time.monotonic() + SAVING_S
        while home.applied == before and time.monotonic() < deadline_s:
            self._crew.turn()
            time.sleep(0.005)  # tidy: allowed because a log file does not call back
        time.sleep(more_s)  # tidy: allowed because the moment is part of the schedule

    def _freeze(self, fault: Fault) -> dict[str, Any]:
        home = self._whom(fault)
        self._crew.freeze(home, True)
        process = home.peer

        def thaw() -> None:
            if home.peer is process:
                self._crew.freeze(home, False)

        self._after(fault["for_s"], thaw)
        return {"site": home.name, "leader": fault["site"] == "leader"}

    def _leave(self, fault: Fault) -> dict[str, Any]:
        if len(self._crew.there()) <= FEWEST:
            return {**self._join(fault), "did": "join"}
        home = self._whom(fault)
        with contextlib.suppress(SwarmError):
            home.ask("leave", {"now": False})
        home.gone = True
        home.ended_by["peer"] = home.ended_by["trainer"] = "leave"
        self._crew.book.write("left", site=home.name)
        self._after(LEAVES_S, lambda: self._crew.kill(home, "both", by="leave"))
        return {"site": home.name}

    def _join(self, fault: Fault) -> dict[str, Any]:
        if len(self._crew.there()) >= MOST:
            home = self._whom({"site": "any"})
            self._crew.kill(home, "both")
            self._again(home, "both", 3.0)
            return {"site": home.name, "did": "kill"}
        for host in self._luck.sample(self._crew.alive(), len(self._crew.alive())):
            with contextlib.suppress(SwarmError):
                ticket = self._crew.ticket(host, vote=False)
                return {"site": self._crew.join(ticket, votes=False).name, "by": host.name}
        raise NotNow("nobody gives a ticket")

    def _kill_stage(self, fault: Fault) -> dict[str, Any]:
        crew, stage = self._crew, fault["stage"]
        for home in crew.alive():
            with contextlib.suppress(SwarmError):
                coverage = home.ask("status")["pipeline"]["coverage"]
                break
        else:
            raise NotNow("nobody knows the stages")
        serving = {one["stage"]: {m["id"] for m in one["members"]} for one in coverage}
        victims = serving.get(stage, set())
        if not victims or any(ids <= victims for s, ids in serving.items() if s != stage):
            raise NotNow(f"stage {stage} cannot be lost alone")
        homes = [home for home in crew.alive() if home.seat.id in victims]
        for home in homes:
            crew.kill(home, "both")
            self._again(home, "both", fault["for_s"])
        return {"sites": [home.name for home in homes]}

    # Paths

    def _rate(self, fault: Fault) -> dict[str, Any]:
        home = self._crew.homes[fault["site"]]
        self._crew.ground.rate(home.name, fault["bits"])
        self._after(fault["for_s"], lambda: self._crew.ground.rate(home.name, 0))
        return {"site": home.name}

    def _cut(self, fault: Fault) -> dict[str, Any]:
        names = [home.name for home in self._crew.homes]
        one, other = ([names[n] for n in side] for side in fault["sides"])
        pairs = {(a, b) for a in one for b in other}
        if not fault.get("one_way"):
            pairs |= {(b, a) for a, b in pairs}
        ground, flap_s = self._crew.ground, fault.get("flap_s")
        ground.cut(frozenset(pairs))
        if flap_s:
            for turn in range(1, int(fault["for_s"] / flap_s)):
                now = frozenset() if turn % 2 else frozenset(pairs)
                self._after(turn * flap_s, lambda now=now: ground.cut(now))
        self._after(fault["for_s"], lambda: ground.cut(frozenset()))
        whole = not fault.get("one_way") and not flap_s
        return {"sides": [one, other], "whole": whole}

    def _link(self, fault: Fault) -> dict[str, Any]:
        ground = self._crew.ground
        assert isinstance(ground, Proxied), "the scenario needs proxies"
        home = self._crew.homes[fault["site"]]
        proxy, how = ground.proxies[home.name], fault["how"]
        if how == "reset all":
            proxy.reset_all()
        elif how == "silent":
            proxy.silent = True
            self._after(fault["for_s"], lambda: setattr(proxy, "silent", False))
        elif how == "dribble":
            before, proxy.piece_bytes = proxy.piece_bytes, 1
            self._after(fault["for_s"], lambda: setattr(proxy, "piece_bytes", before))
        else:
            proxy.strike(how, fault["after_bytes"])
        return {"site": home.name}

    def strikes(self) -> None:
        """At the end: what was struck on the wire, and when the connection ended of it."""
        if isinstance(self._crew.ground, Proxied):
            for site, one in self._crew.ground.struck():
                after = None if one.ended_s is None else round(one.ended_s - one.at_s, 3)
                what = "flip" if one.kind == "flip" else "struck"
                fields = {"site": site, "how": one.kind, "closed_after_s": after}
                self._crew.book.write(what, one.at_s, **fields)

    def _flooded(self, fault: Fault) -> dict[str, Any]:
        addresses: list[str] = []
        for home in self._crew.alive():
            with contextlib.suppress(SwarmError):
                addresses += home.ask("status")["listen"][:1]
        command = [sys.executable, "-m", "tests.chaos.attacker"]
        command += [str(fault["per_s"]), str(fault["for_s"]), *addresses]
        self._flood = subprocess.Popen(command, stdout=subprocess.PIPE)
        self._after(fault["for_s"], self._flood_over)
        return {"addresses": len(addresses)}

    def _flood_over(self) -> None:
        if self._flood is not None:
            done = {"opened": 0}
            with contextlib.suppress(subprocess.TimeoutExpired):
                done |= json.loads(self._flood.communicate(timeout=20.0)[0] or b"{}")
            self._flood.kill()
            self._flood = None
            self._crew.book.write("flooded", **done)

    # Machines

    def _disk(self, fault: Fault) -> dict[str, Any]:
        home, mode = self._whom(fault), fault["mode"]
        folder, process = home.seat.site.folder, home.peer
        assert process is not None
        if mode == "full":
            soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, hard))

            def free() -> None:
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))
        else:
            machine.tell(folder, disk=mode, sync_s=fault["sync_s"])
            if mode == "broken":
                home.broken_until_s = time.monotonic() + fault["for_s"]

            def free() -> None:
                machine.tell(folder, disk="")

        self._after(fault["for_s"], free)
        return {"site": home.name}

    def _clock(self, fault: Fault) -> dict[str, Any]:
        home = self._crew.homes[fault["site"]]
        clock = {"offset_s": fault["offset_s"], "drift": fault["drift"]}
        machine.tell(home.seat.site.folder, **clock, since_mono_s=time.monotonic())
        return {"site": home.name}

    def _corrupt(self, fault: Fault) -> dict[str, Any]:
        home = self._whom(fault)
        site = home.seat.site
        self._crew.kill(home, "peer")
        path = _file_of(site.folder, fault["file"])
        self._again(home, "peer", fault["for_s"])
        if path is None:
            raise NotNow(f"no {fault['file']} on the disk of {home.name}")
        data = path.read_bytes()
        home.damaged = (path, data) if fault["file"] == "log" else None
        at = len(data) // 3
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        return {"site": home.name, "path": path.name}

    def _old_copy(self, fault: Fault) -> dict[str, Any]:
        home = self._whom(fault)
        copy = home.seat.site.folder / "log.copy"
        if not copy.exists():
            raise NotNow("no copy yet")
        age_s = time.time() - copy.stat().st_mtime
        self._crew.kill(home, "peer")
        os.replace(copy, home.seat.site.log_path)
        self._again(home, "peer", fault["for_s"])
        return {"site": home.name, "leader": True, "age_s": round(age_s, 1)}


def _newest_checkpoint(state: Path) -> Path | None:
    found = sorted((state / "checkpoints").glob("checkpoint-????????"))
    return found[-1] if found else None


def _truncate_newest(state: Path, share: float) -> str:
    """Cut the largest file of the newest checkpoint off at a share of its bytes."""
    newest = _newest_checkpoint(state)
    files = sorted(newest.iterdir(), key=lambda path: path.stat().st_size) if newest else []
    if not files:
        return ""
    os.truncate(files[-1], int(share * files[-1].stat().st_size))
    return files[-1].name


def _file_of(folder: Path, what: str) -> Path | None:
    if what == "log":
        return folder / "log"
    newest = _newest_checkpoint(folder / "state")
    if what == "result":
        found = sorted((folder / "state" / "results").rglob("*.result"))
    elif newest is None:
        return None
    else:
        found = sorted(newest.glob("manifest.json" if what == "manifest" else "*.safetensors"))
    return found[-1] if found else None
