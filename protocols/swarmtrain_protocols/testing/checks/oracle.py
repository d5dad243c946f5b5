"""What the entries of the log mean, recomputed: which sets, sums and states are the right ones.

Watches nothing by itself: it keeps the truth, and hands every entry and event to the invariants of
the other files, each of which knows one promise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.codecs import get_codec
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.merkle import leaf_hash, merkle_root
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.state import header_chunk
from swarmtrain_protocols.testing.checks.base import Checker
from swarmtrain_protocols.testing.checks.one_log import LogIsOne
from swarmtrain_protocols.testing.truth import Truth

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World


@dataclass(slots=True)
class Reference:
    """The right state of a channel before some round."""

    theta: F32
    momentum: F32
    state_hash: bytes
    raw: bytes


class Invariant(Checker):
    """One promise about rounds. Entries come when they are first applied anywhere, and before the
    oracle takes them in: what it knows then is what was true before them.
    """

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle

    def modelled(self, world: World, body: e.ModelDefined) -> None:
        """The first states are known."""

    def opened(self, world: World, body: e.RoundOpened) -> None:
        """An attempt was opened."""

    def chosen(self, world: World, body: e.RoundSet) -> None:
        """Its set was fixed."""

    def committed(self, world: World, body: e.RoundCommitted, right: bytes) -> None:
        """It was committed; ``right`` is the root that its set truly gives."""

    def aborted(self, world: World, body: e.RoundAborted) -> None:
        """It was given up."""

    def rewound(self, world: World, body: e.Rewound) -> None:
        """The run goes back."""

    def recovered(self, world: World, channel: str) -> None:
        """The state of a channel was lost and made anew."""

    def changed(self, world: World, body: e.ConfigChanged) -> None:
        """A run key changes in flight."""

    def advanced(self, world: World, host: Host, event: fx.StateAdvanced) -> None:
        """A site has taken a step, or a snapshot."""

    def decided(self, world: World, host: Host, event: fx.ContributionDecided) -> None:
        """A site tells its trainer what became of a contribution."""


class Oracle(LogIsOne):
    """Args:
    truth: what sites made, filled by them.
    keys: of the run.
    chunk_values: values of a chunk.
    """

    def __init__(self, truth: Truth, keys: RunKeys, chunk_values: int) -> None:
        super().__init__()
        self.truth = truth
        self.run_keys = keys
        self.modes = [(0, "off" if keys.overlap == "auto" else keys.overlap)]
        """Overlap modes with the first round that each is for, by the log."""
        self.generation = 0
        self.chunk_values = chunk_values
        self.opened: dict[RoundKey, e.RoundOpened] = {}
        self.chosen: dict[RoundKey, e.RoundSet] = {}
        self.committed: dict[tuple[str, int], bytes] = {}
        self.keys: dict[tuple[str, int], RoundKey] = {}
        self.states: dict[str, list[Reference]] = {}
        self.counted: dict[bytes, RoundKey] = {}
        self.factors: dict[RoundKey, list[float]] = {}
        """By which contributions of a set are clipped, from ``clip``."""
        self.aborted = 0
        self.served: dict[bytes, int] = {}
        """Contributions to state channels that were counted, by member."""
        self.rebuilt: dict[str, int] = {}
        """Channels whose state was lost and made anew, and before which round."""
        self.invariants: list[Invariant] = []
        self._looking: list[Invariant] = []

    # --- entries ---------------------------------------------------------------------------------

    def first(
        self, world: World, host: Host, index: int, body: e.EntryBody, accepted: bool
    ) -> None:
        world.seen["entry:" + type(body).__name__] += 1
        if not accepted:
            world.seen["entry:ignored"] += 1
            return
        if isinstance(body, e.ModelDefined):
            self._model(world, body)
        elif isinstance(body, e.RoundOpened):
            for item in self.invariants:
                item.opened(world, body)
            self.opened[body.key] = body
        elif isinstance(body, e.RoundSet):
            self._set(world, body)
        elif isinstance(body, e.RoundCommitted):
            self._committed(world, body)
        elif isinstance(body, e.RoundAborted):
            self.aborted += 1
            world.seen["abort:" + body.reason] += 1
            for item in self.invariants:
                item.aborted(world, body)
        elif isinstance(body, e.Rewound):
            self._rewound(world, body)
        elif isinstance(body, e.ConfigChanged):
            self._changed(world, body)

    def _model(self, world: World, body: e.ModelDefined) -> None:
        for item, root in zip(body.layout, body.roots, strict=True):
            theta = self.truth.models[item.channel, root]
            self.states[item.channel] = [
                self._reference(item.channel, 0, theta, np.zeros_like(theta))
            ]
        for invariant in self.invariants:
            invariant.modelled(world, body)

    def _set(self, world: World, body: e.RoundSet) -> None:
        for item in self.invariants:
            item.chosen(world, body)
        if len(body.coefficients) < len(self.opened[body.key].contributors):
            world.seen["round:partial"] += 1
        self.chosen[body.key] = body

    def _committed(self, world: World, body: e.RoundCommitted) -> None:
        key = body.key
        world.seen["round:group" if key.channel.startswith("group/") else "round:train"] += 1
        if key.attempt:
            world.seen["round:later-attempt"] += 1
        root, mean = self.recompute(key)
        for item in self.invariants:
            item.committed(world, body, root)
        self.committed[key.channel, key.round] = body.root
        self.keys[key.channel, key.round] = key
        for one in self.contributors(key):
            self.counted[one.root] = key
            if key.channel in self.states:
                self.served[one.member] = self.served.get(one.member, 0) + 1
        if key.channel in self.states:
            self._advance(key, mean)

    def contributors(self, key: RoundKey) -> list[e.Contributor]:
        """Who is in the set of an attempt, in member order."""
        listed = self.opened[key].contributors
        return [listed[item.index] for item in self.chosen[key].coefficients]

    def recompute(self, key: RoundKey) -> tuple[bytes, F32]:
        """The right result: root of its encoded chunks, and its decoded values f32[n]."""
        opened, chosen = self.opened[key], self.chosen[key]
        codec_in, codec_out = get_codec(opened.scatter_codec), get_codec(opened.gather_codec)
        mean = np.zeros(opened.values, np.float32)
        leaves = []
        for index in range(-(-opened.values // self.chunk_values)):
            first = index * self.chunk_values
            n = min(self.chunk_values, opened.values - first)
            acc = np.zeros(n, np.float32)
            for item in chosen.coefficients:
                made = self.truth.contributions[opened.contributors[item.index].root]
                value = np.empty(n, np.float32)
                codec_in.decode(made.chunks[index], value)
                acc = acc + np.float32(item.value) * value
            encoded = bytearray(codec_out.encoded_nbytes(n))
            codec_out.encode(acc, encoded)
            leaves.append(leaf_hash(encoded))
            codec_out.decode(encoded, mean[first : first + n])
        return merkle_root(leaves), mean

    def _advance(self, key: RoundKey, mean: F32) -> None:
        states = self.states[key.channel]
        before = states[-1]
        lr, beta = self._outer(key.round)
        momentum: F32 = np.asarray(beta * before.momentum + mean, np.float32)
        step = lr * (mean + beta * momentum)
        theta: F32 = np.asarray(before.theta - step, np.float32)
        states.append(self._reference(key.channel, key.round + 1, theta, momentum))

    def _outer(self, round_number: int) -> tuple[np.float32, np.float32]:
        """The outer step of a round, by the table of the specification for runs without end."""
        lr, beta = {"off": 0.7, "eager": 0.4}[self.mode(round_number)], 0.9
        named = self.run_keys.outer_lr, self.run_keys.outer_momentum
        lr = lr if named[0] is None else named[0]
        return np.float32(lr), np.float32(beta if named[1] is None else named[1])

    def mode(self, round_number: int) -> str:
        """The overlap mode of a round, by the log."""
        return [mode for first, mode in self.modes if first <= round_number][-1]

    def _reference(self, channel: str, round_number: int, theta: F32, momentum: F32) -> Reference:
        leaves = [leaf_hash(header_chunk(channel, round_number, theta.size))]
        for first in range(0, theta.size, self.chunk_values):
            part = slice(first, first + self.chunk_values)
            leaves.append(leaf_hash(theta[part].tobytes() + momentum[part].tobytes()))
        raw = theta.tobytes() + momentum.tobytes()
        return Reference(theta, momentum, merkle_root(leaves), raw)

    def _rewound(self, world: World, body: e.Rewound) -> None:
        for item in self.invariants:
            item.rewound(world, body)
        self.generation = body.generation
        self.modes = [item for item in self.modes if item[0] <= max(body.rounds)]
        for channel, number in zip(body.channels, body.rounds, strict=True):
            del self.states[channel][number + 1 :]
            for key in [key for key in self.committed if key[0] == channel and key[1] >= number]:
                del self.committed[key]

    def _changed(self, world: World, body: e.ConfigChanged) -> None:
        world.seen[f"overlap:{body.value}"] += 1
        for item in self.invariants:
            item.changed(world, body)
        self.modes.append((body.at_round, body.value))

    # --- events of sites -------------------------------------------------------------------------

    def emitted(self, world: World, host: Host, event: object) -> None:
        super().emitted(world, host, event)
        if isinstance(event, fx.GroupDone):
            world.seen["group:done"] += 1
        elif isinstance(event, fx.ContributionDecided):
            world.seen["decided:" + event.outcome] += 1
        elif isinstance(event, fx.Resync):
            world.seen["resync:" + event.reason.rstrip("0123456789 ")] += 1
        elif isinstance(event, fx.Notice):
            fields = event.fields
            what = fields.get("fault") or fields.get("what") or fields.get("reason") or ""
            world.seen[f"notice:{event.name}:{what}"] += 1
        elif isinstance(event, PeerFault):
            world.seen["fault:" + event.code] += 1
        for item in self.invariants:
            item.emitted(world, host, event)
            if isinstance(event, fx.StateAdvanced):
                item.advanced(world, host, event)
            elif isinstance(event, fx.ContributionDecided):
                item.decided(world, host, event)

    def always(self, world: World, host: Host) -> None:
        for item in self._watching():
            item.always(world, host)

    def _watching(self) -> list[Invariant]:
        """Those that look after every call; most have nothing to do there."""
        if not self._looking:
            self._looking = [i for i in self.invariants if type(i).always is not Checker.always]
        return self._looking

    def crashed(self, world: World, host: Host) -> None:
        super().crashed(world, host)
        for item in self.invariants:
            item.crashed(world, host)

    def booted(self, world: World, host: Host) -> None:
        for item in self.invariants:
            item.booted(world, host)

    def healed(self, world: World) -> None:
        for item in self.invariants:
            item.healed(world)

    def finish(self, world: World) -> None:
        for item in self.invariants:
            item.finish(world)
