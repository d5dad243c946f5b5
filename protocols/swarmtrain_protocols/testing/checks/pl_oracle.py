"""What the entries of a pipeline mean, recomputed: what is in a step, and the weights after it.

From the exact sums that workers handed over and the toy model run in one process. It watches
nothing by itself: the invariants of the ``pl`` files do. Their numbers are those of spec 11 §2.9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.codecs import get_codec
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.merkle import leaf_hash, merkle_root
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.pipeline.book import KEPT, stage_channel
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.state import header_chunk
from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.checks.one_log import LogIsOne
from swarmtrain_protocols.testing.pipeline_truth import PipelineTruth
from swarmtrain_protocols.testing.toystage import I64, Toy

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World

Key = tuple[int, int, int]
"""(generation, step, attempt)."""


def key_of(body: e.StepClosed | e.StepOutcome) -> Key:
    """Which attempt an entry is about."""
    return body.generation, body.step, body.attempt


@dataclass(slots=True)
class Weights:
    """The right state of a stage before some step."""

    theta: F32
    state_hash: bytes


@dataclass(slots=True)
class Content:
    """What a closed step holds: by stage the exact total, by hop how often each micro-batch."""

    totals: dict[int, I64]
    counts: dict[int, dict[int, int]]


@dataclass(slots=True)
class Result:
    """What it must give: by stage the root, the decoded mean and its square norm."""

    roots: list[bytes]
    means: list[F32]
    norms: list[float]


class StepInvariant(Checker):
    """One promise about steps. Entries come before the oracle takes them in."""

    def __init__(self, oracle: StepOracle) -> None:
        self.oracle = oracle

    def entry(self, world: World, body: e.EntryBody) -> None:
        """An accepted entry of any kind, before its own call below."""

    def modelled(self, world: World, body: e.ModelDefined) -> None:
        """The first weights are known."""

    def recovered(self, world: World, body: e.StageRecovered, alone: bool) -> None:
        """A stage is back; ``alone``: no other one was lost while it was."""

    def back(self, world: World, body: e.StageRecovered) -> None:
        """The same; the oracle has the stage's new weights now."""

    def closed(self, world: World, body: e.StepClosed, content: Content) -> None:
        """The set of a step was fixed."""

    def stepped(
        self, world: World, body: e.StepOutcome, closed: e.StepClosed, right: Result
    ) -> None:
        """A step was committed."""

    def advanced(self, world: World, host: Host, event: fx.StateAdvanced) -> None:
        """A site has taken a step, or a snapshot."""


class StepOracle(LogIsOne):
    """Args as for ``oracle.Oracle``; ``toy``: the model."""

    def __init__(self, truth: PipelineTruth, toy: Toy, keys: RunKeys, chunk_values: int) -> None:
        super().__init__()
        self.truth = truth
        self.toy = toy
        self.keys = keys
        self.chunk_values = chunk_values
        self.weights: dict[int, list[Weights]] = {}
        self.assigned: dict[bytes, tuple[int, ...]] = {}
        self.closed: dict[Key, e.StepClosed] = {}
        self.committed: dict[int, Key] = {}
        self.lost: dict[int, bool] = {}
        """Stages that are lost; whether no other one was while it is."""
        self.skip = 0
        """The stage that the first micro-batches of the step leave out."""
        self.former: dict[int, list[tuple[int, bytes]]] = {}
        """By stage: what was given up for a rebuilt state, (step, state hash), in order."""
        self.rebuilt: dict[int, int] = {}
        """By stage: the step before which it was last rebuilt."""
        self.aborted = 0
        self.micro_batches = 0
        """Micro-batches in all committed steps."""
        self.invariants: list[StepInvariant] = []

    # --- entries ---------------------------------------------------------------------------------

    def first(
        self, world: World, host: Host, index: int, body: e.EntryBody, accepted: bool
    ) -> None:
        world.seen["entry:" + type(body).__name__] += 1
        if not accepted:
            world.seen["entry:ignored"] += 1
            return
        for item in self.invariants:
            item.entry(world, body)
        if isinstance(body, e.ModelDefined):
            for stage in range(len(body.roots)):
                self.weights[stage] = [self.made(stage, 0, self.toy.first(stage))]
            for item in self.invariants:
                item.modelled(world, body)
        elif isinstance(body, e.StageAssigned):
            self.assigned[body.member] = body.stages
        elif isinstance(body, e.StageLost):
            self.lost[body.stage] = self.lost.get(body.stage, True)
            if len(self.lost) > 1:
                self.lost = dict.fromkeys(self.lost, False)
        elif isinstance(body, e.StageRecovered):
            self._recovered(world, body)
        elif isinstance(body, e.StepClosed):
            content = self._content(body)
            for item in self.invariants:
                item.closed(world, body, content)
            self.closed[key_of(body)] = body
        elif isinstance(body, e.StepOutcome):
            self._outcome(world, body)

    def _recovered(self, world: World, body: e.StageRecovered) -> None:
        alone = self.lost.pop(body.stage)
        known, name = self.weights[body.stage], body.candidates[body.choice]
        world.seen["recovered:" + name] += 1
        for item in self.invariants:
            item.recovered(world, body, alone)
        if name == KEPT:
            return
        theta = self.truth.candidates[stage_channel(body.stage), body.root]
        self.rebuilt[body.stage] = body.step
        old = known[body.step].state_hash
        self.former.setdefault(body.stage, []).append((body.step, old))
        known[body.step] = self.made(body.stage, body.step, theta)
        for item in self.invariants:
            item.back(world, body)

    def made(self, stage: int, step: int, theta: F32) -> Weights:
        """The state of a stage with these weights before ``step``."""
        header = header_chunk(stage_channel(stage), step, theta.size, ())
        starts = range(0, theta.size, self.chunk_values)
        chunks = [theta[first : first + self.chunk_values].tobytes() for first in starts]
        return Weights(theta, merkle_root([leaf_hash(chunk) for chunk in (header, *chunks)]))

    def _content(self, body: e.StepClosed) -> Content:
        content = Content({}, {})
        for item in body.stages:
            channel = stage_channel(item.stage)
            sums = [self.truth.sums[one.member, channel, one.root] for one in item.contributors]
            total = sum((one.total for one in sums), np.zeros(self.toy.values, np.int64))
            content.totals[item.stage] = total
            content.counts.update(self.toy.counts(item.stage, total))
        return content

    def _outcome(self, world: World, body: e.StepOutcome) -> None:
        if not body.stages:
            self.aborted += 1
            world.seen["step:aborted"] += 1
            world.seen["step-abort:" + body.reason] += 1
            return
        closed = self.closed[key_of(body)]
        world.seen["step:committed"] += 1
        right = Result([], [], [])
        for item in closed.stages:
            root, mean = self._mean(closed, item)
            right.roots.append(root)
            right.means.append(mean)
            right.norms.append(math.fsum(float(value) ** 2 for value in mean))
        for invariant in self.invariants:
            invariant.stepped(world, body, closed, right)
        self.committed[body.step], self.skip = key_of(body), body.skip
        self.micro_batches += closed.micro_batches
        for stage, mean in enumerate(right.means):
            theta = self.weights[stage][body.step].theta
            step = np.float32(self._rate(stage, body.step)) * (np.float32(body.scale) * mean)
            moved: F32 = np.asarray(theta - step, np.float32)
            self.weights[stage].append(self.made(stage, body.step + 1, moved))

    def _rate(self, stage: int, step: int) -> float:
        """A rebuilt stage warms up over 20 steps, 10 % too high at first, less over 500 steps."""
        rebuilt = self.rebuilt.get(stage)
        if rebuilt is None:
            return self.keys.inner_lr
        age = step - rebuilt
        return self.keys.inner_lr * (1.1 - 0.1 * min(1.0, age / 500)) * min(1.0, (age + 1) / 20)

    def _mean(self, closed: e.StepClosed, item: e.StageSum) -> tuple[bytes, F32]:
        """Every micro-batch weighs the same, whoever computed it. Root and decoded values."""
        codec_in, codec_out = get_codec(closed.scatter_codec), get_codec(closed.gather_codec)
        share = np.float32(1.0 / closed.micro_batches)
        mean = np.zeros(self.toy.values, np.float32)
        channel = stage_channel(item.stage)
        sums = [self.truth.sums[c.member, channel, c.root] for c in item.contributors]
        leaves = []
        for index, first in enumerate(range(0, self.toy.values, self.chunk_values)):
            n = min(self.chunk_values, self.toy.values - first)
            acc = np.zeros(n, np.float32)
            for one in sums:
                value = np.empty(n, np.float32)
                codec_in.decode(one.chunks[index], value)
                acc = acc + share * value
            encoded = bytearray(codec_out.encoded_nbytes(n))
            codec_out.encode(acc, encoded)
            leaves.append(leaf_hash(encoded))
            codec_out.decode(encoded, mean[first : first + n])
        return merkle_root(leaves), mean

    # --- events of sites -------------------------------------------------------------------------

    def emitted(self, world: World, host: Host, event: object) -> None:
        super().emitted(world, host, event)
        if isinstance(event, fx.Notice):
            what = event.fields.get("fault") or event.fields.get("what") or ""
            world.seen[f"notice:{event.name}:{what}"] += 1
        elif isinstance(event, fx.Resync):
            world.seen["resync:" + event.reason.rstrip("0123456789 ")] += 1
        elif not isinstance(event, fx.StateAdvanced | LedgerChanged):
            name = type(event).__name__
            outcome = getattr(event, "outcome", "")
            world.seen[f"event:{name}:{outcome}" if isinstance(outcome, str) else name] += 1
        for item in self.invariants:
            item.emitted(world, host, event)
            if isinstance(event, fx.StateAdvanced):
                item.advanced(world, host, event)
