"""Streams through a third member, for two that cannot dial each other (spec 14 §2.2).

One core for all three parts: who wants a link, who is to answer it, and the member between them. It
decides and counts; sockets are the shell's. The member between splices two connections byte for
byte, as TURN does for TCP (RFC 6062): what passes is the ordinary encrypted link of the two, so it
sees ciphertext, and it cannot speak for either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Connect, Effect, Emit, PeerId, Send
from swarmtrain_protocols.dht.requests import Meter
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages.reach import RelayOffer, RelayReply, RelayRequest

PREFACE = b"swarm/r\x00"
TOKEN_BYTES = 16
FEATURE = "relay"
"""In the hello of a member that relays."""
REFUSALS = ("off", "not_a_member", "unknown", "direct", "busy", "quota", "called")
HOUR_S = 3600.0

Kind = Literal["link", "bulk", "answer"]


@dataclass(frozen=True, slots=True)
class OpenStream:
    """Effect: dial ``via``, say the preface and ``token``; then speak to ``peer`` through it.

    ``kind``: begin a control link, begin a bulk connection, or answer as a listener does.
    ``request`` is what ``stream`` returned.
    """

    via: PeerId
    token: bytes
    peer: PeerId
    kind: Kind
    request: int = 0


@dataclass(frozen=True, slots=True)
class StreamFailed:
    """Effect: there will be no stream for ``request``; ``code`` is one of ``REFUSALS`` or so."""

    peer: PeerId
    kind: Kind
    request: int
    code: str


@dataclass(frozen=True, slots=True)
class Splice:
    """Effect: both ends of ``stream`` are here: carry bytes both ways, and tell ``moved``."""

    stream: int


@dataclass(frozen=True, slots=True)
class CloseStream:
    """Effect: hang up on both ends of ``stream``."""

    stream: int


@dataclass(frozen=True, slots=True)
class Relayed:
    """Event at the member between: a stream began (``code`` empty) or ended."""

    a: PeerId
    b: PeerId
    nbytes: int
    code: str = ""


@dataclass(frozen=True, slots=True)
class RelayFailed:
    """Event: no link to ``peer`` can be had; tried again after a pause if it is still wanted."""

    peer: PeerId
    code: str


@dataclass(slots=True)
class _Wish:
    first: float
    last: float
    not_before: float = 0.0
    failures: int = 0
    asking: bool = False


@dataclass(slots=True)
class _Asked:
    peer: PeerId
    kind: Kind
    via: PeerId
    handle: int
    deadline: float
    tried: list[PeerId]


@dataclass(slots=True)
class _Stream:
    ends: tuple[PeerId, PeerId]
    tokens: dict[bytes, int]
    quiet_at: float
    """It is closed then, unless something moves."""
    attached: list[int] = field(default_factory=list)
    nbytes: int = 0

    @property
    def whole(self) -> bool:
        return len(self.attached) == 2


class Relay:
    """One site. Satisfies ``core.Core``.

    Args:
        entropy: n bytes for tokens.
        dialled_by_others: True for a member that others can dial, False for one that only dials
            out, None for a stranger (the log knows).
        relays: this site carries streams of others. ``uses``: it has its own carried.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        entropy: Callable[[int], bytes],
        dialled_by_others: Callable[[PeerId], bool | None],
        relays: bool,
        uses: bool,
    ) -> None:
        self.relays = relays
        self.uses = uses
        self.relayed_bytes = 0
        self.spent: dict[PeerId, int] = {}
        """Bytes of this hour, per member; both ends of a stream pay."""
        self._me = me
        self._entropy = entropy
        self._known = dialled_by_others
        self._out: list[Effect] = []
        self._links: dict[PeerId, bool] = {}
        """Direct links, and whether the other side relays."""
        self._through: dict[PeerId, None] = {}
        """Links that are relayed."""
        self._wishes: dict[PeerId, _Wish] = {}
        self._asked: dict[int, _Asked] = {}
        self._number = 0
        self._streams: dict[int, _Stream] = {}
        self._meters: dict[PeerId, Meter] = {}
        self._answering: dict[PeerId, float] = {}
        self._offers = Meter(limits.RELAY_OFFERS_PER_S, limits.RELAY_OFFERS_BURST)
        self._hour_ends = -math.inf

    # -- links -----------------------------------------------------------------------------------

    def connected(self, now: float, peer: PeerId, *, relays: bool, direct: bool) -> None:
        """A link is up; ``relays``: the other side's hello has ``FEATURE``."""
        if direct:
            self._links[peer] = relays
        else:
            self._through[peer] = None
        self._wishes.pop(peer, None)
        self._answering.pop(peer, None)
        self.tick(now)

    def disconnected(self, now: float, peer: PeerId) -> None:
        self._links.pop(peer, None)
        self._through.pop(peer, None)
        for number in [n for n, asked in self._asked.items() if asked.via == peer]:
            self._next_via(now, self._asked.pop(number), "disconnected")
        for number in [n for n, s in self._streams.items() if peer in s.ends]:
            self._close(number, "disconnected")  # who leaves, or is banned, is carried no more

    # -- wanting ---------------------------------------------------------------------------------

    def want(self, now: float, peer: PeerId) -> None:
        """A link to ``peer`` would be used, and there is no way to dial it.

        Once is not enough: what somebody else can give, or what is not asked for again, is not
        worth a relay. Only members that others cannot dial are reached this way.
        """
        linked = peer in self._links or peer in self._through
        if not self.uses or linked or peer == self._me or self._known(peer) is not False:
            return
        wish = self._wishes.get(peer)
        if wish is None or (now - wish.last > limits.RELAY_WISH_FORGET_S and not wish.asking):
            if wish is None and len(self._wishes) >= limits.RELAY_WISHES_MAX:
                del self._wishes[next(iter(self._wishes))]
            keep = (wish.not_before, wish.failures) if wish is not None else (0.0, 0)
            wish = self._wishes[peer] = _Wish(now, now, *keep)
        wish.last = now
        self._grant(now, peer, wish)

    def stream(self, now: float, peer: PeerId) -> int:
        """One more stream to a peer whose link is relayed; ``OpenStream`` or ``StreamFailed``."""
        self._number += 1
        asked = _Asked(peer, "bulk", self._me, self._number, now, [])
        handle = asked.handle
        self._next_via(now, asked, "no_relay")
        return handle

    def _grant(self, now: float, peer: PeerId, wish: _Wish) -> None:
        """Ask for what has been wished for long enough."""
        fresh = now - wish.last <= limits.RELAY_WISH_FORGET_S
        due = now >= max(wish.first + limits.RELAY_WISH_S, wish.not_before)
        if fresh and due and wish.last > wish.first and not wish.asking:
            wish.asking = True
            self._next_via(now, _Asked(peer, "link", self._me, 0, now, []), "no_relay")

    def _next_via(self, now: float, asked: _Asked, code: str) -> None:
        """Ask the next member that relays; ``code`` is why the last one did not."""
        for via, relays in self._links.items():
            if relays and via not in asked.tried and via != asked.peer:
                asked.tried.append(via)
                asked.via, asked.deadline = via, now + limits.RELAY_WAIT_S
                self._number += 1
                self._asked[self._number] = asked
                reverse = asked.kind == "link" and self._known(self._me) is True
                self._out.append(Send(via, RelayRequest(self._number, asked.peer, reverse)))
                return
        self._failed(now, asked, code)

    def _failed(self, now: float, asked: _Asked, code: str) -> None:
        self._out.append(StreamFailed(asked.peer, asked.kind, asked.handle, code))
        wish = self._wishes.get(asked.peer)
        if asked.kind == "link" and wish is not None:
            wish.asking = False
            wish.failures += 1
            pause_s = limits.RELAY_RETRY_S_MIN * 2 ** min(wish.failures - 1, 8)
            wish.not_before = now + min(pause_s, limits.RELAY_RETRY_S_MAX)
            self._out.append(Emit(RelayFailed(asked.peer, code)))

    def opened(self, now: float, peer: PeerId, ok: bool) -> None:
        """The shell has tried to begin a link over the stream that it was given."""
        wish = self._wishes.get(peer)
        if not ok and wish is not None:
            self._failed(now, _Asked(peer, "link", self._me, 0, now, []), "timeout")

    # -- messages --------------------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: object) -> None:
        """Raises PeerFault ``malformed`` for what no honest member says."""
        if isinstance(message, RelayRequest):
            self._requested(now, peer, message)
        elif isinstance(message, RelayReply):
            self._replied(now, peer, message)
        elif isinstance(message, RelayOffer):
            self._offered(now, peer, message)

    def _replied(self, now: float, peer: PeerId, message: RelayReply) -> None:
        asked = self._asked.get(message.request)
        if asked is None or asked.via != peer:
            return  # late
        del self._asked[message.request]
        if message.code == "called":
            self._called(now, asked)
        elif message.code:
            self._next_via(now, asked, message.code)
        elif len(message.token) != TOKEN_BYTES:
            raise PeerFault("malformed", "a relay grants a stream without a token", peer)
        else:
            opening = OpenStream(peer, message.token, asked.peer, asked.kind, asked.handle)
            self._out.append(opening)

    def _called(self, now: float, asked: _Asked) -> None:
        """The other was told to dial this site; if it does not, the wish begins anew."""
        wish = self._wishes.get(asked.peer)
        if wish is not None:
            wish.asking = False
            wish.not_before = now + limits.RELAY_WAIT_S

    def _offered(self, now: float, peer: PeerId, message: RelayOffer) -> None:
        source = PeerId(message.source)
        known = self._known(source)
        if not self.uses or peer not in self._links or known is None or source == self._me:
            return
        if source in self._links or (source in self._through and not message.token):
            return
        if not message.token:
            if known:  # where it listens is in the log: nobody can have us dial anything else
                self._out.append(Connect(source))
            return
        if len(message.token) != TOKEN_BYTES:
            raise PeerFault("malformed", "a relay offers a stream without a token", peer)
        room = len(self._answering) < limits.RELAY_OFFERS_MAX or source in self._answering
        if room and self._offers.take(now):
            self._answering[source] = now + limits.RELAY_WAIT_S
            self._out.append(OpenStream(peer, message.token, source, "answer"))

    # -- between -----------------------------------------------------------------------------------

    def _requested(self, now: float, peer: PeerId, message: RelayRequest) -> None:
        target = PeerId(message.target)
        code = self._refusal(now, peer, target, message.reverse)
        if code:
            self._out.append(Send(peer, RelayReply(message.request, code=code)))
            if code == "called":
                self._out.append(Send(target, RelayOffer(peer)))
            return
        tokens = [self._entropy(TOKEN_BYTES) for _ in range(2)]
        self._number += 1
        stream = _Stream((peer, target), {tokens[0]: 0, tokens[1]: 1}, now + limits.RELAY_WAIT_S)
        self._streams[self._number] = stream
        self._out.append(Send(peer, RelayReply(message.request, tokens[0])))
        self._out.append(Send(target, RelayOffer(peer, tokens[1])))

    def _refusal(self, now: float, peer: PeerId, target: PeerId, reverse: bool) -> str:
        """Why there will be no stream; '' if there will."""
        if target in (peer, self._me):
            raise PeerFault("malformed", "a relay to itself", peer)
        if not self.relays:
            return "off"
        if self._known(peer) is None or self._known(target) is None:
            return "not_a_member"
        if target not in self._links or peer not in self._links:
            return "unknown"
        meter = self._meters.setdefault(peer, Meter(limits.RELAY_RATE_PER_S, limits.RELAY_BURST))
        if not meter.take(now):
            return "busy"
        if reverse and self._known(peer):
            return "called"
        if self._known(target):
            return "direct"  # it can be dialled: nobody pays for a detour
        if len(self._streams) >= limits.RELAY_STREAMS_MAX:
            return "busy"
        for end in (peer, target):
            mine = sum(end in s.ends for s in self._streams.values())
            if mine >= limits.RELAY_STREAMS_PER_PEER_MAX:
                return "busy"
            if self._spent(now, end) >= limits.RELAY_BYTES_PER_HOUR_MAX:
                return "quota"
        return ""

    def _spent(self, now: float, peer: PeerId) -> int:
        if now >= self._hour_ends:
            self._hour_ends = now + HOUR_S
            self.spent.clear()
        return self.spent.get(peer, 0)

    def attached(self, now: float, token: bytes) -> int | None:
        """Somebody dialled and said this token: the stream it opens, None: hang up."""
        for number, stream in self._streams.items():
            end = stream.tokens.pop(token, None)  # once only
            if end is None:
                continue
            stream.attached.append(end)
            if stream.whole:
                stream.quiet_at = now + limits.RELAY_SILENCE_S
                self._out.append(Splice(number))
                self._out.append(Emit(Relayed(*stream.ends, 0)))
            return number
        return None

    def moved(self, now: float, number: int, nbytes: int) -> None:
        """So many bytes of a stream were carried, one way or the other."""
        stream = self._streams.get(number)
        if stream is None:
            return
        stream.nbytes += nbytes
        stream.quiet_at = now + limits.RELAY_SILENCE_S
        self.relayed_bytes += nbytes
        for end in stream.ends:
            self.spent[end] = self._spent(now, end) + nbytes
        if max(self.spent[end] for end in stream.ends) > limits.RELAY_BYTES_PER_HOUR_MAX:
            self._close(number, "quota")

    def closed(self, now: float, number: int) -> None:
        """One end hung up."""
        if number in self._streams:
            self._close(number, "closed")

    @property
    def streams(self) -> int:
        """That are carried now."""
        return sum(stream.whole for stream in self._streams.values())

    def _close(self, number: int, code: str) -> None:
        stream = self._streams.pop(number)
        self._out.append(CloseStream(number))
        self._out.append(Emit(Relayed(*stream.ends, stream.nbytes, code)))

    # -- time --------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        for number in [n for n, asked in self._asked.items() if now >= asked.deadline]:
            self._next_via(now, self._asked.pop(number), "timeout")
        for number in [n for n, s in self._streams.items() if now >= s.quiet_at]:
            self._close(number, "timeout")
        for peer in [p for p, at in self._answering.items() if now >= at]:
            del self._answering[peer]
        for peer, wish in list(self._wishes.items()):
            self._grant(now, peer, wish)

    def deadline(self) -> float:
        times = [asked.deadline for asked in self._asked.values()]
        times += [stream.quiet_at for stream in self._streams.values()]
        times += list(self._answering.values())
        return min(times, default=math.inf)

    def drain(self) -> list[Effect]:
        out, self._out = self._out, []
        return out
