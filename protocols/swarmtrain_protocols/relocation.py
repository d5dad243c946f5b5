"""A site is found elsewhere than before, or can no longer be dialled: tell log and DHT. Spec 14."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from swarmtrain_protocols.dht.ids import Contact
from swarmtrain_protocols.dht.kademlia import usable

if TYPE_CHECKING:
    from swarmtrain_protocols.node import NodeCore


def relocate(node: NodeCore, now: float, addresses: tuple[str, ...]) -> bool:
    """Others may dial ``addresses`` from now on; none: nobody can dial this site.

    The member's record in the log follows by a join request, as after a restart elsewhere. Returns
    False if nothing has changed.
    """
    reachable = bool(addresses)
    if node.site.addresses == addresses and node.site.reachable == reachable:
        return False
    node.site = node.joiner.site = replace(node.site, addresses=addresses, reachable=reachable)
    node.dht.me = Contact(node.me, usable(addresses))
    node.finder.moved(now, addresses)
    node.tick(now)
    return True
