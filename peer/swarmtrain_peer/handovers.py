"""Hand-overs of this site's trainer: taken once each, encoded, announced, and their outcome told.

Values and decisions are in shared memory; what was handed over whole counts, even if the trainer
dies before it hears so, and what became of it is known to the trainer's and this process' next life
(``memo``).
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
from swarmtrain_peer.memo import Sent, read_memo
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_peer.shard_desk import claiming
from swarmtrain_peer.site import write_private
from swarmtrain_peer.trainer_port import TrainerPort
from swarmtrain_protocols.errors import LocalProtocolError, QuorumLost
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages import RoundKey
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.member import Offer

Document = dict[str, Any]

UNDECIDED_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Flight:
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


class HandOvers:
    """Those of one peer process, on the loop's thread.

    ``decided`` is called with what the trainer may be told: channel, the round of the θ that is
    shown by now, and the flight.
    """

    def __init__(
        self,
        runtime: PeerRuntime,
        port: TrainerPort,
        memo_path: Path,
        decided: Callable[[str, int, Flight], None],
    ) -> None:
        self._runtime = runtime
        self._port = port
        self._told = decided
        self._memo_path = memo_path
        self._memo = read_memo(memo_path)
        self._memo_lock = asyncio.Lock()
        self._flights: dict[str, Flight] = {}
        self._taking: list[asyncio.Task[Document]] = []
        self._turns: dict[str, asyncio.Lock] = {}
        self.channels: list[str] = []
        """Of the model, in its order."""
        self.last_loss = math.nan
        self.steps = 0
        self.samples = 0.0
        self.blocked_s = 0.0

    @property
    def next_position(self) -> int:
        """Where in its data the trainer goes on."""
        return self._memo.next_position

    def close(self) -> None:
        for task in self._taking:
            task.cancel()

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
        before = partial(runtime.node.member.undecided, channel)
        if not await runtime.until(lambda: before() is None, UNDECIDED_TIMEOUT_S):
            what = "the contribution before this one is not decided"
            why = f"waited {UNDECIDED_TIMEOUT_S:g} s"
            raise QuorumLost(what, why, "is a state holder connected?")
        started = host.mono_s()
        codec = runtime.manifest.keys.codec_scatter
        blob, nvalues = await self._encode(channel, seq, codec)
        flight = Flight(seq, blob.root, handed_s=started, figures=dict(args))
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
            self.decided(fx.ContributionDecided(channel, blob.root, "aborted", 0.0, key))
            return
        phase_s = (
            runtime.keys_at().inner_steps / len(self.channels) * float(args.get("step_s", 0.0))
        )
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
        if args["channel"] == self.channels[0]:  # every fragment tells of the same steps
            self.steps += int(args["steps"])
            self.samples += float(args["samples"])
        self.blocked_s += float(args.get("blocked_s", 0.0))
        if args.get("loss") is not None:
            self.last_loss = float(args["loss"])
        if args.get("next_position") is not None:
            self._memo.next_position = int(args["next_position"])

    def known_outcome(self, channel: str, seq: int) -> Document | None:
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

    def decided(self, event: fx.ContributionDecided) -> None:
        flight = self._flights.get(event.channel)
        if flight is None or flight.root != event.root:
            return
        flight.outcome, flight.coefficient = event.outcome, event.coefficient
        channel = self._runtime.node.ledger.channels[event.channel]
        flight.need_round = channel.round if event.outcome != "aborted" else 0
        flight.key = event.key
        self.tell(event.channel)

    def tell(self, channel: str) -> None:
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
        self._told(channel, reached, flight)
