"""Orders of the operator: pause, resume, stop, ban. Only where the founder's key is."""

from __future__ import annotations

from typing import Any

from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.errors import ConfigError, NotAuthorised, QuorumLost
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.orders import sign_order

ORDER_TIMEOUT_S = 10.0


async def give_order(runtime: PeerRuntime, args: dict[str, Any]) -> dict[str, Any]:
    """Have the order ``args["kind"]`` logged; answers once the log says so.

    Raises:
        NotAuthorised: the founder's key is not on this site.
        ConfigError: no such order or member, or it changes nothing.
        QuorumLost: no majority of stewards has logged it in time; it may still come.
    """
    founder, node = runtime.settings.founder, runtime.node
    if founder is None:
        raise NotAuthorised(
            "only the founder gives orders",
            "the founder's key is not here",
            "run it where `swarmtrain up` was first run",
        )
    body = _order(str(args.get("kind")), str(args.get("reason") or ""), args, node.ledger)
    if node.log.leader is None:
        raise QuorumLost("the order was not given", "no leader is known", "see swarmtrain status")
    runtime.driver.run(node.propose, sign_order(founder, node.run, node.ledger.index, body))
    if not await runtime.until(lambda: _done(body, node.ledger), ORDER_TIMEOUT_S):
        raise QuorumLost(
            "the order is not in the log yet",
            f"no majority of stewards answered in {ORDER_TIMEOUT_S:g} s",
            "see swarmtrain status, then give it again",
        )
    return {"index": node.ledger.index}


def _order(kind: str, reason: str, args: dict[str, Any], ledger: Ledger) -> e.EntryBody:
    if ledger.ended:
        raise ConfigError(f"order {kind}", f"the run has ended: {ledger.ended}")
    if kind == "pause":
        return e.Paused(reason or "by its founder")
    if kind == "resume":
        if not ledger.paused:
            raise ConfigError("order resume", "the run is not paused")
        return e.Resumed(reason)
    if kind == "stop":
        return e.RunEnded(reason or "stopped by its founder")
    if kind == "ban":
        return e.MemberBanned(_member(str(args.get("member")), ledger), reason or "by the founder")
    raise ConfigError(f"order {kind!r:.40}", "no such order", "pause, resume, stop or ban")


def _member(digits: str, ledger: Ledger) -> bytes:
    """The only member whose key begins with ``digits``; stewards keep their vote until replaced."""
    found = [key for key in ledger.members if digits and key.hex().startswith(digits.lower())]
    if len(found) != 1:
        why = "several members" if found else "no member"
        raise ConfigError(f"member {digits!r:.70}", f"{why} of that key", "see swarmtrain peers")
    if found[0] in ledger.voters:
        raise ConfigError(f"member {digits}", "it is a steward", "have it leave first")
    return found[0]


def _done(body: e.EntryBody, ledger: Ledger) -> bool:
    if isinstance(body, e.Paused):
        return bool(ledger.paused)
    if isinstance(body, e.Resumed):
        return not ledger.paused
    if isinstance(body, e.MemberBanned):
        return body.member in ledger.banned
    return bool(ledger.ended)
