"""The leader of rounds on its own: links, proposals and the log are in the hands of the test."""

from __future__ import annotations

import random
from typing import Any

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.messages.member import StateReport
from swarmtrain_protocols.rounds.leader import RoundLeader
from swarmtrain_protocols.rounds.policy import RoundPolicy
from tests.protocols.rounds_kit import (
    CHUNK,
    TRAIN,
    VALUES,
    A,
    Log,
    hash_of,
    take,
)

TIMEOUT_S = 8.0
POLICY = RoundPolicy("fp32", "fp32", grace_s=1.0, round_timeout_s=TIMEOUT_S, chunk_values=CHUNK)


def held(
    key: RoundKey, part: int, contributors: tuple[int, ...], refused: tuple[int, ...] = ()
) -> m.PartsHeld:
    """What an owner reports where all contributions are of one length."""
    return m.PartsHeld(key, part, contributors, refused, (1.0,) * len(contributors))


class Chair:
    """A leader (peer A) whose proposals are logged when the test says so."""

    def __init__(self, *members: bytes, policy: RoundPolicy = POLICY, model: bool = True) -> None:
        self.log = Log(*members, model=model)
        self.out: list[Effect] = []
        self.links: list[PeerId] = [PeerId(x) for x in members if x != A]
        self.proposed: list[e.EntryBody] = []
        self.refusing = False
        self.leader = RoundLeader(
            me=PeerId(A),
            rng=random.Random(1),
            ledger=self.log.ledger,
            out=self.out,
            policy=policy,
            propose=self.propose,
            connected=lambda: self.links,
        )
        self.leader.activate(0.0, True)

    def propose(self, now: float, body: e.EntryBody) -> bool:
        if not self.refusing:
            self.proposed.append(body)
        return not self.refusing

    def commit(self, now: float) -> list[e.EntryBody]:
        """Everything that was proposed reaches the ledger."""
        bodies, self.proposed = self.proposed, []
        for body in bodies:
            assert self.log.add(body), body
        self.leader.reconcile(now)
        return bodies

    def say(self, now: float, peer: bytes, message: object) -> None:
        self.leader.receive(now, PeerId(peer), message)

    def ready(self, now: float, peer: bytes, channel: str = TRAIN, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "root": hash_of(f"given {peer.hex()[:8]}"),
            "values": VALUES,
            "codec": "fp32",
            "samples": 4.0,
            "base_round": 0,
            "seen": max(0, self.log.ledger.index),
        }
        self.say(now, peer, m.Ready(self.log.ledger.generation, channel, **{**fields, **changes}))

    def report(self, now: float, *peers: bytes, round: int = 0, **changes: Any) -> None:
        fields = {"state_hash": hash_of(f"state {round}"), "ready": True, "trains": True, **changes}
        for peer in peers:
            generation = self.log.ledger.generation
            self.say(now, peer, StateReport(generation, TRAIN, round, **fields))

    def open(self, *peers: bytes) -> e.RoundOpened:
        """All present are in step and ready; the opening is logged at t = 1."""
        self.report(1.0, *peers)
        for peer in peers:
            self.ready(1.0, peer)
        (opened,) = self.commit(1.0)
        assert isinstance(opened, e.RoundOpened)
        return opened

    def deliver_all(self, now: float, opened: e.RoundOpened) -> None:
        everybody = tuple(range(len(opened.contributors)))
        for index, part in enumerate(opened.parts):
            self.say(now, part.owner, held(opened.key, index, everybody))

    def choose(self, opened: e.RoundOpened) -> None:
        self.deliver_all(1.1, opened)
        (chosen,) = self.commit(1.1)
        assert isinstance(chosen, e.RoundSet)

    def hold(self, now: float, peer: bytes, opened: e.RoundOpened, root: str = "result") -> None:
        self.say(now, peer, m.Holding(opened.key, hash_of(root), True))

    def take(self) -> list[Effect]:
        return take(self.out)

    def gone(self, now: float, peer: bytes) -> None:
        self.links.remove(PeerId(peer))
        self.leader.disconnected(now, PeerId(peer))
