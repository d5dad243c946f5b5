"""The cores of one peer: wired to one ledger and one list of effects."""

from __future__ import annotations

from swarmtrain_protocols.node_parts import NodeParts
from tests.protocols.rounds_kit import Net


def test_all_cores_read_one_ledger_and_write_to_one_list() -> None:
    net = Net(2)
    node = net[0].node
    assert isinstance(node, NodeParts)
    membership = (node.joiner, node.shepherd, node.reception, node.leadership)
    readers = (node.member, node.catchup, node.leader, node.pipeline, *membership)
    assert [reader.ledger is node.ledger for reader in readers] == [True] * len(readers)
    net.run(2.0)
    assert node.linked() == [net[1].node.me]
    assert sorted(node.ledger.members) == sorted([node.me, net[1].node.me])
