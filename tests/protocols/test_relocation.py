"""A site that is found elsewhere, or nowhere: its record in the log and in the DHT follow."""

from __future__ import annotations

from swarmtrain_protocols.dht.kademlia import usable
from swarmtrain_protocols.relocation import relocate
from tests.protocols.rounds_kit import Net

ELSEWHERE = ("44.7.7.7:4007",)


def moved(net: Net, index: int, addresses: tuple[str, ...]) -> bool:
    peer = net[index]
    done = relocate(peer.node, net.now, addresses)
    net.carry_out(peer)
    net.run(8.0)
    return done


def test_the_log_and_the_dht_say_where_it_is_now() -> None:
    net = Net(3)
    net.model()
    assert moved(net, 2, ELSEWHERE)
    me = net[2].node.me
    for peer in net.peers.values():
        known = peer.node.ledger.members[me]
        assert (known.addresses, known.reachable) == (ELSEWHERE, True)
    assert net[2].node.dht.me.addresses == usable(ELSEWHERE)
    assert not moved(net, 2, ELSEWHERE), "nothing has changed"


def test_who_cannot_be_dialled_owns_no_part_and_votes_no_more() -> None:
    net = Net(3)
    net.model()
    assert len(net[0].node.ledger.voters) == 3
    assert moved(net, 2, ())
    me = net[2].node.me
    assert not net[0].node.ledger.members[me].reachable
    assert me not in net[0].node.ledger.voters
    assert net[2].node.dht.me.addresses == ()
    assert moved(net, 2, ELSEWHERE), "and back"
    assert net[0].node.ledger.members[me].reachable
