"""Serves the trainer of this site: attach, θ⁰, hand-overs, decisions, evaluation, the end.

The calls are listed in ``swarmtrain/training/port.py``; values and decisions are in shared memory.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from swarmtrain_peer import host
from swarmtrain_peer.budget import check_memory
from swarmtrain_peer.controlserver import ControlConnection
from swarmtrain_peer.figures import Figures
from swarmtrain_peer.handovers import Flight, HandOvers
from swarmtrain_peer.model import log_model
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_peer.tempo import tempo_of
from swarmtrain_peer.trainer_port import TrainerPort
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.changes import inner_step
from swarmtrain_protocols.errors import LocalProtocolError, QuorumLost, RunMismatch, SwarmError
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.state import CanonicalState

Document = dict[str, Any]

STATE_TIMEOUT_S = 600.0
EVALUATE_EVERY_ROUNDS = 5
END_TIMEOUT_S = 20.0


class TrainerDesk:
    """One per peer process. All methods run on the loop's thread except the state hook."""

    def __init__(self, runtime: PeerRuntime, folder: Path) -> None:
        self._runtime = runtime
        self._port = TrainerPort(folder)
        self.handovers = HandOvers(runtime, self._port, folder / "position.json", self._decided)
        self._connections: list[ControlConnection] = []
        self._ended = False
        self._dismissed = False
        self._schema_hash = b""
        self._tasks: list[asyncio.Task[None]] = []
        self.device = ""
        self.attached_at_s = math.nan
        self.figures = Figures(runtime)
        runtime.listeners.append(self._on_core_event)
        runtime.state_hooks.append(self._on_state)

    # -- attach -------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return bool(self._connections)

    @property
    def steps(self) -> int:
        """Inner steps that were handed over."""
        return self.handovers.steps

    @property
    def samples(self) -> float:
        return self.handovers.samples

    @property
    def last_loss(self) -> float:
        """As the trainer told it last; not a number before."""
        return self.handovers.last_loss

    def utilization(self) -> float:
        """1 − blocked / wall since the first attach; 1 before."""
        wall = host.mono_s() - self.attached_at_s
        return 1.0 if not wall > 0 else max(0.0, 1.0 - self.handovers.blocked_s / wall)

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
        self._schema_hash, self.handovers.channels = schema_hash, [name for name, _ in layout]
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
            if (found := self.handovers.known_outcome(channel, int(seq))) is not None
        }
        return {
            "shm": path,
            "run": run,
            "rounds": {c: s.round for c, s in runtime.data.states.items()},
            "need_theta0": node.ledger.model is None,
            "site": node.me.hex(),
            "ordinal": node.ledger.members[node.me].ordinal,
            "next_position": self.handovers.next_position,
            "members": [m.id.hex() for m in node.ledger.ordered_members()],
            "outcomes": outcomes,
            "tempo": tempo_of(node.ledger),
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
        states.sort(key=lambda s: self.handovers.channels.index(s.channel))
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

    # -- what the cores report ------------------------------------------------------------------

    def _on_core_event(self, event: object) -> None:
        if isinstance(event, fx.ContributionDecided):
            self.handovers.decided(event)
        elif isinstance(event, fx.StateAdvanced):
            self.handovers.tell(event.channel)
            self._maybe_evaluate(event)
        elif isinstance(event, LedgerChanged):
            for _, body, accepted in event.entries:
                if accepted and isinstance(body, e.RunEnded) and not self._ended:
                    self._ended = True
                    self._tasks.append(asyncio.ensure_future(self._end(body.reason)))

    def _decided(self, channel: str, reached: int, flight: Flight) -> None:
        """Tell the trainer, and everybody what the round has cost here."""
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
        decided = {"event": "decided", "channel": channel, "seq": flight.seq, "round": reached}
        for connection in self._connections:
            connection.push(decided | tempo_of(self._runtime.node.ledger))

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
        for task in self._tasks:
            task.cancel()
        self.handovers.close()
        self.figures.close()
        self._port.close()
