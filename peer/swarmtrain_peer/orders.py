"""Orders of the operator, signed with the founder's key. Only where that key is (spec 05 §1.5).

What an order would be refused for by everybody is said here first, with the reason; what only the
log can decide (whether a majority takes it) is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swarmtrain_peer import rollback
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.changes import NOTICE_ROUNDS, check_change, front
from swarmtrain_protocols.errors import ConfigError, NotAuthorised, QuorumLost
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.log.anchor import make_deed
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.orders import EVICTED, sign_order

Document = dict[str, Any]

ORDER_TIMEOUT_S = 10.0


async def give_order(runtime: PeerRuntime, args: Document) -> Document:
    """Have the order ``args["kind"]`` logged; answers once the log says so.

    Raises:
        NotAuthorised: the founder's key is not on this site.
        ConfigError: no such order or member, or it changes nothing.
        CheckpointError: nobody holds the state to go back to.
        QuorumLost: no majority of stewards has logged it in time; it may still come.
    """
    founder, node = runtime.founder_key(), runtime.node
    if founder is None:
        raise NotAuthorised(
            "only the founder gives orders",
            "the founder's key is not here",
            "run it where `swarmtrain up` was first run, or where the run was handed over to",
        )
    body, answer = await _order(runtime, str(args.get("kind")), args)
    if node.log.leader is None:
        raise QuorumLost("the order was not given", "no leader is known", "see swarmtrain status")
    heard: list[bool] = []

    def watch(event: object) -> None:
        if isinstance(event, LedgerChanged):
            heard.extend(taken for _, found, taken in event.entries if found == body)

    runtime.listeners.append(watch)
    try:
        runtime.driver.run(node.propose, sign_order(founder, node.run, node.ledger.index, body))
        if not await runtime.until(lambda: bool(heard), ORDER_TIMEOUT_S):
            raise QuorumLost(
                "the order is not in the log yet",
                f"no majority of stewards answered in {ORDER_TIMEOUT_S:g} s, or the run had moved "
                "on when it came",
                "see swarmtrain status, then give it again",
            )
    finally:
        runtime.listeners.remove(watch)
    if not any(heard):
        raise ConfigError(
            f"order {args.get('kind')}",
            "another entry of the log came first, and it changes nothing any more",
            "see swarmtrain status",
        )
    return {"index": node.ledger.index, **answer}


async def _order(runtime: PeerRuntime, kind: str, args: Document) -> tuple[e.EntryBody, Document]:
    """The entry to sign, and what to tell whoever gave the order beside its index."""
    ledger = runtime.node.ledger
    if ledger.ended:
        raise ConfigError(f"order {kind}", f"the run has ended: {ledger.ended}")
    if kind == "rollback":
        return await rollback.order(runtime, int(args["round"]), _reason(args))
    make = _ORDERS.get(kind)
    if make is None:
        known = ", ".join([*_ORDERS, "rollback"])
        raise ConfigError(f"order {kind!r:.40}", "no such order", f"one of {known}")
    return make(runtime, args)


def _reason(args: Document, default: str = "") -> str:
    return str(args.get("reason") or default)[:256]


def _pause(runtime: PeerRuntime, args: Document) -> tuple[e.EntryBody, Document]:
    return e.Paused(_reason(args, "by its founder")), {}


def _resume(runtime: PeerRuntime, args: Document) -> tuple[e.EntryBody, Document]:
    if not runtime.node.ledger.paused:
        raise ConfigError("order resume", "the run is not paused")
    return e.Resumed(_reason(args)), {}


def _stop(runtime: PeerRuntime, args: Document) -> tuple[e.EntryBody, Document]:
    return e.RunEnded(_reason(args, "stopped by its founder")), {}


def _ban(runtime: PeerRuntime, args: Document) -> tuple[e.EntryBody, Document]:
    """A member by the first digits of its key, or a stranger by all of them."""
    ledger, digits = runtime.node.ledger, str(args.get("member"))
    member = _whole_key(digits) or _among(list(ledger.members), digits, "member")
    if tuple(ledger.voters) == (member,):
        raise ConfigError(f"member {digits}", "it is the only steward", "have it leave first")
    return e.MemberBanned(member, _reason(args, "by the founder")), {"member": member.hex()}


def _evict(runtime: PeerRuntime, args: Document) -> tuple[e.EntryBody, Document]:
    """A member by the first digits of its key; a steward's vote goes to somebody else first."""
    ledger = runtime.node.ledger
    member = _among(list(ledger.members), str(args.get("member")), "member")
    if tuple(ledger.voters) == (member,):
        raise ConfigError(f"member {member.hex()[:8]}", "it is the only steward", "find another")
    reason = f"{EVICTED}: {_reason(args, 'by the founder')}"
    return e.MemberLeft(member, reason[:256]), {"member": member.hex()}


def _unban(runtime: PeerRuntime, args: Document) -> tuple[e.EntryBody, Document]:
    digits = str(args.get("member"))
    member = _among(list(runtime.node.ledger.banned), digits, "banned member")
    return e.MemberBanned(member, _reason(args), lifted=True), {"member": member.hex()}


def _set(runtime: PeerRuntime, args: Document) -> tuple[e.EntryBody, Document]:
    ledger, key = runtime.node.ledger, str(args.get("key"))
    given = args.get("at_round")
    at_round = front(ledger) + NOTICE_ROUNDS if given is None else int(given)
    value = check_change(runtime.manifest.keys, ledger, at_round, key, str(args.get("value")))
    body = e.ConfigChanged(at_round, key, value, _reason(args, "by the founder"))
    return body, {"key": key, "value": value, "at_round": at_round}


def _revoke(runtime: PeerRuntime, args: Document) -> tuple[e.EntryBody, Document]:
    digits = str(args.get("ticket"))
    known = [bytes.fromhex(row["id"]) for row in runtime.tickets.rows(runtime.node.ledger)]
    ticket = _among(known, digits, "ticket")
    if ticket in runtime.node.ledger.access.revoked:
        raise ConfigError(f"ticket {ticket.hex()}", "it is revoked already")
    return e.TicketRevoked(ticket, _reason(args)), {"ticket": ticket.hex()}


def _allow(runtime: PeerRuntime, args: Document) -> tuple[e.EntryBody, Document]:
    digits, add = str(args.get("member") or ""), bool(args.get("add"))
    access = runtime.node.ledger.access
    if not digits:
        if access.closed != add:
            raise ConfigError("allow list", "it is lifted already" if add else "it holds already")
        return e.AllowChanged(b"", add), {}
    if not add:
        member = _among(list(access.listed), digits, "key on the list")
        return e.AllowChanged(member, False), {"member": member.hex()}
    whole = _whole_key(digits)
    if whole is None:
        todo = "the machine prints its key with `swarmtrain doctor`, and when it is refused"
        raise ConfigError(f"key {digits!r:.70}", "not the 64 hex digits of a key", todo)
    return e.AllowChanged(whole, True, str(args.get("note") or "")[:64]), {"member": whole.hex()}


def _handover(runtime: PeerRuntime, args: Document) -> tuple[e.EntryBody, Document]:
    ledger, digits, founder = runtime.node.ledger, str(args.get("member")), runtime.founder_key()
    assert founder is not None, "checked by whoever takes orders"
    member = _among(list(ledger.members), digits, "member")
    if member == ledger.founder:
        raise ConfigError(f"member {digits}", "the run is its own already")
    number = len(ledger.access.deeds)
    if number >= limits.HANDOVERS_MAX:
        raise ConfigError("the run stays where it is", f"it was handed over {number} times")
    deed = make_deed(founder, runtime.node.run, number, member)
    body = e.FounderChanged(
        member, bool(args.get("tickets", True)), _reason(args), deed.signature
    )
    return body, {"founder": member.hex()}


def _whole_key(digits: str) -> bytes | None:
    try:
        key = bytes.fromhex(digits)
    except ValueError:
        return None
    return key if len(key) == 32 else None


def _among(known: list[bytes], digits: str, what: str) -> bytes:
    """The only one of ``known`` that begins with ``digits``."""
    found = [key for key in known if digits and key.hex().startswith(digits.lower())]
    if len(found) == 1:
        return found[0]
    todo = "see swarmtrain ticket list" if what == "ticket" else "see swarmtrain peers"
    if not found:
        raise ConfigError(f"{what} {digits!r:.70}", f"no {what} of that key", todo)
    raise ConfigError(f"{what} {digits!r:.70}", f"several begin like that: {len(found)}", todo)


_Make = Callable[[PeerRuntime, Document], tuple[e.EntryBody, Document]]
_ORDERS: dict[str, _Make] = {
    "pause": _pause,
    "resume": _resume,
    "stop": _stop,
    "ban": _ban,
    "unban": _unban,
    "evict": _evict,
    "set": _set,
    "revoke": _revoke,
    "allow": _allow,
    "handover": _handover,
}


def access_document(ledger: Ledger) -> Document:
    """Who may enter and who is kept out, as the log says."""
    access = ledger.access
    return {
        "founder": ledger.founder.hex(),
        "closed": access.closed,
        "allowed": [{"key": k.hex(), "note": note} for k, note in access.listed.items()],
        "banned": [{"key": k.hex(), "reason": why} for k, why in ledger.banned.items()],
    }
