"""Planted bugs of rounds: who is summed, how, when that counts, and what trainers hear of it."""

from __future__ import annotations

from tests.mutants.catalogue import find, maker
from tests.mutants.patching import patch

_code = maker("rounds", False)
_spec = maker("rounds", True)
_also = maker("rounds", False)
"""A sentence of a specification whose code was read before."""

_FROM_SPECS = (
    _spec(
        "sums run in member order",
        "07 §2.1",
        (
            patch(
                "dataplane:DataPlane.reduce",
                "coefficients = [c.value for c in chosen.coefficients]\n"
                "    sources = [self._source(buffers, part, c.index) for c in chosen.coefficients]",
                "order = sorted(chosen.coefficients, key=lambda c: -c.index)\n"
                "    coefficients = [c.value for c in order]\n"
                "    sources = [self._source(buffers, part, c.index) for c in order]",
            ),
        ),
        find("rounds", 0, 20),
    ),
    _spec(
        "a commit needs more than half of the holders",
        "08 §2.2.10",
        (patch("rounds.leader:RoundLeader._decide", "else len(holders) // 2 + 1", "else 1"),),
        find("rounds: holder lost", 0, 20),
        find("rounds", 0, 10),
    ),
    _spec(
        "of two holders both must hold the result",
        "08 §2.2.10",
        (
            patch(
                "rounds.leader:RoundLeader._decide",
                "need = len(holders) if len(holders) <= 2 else",
                "need = 1 if len(holders) <= 2 else",
            ),
        ),
        find("rounds", 0, 20),
    ),
    _spec(
        "an aborted attempt is over: the next one has another number",
        "08 §2.1",
        (patch("channels:ChannelState.abort", "self.attempt += 1", "pass"),),
        find("rounds", 0, 30),
    ),
    _spec(
        "two attempts of one round are never both open",
        "08 §2.1",
        (
            patch("leadership:Leadership.follow", "log.is_leader and log.ready", "log.is_leader"),
            patch("ledger:_opened", "channel.open is not None or ", ""),
            patch("channels:ChannelState.begin", "assert self.open is None", "pass"),
        ),
        find("small: leader as it writes", 0, 12),
        find("units: ledger", 0),
    ),
    _spec(
        "who lacks a result is told again who computes it",
        "08 §2.5",
        (
            patch(
                "rounds.owners:Owners.complained",
                "self.tell_again(phase, peer, phase.missing[peer])",
                "pass",
            ),
        ),
        find("units: leader", 0),
    ),
    _spec(
        "an attempt is decided once",
        "08 §2.1",
        (
            patch("leadership:Leadership.follow", "log.is_leader and log.ready", "log.is_leader"),
            patch(
                "ledger:_committed",
                "not channel.is_open(body.key) or channel.chosen is None",
                "channel.open is None or channel.chosen is None",
            ),
        ),
        find("small: leader as it writes", 0, 12),
        find("units: ledger", 0),
    ),
    _spec(
        "the set has only what every part's computer has",
        "08 §2.2.9",
        (
            patch(
                "rounds.phases:Phase.delivered",
                "common = set(range(len(self.opened.contributors)))",
                "common: set[int] = set()",
                "common &= set(held)",
                "common |= set(held)",
            ),
        ),
        find("rounds", 0, 12),
        find("units: leader", 0),
    ),
    _spec(
        "a part is summed when all of the set is here",
        "08 §2.3.4, §2.4: deputy and owner both broadcast",
        (
            patch("rounds.attempt:Attempt.step", "if all(index in", "if any(index in"),
            patch(
                "dataplane:DataPlane.reduce",
                "sources = [self._source(buffers, part, c.index) for c in chosen.coefficients]",
                "here = [(part, c.index) in buffers.contributions\n"
                "            or buffers.opened.contributors[c.index].root in self._blobs\n"
                "            for c in chosen.coefficients]\n"
                "    coefficients = [v for v, is_here in zip(coefficients, here) if is_here]\n"
                "    sources = [self._source(buffers, part, c.index)\n"
                "               for c, is_here in zip(chosen.coefficients, here) if is_here]",
            ),
        ),
        find("rounds", 0, 40),
    ),
    _spec(
        "an owner claims its own contribution only if it still has the bytes",
        "08 §2.3.3",
        (patch("rounds.attempt:Attempt.assign", "if not self.own_lost:", "if True:"),),
        find("rounds", 0, 12),
        find("units: attempt", 0),
    ),
    _spec(
        "coefficients are shares of the set, not of all that were listed",
        "08 §1.5",
        (
            patch(
                "rounds.clip:coefficients",
                "e.Coefficient(i, value) for",
                "e.Coefficient(i, value * sum(weights)"
                " / sum(c.samples * c.discount for c in opened.contributors)) for",
            ),
        ),
        find("rounds", 0, 20),
    ),
    _spec(
        "an announcement that an attempt has listed is not taken again",
        "08 §2.2.1: double count on resend",
        (
            patch(
                "rounds.lobby:Lobbies._is_old",
                "return message.seen < index",
                "return False",
            ),
        ),
        find("rounds", 0, 40),
        find("units: lobby", 0),
    ),
    _spec(
        "what was said before its maker was listed anew counts for nothing, whatever its root",
        "08 §2.2.1: double count on resend",
        (
            patch(
                "rounds.lobby:Lobbies._is_old",
                "message.seen < self._newest.get((message.channel, peer), 0)",
                "False",
                "index, _ =",
                "index, root =",
                "return message.seen < index",
                "return message.root == root and message.seen < index",
            ),
        ),
        find("data", 69),
        find("unlike", 69),
        find("rounds", 69),
        find("units: lobby", 0),
    ),
    _spec(
        "who is not in the set hears that it is excluded",
        "08 §2.3",
        (
            patch(
                "rounds.member:RoundMember._decide_offer",
                'if mine else ("excluded", 0.0)',
                'if mine else ("committed", 1.0)',
            ),
        ),
        find("rounds", 0, 20),
    ),
    _spec(
        "an owner that is lost is replaced",
        "08 §2.2.8",
        (patch("rounds.owners:Owners._replace", "if current in able:", "if True:"),),
        find("rounds: sometimes", 0),
        find("units: owners", 0),
    ),
    _spec(
        "every phase of an attempt has a deadline",
        "08 §2.2",
        (patch("rounds.leader:RoundLeader._decide", "if now >= phase.deadline:", "if now < 0.0:"),),
        find("units: leader", 0),
    ),
    _also(
        "a contribution whose attempt failed is offered again or given back",
        "08 §2.3",
        (patch("rounds.member:RoundMember._decide_offer", "offer.bound = None", "return"),),
        find("rounds", 0, 20),
    ),
    _also(
        "where the log pins a state hash, that one counts and no majority",
        "08 §2.2.5",
        (
            patch(
                "rounds.pinning:Pins.standing",
                "known = self._ledger.channels[name].pinned_hash(number)",
                "known = None",
            ),
        ),
        find("small", 0, 24),
        find("units: leader", 0),
    ),
    _spec(
        "the residual of an aborted contribution is the one before it",
        "06 §2.4: residual updated on abort",
        (
            patch(
                "codecs.feedback:ErrorFeedback.rollback",
                "self._close()",
                "self._close()\n    self.residual, self._staged = self._staged, self.residual",
            ),
        ),
        find("units: residual", 0),
    ),
    _spec(
        "what is left out is re-queued",
        "07 §2.4",
        (
            patch(
                "overlap:Overlay.decided",
                "if coefficient is None:\n        return",
                "if coefficient is None:\n        self._requeued = 0\n        return",
            ),
        ),
        find("units: overlap", 0),
    ),
    _spec(
        "eager momentum takes the coefficient that was logged",
        "07 §2.4",
        (
            patch(
                "overlap:Overlay.decided",
                "factor = self.base.dtype.type(coefficient)",
                "factor = self._weight",
            ),
        ),
        find("units: overlap", 0),
    ),
)

_FROM_CODE = (
    _code(
        "a contribution is summed with its own coefficient",
        "dataplane.py",
        patch(
            "dataplane:DataPlane.reduce",
            "coefficients = [c.value for c in chosen.coefficients]",
            "coefficients = [1 / len(chosen.coefficients) for c in chosen.coefficients]",
        ),
        find("rounds", 0, 20),
    ),
    _code(
        "an aborted contribution goes back to its trainer as aborted",
        "rounds/member.py",
        patch("rounds.member:RoundMember._decide_offer", '"aborted", 0.0', '"committed", 1.0'),
        find("rounds", 0, 20),
    ),
    _code(
        "a new leader is told of contributions that wait",
        "rounds/member.py",
        patch("rounds.member:RoundMember.announce", "self._send_ready(offer)", "pass"),
        find("rounds", 0, 30),
    ),
    _code(
        "a contribution that is too old goes back",
        "rounds/member.py",
        patch(
            "rounds.member:RoundMember._expire_offer",
            'self._close_offer(offer, "excluded", 0.0, key)',
            "pass",
        ),
        find("rounds", 0, 60),
    ),
    _code(
        "a silent deputy is no liar",
        "rounds/attempt.py",
        patch(
            "rounds.attempt:Attempt.part_result",
            "if result.owner not in allowed:",
            'if result.owner not in allowed and self._fault(sender, "bad_signature") is None:',
        ),
        find("rounds", 360, 400),
        find("rounds", 0, 60),
    ),
    _code(
        "an attempt whose contributors have lost their bytes ends at once",
        "rounds/leader.py",
        patch(
            "rounds.leader:RoundLeader._gather",
            "< minimum <= possible and now",
            "< minimum and now",
        ),
        find("rounds", 0, 12),
        find("units: leader", 0),
    ),
    _code(
        "what was counted is not offered again",
        "rounds/member.py",
        patch(
            "rounds.member:RoundMember._close_offer",
            "del self._offers[offer.channel]",
            "offer.bound = None",
        ),
        find("unlike", 0, 6),
    ),
    _code(
        "the discount of a late contribution is declared",
        "rounds/leader.py",
        patch("rounds.leader:RoundLeader._contributor", "= discount_of(late, said.age)", "= 1.0"),
        find("unlike", 0, 6),
    ),
    _code(
        "what several phases have moved has the weight of one",
        "rounds/leader.py",
        patch("rounds.leader:RoundLeader._contributor", "said.age)", "0)"),
        find("unlike", 0, 6),
    ),
    _code(
        "how many phases are in a contribution is said",
        "rounds/offer.py",
        patch("rounds.offer:Offer.ready", "self.age,", "0,"),
        find("unlike", 0, 6),
    ),
    _code(
        "the declared discount is applied",
        "rounds/clip.py",
        patch("rounds.clip:coefficients", "item.samples * item.discount", "item.samples"),
        find("unlike", 0, 6),
    ),
    _code(
        "late is late beyond what the overlap mode makes the rule",
        "rounds/leader.py",
        patch("rounds.leader:RoundLeader._hidden", '!= "off"', '== "off"'),
        find("unlike", 0, 6),
    ),
    _code(
        "samples count once",
        "channels.py",
        patch(
            "channels:ChannelState.commit", "self.samples += samples", "self.samples += 2 * samples"
        ),
        find("unlike", 0, 6),
    ),
    _code(
        "only samples of the set count",
        "channels.py",
        patch(
            "channels:ChannelState.commit",
            "for _, samples, _ in self.history[-1].contributors:",
            "for samples in [item.samples for item in opened.contributors]:",
        ),
        find("unlike", 0, 6),
    ),
    _code(
        "the base of a contribution is the one that its trainer said",
        "rounds/leader.py",
        patch(
            "rounds.leader:RoundLeader._contributor",
            "weight = said.samples, said.base_round,",
            "weight = said.samples, key.round,",
        ),
        find("unlike", 0, 6),
    ),
    _code(
        "who is not ready by the deadline is not waited for",
        "rounds/lobby.py",
        patch(
            "rounds.lobby:Lobbies.grace_over_at",
            "lobby.half_ready + grace_s",
            "lobby.half_ready + 100 * grace_s",
        ),
        find("unlike: stubborn", 0, 2),
    ),
    _code(
        "an announcement that was vetted is looked at again once the log has gone on",
        "rounds/lobby.py",
        patch("rounds.lobby:Lobbies.drop_stale", "lobby.vetted.clear()", "pass"),
        find("units: lobby", 0),
    ),
    _code(
        "slow links have their turn",
        "rounds/turns.py",
        patch("rounds.turns:Turns.plan", "return True, ()", "pass"),
        find("unlike: turns", 0),
    ),
    _code(
        "who cannot deliver in time is not waited for in every round",
        "rounds/turns.py",
        patch("rounds.turns:Turns.plan", "hopeless.append(index)", "return True, ()"),
        find("unlike: two phases", 0),
    ),
)

MUTANTS = (*_FROM_SPECS, *_FROM_CODE)
