"""The founder's orders on whole nodes: obeyed by all at one place of the log; numbers by NumPy."""

from __future__ import annotations

import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.log.anchor import make_deed
from swarmtrain_protocols.orders import sign_order
from swarmtrain_protocols.rounds import effects as fx
from tests.protocols.rounds_kit import FOUNDER, IDS, RINGS, TRAIN, Net, Peer
from tests.protocols.test_node import step_all, thetas


def give(net: Net, peer: Peer, body: e.EntryBody, by: Keyring = FOUNDER) -> bool:
    """``peer`` passes on an order; whether the log took it."""
    index = peer.node.ledger.index
    peer.node.propose(net.now, sign_order(by, net.manifest.run_id, index, body))
    net.carry_out(peer)
    net.run(1.0)
    return peer.node.ledger.index > index


def faults_of(net: Net) -> list[str]:
    told = [x for p in net.peers.values() for x in p.told_of(fx.Notice)]
    return [str(x.fields["fault"]) for x in told if x.name == "peer_fault"]


def test_a_learning_rate_changes_at_one_round_for_all_and_for_whoever_comes_later() -> None:
    net = Net(3)
    theta = net.model()
    follower = next(p for p in net.peers.values() if not p.node.log.is_leader)
    assert give(net, follower, e.ConfigChanged(2, "outer_lr", "0.25", "too fast"))
    for rate in (1.0, 1.0, 0.25, 0.25):
        step_all(net, 4.0, 4.0, 4.0)
        theta = theta - np.float32(rate) * np.float32(4.0)
    assert [found.tobytes() for found in thetas(net)] == [theta.tobytes()] * 3
    net.kill(2)
    step_all(net, 4.0, 4.0)
    theta = theta - np.float32(1.0)
    again = net.start(2, records=net[2].records)
    net.run(3.0)
    late = net.start(3)
    net.run(5.0)
    for peer in (again, late):
        assert peer.data.states[TRAIN].theta.tobytes() == theta.tobytes(), "it came back, it joined"
    step_all(net, 8.0, 8.0)
    theta = theta - np.float32(2.0)
    assert [found.tobytes() for found in thetas(net)] == [theta.tobytes()] * 4


def test_an_order_that_came_too_late_is_dropped_and_said_so() -> None:
    net = Net(3)
    net.model()
    step_all(net, 1.0, 1.0, 1.0)
    peer = net[1]
    index = peer.node.ledger.index
    assert not give(net, peer, e.ConfigChanged(1, "outer_lr", "0.25", "round 1 may be open"))
    assert peer.node.ledger.index == index and faults_of(net) == []
    told = [x.fields["reason"] for x in net.leader().told_of(fx.Notice) if "reason" in x.fields]
    assert "order is out of date" in told


def test_the_run_goes_back_by_order_and_the_old_generation_is_over() -> None:
    net = Net(3)
    theta = net.model()
    for value in (1.0, 2.0, 3.0):
        step_all(net, value, value, value)
    root = net[0].node.ledger.channels[TRAIN].outcome(1).state_hash  # type: ignore[union-attr]
    body = e.Rewound(1, "a loss spike", (TRAIN,), (1,), (root,), ordered=True)
    assert give(net, net[1], body)
    net.run(5.0)
    step_all(net, 10.0, 10.0, 10.0, run_s=5.0)
    expected = theta - np.float32(1.0) - np.float32(10.0)
    assert [found.tobytes() for found in thetas(net)] == [expected.tobytes()] * 3
    assert all(p.node.ledger.generation == 1 for p in net.peers.values())
    assert not give(net, net[1], body), "the same order again is out of date"
    unordered = e.Rewound(2, "no", (TRAIN,), (1,), (root,))
    assert not give(net, net[1], unordered), "data are not lost because somebody says so"


def test_only_the_founder_of_now_is_obeyed() -> None:
    net = Net(3)
    net.model()
    heir = RINGS[1]
    assert not give(net, net[2], e.Paused("not mine"), by=heir)
    assert faults_of(net) == ["not_the_founder"]
    deed = make_deed(FOUNDER, net.manifest.run_id, 0, IDS[1])
    assert give(net, net[0], e.FounderChanged(IDS[1], True, "holiday", deed.signature))
    assert not give(net, net[0], e.Paused("not mine any more"))
    assert give(net, net[2], e.Paused("mine"), by=heir)
    assert all(p.node.ledger.paused == "mine" for p in net.peers.values())
