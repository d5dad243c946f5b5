"""What the control socket of a peer process answers: trainers, the command line, the dashboard."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.controlserver import ControlConnection
from swarmtrain_peer.desk import TrainerDesk
from swarmtrain_peer.librarian import Librarian
from swarmtrain_peer.orders import access_document, give_order
from swarmtrain_peer.progress import is_behind
from swarmtrain_peer.rollback import held
from swarmtrain_peer.runtime import PeerRuntime, total_bytes
from swarmtrain_peer.shard_desk import ShardDesk
from swarmtrain_peer.stage_life import StageLife
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import (
    CheckpointError,
    ConfigError,
    NotAuthorised,
    SwarmError,
)
from swarmtrain_protocols.ledger import ChannelState, Member
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.tickets import Capability, Ticket, sign_capability

Document = dict[str, Any]
Handler = Callable[[Document, ControlConnection], Awaitable[Document]]

ROUNDS_LISTED = 64
TICKET_S = 7 * 24 * 3600
"""How long a ticket is good for if nobody says otherwise."""


Desk = TrainerDesk | StageLife


def _trainer_calls(desk: TrainerDesk) -> dict[str, Handler]:
    return {
        "attach": desk.attach,
        "define": lambda args, _: desk.define(args),
        "handover": lambda args, _: desk.handovers.handover(args),
        "evaluated": lambda args, _: desk.evaluated(args),
        "finished": lambda args, _: desk.finished(),
        "detach": lambda args, connection: desk.detach(connection),
    }


class Backend:
    """One per peer process; satisfies ``controlserver.ControlBackend``."""

    def __init__(
        self,
        runtime: PeerRuntime,
        desk: Desk,
        librarian: Librarian,
        stop: Callable[[bool], None],
    ) -> None:
        self._runtime = runtime
        self._desk = desk
        self._stop = stop
        self._opened: dict[tuple[str, int, int], float] = {}
        self._aborted: list[Document] = []
        self._decided: dict[tuple[str, int, int], float] = {}
        self._scalars_seen: dict[str, float] = {}
        self._calls: dict[str, Handler] = {
            "ping": self._ping,
            "status": self._status,
            "peers": self._peers,
            "rounds": self._rounds,
            "events": self._events,
            "leave": self._leave,
            "ticket": self._ticket,
            "tickets": self._tickets,
            "access": self._access,
            "states": self._states,
            "order": lambda args, _: give_order(runtime, args),
            "checkpoints": self._checkpoints,
            "curate": self._curate,
            "metrics": self._metrics,
            "corpus": lambda args, _: librarian.obtain(args),
            "scalars": self._scalars,
        }
        self._shards = ShardDesk(runtime) if runtime.manifest.keys.shards else None
        if isinstance(desk, TrainerDesk):
            self._calls |= _trainer_calls(desk)
        if self._shards is not None:
            self._calls["data"] = self._shards.data
        runtime.listeners.append(self._watch)

    def offer(self, calls: dict[str, Handler]) -> None:
        """Answer more calls."""
        self._calls |= calls

    async def call(self, name: str, args: Document, connection: ControlConnection) -> Document:
        """Answer one call.

        Raises:
            SwarmError: becomes the error of the answer.
        """
        handler = self._calls.get(name)
        if handler is None:
            raise ConfigError(f"unknown call {name!r}", "this peer process does not know it", "")
        return await handler(args, connection)

    def _watch(self, event: object) -> None:
        """Times of rounds, as this site saw them.

        A round that comes opened and decided in one batch of entries is history: nobody here knows
        when it was.
        """
        if not isinstance(event, LedgerChanged):
            return
        now = host.wall_s()
        bodies = [body for _, body, accepted in event.entries if accepted]
        fresh = {body.key: body for body in bodies if isinstance(body, e.RoundOpened)}
        for key in fresh:
            self._opened[key.channel, key.round, key.attempt] = now
        for body in bodies:
            if not isinstance(body, e.RoundCommitted | e.RoundAborted):
                continue
            at = body.key.channel, body.key.round, body.key.attempt
            if body.key in fresh:
                del self._opened[at]
            else:
                self._decided[at] = now
            if isinstance(body, e.RoundAborted):
                self._aborted.append(
                    {"channel": at[0], "round": at[1], "attempt": at[2], "reason": body.reason}
                )
                del self._aborted[:-ROUNDS_LISTED]
        for table in (self._opened, self._decided):
            while len(table) > 4 * ROUNDS_LISTED:
                del table[next(iter(table))]

    async def _ping(self, args: Document, connection: ControlConnection) -> Document:
        return {}

    async def _status(self, args: Document, connection: ControlConnection) -> Document:
        runtime, desk = self._runtime, self._desk
        node, ledger, stats = runtime.node, runtime.node.ledger, runtime.transport.stats
        followed, outer = node.catchup.followed(), runtime.outer_at()
        return {
            "run": runtime.settings.run.hex(),
            "name": runtime.manifest.keys.name,
            "site": node.me.hex(),
            "site_name": runtime.settings.name,
            "generation": ledger.generation,
            "term": node.log.term,
            "leader": node.log.leader.hex() if node.log.leader else None,
            "is_leader": node.log.is_leader,
            "stewards": [v.hex() for v in ledger.voters],
            "members": len(ledger.members),
            "connected": len(node.linked()),
            "channels": {c.name: self._channel(c) for c in ledger.channels.values()},
            "syncing": any(is_behind(node, name) for name in followed)
            if runtime.settings.holds_state
            else False,
            "loss": desk.figures.loss(),
            "train_loss": None if desk.last_loss != desk.last_loss else desk.last_loss,
            "rounds_committed": ledger.rounds_committed,
            "rounds_aborted": ledger.rounds_aborted,
            "bytes_sent": total_bytes(stats, "sent"),
            "bytes_received": total_bytes(stats, "received"),
            "ended": ledger.ended or None,
            "paused": ledger.paused or None,
            "disk_full": list(runtime.alarm.failing),
            "rates": dict(
                zip(("up_bytes_per_s", "down_bytes_per_s"), runtime.rates.bytes_per_s, strict=True)
            ),
            "clock_off_s": round(runtime.time.wall.off_s, 1),
            "founder": ledger.founder.hex(),
            "is_founder": runtime.founder_key() is not None,
            "changes": [
                {"at_round": first, "key": key, "value": value}
                for first, key, value in sorted(ledger.changes)
            ],
            "overlap": outer.overlap,
            "overlap_key": runtime.manifest.keys.overlap,
            "outer_lr": outer.lr,
            "outer_momentum": outer.momentum,
            "trainer": {
                "attached": desk.attached,
                "device": desk.device,
                "step": desk.steps,
                "samples": desk.samples,
                "compute_utilization": desk.utilization(),
            },
            "listen": list(runtime.addresses),
            **runtime.outreach.document(),
            "scalars": dict(self._scalars_seen),
            **({"data": self._shards.document()} if self._shards is not None else {}),
            **self._pipeline(),
        }

    def _pipeline(self) -> Document:
        desk = self._desk
        return {"pipeline": desk.board.document()} if isinstance(desk, StageLife) else {}

    def _channel(self, channel: ChannelState) -> Document:
        track = self._runtime.node.catchup.tracks.get(channel.name)
        phase = "waiting"
        if channel.open is not None:
            phase = "exchange" if channel.chosen is None else "deciding"
        state_hash = track.state_hash.hex() if track is not None and track.state_hash else None
        return {
            "round": channel.round,
            "attempt": channel.attempt,
            "phase": phase,
            "state_round": track.round if track is not None else None,
            "state_hash": state_hash,
            "values": channel.values,
        }

    async def _peers(self, args: Document, connection: ControlConnection) -> Document:
        node = self._runtime.node
        return {"peers": [self._peer(m) for m in node.ledger.ordered_members()]}

    def _peer(self, member: Member) -> Document:
        node = self._runtime.node
        last = self._desk.figures.last_of(member.id)
        desk = self._desk
        return {
            "id": member.id.hex(),
            "name": member.name,
            "addresses": list(member.addresses),
            "trains": member.trains,
            "votes": member.id in node.ledger.voters,
            "may_vote": node.ledger.may_vote(member.id),
            "holds_state": member.holds_state,
            "reachable": member.reachable,
            **self._runtime.outreach.path(PeerId(member.id), member.reachable),
            "role": member.role,
            "ticket": member.ticket.hex() or None,
            "connected": member.id == node.me or PeerId(member.id) in node.linked(),
            "is_self": member.id == node.me,
            "is_leader": member.id == node.log.leader,
            "round": last.get("round"),
            "last_report_age_s": host.mono_s() - last["mono_s"] if last else None,
            "metrics": {k: v for k, v in last.items() if k not in ("id", "mono_s")},
            **(self._shards.of_member(member.id) if self._shards is not None else {}),
            **(desk.board.of_member(member.id) if isinstance(desk, StageLife) else {}),
        }

    async def _rounds(self, args: Document, connection: ControlConnection) -> Document:
        last = min(int(args.get("last") or 20), ROUNDS_LISTED)
        found: list[Document] = []
        desk, ledger = self._desk, self._runtime.node.ledger
        moved = desk.figures.bytes_by_attempt()
        steps = isinstance(desk, StageLife) and ledger.pipeline.mode == "sync"
        for channel in ledger.channels.values():
            # Where all stages step together, a step is listed and not a round of every stage.
            if not (steps and channel.holds_state):
                found += self._channel_rounds(channel)
        if isinstance(desk, StageLife) and steps:
            found += desk.board.steps.documents(ledger)
        found += [
            item | {"outcome": "aborted", "contributors": [], "root": None} | self._times(item)
            for item in self._aborted
        ]
        found.sort(key=lambda r: (r["opened_wall_s"] or 0.0, r["round"], r["attempt"]))
        for item in found:
            item["bytes"] = moved.get((item["channel"], item["round"], item["attempt"]), 0)
        return {"rounds": found[-last:]}

    def _times(self, item: Document) -> Document:
        key = (item["channel"], item["round"], item["attempt"])
        return {
            "opened_wall_s": self._opened.get(key),
            "decided_wall_s": self._decided.get(key),
        }

    def _channel_rounds(self, channel: ChannelState) -> list[Document]:
        found: list[Document] = []
        for outcome in channel.history:
            item: Document = {
                "channel": channel.name,
                "round": outcome.round,
                "attempt": outcome.attempt,
                "outcome": "committed",
                "reason": "",
                "contributors": [
                    {"id": member.hex(), "samples": samples, "coefficient": coefficient}
                    for member, samples, coefficient in outcome.contributors
                ],
                "root": outcome.root.hex(),
                "state_hash_before": outcome.state_hash.hex(),
            }
            found.append(item | self._times(item))
        if channel.open is not None:
            item = {
                "channel": channel.name,
                "round": channel.round,
                "attempt": channel.attempt,
                "outcome": "open",
                "reason": "",
                "contributors": [
                    {"id": c.member.hex(), "samples": c.samples, "coefficient": None}
                    for c in channel.open.contributors
                ],
                "root": None,
            }
            found.append(item | self._times(item))
        return found

    async def _events(self, args: Document, connection: ControlConnection) -> Document:
        events = self._runtime.events
        if args.get("follow"):
            loop = asyncio.get_running_loop()

            def push(record: Document) -> None:
                loop.call_soon_threadsafe(connection.push, {"event": "event", "record": record})

            connection.on_close(events.subscribe(push))
        last = args.get("last")
        found = events.query(
            since_seq=int(args.get("since_seq") or 0), last=None if last is None else int(last)
        )
        return {"events": found[-2000:]}

    async def _leave(self, args: Document, connection: ControlConnection) -> Document:
        self._runtime.events.emit("leaving", now=bool(args.get("now")))
        self._stop(bool(args.get("now")))
        return {}

    async def _ticket(self, args: Document, connection: ControlConnection) -> Document:
        """A ticket that points here; a new capability where the founder's key is at hand."""
        settings = self._runtime.settings
        vote, role = bool(args.get("vote")), str(args.get("role") or "trainer")
        founder = self._runtime.founder_key()
        given_s = args.get("expires_s")
        expires_s = TICKET_S if given_s is None else int(given_s)
        if founder is not None:
            if role not in ("trainer", "observer", "seed"):
                raise ConfigError(f"role {role!r}", "no such role", "trainer, observer or seed")
            capability = Capability(
                host.entropy(8),
                settings.run,
                role,  # type: ignore[arg-type]  # checked above
                vote,
                int(host.wall_s()) + expires_s if expires_s else 0,
                int(args.get("uses") or 0),
            )
            secret = sign_capability(founder, capability)
            self._runtime.tickets.made(capability, host.wall_s(), str(args.get("note") or ""))
        elif settings.ticket is not None and not (vote or given_s or args.get("uses")):
            secret = settings.ticket.capability
        else:
            raise NotAuthorised(
                "only the founder's site makes tickets with other rights",
                "the founder's key is not here",
                "run `swarmtrain ticket create` where `swarmtrain up` was first run",
            )
        doors = self._runtime.outreach.doors()
        if not doors:
            why = "neither it nor another member has an address to put in a ticket"
            raise SwarmError("this site cannot be dialled", why)
        return {"ticket": str(Ticket(doors, settings.run, secret))}

    async def _tickets(self, args: Document, connection: ControlConnection) -> Document:
        return {"tickets": self._runtime.tickets.rows(self._runtime.node.ledger)}

    async def _access(self, args: Document, connection: ControlConnection) -> Document:
        return access_document(self._runtime.node.ledger)

    async def _states(self, args: Document, connection: ControlConnection) -> Document:
        found = await held(self._runtime)
        names = [c.name for c in self._runtime.node.ledger.train_channels()]
        return {
            "rounds": [
                {"round": number, "states": dict(zip(names, (r.hex() for r in roots), strict=True))}
                for number, roots in found.items()
            ]
        }

    async def _curate(self, args: Document, connection: ControlConnection) -> Document:
        keeper = self._runtime.keeper
        if keeper is None:
            raise CheckpointError("no checkpoints", "this site holds no state")
        number, keep = int(args.get("number") or 0), int(args.get("keep") or 0)
        work = partial(keeper.curate, str(args.get("action")), number, keep)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._runtime.disk_pool, work)

    async def _checkpoints(self, args: Document, connection: ControlConnection) -> Document:
        keeper = self._runtime.keeper
        if keeper is None:
            return {"checkpoints": [], "refused": []}
        loop = asyncio.get_running_loop()
        found, broken = await loop.run_in_executor(
            self._runtime.disk_pool, keeper.store.checkpoints
        )
        return {
            "checkpoints": [
                {
                    "number": c.number,
                    "path": str(c.path),
                    "channels": [
                        {"channel": x.channel, "round": x.round, "state_hash": x.root.hex()}
                        for x in c.entries
                    ],
                }
                for c in found
            ],
            "refused": [str(error) for error in broken],
        }

    async def _metrics(self, args: Document, connection: ControlConnection) -> Document:
        last = int(args.get("last") or 256)
        return {"members": self._desk.figures.rows(last)}

    async def _scalars(self, args: Document, connection: ControlConnection) -> Document:
        """Figures of the user's own; the newest of each name, shown in ``status``."""
        for name, value in list(dict(args.get("values") or {}).items())[:64]:
            self._scalars_seen[str(name)[:64]] = float(value)
        while len(self._scalars_seen) > 256:
            del self._scalars_seen[next(iter(self._scalars_seen))]
        return {}
