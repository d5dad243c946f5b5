"""Checkers of pipelines. The numbers in their names are those of spec 11's invariants (PL1 …).

Everything is recomputed from the exact sums that workers handed over and from the toy model run in
one process: which micro-batches a step holds and how often, the mean, the clip, the next weights.
Nothing is taken from the code under test but the codecs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.codecs import get_codec
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.merkle import leaf_hash, merkle_root
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.pipeline.book import KEPT, stage_channel
from swarmtrain_protocols.pipeline.hops import plain_path, stage_of, swapped_path
from swarmtrain_protocols.pipeline.rebuild import CALIBRATION_BATCHES
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.state import header_chunk
from swarmtrain_protocols.testing.check_rounds import LogIsOne
from swarmtrain_protocols.testing.pipeline_truth import PipelineTruth, Sum
from swarmtrain_protocols.testing.toystage import FINGERPRINT, I64, Toy

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World

Key = tuple[int, int, int]
"""(generation, step, attempt)."""


@dataclass(slots=True)
class _Weights:
    """The right state of a stage before some step."""

    theta: F32
    state_hash: bytes


class StepsAreRight(LogIsOne):
    """PL1 to PL10, PL17 to PL19: what is in a step, what came of it, and who holds what."""

    def __init__(self, truth: PipelineTruth, toy: Toy, keys: RunKeys, chunk_values: int) -> None:
        super().__init__()
        self.truth = truth
        self.toy = toy
        self.keys = keys
        self.chunk_values = chunk_values
        self.weights: dict[int, list[_Weights]] = {}
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
        self._means: dict[int, tuple[bytes, F32]] = {}
        self._rounds: dict[tuple[str, int, str], int] = {}

    # --- entries ---------------------------------------------------------------------------------

    def first(
        self, world: World, host: Host, index: int, body: e.EntryBody, accepted: bool
    ) -> None:
        world.seen["entry:" + type(body).__name__] += 1
        if not accepted:
            world.seen["entry:ignored"] += 1
        elif isinstance(body, e.ModelDefined):
            self._model(world, body)
        elif isinstance(body, e.StageAssigned):
            self.assigned[body.member] = body.stages
        elif isinstance(body, e.StageLost):
            self.lost[body.stage] = self.lost.get(body.stage, True)
            if len(self.lost) > 1:
                self.lost = dict.fromkeys(self.lost, False)
        elif isinstance(body, e.StageRecovered):
            self._recovered(world, body)
        elif isinstance(body, e.StepClosed):
            self._closed(world, body)
        elif isinstance(body, e.StepOutcome):
            self._outcome(world, body)
        elif isinstance(body, e.RoundOpened) and body.key.channel.startswith("train/"):
            world.violation("PL3", f"a stage moves by itself: {body}")

    def _model(self, world: World, body: e.ModelDefined) -> None:
        for stage, root in enumerate(body.roots):
            made = self._made(stage, 0, self.toy.first(stage))
            if made.state_hash != root:
                world.violation("model", f"stage {stage} begins with other weights")
            self.weights[stage] = [made]

    def _recovered(self, world: World, body: e.StageRecovered) -> None:
        """PL16: the state itself, or the candidate with the least loss, as it was told."""
        alone = self.lost.pop(body.stage)
        known, name = self.weights[body.stage], body.candidates[body.choice]
        world.seen["recovered:" + name] += 1
        if body.step != len(known) - 1:
            world.violation("PL16", f"stage {body.stage} comes back before step {body.step}")
        if name == KEPT:
            if body.root != known[body.step].state_hash:
                world.violation("PL16", f"stage {body.stage} comes back with another state")
            return
        theta = self.truth.candidates.get((stage_channel(body.stage), body.root))
        if theta is None:
            world.violation("PL16", f"nobody has tried what stage {body.stage} comes back with")
        assert theta is not None
        scored = [loss for loss in body.losses if loss >= 0.0]
        if scored and body.losses[body.choice] != min(scored):
            world.violation("PL16", f"a better candidate was there: {body}")
        if alone and body.losses[body.choice] >= 0.0:
            thetas = {stage: made[body.step].theta for stage, made in self.weights.items()}
            thetas[body.stage] = theta
            batches = [self.toy.calibration(k) for k in range(CALIBRATION_BATCHES)]
            losses = [self.toy.evaluate(tokens, thetas) for tokens in batches]
            if abs(math.fsum(losses) / len(losses) - body.losses[body.choice]) > 1e-9:
                world.violation("PL16", f"{name} was scored with other weights: {body} {losses}")
        self.rebuilt[body.stage] = body.step
        old = known[body.step].state_hash
        self.former.setdefault(body.stage, []).append((body.step, old))
        known[body.step] = self._made(body.stage, body.step, theta)
        if known[body.step].state_hash != body.root:
            world.violation("PL16", f"stage {body.stage}: {body.root.hex()} is not {name}")

    def _made(self, stage: int, step: int, theta: F32) -> _Weights:
        header = header_chunk(stage_channel(stage), step, theta.size, ())
        starts = range(0, theta.size, self.chunk_values)
        chunks = [theta[first : first + self.chunk_values].tobytes() for first in starts]
        return _Weights(theta, merkle_root([leaf_hash(chunk) for chunk in (header, *chunks)]))

    def _closed(self, world: World, body: e.StepClosed) -> None:
        key = (body.generation, body.step, body.attempt)
        if key in self.closed:
            world.violation("PL3", f"step {key} is closed twice")
        if body.step != len(self.weights[0]) - 1:
            world.violation("PL10", f"step {body.step} follows {len(self.weights[0]) - 1}")
        self.closed[key] = body
        sets: dict[int, frozenset[int]] = {}
        totals: dict[int, I64] = {}
        for item in body.stages:
            if item.state_hash != self.weights[item.stage][body.step].state_hash:
                world.violation("PL4", f"{key} pins a wrong state of stage {item.stage}")
            sums = [self._sum(world, key, item, one) for one in item.contributors]
            total = sum((one.total for one in sums), np.zeros(self.toy.values, np.int64))
            totals[item.stage] = total
            for hop, counts in self.toy.counts(item.stage, total).items():
                wrong = {k: n for k, n in counts.items() if n != 1}
                if wrong:
                    world.violation("PL1", f"{key} hop {hop} holds micro-batches {wrong} times")
                sets[hop] = frozenset(counts)
        self._sets_agree(world, key, body, sets)
        paths = {k: self._path(k, sets) for k in sorted(sets[0])}
        self._fingerprints(world, key, body, paths, totals)

    def _sum(self, world: World, key: Key, item: e.StageSum, one: e.Contributor) -> Sum:
        members = [c.member for c in item.contributors]
        if members != sorted(set(members)):
            world.violation("PL3", f"contributors of {key} are not in member order")
        made = self.truth.sums.get((one.member, stage_channel(item.stage), one.root))
        if made is None:
            world.violation("PL3", f"{key} lists a sum of stage {item.stage} nobody made")
        assert made is not None
        return made

    def _sets_agree(
        self, world: World, key: Key, body: e.StepClosed, sets: dict[int, frozenset[int]]
    ) -> None:
        """PL2: the same micro-batches at every hop, but for what is left out; as many as logged."""
        first = {k for k in sets[0] if k < int(self.keys.skip_fraction * self.keys.micro_batches)}
        for hop, found in sets.items():
            if found == (sets[0] - first if hop == self.skip != 0 else sets[0]):
                continue
            listed = {hop: sorted(found) for hop, found in sets.items()}
            world.violation("PL2", f"{key} holds different micro-batches by hop: {listed}")
        if len(sets[0]) != body.micro_batches:
            world.violation("PL2", f"{key} counts {body.micro_batches}, holds {len(sets[0])}")
        least = math.ceil(self.keys.close_fraction * self.keys.micro_batches)
        if len(sets[0]) < least:
            world.violation("PL2", f"{key} closes with {len(sets[0])} of {least}")
        if len(sets[0]) < self.keys.micro_batches:
            world.seen["step:partial"] += 1
        world.seen["step:skipped"] += len(first) if self.skip else 0

    def _path(self, k: int, sets: dict[int, frozenset[int]]) -> tuple[int, ...]:
        """Where ``k`` has left a gradient, in the order that the keys say."""
        swapped = self.keys.swapped and k % 2
        whole = swapped_path(self.toy.stages) if swapped else plain_path(self.toy.stages)
        return tuple(hop for hop in whole if k in sets[hop])

    def _fingerprints(
        self,
        world: World,
        key: Key,
        body: e.StepClosed,
        paths: dict[int, tuple[int, ...]],
        totals: dict[int, I64],
    ) -> None:
        """PL5 to PL7: every gradient descends from the right weights and the right bytes; PL19."""
        thetas = {stage: known[body.step].theta for stage, known in self.weights.items()}
        wanted = {stage: np.zeros(FINGERPRINT, np.int64) for stage in totals}
        losses = []
        for k, path in paths.items():
            gradients, loss = self.toy.whole(body.step, k, thetas, path)
            losses.append(loss)
            for hop, gradient in gradients.items():
                wanted[stage_of(hop, self.toy.stages)] += gradient[-FINGERPRINT:]
        for stage, total in totals.items():
            if not np.array_equal(total[-FINGERPRINT:], wanted[stage]):
                world.violation("PL6", f"{key} stage {stage} was computed from other bytes")
        if body.loss >= 0.0 and not _is_mean_of_some(body.loss, losses):
            world.violation("PL19", f"{key} says loss {body.loss}, its micro-batches {losses}")
        world.seen["loss:all" if abs(body.loss - _mean(losses)) < 1e-9 else "loss:some"] += 1

    def _outcome(self, world: World, body: e.StepOutcome) -> None:
        key = (body.generation, body.step, body.attempt)
        closed = self.closed.get(key)
        if closed is None:
            world.violation("PL3", f"{key} was decided and never closed")
        assert closed is not None
        if not body.stages:
            self.aborted += 1
            world.seen["step:aborted"] += 1
            world.seen["step-abort:" + body.reason] += 1
            return
        if body.step in self.committed:
            world.violation("PL3", f"two outcomes of step {body.step}")
        self.committed[body.step], self.skip = key, body.skip
        self.micro_batches += closed.micro_batches
        world.seen["step:committed"] += 1
        norms, means = [], []
        for item, outcome in zip(closed.stages, body.stages, strict=True):
            root, mean = self._mean(closed, item)
            if root != outcome.root:
                world.violation("PL9", f"{key} stage {item.stage} is not the sum of its set")
            norm = math.fsum(float(value) ** 2 for value in mean)
            if not math.isclose(norm, outcome.square_norm, rel_tol=1e-12):
                world.violation("PL18", f"{key} stage {item.stage}: {outcome.square_norm} {norm}")
            norms.append(norm)
            means.append(mean)
        scale = self._scale(math.fsum(norms))
        if abs(scale - body.scale) > 1e-7:
            world.violation("PL18", f"{key} is clipped by {body.scale}, not {scale}")
        for stage, mean in enumerate(means):
            theta = self.weights[stage][body.step].theta
            step = np.float32(self._rate(stage, body.step)) * (np.float32(body.scale) * mean)
            moved: F32 = np.asarray(theta - step, np.float32)
            self.weights[stage].append(self._made(stage, body.step + 1, moved))

    def _rate(self, stage: int, step: int) -> float:
        """A rebuilt stage warms up over 20 steps, 10 % too high at first, less over 500 steps."""
        rebuilt = self.rebuilt.get(stage)
        if rebuilt is None:
            return self.keys.inner_lr
        age = step - rebuilt
        return self.keys.inner_lr * (1.1 - 0.1 * min(1.0, age / 500)) * min(1.0, (age + 1) / 20)

    def _scale(self, square_norm: float) -> float:
        """PL18: the whole gradient is clipped once."""
        clip = self.keys.inner_clip
        if not clip or square_norm <= clip * clip:
            return 1.0
        return float(np.float32(clip / math.sqrt(square_norm)))

    def _mean(self, closed: e.StepClosed, item: e.StageSum) -> tuple[bytes, F32]:
        """PL17: every micro-batch weighs the same, whoever computed it. Root and decoded values."""
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
        if isinstance(event, fx.StateAdvanced):
            self._advanced(world, host, event)
        elif isinstance(event, fx.Notice):
            what = event.fields.get("fault") or event.fields.get("what") or ""
            world.seen[f"notice:{event.name}:{what}"] += 1
            if event.name == "peer_fault" and what != "corrupt_chunk":  # the weather flips bits
                world.violation("honest", f"{host.name} accuses an honest site: {event}")
        elif isinstance(event, fx.Resync):
            world.seen["resync:" + event.reason.rstrip("0123456789 ")] += 1
        elif isinstance(event, LedgerChanged):
            self._let_go(host, event)
        else:
            name = type(event).__name__
            outcome = getattr(event, "outcome", "")
            world.seen[f"event:{name}:{outcome}" if isinstance(outcome, str) else name] += 1

    def _let_go(self, host: Host, event: LedgerChanged) -> None:
        """Who has lost a stage drops its state; given it again, it begins with any snapshot."""
        for _, body, accepted in event.entries:
            if not accepted or getattr(body, "member", None) != host.peer:
                continue
            kept: tuple[int, ...] = ()
            if isinstance(body, e.StageAssigned):
                kept = body.stages
            elif not isinstance(body, e.MemberLeft | e.MemberBanned):
                continue
            for stage in range(self.toy.stages + 1):
                if stage not in kept:
                    self._rounds.pop((host.name, host.incarnation, stage_channel(stage)), None)

    def _advanced(self, world: World, host: Host, event: fx.StateAdvanced) -> None:
        """PL4, PL5: equal weights wherever the version is equal, and versions only grow."""
        stage = int(event.channel.split("/")[1])
        known = self.weights[stage]
        if event.round >= len(known):
            world.violation("PL4", f"{host.name} has stage {stage} at {event.round}")
        if known[event.round].state_hash != event.state_hash and not self._unaware(host, event):
            world.violation("PL4", f"{host.name} has another stage {stage} before {event.round}")
        slot = (host.name, host.incarnation, event.channel)
        if event.round < self._rounds.get(slot, 0):
            world.violation("PL5", f"{host.name} goes back to {event.round} of stage {stage}")
        self._rounds[slot] = event.round

    def _unaware(self, host: Host, event: fx.StateAdvanced) -> bool:
        """It has a state that was given up, and cannot know yet: the log says so further on."""
        stage = int(event.channel.split("/")[1])
        heard = host.node.core.ledger.pipeline.stages[stage].recovered_step
        given_up = self.former.get(stage, [])
        return heard < event.round and (event.round, event.state_hash) in given_up


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _is_mean_of_some(mean: float, values: Sequence[float]) -> bool:
    """The losses of a driver that died before it told them are missing, no others."""
    sizes = range(len(values), 0, -1)
    return any(
        abs(mean - _mean(chosen)) < 1e-9 for n in sizes for chosen in combinations(values, n)
    )


class BooksAgree(LogIsOne):
    """PL1 at every moment: an accumulator is the sum of its have-set; PL11: drivers are bounded."""

    def __init__(self, toy: Toy, window: int) -> None:
        super().__init__()
        self.toy = toy
        self.window = window
        self.compared = 0

    def always(self, world: World, host: Host) -> None:
        site = host.node
        driver = site.core.pipeline.driver
        if len(driver.batches) > self.toy.micro_batches:
            world.violation("PL11", f"{host.name} drives {len(driver.batches)} micro-batches")
        active = sum(batch.begun and not batch.done for batch in driver.batches.values())
        if active > self.window:
            world.violation("PL11", f"{host.name} has {active} under way, window {self.window}")
        if not site.touched or site.clearing or not host.quiet:
            return
        site.touched = False
        self.compared += 1
        worker = site.core.pipeline.worker
        for stage, total in site.accumulators.items():
            for hop, counts in self.toy.counts(stage, total).items():
                claimed = worker.have(hop)
                if counts != dict.fromkeys(claimed, 1):
                    world.violation(
                        "PL1", f"{host.name} claims {claimed} at hop {hop}, holds {counts}"
                    )
