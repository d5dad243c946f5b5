"""Planted bugs of membership: who may be in, who is let go, how members reach each other."""

from __future__ import annotations

from tests.mutants.catalogue import find, maker
from tests.mutants.patching import patch

_code = maker("membership", False)
_spec = maker("membership", True)
_also = maker("membership", False)
"""A sentence of a specification whose code was read before."""

_FROM_SPECS = (
    _spec(
        "uses of a ticket are counted where entries are applied",
        "05 §2.4",
        (
            patch(
                "ledger:Ledger.ticket_used_up",
                "return member not in known and",
                "return False and",
            ),
        ),
        find("units: access", 0),
    ),
    _spec(
        "who is banned is out",
        "05 §2.4",
        (patch("access:banned", "ledger.members.pop(body.member, None)", "pass"),),
        find("units: access", 0),
    ),
    _spec(
        "who is suspended owns no part",
        "08 §2.9",
        (
            patch(
                "suspension:trusted",
                "return [k for k in members if not is_suspended(ledger, k)] or members",
                "return members",
            ),
        ),
        find("units: owners", 0),
    ),
    _also(
        "who is gone for long is let go",
        "05 §2.6",
        (
            patch(
                "membership:Shepherd._watch",
                'self._propose(now, e.MemberLeft(member.id, "lost"))',
                "pass",
            ),
        ),
        find("members: gone for good", 0, 3),
    ),
    _also(
        "who was let go as lost asks to be in again",
        "05 §2.6",
        (
            patch(
                "membership:Joiner._as_wanted",
                "return (\n        known is not None\n        and known.life",
                "return self._registered >= 0 or (\n        known is not None\n"
                "        and known.life",
            ),
        ),
        find("members: away for long", 0, 3),
    ),
    _spec(
        "a record's sequence never goes backwards at a reader",
        "03 §2.1.6",
        (
            patch(
                "dht.records:RecordStore.put",
                "record.sequence < self.marks.sequence(slot)",
                "False",
            ),
        ),
        find("units: records", 0),
    ),
)

_FROM_CODE = (
    _code(
        "a token opens the stream that it was made for",
        "relay.py",
        patch(
            "relay:Relay.attached",
            "end = stream.tokens.pop(token, None)",
            "end = stream.tokens.popitem()[1] if stream.tokens else None",
        ),
        find("members: behind NAT", 10, 13),
    ),
    _code(
        "both ends get a token of their own",
        "relay.py",
        patch(
            "relay:Relay._requested",
            "self._out.append(Send(target, RelayOffer(peer, tokens[1])))",
            "self._out.append(Send(target, RelayOffer(peer, tokens[0])))",
        ),
        find("members: behind NAT", 0, 2),
    ),
    _code(
        "the target is told",
        "relay.py",
        patch(
            "relay:Relay._requested",
            "self._out.append(Send(target, RelayOffer(peer, tokens[1])))",
            "pass",
        ),
        find("members: behind NAT", 0, 2),
    ),
    _code(
        "a wish that failed may be granted later",
        "relay.py",
        patch("relay:Relay._failed", "wish.asking = False", "pass"),
        find("members: behind NAT", 9, 15),
    ),
    _code(
        "both ends pay",
        "relay.py",
        patch(
            "relay:Relay.moved",
            "self._spent(now, end) + nbytes",
            "self._spent(now, end) + nbytes // 2",
        ),
        find("members: behind NAT", 0, 2),
    ),
    _code(
        "a stream that nobody came to is closed",
        "relay.py",
        patch("relay:Relay.tick", 'self._close(number, "timeout")', "pass"),
        find("members: behind NAT", 10, 15),
    ),
    _code(
        "what a node names reaches the path that asked it only",
        "dht/lookup.py",
        patch(
            "dht.lookup:Lookup.hear",
            "self._enter(view, contact)\n",
            "[self._enter(each, contact) for each in self._views]\n",
        ),
        find("dht: led away", 1),
    ),
    _code(
        "nobody is a contact who has not proven who it is",
        "dht/kademlia.py",
        patch(
            "dht.kademlia:DhtCore.hinted",
            "found.append(contact_of(peer, addresses))",
            "found.append(contact_of(peer, addresses)); self.table.seen(found[-1])",
        ),
        find("dht: invented", 1),
    ),
    _code(
        "one subnet has few places in the table",
        "dht/routing.py",
        patch(
            "dht.routing:RoutingTable._fits", "return False\n        inside", "pass\n        inside"
        ),
        find("dht: flood", 1),
    ),
    _code(
        "writing takes a read of the same key",
        "dht/serving.py",
        patch(
            "dht.serving:Serving._keep",
            "self.tokens.valid(core.wall(now), peer, record.key, message.token)",
            "True",
        ),
        find("dht: blind", 1),
    ),
    _code(
        "a record keeps the rule of its name",
        "dht/records.py",
        patch(
            "dht.records:refusal",
            "breaks_its_rule(record.name, record.publisher, record.value)",
            "False",
        ),
        find("dht: squatted", 1),
    ),
    _code(
        "hosts where nobody answers are not dialled because they are named",
        "dht/hearsay.py",
        patch("dht.hearsay:Hearsay._blocked", "return recent and", "return False and"),
        find("dht: reflected", 1),
    ),
    _code(
        "those out of sight are tried again",
        "dht/healing.py",
        patch(
            "dht.healing:Healing.tick",
            "core.ping(now, contact, partial(self._answered, contact))",
            "pass",
        ),
        find("dht: split", 1),
    ),
    _code(
        "a few keys beside the target cannot agree on half of the truth",
        "dht/search.py",
        patch(
            "dht.search:Searches._agreed",
            "return not self._core.density.crowded(search.target, nearest)",
            "return True",
        ),
        find("dht: halves", 1),
    ),
    _code(
        "copies are made anew when a holder leaves",
        "dht/replication.py",
        patch("dht.replication:Replication.left", "if nearer < limits.DHT_PATHS:", "if False:"),
        find("dht: waves", 1),
    ),
    _code(
        "a crowd beside a key makes the search wider",
        "dht/search.py",
        patch(
            "dht.search:Searches._surrounded",
            "return not few and density.crowded(target, closest)",
            "return False",
        ),
        find("dht: ground", 1),
    ),
)

MUTANTS = (*_FROM_SPECS, *_FROM_CODE)
