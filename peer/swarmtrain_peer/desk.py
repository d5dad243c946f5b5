"""Serves the trainer of this site: attach, θ⁰, hand-overs, decisions, evaluation, the end.

The calls are listed in ``swarmtrain/training/port.py``; values and decisions are in shared memory.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from swarmtrain_peer import host
from swarmtrain_peer.budget import check_memory
from swarmtrain_peer.controlserver import ControlConnection
from swarmtrain_peer.figures import Figures
from swarmtrain_peer.memo import Sent, read_memo
from swarmtrain_peer.model import log_model
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_peer.shard_desk import claiming
from swarmtrain_peer.site import write_private
from swarmtrain_peer.tempo import tempo_of
from swarmtrain_peer.trainer_port import TrainerPort
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.changes import inner_step
from swarmtrain_protocols.errors import LocalProtocolError, QuorumLost, RunMismatch, SwarmError
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages import RoundKey
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.member import Offer
from swarmtrain_protocols.state import CanonicalState

Document = dict[str, Any]

STATE_TIMEOUT_S = 600.0
UNDECIDED_TIMEOUT_S = 120.0
EVALUATE_EVERY_ROUNDS = 5
END_TIMEOUT_S = 20.0


@dataclass(slots=True)
class _Flight:
    """A hand-over that is not decided yet, or decided and not told."""

    seq: int
    root: bytes = b""
    outcome: str = ""
    coefficient: float = 0.0
    need_round: int = 0
    told: bool = False
    key: RoundKey | None = None
    handed_s: float = math.nan
    encode_s: float = 0.0
    figures: Document = field(default_factory=dict)


class TrainerDesk:
    """One per peer process. All methods run on the loop's thread except the state hook."""

    def __init__(self, runtime: PeerRuntime, folder: Path) -> None:
        self._runtime = runtime
        self._port = TrainerPort(folder)
        self._memo_path = folder / "position.json"
        self._memo = read_memo(self._memo_path)
        self._memo_lock = asyncio.Lock()
        self._connections: list[ControlConnection] = []
        self._flights: dict[str, _Flight] = {}
        self._taking: list[asyncio.Task[Document]] = []
        self._turns: dict[str, asyncio.Lock] = {}
        self._ended = False
        self._dismissed = False
        self._schema_hash = b""
        self._layout: list[tuple[str, int]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.device = ""
        self.last_loss = math.nan
        self.steps = 0
        self.samples = 0.0
        self.blocked_s = 0.0
        self.attached_at_s = math.nan
        self.figures = Figures(runtime)
        runtime.listeners.append(self._on_core_event)
        runtime.state_hooks.append(self._on_state)

    # -- attach -------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return bool(self._connections)

    def utilization(self) -> float:
        """1 − blocked / wall since the first attach; 1 before."""
        wall = host.mono_s() - self.attached_at_s
        return 1.0 if not wall > 0 else max(0.0, 1.0 - self.blocked_s / wall)

    async def attach(self, args: Document, connection: ControlConnection) -> Document:
        """Map the shared memory, wait for the state, and say what there is to know.

        Raises:
            RunMismatch: another model than the run's. NoDevice: it does not fit into memory.
        """
        node = self._runtime.node
        schema_hash = bytes.fromhex(args["schema_hash"])
        layout = [(str(name), int(values)) for name, values in args["layout"]]
        await self._runtime.wait_member()
        self._check_model(schema_hash, layout)
        if not self._port.is_open:
            check_memory(sum(n for _, n in layout), self._runtime.manifest.keys)
        self._schema_hash, self._layout = schema_hash, layout
        path = self._port.open(schema_hash, layout)
        if node.ledger.model is not None:
            await self._wait_state([name for name, _ in layout])
        for state in list(self._runtime.data.states.values()):
            self._on_state(state)
        if connection not in self._connections:
            self._connections.append(connection)
            connection.on_close(partial(self._gone, connection))
        if math.isnan(self.attached_at_s):
            self.attached_at_s = host.mono_s()
        self.device = str(args.get("device", ""))
        self._runtime.events.emit("trainer_attached", ranks=1, device=self.device)
        self._runtime.driver.run(node.set_training, True)
        self._runtime.driver.run(node.finished, False)
        return self._attached(path, args)

    def _check_model(self, schema_hash: bytes, layout: list[tuple[str, int]]) -> None:
        model = self._runtime.node.ledger.model
        if model is None:
            return
        mine = [(item.channel, item.values) for item in model.layout]
        if model.schema_hash != schema_hash or mine != layout:
            raise RunMismatch(
                "this model is not the run's model",
                "the list of (name, shape, dtype) differs",
                "train with the script and the versions that the founder used",
            )

    async def _wait_state(self, channels: list[str]) -> None:
        await self._wait(
            lambda: all(
                c in self._runtime.data.states and self._runtime.node.catchup.in_step(c)
                for c in channels
            ),
            STATE_TIMEOUT_S,
            "the state did not arrive",
        )

    async def _wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        if not await self._runtime.until(condition, timeout_s):
            raise QuorumLost(what, f"waited {timeout_s:g} s", "is a state holder connected?")

    def _attached(self, path: str, args: Document) -> Document:
        runtime, node = self._runtime, self._runtime.node
        run = msgspec.to_builtins(runtime.keys_at())
        outer = runtime.outer_at()
        run |= {"overlap": outer.overlap, "outer_lr": outer.lr, "outer_momentum": outer.momentum}
        outcomes = {
            channel: found
            for channel, seq in dict(args.get("in_flight") or {}).items()
            if (found := self._known_outcome(channel, int(seq))) is not None
        }
        return {
            "shm": path,
            "run": run,
            "rounds": {c: s.round for c, s in runtime.data.states.items()},
            "need_theta0": node.ledger.model is None,
            "site": node.me.hex(),
            "ordinal": node.ledger.members[node.me].ordinal,
            "next_position": self._memo.next_position,
            "members": [m.id.hex() for m in node.ledger.ordered_members()],
            "outcomes": outcomes,
            "tempo": tempo_of(node.ledger),
        }

    def _known_outcome(self, channel: str, seq: int) -> Document | None:
        """What became of a hand-over that a trainer waits for, in this life or the one before."""
        flight = self._flights.get(channel)
        if flight is not None:
            if flight.seq != seq or not flight.told:
                return None
            outcome, coefficient = flight.outcome, flight.coefficient
        else:
            node = self._runtime.node
            found = self._memo.outcome(channel, seq, node.ledger.channels.get(channel), node.me)
            if found is None:
                return None
            outcome, coefficient = found
        state = self._runtime.data.states[channel]
        return {
            "seq": seq,
            "outcome": outcome,
            "coefficient": coefficient,
            "round": state.round,
        }

    def _gone(self, connection: ControlConnection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            if not self._connections:
                self._runtime.events.emit("trainer_lost", reason="its connection closed")
                self._runtime.driver.run(self._runtime.node.set_training, False)

    async def detach(self, connection: ControlConnection) -> Document:
        """The trainer ends: its planned steps are done, or it was told to stop."""
        if connection in self._connections:
            self._connections.remove(connection)
        self._runtime.changed()
        self._runtime.driver.run(self._runtime.node.set_training, False)
        if not self._dismissed:
            self._runtime.driver.run(self._runtime.node.finished, True)
        return {}

    async def dismiss(self, timeout_s: float, hurry: Callable[[], bool]) -> None:
        """This site leaves: ask the trainer to end, which does not mean that its work is done."""
        self._dismissed = True
        self._stop_trainers("this site leaves the run")
        await self._runtime.until(lambda: not self._connections or hurry(), timeout_s)

    def _stop_trainers(self, reason: str) -> None:
        if self._port.is_open:
            self._port.set_should_stop(reason)
        for connection in self._connections:
            connection.push({"event": "run_ended", "reason": reason})

    async def finished(self) -> Document:
        """All planned steps are done; the trainer stays to evaluate until it is told to stop."""
        self._runtime.driver.run(self._runtime.node.set_training, False)
        self._runtime.driver.run(self._runtime.node.finished, True)
        return {}

    # -- θ⁰ -----------------------------------------------------------------------------------

    async def define(self, args: Document) -> Document:
        """Offer this trainer's initial weights as the run's; another member's may win."""
        runtime = self._runtime
        states: list[CanonicalState] = []
        loop = asyncio.get_running_loop()
        for channel, seq in sorted(dict(args["seqs"]).items()):
            theta = self._port.handover(channel, int(seq))
            if theta is None:
                raise LocalProtocolError("torn initial weights", channel, "define again")
            state = runtime.data.new_state(channel, 0, theta.size)
            state.theta[:] = theta
            self._port.release(channel)
            await loop.run_in_executor(runtime.pool, state.root)
            states.append(state)
        order = [name for name, _ in self._layout]
        states.sort(key=lambda s: order.index(s.channel))
        body = e.ModelDefined(
            self._schema_hash,
            tuple(e.ChannelLayout(s.channel, s.theta.size) for s in states),
            tuple(s.root() for s in states),
            runtime.node.me,
        )
        await log_model(runtime, body)
        model = runtime.node.ledger.model
        assert model is not None
        if model.roots == body.roots and model.schema_hash == body.schema_hash:
            for state in states:
                if state.channel not in runtime.data.states:
                    runtime.data.states[state.channel] = state
                    if runtime.keeper is not None:
                        runtime.keeper.advanced(state)
                    self._on_state(state)
                    runtime.driver.run(runtime.node.restore, state.channel, 0, state.root())
        self._check_model(body.schema_hash, [(i.channel, i.values) for i in body.layout])
        await self._wait_state([s.channel for s in states])
        return {}

    # -- hand-overs ---------------------------------------------------------------------------

    async def handover(self, args: Document) -> Document:
        """Encode and announce a pseudo-gradient that stands in shared memory.

        What was handed over whole counts, even if the trainer dies before it hears the answer.
        """
        taking = asyncio.ensure_future(self._take_once(args))
        self._taking.append(taking)
        taking.add_done_callback(self._taken)
        return await asyncio.shield(taking)

    async def _take_once(self, args: Document) -> Document:
        """One at a time per channel: a repeat of the same hand-over finds it taken."""
        channel, seq = str(args["channel"]), int(args["seq"])
        async with self._turns.setdefault(channel, asyncio.Lock()):
            flight = self._flights.get(channel)
            if flight is None or flight.seq != seq:
                await self._take(channel, seq, args)
        return {}

    def _taken(self, taking: asyncio.Task[Document]) -> None:
        self._taking.remove(taking)
        if not taking.cancelled():
            taking.exception()  # told to whoever called, if anybody still listens

    async def _take(self, channel: str, seq: int, args: Document) -> None:
        runtime = self._runtime
        await self._wait(
            lambda: runtime.node.member.undecided(channel) is None,
            UNDECIDED_TIMEOUT_S,
            "the contribution before this one is not decided",
        )
        started = host.mono_s()
        codec = runtime.manifest.keys.codec_scatter
        blob, nvalues = await self._encode(channel, seq, codec)
        flight = _Flight(seq, blob.root, handed_s=started, figures=dict(args))
        self._flights[channel] = flight
        self._account(args)
        self._memo.sent[channel] = Sent(seq, blob.root.hex(), runtime.node.ledger.index)
        flight.encode_s = host.mono_s() - started
        await self._remember()
        runtime.events.emit(
            "handover",
            channel=channel,
            samples=args["samples"],
            inner_steps=args["steps"],
            blocked_s=args.get("blocked_s", 0.0),
            compute_s=args.get("phase_s", 0.0),
            base_round=args["base_round"],
        )
        runtime.events.emit(
            "contribution_ready",
            channel=channel,
            samples=args["samples"],
            bytes=blob.nbytes,
            encode_s=round(flight.encode_s, 6),
        )
        samples, base_round = float(args["samples"]), int(args["base_round"])
        state = runtime.data.states.get(channel)
        if state is not None and base_round > state.round:  # the run was rewound meanwhile
            runtime.data.drop(blob.root)
            key = RoundKey(runtime.node.ledger.generation, channel, state.round, 0)
            self._decided(fx.ContributionDecided(channel, blob.root, "aborted", 0.0, key))
            return
        phase_s = runtime.keys_at().inner_steps / len(self._layout) * float(args.get("step_s", 0.0))
        more = base_round, 0, phase_s, flight.encode_s
        offer = Offer(channel, blob.root, nvalues, codec, samples, *more)
        runtime.driver.run(runtime.node.contribute, claiming(offer, args))

    async def _remember(self) -> None:
        """Make the memo durable; a sync may take long, so not on the loop."""
        async with self._memo_lock:
            write = partial(write_private, self._memo_path, msgspec.json.encode(self._memo))
            # A full disk is told; the next hand-over tries again.
            attempt = partial(self._runtime.alarm.attempt, "position", write)
            await asyncio.get_running_loop().run_in_executor(self._runtime.pool, attempt)

    async def _encode(self, channel: str, seq: int, codec: str) -> tuple[Blob, int]:
        """Read hand-over ``seq`` from its slot; returns the encoded chunks and how many values.

        Raises:
            LocalProtocolError: torn, or not finite.
        """
        values = self._port.handover(channel, seq)
        torn = LocalProtocolError("torn hand-over", f"{channel} {seq}", "hand over again")
        if values is None:
            raise torn
        runtime, loop = self._runtime, asyncio.get_running_loop()
        try:
            blob: Blob = await loop.run_in_executor(
                runtime.pool, runtime.data.encode, values, codec
            )
        finally:
            whole = self._port.side.intact(channel, seq)
            self._port.release(channel)
        if not whole:
            runtime.data.drop(blob.root)
            raise torn
        return blob, values.size

    def _account(self, args: Document) -> None:
        if args["channel"] == self._layout[0][0]:  # every fragment tells of the same steps
            self.steps += int(args["steps"])
            self.samples += float(args["samples"])
        self.blocked_s += float(args.get("blocked_s", 0.0))
        if args.get("loss") is not None:
            self.last_loss = float(args["loss"])
        if args.get("next_position") is not None:
            self._memo.next_position = int(args["next_position"])

    # -- what the cores report ------------------------------------------------------------------

    def _on_core_event(self, event: object) -> None:
        if isinstance(event, fx.ContributionDecided):
            self._decided(event)
        elif isinstance(event, fx.StateAdvanced):
            self._tell(event.channel)
            self._maybe_evaluate(event)
        elif isinstance(event, LedgerChanged):
            for _, body, accepted in event.entries:
                if accepted and isinstance(body, e.RunEnded) and not self._ended:
                    self._ended = True
                    self._tasks.append(asyncio.ensure_future(self._end(body.reason)))

    def _decided(self, event: fx.ContributionDecided) -> None:
        flight = self._flights.get(event.channel)
        if flight is None or flight.root != event.root:
            return
        flight.outcome, flight.coefficient = event.outcome, event.coefficient
        channel = self._runtime.node.ledger.channels[event.channel]
        flight.need_round = channel.round if event.outcome != "aborted" else 0
        flight.key = event.key
        self._tell(event.channel)

    def _tell(self, channel: str) -> None:
        """Show a decision, but not before the θ that it made."""
        flight = self._flights.get(channel)
        if flight is None or not flight.outcome or flight.told:
            return
        state = self._runtime.data.states.get(channel)
        reached = state.round if state is not None else 0
        if reached < flight.need_round:
            return
        flight.told = True
        self._port.decided(channel, flight.seq, flight.outcome, flight.coefficient, reached)
        self._report(flight)
        decided = {"event": "decided", "channel": channel, "seq": flight.seq, "round": reached}
        for connection in self._connections:
            connection.push(decided | tempo_of(self._runtime.node.ledger))

    def _report(self, flight: _Flight) -> None:
        given, key = flight.figures, flight.key
        assert key is not None, "an outcome came with its round"
        figures = {
            "compute_s": round(float(given.get("phase_s", 0.0)), 6),
            "wait_s": round(float(given.get("blocked_s", 0.0)), 6),
            "encode_s": round(flight.encode_s, 6),
            "samples": given.get("samples"),
            "loss": given.get("loss"),
            "compute_utilization": round(self.utilization(), 6),
        }
        self.figures.report(key, flight.outcome, figures, flight.handed_s)

    def _on_state(self, state: CanonicalState) -> None:
        """On a pool thread, while the state holds still."""
        if self._port.is_open:
            outer, keys = self._runtime.outer_at(state.round), self._runtime.keys_at(state.round)
            self._port.publish(state.channel, state.round, state.theta, outer, inner_step(keys))

    # -- evaluation and the end -------------------------------------------------------------------

    def _is_evaluator(self) -> bool:
        node = self._runtime.node
        linked = [*node.linked(), node.me]
        trainers = [m.id for m in node.ledger.ordered_members() if m.trains and m.id in linked]
        return self.attached and bool(trainers) and trainers[0] == node.me

    def _maybe_evaluate(self, event: fx.StateAdvanced) -> None:
        due = event.round == 1 or event.round % EVALUATE_EVERY_ROUNDS == 0
        if due and event.caught_up and not self._ended and self._is_evaluator():
            self._push_evaluate(event.round)

    def _push_evaluate(self, round_number: int) -> None:
        if not self.figures.has_loss(round_number):
            for connection in self._connections[:1]:
                connection.push({"event": "evaluate", "round": round_number})

    async def evaluated(self, args: Document) -> Document:
        """The trainer's loss of θ on the fixed held-out set."""
        self.figures.evaluated(int(args["round"]), float(args["loss"]))
        return {}

    async def _end(self, reason: str) -> None:
        """The run is over: evaluate the last θ once, then let the trainers go."""
        channels = self._runtime.node.ledger.train_channels()
        last = max((c.round for c in channels), default=0)
        try:
            await self._wait_state([c.name for c in channels if self._runtime.settings.holds_state])
            if last and self._is_evaluator():
                self._push_evaluate(last)
            if last and self.attached:
                await self._wait(
                    lambda: self.figures.has_loss(last), END_TIMEOUT_S, "no final evaluation"
                )
        except SwarmError as error:
            self._runtime.events.emit("fallback", what="final evaluation", why=str(error))
        self._stop_trainers(reason)

    @property
    def over(self) -> bool:
        """The run has ended and the trainer is gone."""
        return self._ended and not self._connections and all(task.done() for task in self._tasks)

    async def beat(self) -> None:
        """Show the trainer that this process lives, for ever."""
        while True:
            self._port.beat(int(host.mono_s() * 1e9))
            await asyncio.sleep(0.5)

    def close(self) -> None:
        for task in (*self._tasks, *self._taking):
            task.cancel()
        self.figures.close()
        self._port.close()
