"""Can others dial this site? Those whom it has dialled try it, and answer (spec 14 §2.1).

After AutoNAT of libp2p, with one difference: no message names a host. A responder dials the host
that the asker's link comes from and no other, so nobody can be made to dial a third party
(reflection). What it says on the new connection (``knock``) and what it must hear (``answer``) were
agreed on the encrypted link: another machine at that address cannot pass for the asker.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from swarmtrain_protocols import limits
from swarmtrain_protocols.addresses import is_private, join_address, split_address, subnet
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.dht.requests import Meter
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.messages.reach import DialBack, DialBackRequest

PREFACE = b"swarm/k\x00"
SECRET_BYTES = 16
ASK_AGAIN_S = 60.0
"""Before a peer that gave no vote, or whose vote is void, is asked once more."""

State = Literal["unknown", "reachable", "outgoing only"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known: ``agree`` of ``asked`` others say so. ``seen``: the host they see, or ''."""

    state: State = "unknown"
    agree: int = 0
    asked: int = 0
    seen: str = ""
    port: int = 0
    """One that others could dial; 0: none."""

    @property
    def confidence(self) -> str:
        """For people: how many of how many."""
        return f"{self.agree} of {self.asked}"


@dataclass(frozen=True, slots=True)
class VerdictChanged:
    """Event: others see this site otherwise than before."""

    verdict: Verdict


@dataclass(frozen=True, slots=True)
class KnockAt:
    """Effect: dial the host that the link of ``peer`` comes from, at each of ``ports``.

    Say the preface and ``knock``; a port is open if ``answer`` comes back. Then call ``dialled``.
    """

    ticket: int
    peer: PeerId
    ports: tuple[int, ...]
    knock: bytes
    answer: bytes


@dataclass(frozen=True, slots=True)
class _Vote:
    open: bool
    seen: str
    subnet: str
    private: bool
    port: int
    at: float


@dataclass(slots=True)
class _Asked:
    peer: PeerId
    knock: bytes
    answer: bytes
    ports: tuple[int, ...]
    deadline: float
    heard: bool = False


class Reach:
    """One site's opinion of itself, and its service to others. Satisfies ``core.Core``."""

    def __init__(self, entropy: Callable[[int], bytes]) -> None:
        self.verdict = Verdict()
        self._entropy = entropy
        self._out: list[Effect] = []
        self._ports: tuple[int, ...] = ()
        self._claims: tuple[str, ...] = ()
        """Hosts that it tells others."""
        self._hosts: dict[PeerId, str] = {}
        self._voters: dict[PeerId, float] = {}
        """Those whom this site has dialled, and from when on they may be asked."""
        self._votes: dict[PeerId, _Vote] = {}
        self._asked: dict[int, _Asked] = {}
        self._number = 0
        self._serving: dict[int, tuple[PeerId, int]] = {}
        self._meters: dict[PeerId, Meter] = {}
        self._all = Meter(limits.DIAL_BACK_RATE_ALL_PER_S, limits.DIAL_BACK_BURST_ALL)

    @property
    def waits(self) -> bool:
        """Somebody was asked and has not answered yet."""
        return bool(self._asked)

    # -- what the shell tells ------------------------------------------------------------------

    def listen(self, now: float, addresses: tuple[str, ...]) -> None:
        """Where others should be able to dial this site; nowhere: it does not listen."""
        places = [split_address(address) for address in addresses]
        ports = tuple(dict.fromkeys(port for _, port in places))[: limits.DIAL_BACK_PORTS_MAX]
        hosts = tuple(dict.fromkeys(host for host, _ in places))
        if (ports, hosts) != (self._ports, self._claims):
            self._ports, self._claims = ports, hosts
            self._votes.clear()
            self._asked.clear()
            self._voters = dict.fromkeys(self._voters, now)
        self.tick(now)

    def connected(self, now: float, peer: PeerId, address: str, outgoing: bool) -> None:
        """A direct link: ``address`` is the other end's socket. Relayed ones do not count."""
        host, _ = split_address(address)
        self._hosts[peer] = host
        if outgoing:
            vote = self._votes.get(peer)
            last = now if vote is None else vote.at + ASK_AGAIN_S
            self._voters[peer] = max(now, last)
        elif len(self._votes) < limits.DIAL_BACK_METERS_MAX:  # it got through: a proof
            place = subnet(address)
            self._votes[peer] = _Vote(True, "", place, is_private(address), 0, now)
        self.tick(now)

    def disconnected(self, now: float, peer: PeerId) -> None:
        self._hosts.pop(peer, None)
        self._voters.pop(peer, None)
        for request in [n for n, asked in self._asked.items() if asked.peer == peer]:
            del self._asked[request]
        self.tick(now)

    def knocked(self, knock: bytes) -> bytes | None:
        """Somebody dialled and said this: what to answer, None: hang up."""
        for asked in self._asked.values():
            if asked.knock == knock:
                asked.heard = True
                return asked.answer
        return None

    def dialled(self, now: float, ticket: int, found: tuple[int, ...]) -> None:
        """The shell has carried out ``KnockAt``: these ports answered."""
        peer, request = self._serving.pop(ticket)
        if (host := self._hosts.get(peer)) is not None:
            self._out.append(Send(peer, DialBack(request, host, found)))

    def receive(self, now: float, peer: PeerId, message: object) -> None:
        """Raises PeerFault ``malformed`` for an answer that cannot be one."""
        if isinstance(message, DialBackRequest):
            self._serve(now, peer, message)
        elif isinstance(message, DialBack):
            self._answered(now, peer, message)

    # -- serving ---------------------------------------------------------------------------------

    def _serve(self, now: float, peer: PeerId, message: DialBackRequest) -> None:
        host = self._hosts.get(peer)
        if host is None or not message.ports:
            self._out.append(Send(peer, DialBack(message.request, "", (), "unknown")))
        elif len(self._serving) >= limits.DIAL_BACK_IN_FLIGHT_MAX or not self._may(now, peer):
            self._out.append(Send(peer, DialBack(message.request, host, (), "busy")))
        else:
            self._number += 1
            self._serving[self._number] = peer, message.request
            ports, secrets = message.ports, (message.knock, message.answer)
            self._out.append(KnockAt(self._number, peer, ports, *secrets))

    def _may(self, now: float, peer: PeerId) -> bool:
        meter = self._meters.pop(peer, None)
        if meter is None:
            meter = Meter(limits.DIAL_BACK_RATE_PER_S, limits.DIAL_BACK_BURST)
            while len(self._meters) >= limits.DIAL_BACK_METERS_MAX:
                del self._meters[next(iter(self._meters))]
        self._meters[peer] = meter  # the one used last is forgotten last
        return meter.take(now) and self._all.take(now)

    # -- asking ----------------------------------------------------------------------------------

    def _answered(self, now: float, peer: PeerId, message: DialBack) -> None:
        asked = self._asked.get(message.request)
        if asked is None or asked.peer != peer:
            return  # late, or of an earlier question
        del self._asked[message.request]
        self._voters[peer] = now + ASK_AGAIN_S
        if not message.code:
            try:
                ipaddress.ip_address(message.seen)
            except ValueError:
                raise PeerFault("malformed", "dial-back: no address seen", peer) from None
            if any(port not in asked.ports for port in message.open):
                raise PeerFault("malformed", "dial-back: ports that were not asked for", peer)
            # "Open" counts if the knock was heard, "closed" if it was not: else it got lost, or
            # somebody lies.
            if bool(message.open) == asked.heard and (asked.heard or self._concerns(message.seen)):
                self._vote(now, peer, message)
        self.tick(now)

    def _concerns(self, seen: str) -> bool:
        """Whether nobody there means that nobody is where this site says it is.

        A machine may dial out from another address than it listens on; a private address behind
        the one that is seen is a router's business.
        """
        behind = not is_private(join_address(seen, 1))
        return seen in self._claims or (
            behind and all(is_private(join_address(host, 1)) for host in self._claims)
        )

    def _vote(self, now: float, peer: PeerId, message: DialBack) -> None:
        seen, port = message.seen, min(message.open, default=0)
        for other, vote in list(self._votes.items()):
            if vote.seen and vote.seen != seen and _version(vote.seen) == _version(seen):
                del self._votes[other]  # the address of this site has changed since
                if other in self._voters:
                    self._voters[other] = vote.at + ASK_AGAIN_S
        place = join_address(self._hosts[peer], 1)
        private = is_private(join_address(seen, 1))
        self._votes[peer] = _Vote(bool(port), seen, subnet(place), private, port, now)
        self._voters[peer] = now + limits.DIAL_BACK_AGAIN_S

    def _places(self) -> list[str]:
        """Subnets that have, or will have, their say; private ones say as often as they are."""
        taken = [vote.subnet for vote in self._votes.values() if not vote.private]
        for asked in self._asked.values():
            address = join_address(self._hosts[asked.peer], 1)
            if not is_private(address):
                taken.append(subnet(address))
        return taken

    def _ask(self, now: float) -> None:
        for peer, at in list(self._voters.items()):
            count = len(self._votes) + len(self._asked)
            if not self._ports or count >= limits.DIAL_BACK_VOTERS:
                return
            if at > now or not self._may_be_asked(peer):
                continue
            self._number += 1
            secret = self._entropy(2 * SECRET_BYTES)
            knock, answer = secret[:SECRET_BYTES], secret[SECRET_BYTES:]
            deadline = now + limits.DIAL_BACK_REPLY_S
            self._asked[self._number] = _Asked(peer, knock, answer, self._ports, deadline)
            request = DialBackRequest(self._number, self._ports, knock, answer)
            self._out.append(Send(peer, request))

    def _judge(self) -> None:
        votes = list(self._votes.values())
        public = [vote for vote in votes if not vote.private]
        votes = public or votes  # who sees a public address knows more than the next room
        yes, no = sum(v.open for v in votes), sum(not v.open for v in votes)
        seen = next((v.seen for v in reversed(votes) if v.seen), "")
        port = next((v.port for v in reversed(votes) if v.port), 0)
        verdict = Verdict("unknown", 0, len(votes), seen, port)
        if not self._ports:
            verdict = Verdict("outgoing only", seen=seen)
        elif yes > no:
            verdict = replace(verdict, state="reachable", agree=yes)
        elif no > yes:
            verdict = replace(verdict, state="outgoing only", agree=no, port=0)
        if verdict != self.verdict:
            self.verdict = verdict
            self._out.append(Emit(VerdictChanged(verdict)))

    # -- time ------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        for peer in [p for p, v in self._votes.items() if now >= v.at + limits.DIAL_BACK_AGAIN_S]:
            del self._votes[peer]
        for request in [n for n, asked in self._asked.items() if now >= asked.deadline]:
            self._voters[self._asked.pop(request).peer] = now + ASK_AGAIN_S
        self._ask(now)
        self._judge()

    def deadline(self) -> float:
        times = [asked.deadline for asked in self._asked.values()]
        times += [vote.at + limits.DIAL_BACK_AGAIN_S for vote in self._votes.values()]
        if self._ports and len(self._votes) + len(self._asked) < limits.DIAL_BACK_VOTERS:
            times += [at for peer, at in self._voters.items() if self._may_be_asked(peer)]
        return min(times, default=math.inf)

    def _may_be_asked(self, peer: PeerId) -> bool:
        address = join_address(self._hosts[peer], 1)
        busy = peer in self._votes or any(a.peer == peer for a in self._asked.values())
        return not busy and (is_private(address) or subnet(address) not in self._places())

    def drain(self) -> list[Effect]:
        out, self._out = self._out, []
        return out


def _version(host: str) -> int:
    return ipaddress.ip_address(host).version
