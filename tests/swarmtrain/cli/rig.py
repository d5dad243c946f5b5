"""A site whose control socket answers from a made-up run; and the command line in this process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.controlserver import ControlConnection, ControlServer
from swarmtrain_peer.site import Site, found_site
from swarmtrain_protocols.errors import NotAuthorised
from swarmtrain_protocols.manifest import Capability, RunKeys, Ticket, sign_capability
from tests.loop_thread import LoopThread
from tests.swarmtrain.fake_run import FakeClient, FakeRun

KEY = "ab" * 32
ORDERED: dict[str, dict[str, Any]] = {
    "set": {"key": "inner_lr", "value": "0.001", "at_round": 40},
    "rollback": {"round": 10, "generation": 1},
    "revoke": {"ticket": "12345678" * 2},
    "allow": {"member": KEY},
    "handover": {"founder": KEY},
}
TICKET_ROW: dict[str, Any] = {
    "id": "12345678" * 2,
    "role": "trainer",
    "vote": False,
    "expires_s": 0,
    "uses": 2,
    "made_s": 1_790_000_000,
    "note": "for bob",
    "bearers": [KEY],
    "revoked": None,
}
ANSWERS: dict[str, dict[str, Any]] = {
    "states": {"rounds": [{"round": 10, "states": {"train/0/0": "cd" * 32}}]},
    "tickets": {"tickets": [TICKET_ROW]},
    "access": {
        "founder": KEY,
        "closed": True,
        "allowed": [{"key": KEY, "note": "bob"}],
        "banned": [{"key": KEY, "reason": "noise"}],
    },
}
"""What a peer process says to calls that the made-up run does not know."""


class FakeBackend:
    """Answers like a peer process; remembers what it was asked."""

    def __init__(self, site: Site, run: FakeRun) -> None:
        self.site = site
        self.run = run
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.followers: list[ControlConnection] = []
        self.followed = threading.Event()

    async def call(
        self, name: str, args: dict[str, Any], connection: ControlConnection
    ) -> dict[str, Any]:
        self.asked.append((name, args))
        if name == "leave":
            return {}
        if name == "order":
            return {"index": 7, **ORDERED.get(args["kind"], {})}
        if name in ANSWERS:
            return ANSWERS[name]
        if name == "ticket":
            if args["vote"] and args["uses"] == 99:
                raise NotAuthorised("no vote for you", "the founder said so", "ask nicely")
            founder = self.site.founder()
            assert founder is not None
            capability = Capability(
                id=b"12345678", run=self.site.run_id, role=args["role"], vote=args["vote"]
            )
            secret = sign_capability(founder, capability)
            return {"ticket": str(Ticket(("127.0.0.1:4000",), self.site.run_id, secret))}
        answer = FakeClient(self.run).call(name, args)
        if name == "events":
            found = [r for r in answer["events"] if r["seq"] > args.get("since_seq", 0)]
            last = args.get("last") or len(found)
            if args.get("follow"):
                self.followers.append(connection)
                self.followed.set()
            return {"events": found[-last:]}
        return answer


class Rig:
    """One live site in ``home``."""

    def __init__(self, home: Path, rounds: int = 24) -> None:
        self.home = home
        self.site = found_site(home, RunKeys(name="tiny-lm"), PeerConfig(name="anna-laptop"))
        self.run = FakeRun(rounds)
        self.backend = FakeBackend(self.site, self.run)
        self._thread = LoopThread()
        self.server = ControlServer(self.site.control_path, self.backend)
        self._thread.do(self.server.start())

    def push(self, record: dict[str, Any]) -> None:
        document = {"event": "event", "record": record}
        self._thread.loop.call_soon_threadsafe(self.server.push_all, document)

    def stop_server(self) -> None:
        self._thread.do(self.server.close())

    def close(self) -> None:
        self.stop_server()
        self._thread.close()
