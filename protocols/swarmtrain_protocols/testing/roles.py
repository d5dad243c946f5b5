"""Who plays which part in a swarm of nodes just now, for faults that are aimed at a role."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmtrain_protocols.node import NodeCore

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host


def plays(host: Host, role: str) -> bool:
    """Whether ``host`` is ``leader``, ``steward``, ``member``, ``ownerN``, ``deputyN`` now.

    Owner and deputy of part N (0 … 255) are those of an attempt that is open in its own ledger.
    """
    node = getattr(host.node, "core", None)
    if not host.alive or not isinstance(node, NodeCore):
        return False
    if role == "leader":
        return node.log.is_leader
    if role == "steward":
        return host.peer in node.ledger.voters
    if role == "member":
        return node.joiner.is_member
    for kind in ("owner", "deputy"):
        if role.startswith(kind):
            return _has_part(node, host.peer, kind, int(role.removeprefix(kind)))
    raise AssertionError(f"no such role: {role}")


def _has_part(node: NodeCore, peer: bytes, kind: str, part: int) -> bool:
    for channel in node.ledger.channels.values():
        parts = channel.open.parts if channel.open is not None else ()
        if part < len(parts) and getattr(parts[part], kind) == peer:
            return True
    return False
