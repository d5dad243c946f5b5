"""What every member derives from the log: members, stewards, channels, rounds and their outcomes.

``apply`` is a pure function of the entries in order. An entry that does not fit the state (a second
outcome for one attempt, an attempt that was opened twice by a new leader) is ignored by everybody
alike: that is why an attempt has exactly one outcome (DESIGN §4, §5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from swarmtrain_protocols import access, changes, limits, suspension
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.channels import ZERO_HASH, ChannelState, Outcome, are_ranges
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages.common import RoundKey, Spans
from swarmtrain_protocols.pipeline import book
from swarmtrain_protocols.rounds import clip
from swarmtrain_protocols.shards import DataState


class Member(msgspec.Struct):
    """One site of the run. ``joined_index`` is the log index of its latest MEMBER_JOINED."""

    id: bytes
    name: str
    addresses: tuple[str, ...]
    trains: bool
    holds_state: bool
    may_vote: bool
    reachable: bool
    joined_index: int
    ordinal: int
    """Counts first joins; never reused, so data positions stay disjoint."""
    ticket: bytes = b""
    """Id of the ticket it came with last."""
    role: str = "trainer"
    life: bytes = b""
    """Of the process that serves it, as far as the log knows."""


class Ledger(msgspec.Struct):
    """The replicated state machine. Equal at all members that applied the same prefix.

    ``bearers``: who has joined with a ticket of limited uses, by the id of its capability.
    ``group_round``: the first round of a group channel that is new; above all rounds of groups
    that were forgotten, so that a name used again never repeats a key.
    """

    run: bytes = ZERO_HASH
    founder: bytes = ZERO_HASH
    index: int = -1
    generation: int = 0
    members: dict[bytes, Member] = {}
    ordinals: int = 0
    banned: dict[bytes, str] = {}
    voters: tuple[bytes, ...] = ()
    joint: tuple[bytes, ...] = ()
    genesis_steward: bytes = ZERO_HASH
    model: e.ModelDefined | None = None
    channels: dict[str, ChannelState] = {}
    paused: str = ""
    ended: str = ""
    rounds_committed: int = 0
    rounds_aborted: int = 0
    bearers: dict[bytes, list[bytes]] = {}
    group_round: int = 0
    pipeline: book.PipelineState = msgspec.field(default_factory=book.PipelineState)
    data: DataState = msgspec.field(default_factory=DataState)
    """The data of the run, dealt in shards (13)."""
    overlaps: list[tuple[int, str]] = []
    """Changes of the overlap mode, by the first round that each is for; see ``schedule``."""
    changes: list[tuple[int, str, str]] = []
    """(first round, run key, text) of what the founder has changed in flight; see ``changes``."""
    access: access.Access = msgspec.field(default_factory=access.Access)
    suspended: dict[bytes, suspension.Suspension] = {}
    """Who has cost others an attempt, by key; also those whose time is over."""

    def apply(self, index: int, body: e.EntryBody) -> bool:
        """Apply entry ``index``; False if the entry does not fit and is ignored."""
        assert index == self.index + 1, (index, self.index)
        self.index = index
        handler = _HANDLERS.get(type(body))
        accepted = True if handler is None else handler(self, index, body)
        if accepted and self.data.dealt and isinstance(body, _MOVES_SHARDS):
            self.data.deal([m.id for m in self.ordered_members() if m.trains])
        return accepted

    def ordered_members(self) -> list[Member]:
        """Members in member order (by key bytes)."""
        return [self.members[key] for key in sorted(self.members)]

    def train_channels(self) -> list[ChannelState]:
        return [c for c in self.channels.values() if c.holds_state]

    def follows(self, member: bytes, channel: str) -> bool:
        """Whether ``member``, if it holds state at all, is to hold that of ``channel``."""
        if not self.pipeline.stages or not channel.startswith("train/"):
            return True
        return self.pipeline.follows(member, channel)

    def orphaned(self, channel: str) -> bool:
        """Whether ``channel`` is that of a stage that is lost, or that nobody serves."""
        lost = self.pipeline.lost()
        return any(
            channel == book.stage_channel(stage)
            and (stage in lost or not self.pipeline.serving(stage))
            for stage in range(len(self.pipeline.stages))
        )

    def plain_ranges(self, channel: str) -> tuple[tuple[int, int], ...]:
        """Values of a channel that do not decay, by the model of the run."""
        layout = self.model.layout if self.model is not None else ()
        return next((item.plain for item in layout if item.channel == channel), ())

    def counts_data(self, channel: str) -> bool:
        """Whether contributions in ``channel`` claim what they were trained on: the first one."""
        return self.model is not None and self.model.layout[0].channel == channel

    def refusal(self, member: bytes, channel: str, claims: Spans, samples: float) -> str:
        """Why a contribution with these claims cannot be listed now, or "" (13)."""
        if not self.counts_data(channel):
            return "bad_claim" if claims else ""
        return self.data.refusal(member, claims, samples)

    def may_vote(self, member: bytes) -> bool:
        known = self.members.get(member)
        return member == self.genesis_steward or (known is not None and known.may_vote)

    def ticket_used_up(self, ticket: bytes, uses: int, member: bytes) -> bool:
        """True if ``member`` would be one bearer too many of a ticket for ``uses`` members."""
        if not uses:
            return False
        known = self.bearers.get(ticket)
        if known is None:
            return len(self.bearers) >= limits.TICKETS_LIMITED_MAX
        return member not in known and len(known) >= min(uses, limits.TICKET_USES_MAX)

    def next_key(self, channel: str) -> RoundKey | None:
        """The attempt that may be opened next in ``channel``.

        None: there is no room for it, or its rounds are steps of a pipeline.
        """
        known = self.channels.get(channel)
        if self.stepwise(channel):
            return None
        if known is not None:
            return RoundKey(self.generation, channel, known.round, known.attempt)
        full = len(self.channels) >= limits.CHANNELS_MAX and self._idle_group() is None
        if not channel.startswith("group/") or full:
            return None
        return RoundKey(self.generation, channel, self.group_round, 0)

    def stepwise(self, channel: str) -> bool:
        """Whether STEP_CLOSED and STEP_OUTCOME open and decide the rounds of this channel."""
        return self.pipeline.mode == "sync" and channel.startswith("train/")

    def weighs(self, channel: str) -> bool:
        """Whether contributions to this channel are clipped by their norm (15)."""
        return channel.startswith("train/") and not self.stepwise(channel)

    def _idle_group(self) -> ChannelState | None:
        """The group that was idle for longest."""
        idle = [c for c in self.channels.values() if not c.holds_state and c.open is None]
        return min(idle, key=lambda c: (c.last_index, c.name), default=None)

    def forget_idle_group(self) -> None:
        """Make room for another channel."""
        idle = self._idle_group()
        assert idle is not None
        del self.channels[idle.name]
        self.group_round = max(self.group_round, idle.round + 1)

    def snapshot(self) -> bytes:
        """MessagePack of the whole ledger."""
        return msgspec.msgpack.encode(self)


def load_snapshot(data: bytes) -> Ledger:
    """Decode ``Ledger.snapshot``.

    Raises:
        PeerFault: ``malformed``.
    """
    try:
        return msgspec.msgpack.decode(data, type=Ledger)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PeerFault("malformed", f"ledger snapshot: {error}") from None


def _genesis(ledger: Ledger, index: int, body: e.Genesis) -> bool:
    if index != 0:
        return False
    ledger.run, ledger.founder = body.run, body.founder
    ledger.genesis_steward = body.steward
    ledger.voters = (body.steward,)
    return True


def _joined(ledger: Ledger, index: int, body: e.MemberJoined) -> bool:
    if access.refusal(ledger, body.member, body.ticket, body.uses) is not None:
        return False
    known = ledger.members.get(body.member)
    if known is not None and ledger.ticket_used_up(body.ticket, body.uses, body.member):
        return False
    if known is None:
        if len(ledger.members) >= limits.MEMBERS_MAX:
            return False
        ordinal = ledger.ordinals
        ledger.ordinals += 1
    else:
        ordinal = known.ordinal
    if body.uses:
        bearers = ledger.bearers.setdefault(body.ticket, [])
        if body.member not in bearers:
            bearers.append(body.member)
    ledger.members[body.member] = Member(
        id=body.member,
        name=body.name,
        addresses=body.addresses,
        trains=body.trains,
        holds_state=body.holds_state,
        may_vote=body.may_vote or (known is not None and known.may_vote),
        reachable=body.reachable,
        joined_index=index,
        ordinal=ordinal,
        ticket=body.ticket,
        role=body.role,
        life=body.life,
    )
    return True


def _left(ledger: Ledger, index: int, body: e.MemberLeft) -> bool:
    ledger.pipeline.assigned.pop(body.member, None)
    return ledger.members.pop(body.member, None) is not None


def _stewards(ledger: Ledger, index: int, body: e.StewardsChanged) -> bool:
    ledger.voters, ledger.joint = body.voters, body.joint
    return True


def valid_model(body: e.ModelDefined) -> bool:
    """Distinct state channels, each with values and a root."""
    names = [item.channel for item in body.layout]
    return (
        len(names) == len(body.roots) > 0
        and len(set(names)) == len(names)
        and all(name.startswith("train/") for name in names)
        and all(0 < item.values <= limits.VALUES_PER_CHANNEL_MAX for item in body.layout)
        and all(are_ranges(item.plain, item.values) for item in body.layout)
    )


def _model(ledger: Ledger, index: int, body: e.ModelDefined) -> bool:
    if ledger.model is not None or not valid_model(body) or not ledger.pipeline.fits(body):
        return False
    ledger.model = body
    for item, root in zip(body.layout, body.roots, strict=True):
        ledger.channels[item.channel] = ChannelState(
            name=item.channel, values=item.values, start_hash=root
        )
    return True


def _data(ledger: Ledger, index: int, body: e.DataDefined) -> bool:
    if ledger.model is None:
        return False
    number = ledger.channels[ledger.model.layout[0].channel].round
    return ledger.data.define(body.samples, body.digest, number)


def _opened(ledger: Ledger, index: int, body: e.RoundOpened) -> bool:
    if ledger.ended or ledger.paused or not body.contributors or not body.parts:
        return False
    if body.key != ledger.next_key(body.key.channel):
        return False
    channel = ledger.channels.get(body.key.channel)
    if channel is None:
        if len(ledger.channels) >= limits.CHANNELS_MAX:
            ledger.forget_idle_group()
        channel = ChannelState(body.key.channel, body.values, round=body.key.round)
        ledger.channels[channel.name] = channel
    if channel.open is not None or (channel.holds_state and channel.values != body.values):
        return False
    name = body.key.channel
    if any(ledger.refusal(c.member, name, c.claims, c.samples) for c in body.contributors):
        return False
    channel.begin(index, body, limits.HISTORY_RECORDS_MAX // len(ledger.channels))
    if ledger.counts_data(name):
        ledger.data.opened((c.member, c.claims) for c in body.contributors)
    return True


def _set(ledger: Ledger, index: int, body: e.RoundSet) -> bool:
    channel = ledger.channels.get(body.key.channel)
    if channel is None or channel.open is None or channel.open.key != body.key:
        return False
    indices = [item.index for item in body.coefficients]
    in_range = all(i < len(channel.open.contributors) for i in indices)
    if channel.chosen is not None or not indices or not in_range or indices != sorted(set(indices)):
        return False
    if not clip.legal_norms(body):
        return False
    channel.chosen = body
    return True


def _committed(ledger: Ledger, index: int, body: e.RoundCommitted) -> bool:
    channel = ledger.channels.get(body.key.channel)
    if channel is None or not channel.is_open(body.key) or channel.chosen is None:
        return False
    if ledger.stepwise(channel.name):
        return False
    channel.commit(index, body.root, body.held_by, len(ledger.channels))
    if ledger.counts_data(channel.name):
        done = channel.history[-1].contributors
        ledger.data.decided([member for member, _, c in done if c > 0], channel.round)
    ledger.rounds_committed += 1
    return True


def _aborted(ledger: Ledger, index: int, body: e.RoundAborted) -> bool:
    channel = ledger.channels.get(body.key.channel)
    if channel is None or not channel.is_open(body.key) or ledger.stepwise(channel.name):
        return False
    channel.abort(body.reason)
    if ledger.counts_data(channel.name):
        ledger.data.decided((), channel.round)
    ledger.rounds_aborted += 1
    return True


def _paused(ledger: Ledger, index: int, body: e.Paused) -> bool:
    ledger.paused = body.reason or "paused"
    return True


def _resumed(ledger: Ledger, index: int, body: e.Resumed) -> bool:
    ledger.paused = ""
    return True


def _rewound(ledger: Ledger, index: int, body: e.Rewound) -> bool:
    if body.generation != ledger.generation + 1:
        return False
    if not len(body.channels) == len(body.rounds) == len(body.roots):
        return False
    if not book.may_rewind(ledger, body):
        return False
    ledger.generation = body.generation
    latest = max(body.rounds, default=0)
    ledger.overlaps = [item for item in ledger.overlaps if item[0] <= latest]
    changes.forget_beyond(ledger, latest)
    for name, round_number, root in zip(body.channels, body.rounds, body.roots, strict=True):
        channel = ledger.channels.get(name)
        if channel is not None:
            channel.restart(round_number, root)
        if ledger.counts_data(name):
            ledger.data.rewound(round_number)
    book.rewound(ledger)
    return True


def _ended(ledger: Ledger, index: int, body: e.RunEnded) -> bool:
    if ledger.ended:
        return False
    ledger.ended = body.reason or "ended"
    return True


def _config(ledger: Ledger, index: int, body: e.ConfigChanged) -> bool:
    """A change is for rounds that nobody can have opened yet, so it stands before they are."""
    train = ledger.train_channels()
    if body.key != "overlap":
        if not train or body.at_round <= changes.front(ledger):
            return False
        if not changes.fits(ledger, body.key, body.value):
            return False
        changes.add(ledger, body.at_round, body.key, body.value)
        return True
    rounds = [channel.round for channel in train] + [item[0] for item in ledger.overlaps]
    if body.value not in ("off", "eager") or not train:
        return False
    if body.at_round <= max(rounds):
        return False
    if body.value == (ledger.overlaps[-1][1] if ledger.overlaps else "off"):
        return False
    ledger.overlaps.append((body.at_round, body.value))
    del ledger.overlaps[: -limits.CONFIG_CHANGES_KEPT]
    return True


_HANDLERS: dict[type, Callable[[Ledger, int, Any], bool]] = {
    e.Genesis: _genesis,
    e.MemberJoined: _joined,
    e.MemberLeft: _left,
    e.MemberBanned: access.banned,
    e.MemberSuspended: suspension.suspended,
    e.TicketRevoked: access.revoked,
    e.AllowChanged: access.allow_changed,
    e.FounderChanged: access.founder_changed,
    e.StewardsChanged: _stewards,
    e.ModelDefined: _model,
    e.DataDefined: _data,
    e.RoundOpened: _opened,
    e.RoundSet: _set,
    e.RoundCommitted: _committed,
    e.RoundAborted: _aborted,
    e.Paused: _paused,
    e.Resumed: _resumed,
    e.Rewound: _rewound,
    e.RunEnded: _ended,
    **book.HANDLERS,
    e.ConfigChanged: _config,
}

_MOVES_SHARDS = (
    *(e.DataDefined, e.MemberJoined, e.MemberLeft, e.MemberBanned),
    *(e.RoundCommitted, e.RoundAborted, e.Rewound),
)
"""Entries after which shards may have to be dealt."""

__all__ = [
    "ZERO_HASH",
    "ChannelState",
    "Ledger",
    "Member",
    "Outcome",
    "load_snapshot",
    "valid_model",
]
