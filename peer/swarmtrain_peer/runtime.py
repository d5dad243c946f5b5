"""One running peer: transport, node, data plane and disk, put together. Runs on one event loop.

``st.Peer`` runs it in a thread of the caller's process, ``process.py`` in a process of its own.
What serves a trainer is in ``desk.py``, what serves the control socket in ``backend.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.admission import admit, refused_error
from swarmtrain_peer.alarm import DiskAlarm
from swarmtrain_peer.arrivals import Arrivals
from swarmtrain_peer.contactsfile import ContactsFile
from swarmtrain_peer.driver import Driver
from swarmtrain_peer.enquiry import CONNECT_TIMEOUT_S, Enquiry
from swarmtrain_peer.events import EventLog
from swarmtrain_peer.halting import halting
from swarmtrain_peer.keeper import Keeper
from swarmtrain_peer.narrator import Narrator
from swarmtrain_peer.outreach import Outreach
from swarmtrain_peer.patience import Patience
from swarmtrain_peer.quorum import QuorumWatch
from swarmtrain_peer.recordfile import RecordFile
from swarmtrain_peer.roundclock import RoundClock
from swarmtrain_peer.settings import PeerSettings
from swarmtrain_peer.site import write_private
from swarmtrain_peer.siterate import SiteRate
from swarmtrain_peer.ticketbook import TicketBook
from swarmtrain_peer.timekeeper import Timekeeper
from swarmtrain_peer.transport import Transport
from swarmtrain_protocols import PROTOCOL_VERSION, codecs, limits
from swarmtrain_protocols.access import founder_of
from swarmtrain_protocols.changes import front, keys_at
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.entries import Rewound
from swarmtrain_protocols.errors import ConfigError, NoPeerReachable, SwarmError
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.manifest import Manifest, RunKeys, make_genesis
from swarmtrain_protocols.membership import SiteConfig
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.messages.session import Hello, Refused
from swarmtrain_protocols.node import NodeCore
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.schedule import OuterStep, outer_at
from swarmtrain_protocols.state import CanonicalState
from swarmtrain_protocols.tickets import Capability, Ticket, sign_capability

JOIN_TIMEOUT_S = 60.0
RECHECK_S = 0.5


class PeerRuntime:
    """A member of one run. ``on_core_event`` gets every event of the cores, on the loop."""

    def __init__(self, settings: PeerSettings, events: EventLog) -> None:
        self.settings = settings
        self.events = events
        self.alarm = DiskAlarm(events, settings.state or Path.cwd())
        self.node: NodeCore
        self.driver: Driver
        self.data: DataPlane
        self.keeper: Keeper | None = None
        self.clock = RoundClock()
        self.time = Timekeeper(events)
        self.rates = SiteRate(settings.caps_bytes_per_s)
        self.manifest: Manifest
        self.listeners: list[Callable[[object], None]] = []
        self.state_hooks: list[Callable[[CanonicalState], None]] = []
        self.metrics_listeners: list[Callable[[PeerId, bytes], None]] = []
        self.link_listeners: list[Callable[[PeerId], None]] = []
        self.on_node: Callable[[], None] = lambda: None  # the node is there, and did nothing yet
        self.failure: asyncio.Future[BaseException]
        self.archives: dict[bytes, None] = {}
        """Roots of large blobs of no round, such as the corpus: rounds go before them."""
        self.offer_listeners: list[Callable[[PeerId, mm.SnapshotOffer], None]] = []
        self.tickets = TicketBook(settings.tickets)
        self.arrivals = Arrivals(self)
        self._started = False
        self._changed = asyncio.Event()
        self._static_key = host.entropy(32)
        self._tasks: list[asyncio.Future[None]] = []
        self.pool = ThreadPoolExecutor(settings.threads, "swarmtrain-work")
        self.chunk_pool = ThreadPoolExecutor(settings.threads, "swarmtrain-chunk")
        self.disk_pool = ThreadPoolExecutor(1, "swarmtrain-disk")

    # -- start --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, find the run, join it. Returns once the node runs (membership may follow).

        Raises:
            NoPeerReachable, NotAuthorised, RunMismatch, VersionMismatch: as named.
        """
        s = self.settings
        self._loop = asyncio.get_running_loop()
        self.failure = self._loop.create_future()
        self.transport = Transport(
            keyring=s.keyring,
            static_key=self._static_key,
            entropy=host.entropy,
            hello=self._hello,
            admit=self._admit,
            handler=self.arrivals,
            provide=self.provide,
            threads=s.threads,
            caps_bytes_per_s=s.caps_bytes_per_s,
            donor_share=s.donor_share,
            yields=lambda root: self._started and self._yields(root),
        )
        if s.fast_kernels:
            self.chunk_pool.submit(codecs.use_numba, True)  # the disk is wanted at once
        enquiry = self.arrivals.enquiry = Enquiry(self.transport, s.run)
        self.outreach = Outreach(s, self.transport, self.events)
        bound = await self._listen()
        self.outreach.start((s.announce or host.announced(bound)) if bound else ())
        manifest = s.manifest or await enquiry.manifest(s.ticket, s.save_manifest)
        self.manifest = manifest
        if s.manifest is None:
            await self.outreach.first_verdict()
        self._make_node(manifest)
        self._contacts = ContactsFile(s.contacts, s.run, self.events)
        self._contacts.load(self.node.dht.book, host.wall_s())
        self._tasks.append(asyncio.ensure_future(self._contacts.keep(self.node.dht.book)))
        self.on_node()
        if self.keeper is not None:
            self.driver.pump()  # what the log says of a rewind comes before what the disk says
            await self.keeper.recover(self._restored, self.node.stored_earlier)
            for begun in self.keeper.begun():
                self.node.catchup.partly_here(*begun)
        self._started = True
        self.outreach.serve(self.node, self.driver.run)
        self.arrivals.begin()
        if s.ticket is not None and s.manifest is not None:
            self._dial_ticket(s.ticket)
        self.driver.run(self.node.tick)
        patience = Patience(self.node, self.transport, self.driver.run)
        self.time.changed = lambda now, wall_s: self.driver.run(self.node.dht.set_wall, wall_s)
        look = self.time.look
        self.quorum = QuorumWatch(self.node, self.events, self._on_event, patience, mono_s=look)
        self._tasks.append(asyncio.ensure_future(self.quorum.watch()))
        self.events.emit("peer_started", listen=",".join(self.outreach.addresses), version="0.1.0")

    async def _listen(self) -> str:
        """Bind, if port 0 is asked for then the port of an earlier life if it is still free."""
        wanted, memory = self.settings.listen, self.settings.port
        if not wanted.endswith(":0") or memory is None:
            try:
                return await self.transport.start(wanted)
            except OSError as error:
                raise ConfigError(f"cannot listen on {wanted}", str(error)) from None
        with contextlib.suppress(OSError, ValueError):
            port = int(memory.read_text())
            return await self.transport.start(f"{wanted.removesuffix(':0')}:{port}")
        bound = await self.transport.start(wanted)
        write_private(memory, bound.rpartition(":")[2].encode())
        return bound

    def _make_node(self, manifest: Manifest) -> None:
        s = self.settings
        keys = manifest.keys
        self.data = DataPlane(keys=keys, run=self.chunk_pool.map)
        records = RecordFile(s.records) if s.records is not None else None
        old = list(records.load()) if records is not None else []
        genesis = None
        if s.founder is not None and not old:
            genesis = make_genesis(s.founder, s.run, s.keyring.peer_id)
        site = SiteConfig(
            name=s.name,
            addresses=self.outreach.addresses,
            trains=s.trains,
            holds_state=s.holds_state,
            votes=s.votes,
            reachable=bool(self.outreach.addresses),
            capability=self.capability(),
            life=host.entropy(8),
        )
        self.narrator = Narrator(self.events)
        self.node = NodeCore(
            site=site,
            manifest=manifest,
            keyring=s.keyring,
            rng=random.Random(host.entropy(16)),
            now=self.time.now(),
            wall_s=self.time.wall_s(),
            records=old,
            genesis=genesis,
        )
        self.node.member.pace.bytes_per_s = self.rates.bytes_per_s
        if s.state is not None and s.holds_state:
            self.keeper = Keeper(
                s.state,
                data=self.data,
                snapshots=self.node.catchup.snapshots,
                events=self.events,
                alarm=self.alarm,
                disk=self.disk_pool,
                every_rounds=keys.checkpoint_every_rounds,
                kept=s.checkpoints_kept,
                replicas_min=keys.replicas_min,
            )
        self.driver = Driver(
            node=self.node,
            transport=self.transport,
            data=self.data,
            records=records,
            keeper=self.keeper,
            alarm=self.alarm,
            pool=self.pool,
            on_event=self._on_event,
            on_state=self._on_state,
            clock=self.clock,
            mono_s=self.time.now,
        )

    def outer_at(self, round_number: int | None = None) -> OuterStep:
        """Overlap mode and outer step of a round, by default of the newest."""
        ledger = self.node.ledger
        number = front(ledger) if round_number is None else round_number
        return outer_at(self.manifest.keys, ledger, number)

    def keys_at(self, round_number: int | None = None) -> RunKeys:
        """The run's keys in a round, by default in the newest, with what was changed in flight."""
        ledger = self.node.ledger
        number = front(ledger) if round_number is None else round_number
        return keys_at(self.manifest.keys, ledger, number)

    def capability(self) -> bytes:
        """The bearer's right to be a member: from the ticket, or the founder's own."""
        s = self.settings
        if s.ticket is not None:
            return s.ticket.capability
        founder = self.founder_key() or s.founder
        if founder is not None:
            return sign_capability(
                founder, Capability(host.entropy(8), s.run, "trainer", True, 0, 0)
            )
        return b""

    def founder_key(self) -> Ed25519Keyring | None:
        """The key that signs orders and tickets now, if this site has it.

        It is the one the run was founded with, or this site's own after a hand-over.
        """
        s = self.settings
        wanted = self.manifest.founder
        if self._started:
            wanted = founder_of(self.node.ledger, wanted)
        mine = [key for key in (s.founder, s.keyring) if key is not None]
        return next((key for key in mine if key.peer_id == wanted), None)

    def _dial_ticket(self, ticket: Ticket) -> None:
        """A restarted member dials the ticket's addresses besides those the log knows."""

        async def dial(address: str) -> None:
            try:
                await self.transport.connect_address(address, CONNECT_TIMEOUT_S)
            except SwarmError as error:
                self.events.emit("link_refused", reason=str(error), address=address)

        for address in ticket.addresses:
            if address not in self.outreach.addresses:
                self._tasks.append(asyncio.ensure_future(dial(address)))

    # -- identity and admission -----------------------------------------------------------------

    def _hello(self) -> Hello:
        return Hello(
            PROTOCOL_VERSION,
            self.settings.run,
            self.settings.name[: limits.NAME_CHARS_MAX],
            self.outreach.addresses,
            self.capability(),
            self.outreach.features,
            wall_s=int(host.wall_s()),
        )

    def _admit(self, peer: PeerId, hello: Hello) -> Refused | None:
        """Whom to talk to: members, and bearers of a capability of this run's founder."""
        if not self._started:
            return None  # still looking for the run: whoever was dialled is checked by the log
        if self.driver.stuck:
            return Refused("disk_full", "no space for the log")
        ledger = self.node.ledger
        run, founder = self.settings.run, self.manifest.founder
        return admit(ledger, peer, hello.capability, run, founder, self.time.wall_s())

    def provide(self, root: bytes) -> Blob | None:
        """Any blob this peer can serve: in memory, or a mapped result file."""
        if not self._started:
            return None
        blob = self.data.provide(root)
        return blob if self.keeper is None else self.keeper.provide(root, blob)

    def _yields(self, root: bytes) -> bool:
        """Whoever fetches it is catching up, and makes way for rounds."""
        if root in self.archives:
            return True
        return self.keeper is not None and self.keeper.is_history(root)

    # -- events of the core ---------------------------------------------------------------------

    def _on_event(self, event: object) -> None:
        if (error := halting(event, self.settings.records)) is not None:
            self.fail(error)
        self._changed.set()
        if isinstance(event, LedgerChanged) and self.keeper is not None:
            self.keeper.look(self.node.ledger)
            self.keeper.every_rounds = self.keys_at().checkpoint_every_rounds
            for _, body, accepted in event.entries:
                if accepted and isinstance(body, Rewound):
                    self.keeper.rewound(body)
        self.narrator.tell(self.node, event)
        for listener in list(self.listeners):
            listener(event)

    def fail(self, error: BaseException) -> None:
        """The process is to end with this; whoever started it may start it again."""
        if not isinstance(error, SwarmError):
            self.events.emit("internal_error", why=repr(error))
        if not self.failure.done():
            self.failure.set_result(error)

    def peer_fault(self, peer: PeerId | None, code: str, why: str) -> None:
        """Tell what is wrong with something that another one has said."""
        self.events.emit("peer_fault", peer=peer.hex() if peer else "", fault=code, why=why)

    def _on_state(self, channel: str) -> None:
        """A state holds still right after it advanced; called on a pool thread."""
        state = self.data.states[channel]
        for hook in self.state_hooks:
            hook(state)
        if self.keeper is not None:
            self.keeper.advanced(state)

    def _restored(self, state: CanonicalState) -> None:
        for hook in self.state_hooks:
            hook(state)
        self.driver.run(self.node.restore, state.channel, state.round, state.root())

    def adopt_state(self, state: CanonicalState) -> None:
        """Go on from a state that lay on this site's disk and that the log pins."""
        self.data.states[state.channel] = state
        self._restored(state)

    def send_metrics(self, body: bytes, only: PeerId | None = None) -> None:
        """Tell every linked member, or ``only`` one, this site's figures; at most 4 kB."""
        message = mm.Metrics(self.node.me, body)
        for peer in self.transport.connected_peers() if only is None else [only]:
            self.transport.send(peer, message)

    # -- membership -----------------------------------------------------------------------------

    async def wait_member(self, timeout_s: float = JOIN_TIMEOUT_S) -> None:
        """Wait until the log lists this node.

        Raises:
            NotAuthorised: refused. NoPeerReachable: nobody answered in time.
        """
        joiner = self.node.joiner
        await self.until(
            lambda: joiner.is_member or bool(joiner.refused) or self.failure.done(), timeout_s
        )
        if joiner.refused:
            raise refused_error(joiner.refused)
        if self.failure.done():
            raise self.failure.result()
        if not joiner.is_member:
            raise NoPeerReachable(
                "joining took too long", f"no answer in {timeout_s:g} s", "is a steward up?"
            )

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``condition`` holds; it is looked at after every event of the cores."""
        deadline = host.mono_s() + timeout_s
        while not condition():
            left = deadline - host.mono_s()
            if left <= 0:
                return False
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, RECHECK_S)):
                    await self._changed.wait()
        return True

    def changed(self) -> None:
        """Let ``until`` look again."""
        self._changed.set()

    async def leave(
        self,
        reason: str,
        timeout_s: float,
        hurry: Callable[[], bool] = lambda: False,
        at_once: bool = False,
    ) -> bool:
        """Ask to be let go; True if the log says so in time, before ``hurry``, or has ended."""
        node = self.node
        if not node.joiner.is_member or node.ledger.ended:
            return True
        self.driver.run(node.leave, reason, at_once)
        await self.until(lambda: not node.joiner.is_member or hurry(), timeout_s)
        return not node.joiner.is_member

    async def close(self, reason: str = "closed") -> None:
        stats = self.transport.stats
        if self._started:
            self.driver.close()
            self._contacts.save(self.node.dht.book)
        for task in self._tasks:
            task.cancel()
        await self.outreach.close()
        await self.transport.close()
        for pool in (self.pool, self.chunk_pool, self.disk_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        self.events.emit(
            "peer_stopped",
            bytes_sent=total_bytes(stats, "sent"),
            bytes_received=total_bytes(stats, "received"),
            reason=reason,
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.outreach.addresses


def total_bytes(stats: dict[str, Any], way: str) -> int:
    """Bytes ``sent`` or ``received`` on all links, control and bulk."""
    return int(stats[f"control_{way}_bytes"]) + int(stats[f"bulk_{way}_bytes"])
