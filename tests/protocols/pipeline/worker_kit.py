"""A worker with a device whose gradients are numbers that show every duplicate and every loss.

The gradient of micro-batch k at a hop is 4**k in units of that hop: the digits in base 4 of an
accumulator say how often each k is in it (up to three times), whatever was added and taken out.
"""

from __future__ import annotations

import random
from typing import Any

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.pipeline import claims as cl
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import step_key
from swarmtrain_protocols.pipeline.hops import plain_path, skipped_path, stage_of
from swarmtrain_protocols.pipeline.requests import HopSizes, inline_tensor
from swarmtrain_protocols.pipeline.worker import WorkerCore
from swarmtrain_protocols.rounds.fetches import Fetches
from swarmtrain_protocols.rounds.member import RoundMember
from tests.protocols.pipeline.stage_kit import StageLog
from tests.protocols.rounds_kit import RINGS, A, B, C, D, hash_of, of_kind, sent, take

ME, LEADER, DRIVER, OTHER = A, B, C, D
BLOCKS = 2
HEAD = BLOCKS + 1
MICRO_BATCHES = 8
TOKENS = b"\x01\x00\x00\x00" * 4


class Device:
    """Accumulators by hop. Computes when it is told to, in the order in which it was asked."""

    def __init__(self) -> None:
        self.sums: dict[int, int] = {}
        self.todo: list[Any] = []

    def digits(self, hop: int) -> dict[int, int]:
        """How often each micro-batch is in the accumulator of a hop; missing: not at all."""
        rest, k, found = self.sums.get(hop, 0), 0, {}
        while rest:
            rest, count = divmod(rest, 4)
            if count:
                found[k] = count
            k += 1
        return found

    def add(self, hop: int, k: int, sign: int) -> None:
        self.sums[hop] = self.sums.get(hop, 0) + sign * 4**k


class Bench:
    """The worker of member A; B leads, C drives; all members are in step unless a test says so."""

    def __init__(
        self, stages: tuple[int, ...] = (0, 1, 2), *, now: float = 0.0, **changes: Any
    ) -> None:
        self.log = StageLog(A, B, C, D, blocks=BLOCKS)
        self.out: list[Effect] = []
        self.device = Device()
        self.away: set[str] = set()
        self.now = now
        ring = next(r for r in RINGS if r.peer_id == ME)
        self.member = RoundMember(
            keyring=ring,
            rng=random.Random(1),
            ledger=self.log.ledger,
            fetches=Fetches(self.out),
            out=self.out,
            max_base_age_rounds=2,
        )
        fields: dict[str, Any] = {
            "micro_batches": MICRO_BATCHES,
            "scatter_codec": "fp32",
            "sizes": HopSizes(len(TOKENS), 3, 3),
        }
        self.worker = WorkerCore(
            me=PeerId(ME),
            ledger=self.log.ledger,
            out=self.out,
            member=self.member,
            in_step=lambda name: name not in self.away,
            **{**fields, **changes},
        )
        self.worker.leader = self.member.leader = PeerId(LEADER)
        self.worker.trainer(now, 1 << 20)
        if stages:
            self.log.assign(ME, *stages)
        self.worker.reconcile(now)
        take(self.out)

    # -- what others say -------------------------------------------------------------------

    def request(self, kind: str, hop: int, k: int, **changes: Any) -> m.HopRequest:
        state = self.log.ledger.pipeline
        attempt, skip = changes.pop("attempt", 0), changes.pop("skip", 0)
        text = changes.pop("text", "")
        path = skipped_path(plain_path(BLOCKS), skip) if skip else plain_path(BLOCKS)
        backward = kind == "backward"
        inputs = inline_tensor(b"x%c%c" % (hop, k % 256)) if hop else m.EMPTY
        gradient = inline_tensor(b"g%c%c" % (hop, k % 256)) if backward and hop != HEAD else m.EMPTY
        if text:
            inputs = inline_tensor(text.encode())
        fields: dict[str, Any] = {
            "id": m.HopId(self.log.ledger.generation, state.step, k, hop, backward, attempt),
            "kind": kind,
            "version": state.step,
            "stage_generation": state.era,
            "path": path,
            "inputs": inputs,
            "gradient": gradient,
            "tokens": TOKENS if hop in (0, HEAD) else b"",
        }
        return m.HopRequest(**{**fields, **changes})

    def ask(self, kind: str, hop: int, k: int, *, peer: bytes = DRIVER, **changes: Any) -> None:
        self.worker.receive(self.now, PeerId(peer), self.request(kind, hop, k, **changes))
        self.collect()

    def say(self, message: object, peer: bytes = LEADER) -> None:
        self.worker.receive(self.now, PeerId(peer), message)
        self.collect()

    def query(self, number: int = 1) -> None:
        self.say(m.CloseQuery(step_key(self.log.ledger), number))

    def plan(self, owners: dict[int, list[int]], *, number: int = 1, other: bytes = OTHER) -> bytes:
        """Tell the plan in which this worker owns ``owners`` by hop and another all the rest."""
        everything = sorted({k for numbers in owners.values() for k in numbers})
        settled = cl.Settlement(everything)
        for hop in range(BLOCKS + 2):
            for k in everything:
                mine = k in owners.get(hop, [])
                settled.owners[hop, k] = PeerId(ME if mine else other)
        plan = cl.plan_of(step_key(self.log.ledger), number, settled, BLOCKS)
        self.say(plan)
        return cl.plan_digest(plan)

    def apply(self, body: e.EntryBody) -> None:
        """An entry is accepted here."""
        self.log.ok(body)
        self.member.logged(body)
        self.member.reconcile(self.now)
        self.worker.reconcile(self.now)
        self.collect()

    # -- the device ------------------------------------------------------------------------

    def collect(self) -> None:
        """Effects for the device get into its line, in order; ``ClearGradients`` as well."""
        kinds = (px.Compute, px.Undo, px.HandOver, px.ClearGradients)
        known = [id(x) for x in self.device.todo]
        for effect in self.out:
            if isinstance(effect, kinds) and id(effect) not in known:
                self.device.todo.append(effect)
        self.out[:] = [x for x in self.out if not isinstance(x, kinds)]

    def work(self, count: int = 1000) -> int:
        """Let the device do up to ``count`` things; returns how many it did."""
        done = 0
        self.collect()
        while self.device.todo and done < count:
            self._do(self.device.todo.pop(0))
            self.collect()
            done += 1
        return done

    def _do(self, effect: Any) -> None:
        device, worker = self.device, self.worker
        if isinstance(effect, px.ClearGradients):
            for hop in list(device.sums):
                if stage_of(hop, BLOCKS) in effect.stages:
                    device.sums[hop] = 0
        elif isinstance(effect, px.Compute):
            if effect.accumulate:
                device.add(effect.hop, effect.micro_batch, 1)
            output = inline_tensor(b"out %d %d" % (effect.hop, effect.micro_batch))
            worker.computed(self.now, effect.job, output, 1.5, 0.25)
        elif isinstance(effect, px.Undo):
            device.add(effect.request.id.hop, effect.request.id.micro_batch, -1)
            worker.computed(self.now, effect.job, m.EMPTY, 0.0, 0.25)
        else:
            sums = [
                device.sums.get(h, 0)
                for h in range(BLOCKS + 2)
                if stage_of(h, BLOCKS) == effect.stage
            ]
            worker.handed_over(self.now, effect.stage, effect.key, hash_of(f"sum {sums}"))

    def run(self, kind: str, hop: int, *numbers: int, **changes: Any) -> None:
        """Ask for hops and let the device do them."""
        for k in numbers:
            self.ask(kind, hop, k, **changes)
            self.work()

    # -- what it said ----------------------------------------------------------------------

    def take(self) -> list[Effect]:
        self.collect()
        return take(self.out)

    def replies(self) -> list[m.HopReply]:
        return [x for _, x in sent(self.out, m.HopReply)]

    def refusals(self) -> list[str]:
        """Codes, in order; everything that was said is forgotten."""
        return [x.code for _, x in sent(self.take(), m.HopRefused)]

    def answers(self) -> list[dict[int, list[int]]]:
        """What it claimed, by hop, in every answer to a query."""
        found = []
        for peer, answer in sent(self.take(), m.CloseAnswer):
            assert peer == LEADER
            found.append(
                {x.hop: cl.numbers_of(cl.from_bytes(x.micro_batches)) for x in answer.claims}
            )
        return found

    def readies(self) -> list[m.StepReady]:
        return [x for _, x in sent(self.out, m.StepReady)]

    def truth(self) -> None:
        """The invariant: every accumulator holds its have-set, each micro-batch once."""
        for hop in range(BLOCKS + 2):
            assert self.device.digits(hop) == dict.fromkeys(self.worker.have(hop), 1), hop


def jobs(bench: Bench) -> list[px.Compute]:
    """Computations that wait for the device."""
    return of_kind(bench.device.todo, px.Compute)
