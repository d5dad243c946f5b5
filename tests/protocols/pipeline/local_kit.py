"""A worker whose stages step by themselves, and a device that says what every step was made of."""

from __future__ import annotations

import random
from typing import Any

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.messages import rounds as rm
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.hops import plain_path, stage_of
from swarmtrain_protocols.pipeline.localsteps import LocalPolicy
from swarmtrain_protocols.pipeline.requests import inline_tensor
from swarmtrain_protocols.pipeline.worker import WorkerCore
from swarmtrain_protocols.rounds.fetches import Fetches
from swarmtrain_protocols.rounds.member import RoundMember
from tests.protocols.pipeline.stage_kit import StageLog
from tests.protocols.rounds_kit import RINGS, A, B, C, D, hash_of, opening, sent, take

ME, LEADER, DRIVER, OTHER = A, B, C, D
BLOCKS = 3
HEAD = BLOCKS + 1
TOKENS = b"\x01\x00\x00\x00" * 4
POLICY = LocalPolicy(micro_batches=2, inner_steps=8, samples=3, max_rounds=0, scatter_codec="fp32")


class Bench:
    """The worker of member A serves ``stages``; B leads, C drives."""

    def __init__(
        self, *stages: int, policy: LocalPolicy = POLICY, others: dict[bytes, int] | None = None
    ) -> None:
        self.log = StageLog(A, B, C, D, blocks=BLOCKS, mode="diloco")
        self.out: list[Effect] = []
        self.away: set[str] = set()
        self.todo: list[Any] = []
        self.sums: dict[int, list[tuple[int, int]]] = {}
        self.stepped: list[tuple[int, int, list[tuple[int, int]]]] = []
        """(stage, number of the step, what was in it), in order."""
        self.handed: list[px.HandOver] = []
        self.released: list[bytes] = []
        ring = next(r for r in RINGS if r.peer_id == ME)
        self.member = RoundMember(
            keyring=ring,
            rng=random.Random(1),
            ledger=self.log.ledger,
            fetches=Fetches(self.out),
            out=self.out,
            max_base_age_rounds=2,
        )
        self.worker = WorkerCore(
            me=PeerId(ME),
            ledger=self.log.ledger,
            out=self.out,
            member=self.member,
            in_step=lambda name: name not in self.away,
            micro_batches=1 << 32,
            scatter_codec="fp32",
            local=policy,
        )
        self.worker.leader = self.member.leader = PeerId(LEADER)
        self.worker.trainer(0.0, 1 << 20)
        self.log.assign(ME, *stages)
        for member, stage in (others or {}).items():
            self.log.assign(member, stage)
        self.worker.reconcile(0.0)
        take(self.out)

    # -- what others say -------------------------------------------------------------------

    def request(self, kind: str, hop: int, k: int, **changes: Any) -> m.HopRequest:
        ledger, backward = self.log.ledger, kind == "backward"
        stage = stage_of(hop, BLOCKS)
        fields: dict[str, Any] = {
            "id": m.HopId(ledger.generation, 0, k, hop, backward, changes.pop("attempt", 0)),
            "kind": kind,
            "version": ledger.channels[stage_channel(stage)].round,
            "stage_generation": ledger.pipeline.era,
            "path": plain_path(BLOCKS),
            "inputs": inline_tensor(b"x%d %d" % (hop, k)) if hop else m.EMPTY,
            "gradient": inline_tensor(b"g%d" % k) if backward and hop != HEAD else m.EMPTY,
            "tokens": TOKENS if hop in (0, HEAD) else b"",
        }
        return m.HopRequest(**{**fields, **changes})

    def ask(self, kind: str, hop: int, *numbers: int, **changes: Any) -> None:
        """Requests of the driver; the device does nothing yet."""
        for k in numbers:
            self.worker.receive(0.0, PeerId(DRIVER), self.request(kind, hop, k, **changes))

    def train(self, hop: int, *numbers: int) -> None:
        """Backwards, each computed before the next one is asked for."""
        for k in numbers:
            self.ask("backward", hop, k)
            self.work()

    def open(self, stage: int, *members: bytes, root: bytes = b"") -> e.RoundOpened:
        """An attempt at the stage's round; ``root`` is what this worker has announced."""
        roots = {ME: root} if root else {}
        body = opening(self.log.ledger, members, channel=stage_channel(stage), roots=roots)
        self.apply(body)
        return body

    def commit(self, opened: e.RoundOpened) -> None:
        """The round is committed: its result is not here yet."""
        weights = range(len(opened.contributors))
        share = 1.0 / len(weights)
        self.apply(e.RoundSet(opened.key, tuple(e.Coefficient(i, share) for i in weights)))
        self.away.add(opened.key.channel)
        self.apply(e.RoundCommitted(opened.key, hash_of("result"), opened.holders))

    def arrive(self, stage: int) -> None:
        """The state of the stage's round is in place."""
        self.away.discard(stage_channel(stage))
        self.worker.reconcile(0.0)

    def apply(self, body: e.EntryBody) -> None:
        self.log.ok(body)
        self.member.logged(body)
        self.member.reconcile(0.0)
        self.worker.reconcile(0.0)

    # -- the device ------------------------------------------------------------------------

    def collect(self) -> None:
        kinds = (px.Compute, px.LocalStep, px.HandOver, px.ClearGradients)
        self.todo += [x for x in self.out if isinstance(x, kinds)]
        self.out[:] = [x for x in self.out if not isinstance(x, kinds)]

    def work(self, count: int = 1000) -> None:
        """Let the device do up to ``count`` things; hand-overs are kept for ``hand``."""
        self.collect()
        while self.todo and count:
            self._do(self.todo.pop(0))
            self.collect()
            count -= 1

    def _do(self, effect: Any) -> None:
        if isinstance(effect, px.Compute):
            if effect.accumulate:
                pair = (effect.hop, effect.micro_batch)
                self.sums.setdefault(effect.stage, []).append(pair)
            output = inline_tensor(b"out %d %d" % (effect.hop, effect.micro_batch))
            self.worker.computed(0.0, effect.job, output, 1.5, 0.25)
        elif isinstance(effect, px.LocalStep):
            self.stepped.append((effect.stage, effect.step, self.sums.pop(effect.stage, [])))
        elif isinstance(effect, px.HandOver):
            self.handed.append(effect)
        else:
            for stage in effect.stages:
                self.sums.pop(stage, None)

    def hand(self, name: str = "delta") -> None:
        """Answer the oldest hand-over."""
        effect = self.handed.pop(0)
        self.worker.handed_over(0.0, effect.stage, effect.key, hash_of(name))
        self.collect()

    # -- what it said ----------------------------------------------------------------------

    def codes(self) -> list[str]:
        """Codes of refusals since the last look at what was said."""
        return [x.code for _, x in sent(take(self.out), m.HopRefused)]

    def announced(self) -> list[rm.Ready]:
        return [x for _, x in sent(self.out, rm.Ready)]
