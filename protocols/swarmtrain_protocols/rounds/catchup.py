"""Keeps the canonical state of this node at the ledger's round: apply, replay, or fetch a snapshot.

Restart, late join and a missed round are one procedure (docs/architecture.md). Every byte that is
used is pinned by the log: a snapshot by the state hash of a ROUND_OPENED or MODEL_DEFINED, a result
by the root of its ROUND_COMMITTED. In a pipeline a node follows the stages that the log assigns to
it; what it served before is dropped once others are further. Spec 10.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs import get_codec
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send, earliest
from swarmtrain_protocols.ledger import ZERO_HASH, ChannelState, Ledger, Outcome
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.messages.member import SnapshotOffer, SnapshotQuery, StateReport
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.download import ARRIVED, Donors, Download
from swarmtrain_protocols.rounds.fetches import Fetches
from swarmtrain_protocols.rounds.member import RoundMember
from swarmtrain_protocols.schedule import outer_at

QUERY_INTERVAL_S = 1.0
DONORS_INTERVAL_S = 15.0
"""How often, while a snapshot comes, others are asked whether they have it too."""
SOURCES_MAX = 8
REPORT_AGAIN_S = 5.0
"""In a pipeline a step waits for whoever is not known to be in step: a report may have got lost."""


@dataclass(slots=True)
class Track:
    """Where the state of one channel stands here. ``state_hash`` None: no state yet."""

    channel: str
    round: int = 0
    state_hash: bytes | None = None
    busy: bool = False
    download: Download | None = None
    next_query: float = 0.0
    verified: int = -1
    generation: int = 0
    """The log's when the state was taken up."""
    partly: tuple[int, bytes] | None = None
    """(round, hash) of a snapshot of which an earlier life has some chunks: rather than others."""
    partly_until: float = -1.0


class CatchUp:
    """All state channels of one node. Inactive for nodes that hold no state."""

    def __init__(
        self,
        *,
        me: PeerId,
        rng: random.Random,
        ledger: Ledger,
        fetches: Fetches,
        out: list[Effect],
        member: RoundMember,
        connected: Callable[[], list[PeerId]],
        keys: RunKeys,
        chunk_values: int = limits.CHUNK_VALUES,
    ) -> None:
        self.ledger = ledger
        self.leader: PeerId | None = None
        self.active = False
        self.training = False
        self.tracks: dict[str, Track] = {}
        self.snapshots: dict[str, list[tuple[int, bytes]]] = {}
        """What this node can serve: (round, state hash), oldest first; kept by the shell."""
        self._me = me
        self._rng = rng
        self.fetches = fetches
        self._out = out
        self._member = member
        self._connected = connected
        self._keys = keys
        self.chunk_values = chunk_values
        self._donors = Donors()
        self._report_at = 0.0
        self._told: dict[str, tuple[int, bytes | None]] = {}

    def restore(self, channel: str, round_number: int, state_hash: bytes) -> None:
        """The shell loaded (or made) a state: the one before ``round_number``."""
        if channel in self.tracks:
            self._abandon(self.tracks[channel])
        track = Track(channel, round_number, state_hash)
        track.generation = self.ledger.generation
        self.tracks[channel] = track
        self._member.state_is(channel, round_number)

    def partly_here(self, channel: str, round_number: int, root: bytes) -> None:
        """The shell has chunks of this snapshot from an earlier life."""
        track = self.tracks.setdefault(channel, Track(channel))
        track.partly = round_number, root

    def in_step(self, channel: str) -> bool:
        """The state here is the one that the next round is applied to."""
        track = self.tracks.get(channel)
        return (
            track is not None
            and track.state_hash is not None
            and track.round == self.ledger.channels[channel].round
        )

    def rewound(self) -> None:
        """A new generation began: what was verified before must be verified again."""
        for track in self.tracks.values():
            track.verified = -1
            self._abandon(track)
        for name, have in self.snapshots.items():
            channel = self.ledger.channels.get(name)
            if channel is not None:
                have[:] = [item for item in have if item[0] <= channel.round]

    # -- following the ledger --------------------------------------------------------------

    def reconcile(self, now: float) -> None:
        if not self.active:
            return
        for channel in self.ledger.train_channels():
            if self.follows(channel.name):
                track = self.tracks.get(channel.name)
                if track is None:
                    track = self.tracks[channel.name] = Track(channel.name)
                self._verify(channel, track)
                self._advance(now, channel, track)
                self._tell(track)
            elif channel.name in self.tracks:
                self._part_with(channel, self.tracks[channel.name])

    def follows(self, channel: str) -> bool:
        """Whether this node is to hold the state of ``channel``."""
        return self.ledger.follows(self._me, channel)

    def followed(self) -> list[str]:
        """State channels that this node is to hold."""
        return [c.name for c in self.ledger.train_channels() if self.follows(c.name)]

    def _part_with(self, channel: ChannelState, track: Track) -> None:
        """The stage is others' now.

        A state that nobody is beyond stays: after a restart of everybody the log lags behind the
        disk, and this may be the only copy. So does that of an orphaned stage.
        """
        newest = track.state_hash is not None and track.round >= channel.round
        if track.busy or newest or self.ledger.orphaned(track.channel):
            return
        self._abandon(track)
        del self.tracks[track.channel]
        self._member.forget_results(track.channel)
        self._out.append(fx.DropState(track.channel))

    def _verify(self, channel: ChannelState, track: Track) -> None:
        """Compare the own state with the hash that the log pins for its round, once a round."""
        if track.state_hash is None or track.busy or track.verified == track.round:
            return
        pinned = channel.pinned_hash(track.round)
        if track.round > channel.round and track.generation == self.ledger.generation:
            return  # after a restart the log may lag behind the disk for a moment
        if track.round > channel.round:
            reason = "the run was rewound"
        elif pinned is None:
            return
        elif pinned == track.state_hash:
            track.verified = track.round
            track.generation = self.ledger.generation
            return
        else:
            reason = "own state differs from the pinned hash"
        self._out.append(Emit(fx.Resync(track.channel, track.round, reason)))
        track.state_hash = None
        self._abandon(track)

    def _abandon(self, track: Track) -> None:
        """Stop what is being fetched; nothing is needed of it any more."""
        download, track.download = track.download, None
        if download is not None:
            download.cancel()

    def _advance(self, now: float, channel: ChannelState, track: Track) -> None:
        if track.download is not None:
            self._attend(now, channel, track, track.download)
            return
        if track.busy:
            return
        if track.state_hash is None:
            self._query(now, channel, track)
            return
        if track.round >= channel.round or track.next_query > now:
            return
        track.next_query = 0.0  # that wait is over
        outcome = channel.outcome(track.round)
        stored = self._member.in_place.get((track.channel, track.round))
        forgotten = outcome is None and not self.ledger.stepwise(track.channel)
        if stored is not None and (forgotten or (outcome is not None and outcome.root == stored)):
            # One that the log has forgotten is judged by the next hash that it pins.
            track.busy = True
            self._out.append(self._apply(channel, track, stored))
        elif outcome is None:
            reason = f"round {track.round} is no longer in the log's history"
            self._out.append(Emit(fx.Resync(track.channel, track.round, reason)))
            track.state_hash = None
            self._query(now, channel, track)
        elif track.round not in self._member.pending_rounds(track.channel):
            self._fetch_result(now, channel, track, outcome)

    def _apply(self, channel: ChannelState, track: Track, root: bytes) -> fx.ApplyResult:
        """What the rule of the channel needs to take the step of the track's round."""
        name, number = track.channel, track.round
        outcome = channel.outcome(number)
        if outcome is None or not self.ledger.stepwise(name):
            step = outer_at(self._keys, self.ledger, number)
            return fx.ApplyResult(name, number, root, lr=step.lr, momentum=step.momentum)
        recovered = self.ledger.pipeline.recovered_step(name)
        plain = self.ledger.plain_ranges(name)
        return fx.ApplyResult(name, number, root, outcome.scale, recovered, plain)

    # -- results and snapshots -------------------------------------------------------------

    def _sources(self, channel: str, preferred: tuple[bytes, ...]) -> list[PeerId]:
        here = set(self._connected())
        known = {PeerId(p): None for p in preferred if p != self._me}
        holders = [
            PeerId(p.id)
            for p in self.ledger.ordered_members()
            if p.holds_state and p.id != self._me and p.id not in known
        ]
        self._rng.shuffle(holders)
        ordered = [*known, *holders]
        ordered.sort(key=lambda p: (not self.ledger.follows(p, channel), p not in here))
        return ordered[:SOURCES_MAX]

    def _fetch_result(
        self, now: float, channel: ChannelState, track: Track, outcome: Outcome
    ) -> None:
        donors = self._sources(track.channel, outcome.held_by)
        total = -(-outcome.values // self.chunk_values)
        purpose = fx.WholeResult(
            track.channel, outcome.round, outcome.root, outcome.values, outcome.gather_codec
        )
        nbytes = get_codec(outcome.gather_codec).encoded_nbytes(self.chunk_values)
        if donors:
            self._begin(now, track, purpose, donors, total, nbytes).start(now)
        else:
            track.next_query = now + QUERY_INTERVAL_S

    def _query(self, now: float, channel: ChannelState, track: Track) -> None:
        if track.next_query > now:
            return
        if track.partly is not None and track.partly_until < 0:
            track.partly_until = now + QUERY_INTERVAL_S
        track.next_query = now + QUERY_INTERVAL_S
        self._ask(track, [])

    def _ask(self, track: Track, known: list[PeerId]) -> None:
        for peer in self._sources(track.channel, ()):
            if peer not in known:
                self._out.append(Send(peer, SnapshotQuery(track.channel)))

    def _begin(
        self,
        now: float,
        track: Track,
        purpose: fx.WholeResult | fx.Snapshot,
        donors: list[PeerId],
        total: int,
        chunk_nbytes: int,
    ) -> Download:
        def ended(at: float, how: str) -> None:
            if how == ARRIVED:
                self._arrived(at, track, download)
            else:
                self._failed(at, track, download)

        download = Download(
            purpose,
            total=total,
            chunk_nbytes=chunk_nbytes,
            book=self._donors,
            fetches=self.fetches,
            out=self._out,
            ended=ended,
        )
        track.download = download
        for donor in donors:
            download.add_donor(now, donor)
        return download

    def _attend(self, now: float, channel: ChannelState, track: Track, download: Download) -> None:
        """A download goes on: is it still of use, is somebody late, who else has it?"""
        purpose = download.purpose
        if isinstance(purpose, fx.WholeResult):
            download.tick(now)
        elif not self._usable(channel, purpose.round, purpose.root):
            self._abandon(track)
            track.next_query = 0.0
            reason = "the log has forgotten the round of the snapshot that was being fetched"
            self._out.append(Emit(fx.Resync(track.channel, purpose.round, reason)))
            self._query(now, channel, track)
        else:
            download.tick(now)
            if track.next_query <= now and track.download is download:
                track.next_query = now + DONORS_INTERVAL_S
                self._ask(track, download.donors)

    def _failed(self, now: float, track: Track, download: Download) -> None:
        """No donor is left. A result that nobody serves any more means: take a snapshot."""
        track.download = None
        channel = self.ledger.channels.get(track.channel)
        if isinstance(download.purpose, fx.WholeResult) and channel is not None:
            # The own state stays: if the result is lost everywhere, it is what a rewind goes to.
            reason = f"nobody serves the result of round {download.purpose.round}"
            self._out.append(Emit(fx.Resync(track.channel, track.round, reason)))
            self._query(now, channel, track)
            self.report(track.channel)
        elif isinstance(download.purpose, fx.Snapshot):
            track.partly = download.purpose.round, download.purpose.root
            track.partly_until = -1.0
        track.next_query = now + QUERY_INTERVAL_S

    def _arrived(self, now: float, track: Track, download: Download) -> None:
        track.download = None
        track.busy = True
        purpose = download.purpose
        if isinstance(purpose, fx.Snapshot):
            track.partly = None
            fields: dict[str, object] = {
                "channel": purpose.channel,
                "round": purpose.round,
                "chunks": download.total,
                "chunks_here": download.here,
                "donors": len(download.used),
                "fetch_s": round(now - download.begin_s, 3),
            }
            self._out.append(Emit(fx.Notice("state_fetched", fields)))
            self._out.append(fx.InstallSnapshot(purpose))
        else:
            self._out.append(fx.CompleteResult(purpose))

    def prepared(
        self, now: float, channel: str, root: bytes, have: tuple[int, ...], compare: bool
    ) -> None:
        """There is room for a snapshot, and chunks ``have`` of it are in place."""
        track = self.tracks.get(channel)
        download = None if track is None else track.download
        if download is None or download.purpose.root != root or download.ready:
            return  # abandoned meanwhile
        snapshot = download.purpose
        assert isinstance(snapshot, fx.Snapshot)
        if compare:
            download.ask_hashes(now, lambda at: self._out.append(fx.PrepareSnapshot(snapshot)))
        else:
            download.start(now, have)

    def offered(self, now: float, peer: PeerId, offer: SnapshotOffer) -> None:
        """A donor's answer: take its newest snapshot that the log pins."""
        channel = self.ledger.channels.get(offer.channel)
        track = self.tracks.get(offer.channel)
        if channel is None or track is None or track.busy or self.in_step(offer.channel):
            return
        if not self.follows(offer.channel):
            return
        download = track.download
        if download is not None:
            if isinstance(download.purpose, fx.WholeResult):
                return
            if download.purpose.root in offer.roots:
                download.add_donor(now, peer)
            return
        good = [
            (number, root)
            for number, root in zip(offer.rounds, offer.roots, strict=False)
            if root != ZERO_HASH
            and self._usable(channel, number, root)
            and (track.state_hash is None or number > track.round)
            and not self._donors.is_liar(peer, root)
        ]
        if track.partly in good:
            good = [item for item in good if item == track.partly]
        elif track.partly is not None and now < track.partly_until:
            return  # another donor may still have that one
        if good:
            number, root = max(good)
            total = 1 + -(-channel.values // self.chunk_values)
            snapshot = fx.Snapshot(track.channel, number, root, channel.values)
            track.generation = self.ledger.generation
            track.partly = None
            track.next_query = now + DONORS_INTERVAL_S
            self._begin(now, track, snapshot, [peer], total, 8 * self.chunk_values)
            self._out.append(fx.PrepareSnapshot(snapshot))

    @staticmethod
    def _usable(channel: ChannelState, number: int, root: bytes) -> bool:
        """Pinned, and every later result is in the log's history."""
        if channel.pinned_hash(number) != root:
            return False
        return all(channel.outcome(r) is not None for r in range(number, channel.round))

    def queried(self, peer: PeerId, query: SnapshotQuery) -> None:
        have = self.snapshots.get(query.channel, [])[-8:]
        rounds, roots = tuple(number for number, _ in have), tuple(root for _, root in have)
        self._out.append(Send(peer, SnapshotOffer(query.channel, rounds, roots)))

    # -- answers of the data plane ---------------------------------------------------------

    def applied(self, now: float, channel: str, round_number: int, state_hash: bytes) -> None:
        """The state here is now the one before ``round_number``."""
        track = self.tracks.setdefault(channel, Track(channel))
        track.busy = False
        track.next_query = 0.0
        track.round, track.state_hash = round_number, state_hash
        self._member.pace.applied(now, channel, round_number - 1)
        self._member.in_place.pop((channel, round_number - 1), None)
        self._member.state_is(channel, round_number)
        known = self.ledger.channels.get(channel)
        caught_up = known is not None and known.round == round_number
        self._out.append(Emit(fx.StateAdvanced(channel, round_number, state_hash, caught_up)))
        self._told.pop(channel, None)  # a state that comes back is told again, and once
        self.reconcile(now)
        if self.in_step(channel) and channel not in self._told:
            self.report(channel)

    def completed(self, now: float, result: fx.WholeResult) -> None:
        """A missed result is in place under its committed root."""
        self.tracks[result.channel].busy = False
        self._member.in_place[result.channel, result.round] = result.root
        self.reconcile(now)

    def install_failed(self, now: float, channel: str, reason: str, spoilt: bool = False) -> None:
        """What was fetched is of no use, or (``spoilt``) the own state is and others have it."""
        track = self.tracks[channel]
        track.busy = False
        track.next_query = now + QUERY_INTERVAL_S
        if spoilt and any(self.ledger.follows(p, channel) for p in self._sources(channel, ())):
            track.state_hash = None
        self._out.append(Emit(fx.Resync(channel, track.round, reason)))

    # -- reports ---------------------------------------------------------------------------

    def report(self, channel: str) -> None:
        """Tell the leader that this node holds the current state of ``channel``."""
        track = self.tracks[channel]
        if self.leader is None or track.state_hash is None or not self.follows(channel):
            return
        message = StateReport(
            self.ledger.generation,
            channel,
            track.round,
            track.state_hash,
            self.in_step(channel),
            self.training,
        )
        self._told[channel] = (track.round, track.state_hash if message.ready else None)
        self._out.append(Send(self.leader, message))

    def _tell(self, track: Track) -> None:
        """In a pipeline a step waits for it: a log that catches up makes a state the newest."""
        name, state = track.channel, (track.round, track.state_hash)
        if self._repeats() and self.in_step(name) and self._told.get(name) != state:
            self.report(name)

    def announce(self) -> None:
        for name in self.tracks:
            if name in self.ledger.channels:
                self.report(name)

    # -- time ------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        self.reconcile(now)
        if self._repeats() and now >= self._report_at:
            self._report_at = now + REPORT_AGAIN_S
            self.announce()

    def _repeats(self) -> bool:
        return bool(self.ledger.pipeline.stages) and self.leader is not None

    def _behind(self, track: Track) -> bool:
        known = track.channel in self.ledger.channels and self.follows(track.channel)
        return known and not self.in_step(track.channel)

    def deadline(self) -> float:
        if not self.active:
            return math.inf
        wanted_at = self._report_at if self.tracks and self._repeats() else math.inf
        for track in self.tracks.values():
            download = track.download
            if download is not None:
                wanted_at = earliest(wanted_at, download.deadline())
            asks = download is None or isinstance(download.purpose, fx.Snapshot)
            if asks and not track.busy and track.next_query > 0.0 and self._behind(track):
                wanted_at = earliest(wanted_at, track.next_query)
        return wanted_at
