"""The member's side of all rounds: own contributions, attempts in progress, reports. Spec 08."""

from __future__ import annotations

import math
import random
from collections import deque

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.ledger import ChannelState, Ledger, Outcome
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.rounds import clip
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.attempt import Attempt, Closing
from swarmtrain_protocols.rounds.fetches import Fetches
from swarmtrain_protocols.rounds.offer import Offer
from swarmtrain_protocols.rounds.pace import Pace

CLOSING_TIMEOUT_S = 10.0
NO_NEWS_S = 1.5
"""Whoever knows of a part says so at once; a node that was away finds that nobody remembers."""
QUERY_INTERVAL_S = 0.5
RECENT_ATTEMPTS_MAX = 16
EARLY_MAX = 2 * limits.PARTS_MAX
ANNOUNCE_AGAIN_S = 10.0
"""What waits this long is announced again: a round trip of a link that is five seconds away."""


class RoundMember:
    """All attempts that this node takes part in. One undecided contribution per channel."""

    def __init__(
        self,
        *,
        keyring: Keyring,
        rng: random.Random,
        ledger: Ledger,
        fetches: Fetches,
        out: list[Effect],
        max_base_age_rounds: int,
    ) -> None:
        self.ledger = ledger
        self.leader: PeerId | None = None
        self._me = keyring.peer_id
        self._keyring = keyring
        self._rng = rng
        self._fetches = fetches
        self._out = out
        self._max_base_age = max_base_age_rounds
        self._offers: dict[str, Offer] = {}
        self._attempts: dict[str, Attempt] = {}
        self._closing: list[Closing] = []
        self._recent: dict[RoundKey, list[m.PartResult]] = {}
        self._early: deque[tuple[PeerId, m.PartResult | m.TakeOver]] = deque(maxlen=EARLY_MAX)
        self.pace = Pace()
        self.in_place: dict[tuple[str, int], bytes] = {}
        """Results that are in place and committed, by (channel, round): food for the catch-up."""

    # -- the own contribution --------------------------------------------------------------

    def offer(self, now: float, offer: Offer) -> None:
        """Announce an encoded contribution.

        Raises:
            LocalProtocolError: the channel has an undecided contribution.
        """
        if offer.channel in self._offers:
            raise LocalProtocolError("one contribution at a time", offer.channel)
        channel = self.ledger.channels.get(offer.channel)
        offer.since = channel.round if channel is not None else self.ledger.group_round
        offer.again_at = now + ANNOUNCE_AGAIN_S
        self._offers[offer.channel] = offer
        self._send_ready(offer)
        self.reconcile(now)

    def withdraw(self, now: float, channel: str) -> bool:
        """Take an unbound contribution back; False if it is in an open attempt already."""
        offer = self._offers.get(channel)
        if offer is None or offer.bound is not None:
            return False
        del self._offers[channel]
        if self.leader is not None:
            message = m.Withdraw(self.ledger.generation, channel, offer.root)
            self._out.append(Send(self.leader, message))
        self._out.append(fx.ReleaseContribution(channel, offer.root))
        return True

    def pledge(self, offer: Offer) -> None:
        """Hold a contribution ready for a step; it takes the place of one that was not closed.

        Raises:
            LocalProtocolError: the one in its place is in an open attempt.
        """
        old = self._offers.get(offer.channel)
        if old is not None and old.bound is not None:
            raise LocalProtocolError("one contribution at a time", offer.channel)
        if old is not None and old.root != offer.root:
            self._out.append(fx.ReleaseContribution(old.channel, old.root))
        offer.pledged, offer.since = True, self.ledger.channels[offer.channel].round
        self._offers[offer.channel] = offer

    def retract(self, channel: str) -> None:
        """The step went on without what was pledged."""
        offer = self._offers.get(channel)
        if offer is not None and offer.pledged and offer.bound is None:
            del self._offers[channel]
            self._out.append(fx.ReleaseContribution(channel, offer.root))

    def undecided(self, channel: str) -> Offer | None:
        return self._offers.get(channel)

    def _send_ready(self, offer: Offer) -> None:
        if self.leader is None or offer.pledged:
            return
        seen = max(0, self.ledger.index)
        announced = offer.ready(self.ledger.generation, seen, self.pace)
        self._out.append(Send(self.leader, announced))

    def announce(self, now: float) -> None:
        """A new leader, or a new link to it: repeat everything it needs to go on."""
        for offer in self._offers.values():
            if offer.bound is None:
                self._send_ready(offer)
        if self.leader is not None:
            for attempt in self._attempts.values():
                self._hear_early(now, attempt)
                attempt.reports(self.leader, everything=True)

    def announcement_due(self, now: float) -> bool:
        """Something has waited for long: the leader may not have heard of it, or of states here.

        Asked for at every tick; true once per ``ANNOUNCE_AGAIN_S``.
        """
        offers = [o for o in self._offers.values() if o.bound is None and o.again_at <= now]
        attempts = [a for a in self._attempts.values() if a.again_at <= now]
        for offer in offers:
            offer.again_at = now + ANNOUNCE_AGAIN_S
        for attempt in attempts:
            attempt.again_at = now + ANNOUNCE_AGAIN_S
        return bool(offers) or any(attempt.tells for attempt in attempts)

    def rewound(self, now: float) -> None:
        """A new generation began: what was offered in the old one is returned as aborted."""
        for channel, offer in list(self._offers.items()):
            if channel.startswith("train/"):
                key = offer.bound or RoundKey(self.ledger.generation - 1, channel, 0, 0)
                self._close_offer(offer, "aborted", 0.0, key)
        for slot in [s for s in self.in_place if s[0] in self.ledger.channels]:
            if slot[1] >= self.ledger.channels[slot[0]].round:
                del self.in_place[slot]

    def state_is(self, channel: str, number: int) -> None:
        """The state here is the one before ``number``: what began later is void."""
        offer = self._offers.get(channel)
        if offer is not None and offer.bound is None and offer.base_round > number:
            key = RoundKey(self.ledger.generation, channel, number, 0)
            self._close_offer(offer, "aborted", 0.0, key)

    def connected(self, peer: PeerId) -> None:
        """A new link: what ``peer`` computed may have been said on the old one, and lost."""
        for attempt in self._attempts.values():
            attempt.ask_again(peer)

    # -- following the ledger --------------------------------------------------------------

    def logged(self, body: e.EntryBody) -> None:
        """An entry was accepted. What becomes of an own contribution is seen entry by entry.

        Several may come at once, so that an attempt is over before this node has begun it.
        """
        if isinstance(body, e.RoundOpened):
            self._bind(body.key, body.contributors)
        elif isinstance(body, e.StepClosed):
            for item in body.stages:
                key = RoundKey(body.generation, stage_channel(item.stage), body.step, body.attempt)
                self._bind(key, item.contributors)
        elif isinstance(body, e.RoundSet):
            channel = self.ledger.channels[body.key.channel]
            self._out += [Emit(notice) for notice in clip.notices(channel, body)]
        elif isinstance(body, e.RoundCommitted | e.RoundAborted):
            self._decide_offer(body.key)
        elif isinstance(body, e.StepOutcome | e.StageLost):
            for name, offer in list(self._offers.items()):
                if offer.bound is not None and not self.ledger.channels[name].is_open(offer.bound):
                    self._decide_offer(offer.bound)

    def _bind(self, key: RoundKey, contributors: tuple[e.Contributor, ...]) -> None:
        offer = self._offers.get(key.channel)
        if offer is not None and (self._me, offer.root) in (
            (c.member, c.root) for c in contributors
        ):
            offer.bound = key
        elif offer is not None and any(c.member == self._me for c in contributors):
            self._send_ready(offer)  # what was said before this was seen counts for nothing

    def jumped(self) -> None:
        """A snapshot replaced the ledger: what was offered may have been decided unseen."""
        for name, offer in list(self._offers.items()):
            channel = self.ledger.channels.get(name)
            past = channel.history if channel is not None else []
            for done in past:
                mine = [c for member, _, c in done.contributors if member == self._me]
                if done.round >= offer.since and mine:  # one contribution at a time: this one
                    key = RoundKey(done.generation, name, done.round, done.attempt)
                    self._close_offer(offer, "committed", mine[0], key)
                    break
            else:
                opened = channel.open if channel is not None else None
                if offer.bound is not None and (opened is None or opened.key != offer.bound):
                    self._decide_offer(offer.bound)

    def reconcile(self, now: float) -> None:
        """Compare what runs here with what the ledger says, and act on the difference."""
        for name in [n for n in self._attempts if n not in self.ledger.channels]:
            forgotten = self._attempts.pop(name)  # an idle group of which the ledger is rid
            forgotten.cancel()
            self._out.append(fx.ReleaseAttempt(forgotten.key))
        for name in list(self.ledger.channels):
            channel = self.ledger.channels[name]
            attempt = self._attempts.get(name)
            if attempt is not None and (channel.open is None or channel.open.key != attempt.key):
                self._finish(now, attempt, channel)
                attempt = None
            if channel.open is not None and attempt is None:
                attempt = self._begin(now, channel)
            if attempt is not None and channel.chosen is not None and attempt.chosen is None:
                attempt.choose(now, channel.chosen)
            if attempt is not None:
                self._hear_early(now, attempt)
            self._expire_offer(channel)
        self.flush_reports()

    def _begin(self, now: float, channel: ChannelState) -> Attempt | None:
        opened = channel.open
        assert opened is not None
        people = [c.member for c in opened.contributors] + list(opened.holders)
        people += [p.owner for p in opened.parts] + [p.deputy for p in opened.parts]
        if self._me not in people:
            return None
        here = self._keyring, self._rng, self._fetches, self._out
        attempt = Attempt(opened.key, opened, self._me, self.ledger.run, *here)
        self._attempts[channel.name] = attempt
        attempt.weighs = self.ledger.weighs(channel.name)
        offer = self._offers.get(channel.name)
        index = attempt.own_index
        own = None if index is None else opened.contributors[index]
        if own is not None and (offer is None or own.root != offer.root):
            attempt.own_lost = True
        elif offer is not None and own is not None:
            self.pace.begun(now, opened.key, offer.encode_s)
        attempt.again_at = now + ANNOUNCE_AGAIN_S
        attempt.begin(now)
        if attempt.own_lost and self.leader is not None:
            attempt.reports(self.leader, everything=True)
        return attempt

    def _finish(self, now: float, attempt: Attempt, channel: ChannelState) -> None:
        del self._attempts[channel.name]
        key = attempt.key
        outcome = channel.outcome(key.round)
        committed = (
            outcome is not None
            and outcome.attempt == key.attempt
            and outcome.generation == key.generation
        )
        if not committed or outcome is None:
            attempt.cancel()
            self._out.append(fx.ReleaseAttempt(key))
            return
        if attempt.stored_root is not None:
            self._settle(attempt, outcome)
        elif self._me in attempt.receivers():
            closing = Closing(attempt, outcome, now + CLOSING_TIMEOUT_S, now + QUERY_INTERVAL_S)
            attempt.ask_at = math.inf  # from now on everybody is asked, and often
            self._closing.append(closing)
        else:
            attempt.cancel()
            self._out.append(fx.ReleaseAttempt(key))

    def _settle(self, attempt: Attempt, outcome: Outcome) -> None:
        """The committed bytes are in place."""
        attempt.cancel()
        if attempt.stored_root != outcome.root:
            # An owner has told this node something else than the others.
            why = f"the own result of {attempt.key} is not the one that was committed"
            self._fall_back(attempt.key, why)
            return
        self._recent[attempt.key] = [attempt.results[p] for p in sorted(attempt.results)]
        while len(self._recent) > RECENT_ATTEMPTS_MAX:
            del self._recent[next(iter(self._recent))]
        if attempt.key.channel.startswith("train/"):
            self._placed(attempt.key, outcome.root)
        else:
            self._out.append(Emit(fx.GroupDone(attempt.key, outcome.root, outcome.contributors)))
        self._out.append(fx.ReleaseAttempt(attempt.key))

    def _placed(self, key: RoundKey, root: bytes) -> None:
        """Remember a result, and forget those that nothing here will ever be applied to."""
        oldest = key.round - limits.HISTORY_ROUNDS
        for slot in [s for s in self.in_place if s[0] == key.channel and s[1] < oldest]:
            del self.in_place[slot]
        self.in_place[key.channel, key.round] = root

    def forget_results(self, channel: str) -> None:
        """No state of ``channel`` is here any more that a result could be applied to."""
        for slot in [s for s in self.in_place if s[0] == channel]:
            del self.in_place[slot]

    def _decide_offer(self, key: RoundKey) -> None:
        """The attempt ``key`` is over."""
        offer = self._offers.get(key.channel)
        if offer is None or offer.bound != key:
            return
        channel = self.ledger.channels.get(key.channel)
        outcome = channel.outcome(key.round) if channel is not None else None
        if outcome is None or (outcome.attempt, outcome.generation) != (
            key.attempt,
            key.generation,
        ):
            offer.bound = None
            if key.channel.startswith("group/"):
                self._send_ready(offer)  # a group call waits for the next attempt
                return
            verdict, coefficient = "aborted", 0.0
        else:
            mine = [c for member, _, c in outcome.contributors if member == self._me]
            verdict, coefficient = ("committed", mine[0]) if mine else ("excluded", 0.0)
        self._close_offer(offer, verdict, coefficient, key)

    def _close_offer(self, offer: Offer, verdict: str, coefficient: float, key: RoundKey) -> None:
        del self._offers[offer.channel]
        self._out.append(
            Emit(fx.ContributionDecided(offer.channel, offer.root, verdict, coefficient, key))
        )
        self._out.append(fx.ReleaseContribution(offer.channel, offer.root))

    def _expire_offer(self, channel: ChannelState) -> None:
        """A contribution that nobody will take is returned to its trainer, never silently used.

        Its base is too old, or what it was trained on is not its member's any more (13).
        """
        offer = self._offers.get(channel.name)
        if offer is None or offer.bound is not None or not channel.holds_state or offer.pledged:
            return
        claims = self.ledger.refusal(self._me, channel.name, offer.claims, offer.samples)
        if claims:
            self._out.append(Emit(fx.Notice("contribution_rejected", {"reason": claims})))
        if claims or channel.round - offer.base_round > self._max_base_age:
            if self.leader is not None:
                message = m.Withdraw(self.ledger.generation, channel.name, offer.root)
                self._out.append(Send(self.leader, message))
            key = RoundKey(self.ledger.generation, channel.name, channel.round, channel.attempt)
            self._close_offer(offer, "excluded", 0.0, key)

    # -- answers of the data plane ---------------------------------------------------------

    def measured(self, now: float, effect: fx.MeasurePart, square: float) -> None:
        if (attempt := self._find(effect.key)) is not None:
            attempt.measured(now, effect.part, effect.index, square)

    def reduced(self, now: float, key: RoundKey, part: int, root: bytes) -> None:
        if (attempt := self._find(key)) is not None:
            attempt.reduced(now, part, root)

    def stored(
        self, now: float, key: RoundKey, root: bytes, durable: bool, square_norm: float = 0.0
    ) -> None:
        """All parts are in place and hashed to ``root``; ``durable``: on disk.

        ``square_norm``: of the decoded result, for stages of a pipeline.
        """
        attempt = self._find(key)
        if attempt is None:
            self._out.append(fx.ReleaseAttempt(key))
            return
        attempt.stored_root, attempt.durable, attempt.square_norm = root, durable, square_norm
        if self._attempts.get(key.channel) is attempt:
            if self.leader is not None:
                self._out.append(Send(self.leader, m.Holding(key, root, durable, square_norm)))
            return
        for closing in self._closing:
            if closing.attempt is attempt:
                self._closing.remove(closing)
                self._settle(attempt, closing.outcome)
                return

    def _find(self, key: RoundKey) -> Attempt | None:
        attempt = self._attempts.get(key.channel)
        if attempt is not None and attempt.key == key:
            return attempt
        for closing in self._closing:
            if closing.attempt.key == key:
                return closing.attempt
        return None

    def pending_rounds(self, channel: str) -> list[int]:
        """Committed rounds whose bytes are still on their way by the normal path."""
        return [c.outcome.round for c in self._closing if c.attempt.key.channel == channel]

    # -- messages --------------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: object) -> None:
        if isinstance(message, m.PartResult | m.TakeOver):
            attempt = self._find(message.key)
            heard = self._heard(now, attempt, peer, message)
            early = attempt is not None or self._is_ahead(message.key)
            if not heard and early and peer in self.ledger.members:
                self._early.append((peer, message))
        elif isinstance(message, m.RoundQuery):
            attempt = self._find(message.key)
            if attempt is not None:
                attempt.answer_query(peer)
            for result in self._recent.get(message.key, []):
                self._out.append(Send(peer, result))
        self.flush_reports()

    def _heard(
        self, now: float, attempt: Attempt | None, peer: PeerId, said: m.PartResult | m.TakeOver
    ) -> bool:
        """Act on what is said of an attempt; False: the log here has not got that far."""
        if attempt is None:
            return False
        if isinstance(said, m.PartResult):
            attempt.part_result(now, peer, said)
        elif peer == self.leader:
            attempt.take_over(now, said.part, PeerId(said.deputy))
        else:
            return False
        return True

    def _is_ahead(self, key: RoundKey) -> bool:
        """The log here has not got that far: in a step an owner may be done before others begin."""
        channel = self.ledger.channels.get(key.channel)
        if channel is None or key.generation != self.ledger.generation:
            return False
        return (key.round, key.attempt) >= (channel.round, channel.attempt)

    def _hear_early(self, now: float, attempt: Attempt) -> None:
        for item in [item for item in self._early if item[1].key == attempt.key]:
            if self._heard(now, attempt, *item):
                self._early.remove(item)

    def flush_reports(self) -> None:
        """Report to the leader what attempts have got since the last call."""
        if self.leader is None:
            return
        for attempt in self._attempts.values():
            if attempt.held_changed or attempt.complains:
                attempt.reports(self.leader, everything=False)

    # -- time ------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        for attempt in self._attempts.values():
            attempt.step(now)
        for closing in list(self._closing):
            closing.attempt.step(now)
            waited_s = now - (closing.deadline - CLOSING_TIMEOUT_S)
            if closing.deadline <= now or (waited_s >= NO_NEWS_S and not closing.attempt.hopeful()):
                self._give_up(closing)
            elif closing.next_query <= now:
                # Whoever computed a part may have died before telling us; others have it.
                closing.next_query = now + QUERY_INTERVAL_S
                for peer in closing.attempt.receivers():
                    if peer != self._me:
                        self._out.append(Send(peer, m.RoundQuery(closing.attempt.key)))
        self.flush_reports()

    def _give_up(self, closing: Closing) -> None:
        """The normal path did not bring all parts; the catch-up fetches by the committed root."""
        self._closing.remove(closing)
        closing.attempt.cancel()
        key = closing.attempt.key
        self._fall_back(key, f"parts of {key} did not arrive in time")

    def _fall_back(self, key: RoundKey, why: str) -> None:
        fields: dict[str, object] = {"what": "result by committed root", "why": why}
        self._out.append(Emit(fx.Notice("fallback", fields)))
        self._out.append(fx.ReleaseAttempt(key))

    def deadline(self) -> float:
        if not self._attempts and not self._offers and not self._closing:
            return math.inf
        times = [min(a.deadline(), a.again_at) for a in self._attempts.values()]
        times += [offer.again_at for offer in self._offers.values() if offer.bound is None]
        for closing in self._closing:
            times += [closing.deadline, closing.next_query, closing.attempt.deadline()]
        return min(times, default=math.inf)


__all__ = ["Offer", "RoundMember"]
