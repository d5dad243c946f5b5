"""Checkers of the round protocol. The numbers in their names are those of reliability goals.

Everything is recomputed here from true contributions and logged sets with plain NumPy, in member
order, one rounding per operation; nothing is taken from the code under test but the codecs.
"""

from __future__ import annotations

import math
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
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.state import header_chunk
from swarmtrain_protocols.testing.checkers import Checker
from swarmtrain_protocols.testing.truth import Truth

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World


@dataclass(slots=True)
class _Reference:
    """The right state of a channel after some round."""

    theta: F32
    momentum: F32
    state_hash: bytes
    raw: bytes


class LogIsOne(Checker):
    """All sites apply the same entries at the same indices, for ever (OS2, and the ledger's part).

    ``history[i]`` is entry i as the first site applied it: (body bytes, accepted).
    """

    def __init__(self) -> None:
        self.history: dict[int, tuple[bytes, bool]] = {}
        self.bodies: dict[int, e.EntryBody] = {}
        self.applied: dict[str, int] = {}

    def emitted(self, world: World, host: Host, event: object) -> None:
        if not isinstance(event, LedgerChanged):
            return
        for index, body, accepted in event.entries:
            before = self.applied.get(host.name)
            if before is not None and index != before + 1 and index != 0:
                # A snapshot may jump forward; nothing may go back inside an incarnation.
                if index <= before:
                    world.violation("log-order", f"{host.name} applies {index} after {before}")
                world.seen["log:jump"] += 1
            self.applied[host.name] = index
            found = (e.encode_body(body), accepted)
            known = self.history.setdefault(index, found)
            if known != found:
                world.violation(
                    "log-fork", f"{host.name} has {body} ({accepted}) at {index}, others {known}"
                )
            if index not in self.bodies:
                self.bodies[index] = body
                self.first(world, host, index, body, accepted)

    def first(
        self, world: World, host: Host, index: int, body: e.EntryBody, accepted: bool
    ) -> None:
        """Entry ``index`` was applied for the first time anywhere; for subclasses."""

    def crashed(self, world: World, host: Host) -> None:
        self.applied.pop(host.name, None)


class RoundsAreRight(LogIsOne):
    """AR1 to AR4, GF2, OS1: outcomes, sums, sets, coefficients and states, bit for bit."""

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
        self.states: dict[str, list[_Reference]] = {}
        self.counted: dict[bytes, RoundKey] = {}
        self.returned: dict[bytes, str] = {}
        self.aborted = 0
        self.served: dict[bytes, int] = {}
        """Contributions to state channels that were counted, by member."""

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
            self._opened(world, body)
        elif isinstance(body, e.RoundSet):
            self._set(world, body)
        elif isinstance(body, e.RoundCommitted):
            self._committed(world, body)
        elif isinstance(body, e.RoundAborted):
            self.aborted += 1
            world.seen["abort:" + body.reason] += 1
        elif isinstance(body, e.Rewound):
            self._rewound(world, body)
        elif isinstance(body, e.ConfigChanged):
            self._changed(world, body)

    def _rewound(self, world: World, body: e.Rewound) -> None:
        """A rewind for data loss is wrong while somebody alive holds what is said to be lost."""
        self.generation = body.generation
        self.modes = [item for item in self.modes if item[0] <= max(body.rounds)]
        for channel, number, root in zip(body.channels, body.rounds, body.roots, strict=True):
            states = self.states[channel]
            for host in world.hosts.values():
                held = host.node.plane.states.get(channel) if host.node is not None else None
                if held is not None and held.round == len(states) - 1 > number:
                    world.violation("false-loss", f"{host.name} holds the newest {channel}: {body}")
            if states[number].state_hash != root:
                world.violation("OS1", f"{body} goes to a state that never was")
            del states[number + 1 :]
            for key in [key for key in self.committed if key[0] == channel and key[1] >= number]:
                del self.committed[key]

    def _model(self, world: World, body: e.ModelDefined) -> None:
        for item, root in zip(body.layout, body.roots, strict=True):
            theta = self.truth.models[item.channel, root]
            reference = self._reference(item.channel, 0, theta, np.zeros_like(theta))
            if reference.state_hash != root:
                world.violation("model", "the root of the model is not that of its weights")
            self.states[item.channel] = [reference]

    def _opened(self, world: World, body: e.RoundOpened) -> None:
        members = [c.member for c in body.contributors]
        if members != sorted(set(members)):
            world.violation("GF2", f"contributors of {body.key} are not in member order")
        for item in body.contributors:
            made = self.truth.contributions.get(item.root)
            if made is None or (made.member, made.samples) != (item.member, item.samples):
                world.violation("GF2", f"{body.key} lists a contribution nobody made")
        covered = [(p.first, p.count) for p in body.parts]
        place = 0
        for start, count in sorted(covered):
            if start != place or count < 1:
                world.violation("GF2", f"parts of {body.key} overlap or leave gaps: {covered}")
            place += count
        if place != -(-body.values // self.chunk_values):
            world.violation("GF2", f"parts of {body.key} do not cover the vector")
        if body.key.channel.startswith("train/"):
            right = self.states[body.key.channel][body.key.round].state_hash
            if right != body.state_hash:
                world.violation("OS1", f"{body.key} pins a wrong state hash")
        self.opened[body.key] = body

    def _set(self, world: World, body: e.RoundSet) -> None:
        opened = self.opened[body.key]
        weights = [self._weight(world, body.key, opened, c.index) for c in body.coefficients]
        total = math.fsum(weights)
        for item, weight in zip(body.coefficients, weights, strict=True):
            if not (0.0 <= item.value <= 1.0) or abs(item.value - weight / total) > 1e-6:
                world.violation("AR4", f"coefficients of {body.key}: {body.coefficients}")
        if len(body.coefficients) < len(opened.contributors):
            world.seen["round:partial"] += 1
        self.chosen[body.key] = body

    def _weight(self, world: World, key: RoundKey, opened: e.RoundOpened, index: int) -> float:
        """Samples, less the discount of one that is late by the mode of the round (08 §2.8)."""
        item = opened.contributors[index]
        if key.channel not in self.states:
            return item.samples
        usual = 0 if self._mode(key.round) == "off" else 1
        late = max(0, key.round - item.base_round - usual)
        world.seen[f"late:{min(late, 2)}"] += 1
        age = self.truth.contributions[item.root].age
        return float(item.samples / np.sqrt(1 + late) / (1 + age))

    def _mode(self, round_number: int) -> str:
        return [mode for first, mode in self.modes if first <= round_number][-1]

    def _committed(self, world: World, body: e.RoundCommitted) -> None:
        key = body.key
        known = self.committed.get((key.channel, key.round))
        if known is not None and known != body.root:
            world.violation("AR1", f"two outcomes of {key.channel} round {key.round}")
        self.committed[key.channel, key.round] = body.root
        self.keys[key.channel, key.round] = key
        world.seen["round:group" if key.channel.startswith("group/") else "round:train"] += 1
        if key.attempt:
            world.seen["round:later-attempt"] += 1
        root, mean = self._recompute(world, key)
        if root != body.root:
            world.violation("AR2", f"the result of {key} is not the sum of its set")
        if key.channel in self.states:
            self._advance(world, key, mean)

    def _recompute(self, world: World, key: RoundKey) -> tuple[bytes, F32]:
        """The reference: root of the encoded result, and its decoded values f32[n]."""
        opened, chosen = self.opened[key], self.chosen[key]
        codec_in, codec_out = get_codec(opened.scatter_codec), get_codec(opened.gather_codec)
        mean = np.zeros(opened.values, np.float32)
        leaves = []
        for item in chosen.coefficients:
            root = opened.contributors[item.index].root
            if root in self.counted:
                world.violation("AR3", f"{key} counts a contribution of {self.counted[root]}")
            if root in self.returned:
                world.violation("AR3", f"{key} counts what was {self.returned[root]}")
            self.counted[root] = key
            if key.channel in self.states:
                member = opened.contributors[item.index].member
                self.served[member] = self.served.get(member, 0) + 1
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

    def _advance(self, world: World, key: RoundKey, mean: F32) -> None:
        states = self.states[key.channel]
        if len(states) != key.round + 1:
            world.violation("OS2", f"{key} committed after {len(states) - 1} rounds")
        before = states[-1]
        lr, beta = self._outer(key.round)
        momentum: F32 = np.asarray(beta * before.momentum + mean, np.float32)
        step = lr * (mean + beta * momentum)
        theta: F32 = np.asarray(before.theta - step, np.float32)
        states.append(self._reference(key.channel, key.round + 1, theta, momentum))

    def _outer(self, round_number: int) -> tuple[np.float32, np.float32]:
        """The outer step of a round, by the table of the specification for runs without end."""
        lr, beta = {"off": 0.7, "eager": 0.4}[self._mode(round_number)], 0.9
        named = self.run_keys.outer_lr, self.run_keys.outer_momentum
        lr = lr if named[0] is None else named[0]
        return np.float32(lr), np.float32(beta if named[1] is None else named[1])

    def _changed(self, world: World, body: e.ConfigChanged) -> None:
        world.seen[f"overlap:{body.value}"] += 1
        begun = [
            key.round
            for key in self.opened
            if key.channel in self.states and key.generation == self.generation
        ]
        if self.run_keys.overlap != "auto" or any(number >= body.at_round for number in begun):
            world.violation("CF1", f"{body} is for rounds that were opened before it")
        self.modes.append((body.at_round, body.value))

    def _reference(self, channel: str, round_number: int, theta: F32, momentum: F32) -> _Reference:
        leaves = [leaf_hash(header_chunk(channel, round_number, theta.size))]
        for first in range(0, theta.size, self.chunk_values):
            part = slice(first, first + self.chunk_values)
            leaves.append(leaf_hash(theta[part].tobytes() + momentum[part].tobytes()))
        raw = theta.tobytes() + momentum.tobytes()
        return _Reference(theta, momentum, merkle_root(leaves), raw)

    # --- events of sites -------------------------------------------------------------------------

    def emitted(self, world: World, host: Host, event: object) -> None:
        super().emitted(world, host, event)
        if isinstance(event, fx.StateAdvanced):
            self._state(world, host, event)
        elif isinstance(event, fx.ContributionDecided):
            self._decided(world, host, event)
        elif isinstance(event, fx.GroupDone):
            if self.committed.get((event.key.channel, event.key.round)) != event.root:
                world.violation("AR1", f"{host.name} has another result of {event.key}")
            world.seen["group:done"] += 1
        elif isinstance(event, fx.Resync):
            world.seen["resync:" + event.reason.rstrip("0123456789 ")] += 1
        elif isinstance(event, fx.Notice):
            self._notice(world, host, event)
        elif isinstance(event, PeerFault):
            world.violation("honest", f"{host.name} accuses an honest site: {event!r}")

    def _notice(self, world: World, host: Host, event: fx.Notice) -> None:
        """All sites are honest here; only chunks are spoilt, on their way, by the world itself."""
        fields = event.fields
        what = fields.get("fault") or fields.get("what") or fields.get("reason") or ""
        world.seen[f"notice:{event.name}:{what}"] += 1
        if event.name == "peer_fault" and what != "corrupt_chunk":
            world.violation("honest", f"{host.name} accuses an honest site: {event}")

    def _state(self, world: World, host: Host, event: fx.StateAdvanced) -> None:
        states = self.states[event.channel]
        if event.round >= len(states):
            world.violation("OS1", f"{host.name} is at round {event.round} of {event.channel}")
        flipped = (host.name, event.channel) in world.trouble.flipped  # see ``flips``
        if states[event.round].state_hash != event.state_hash and not flipped:
            world.violation("OS1", f"{host.name} has another state before round {event.round}")

    def _decided(self, world: World, host: Host, event: fx.ContributionDecided) -> None:
        world.seen["decided:" + event.outcome] += 1
        counted = self.counted.get(event.root)
        if event.outcome == "committed":
            if counted != event.key:
                world.violation("AR3", f"{host.name}: {event.key} is said to count, but does not")
            chosen, opened = self.chosen[event.key], self.opened[event.key]
            mine = [
                c.value
                for c in chosen.coefficients
                if opened.contributors[c.index].root == event.root
            ]
            if mine != [event.coefficient]:
                world.violation("AR4", f"{host.name} is told {event.coefficient}, log: {mine}")
            return
        if counted is not None:
            world.violation("AR3", f"{host.name} gets back what {counted} counts")
        self.returned[event.root] = event.outcome

    def always(self, world: World, host: Host) -> None:
        """AR6: whatever a site holds, it is a state that the log made."""
        node = host.node
        if node.core.ledger.model is None:
            return  # what a site proposes is not the model yet
        for channel, state in node.plane.states.items():
            known = self.states.get(channel)
            if known is None:
                continue
            if state.round >= len(known):
                continue  # its commit is applied here before anybody has emitted it
            right = known[state.round]
            same = right.raw == state.theta.tobytes() + state.slots["momentum"].tobytes()
            flipped = (host.name, channel) in world.trouble.flipped  # see ``flips``
            told = node.core.catchup.tracks[channel].state_hash is not None
            if not same and not flipped and told:
                world.violation("AR6", f"{host.name} changed its state of round {state.round}")
