"""A run that lost a majority of its stewards goes on from what one member has verified."""

from __future__ import annotations

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import ConfigError, LocalProtocolError
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.log.anchor import make_deed
from swarmtrain_protocols.log.events import Superseded
from swarmtrain_protocols.messages.member import Propose
from swarmtrain_protocols.orders import sign_order
from swarmtrain_protocols.recovery import Plan, begin_again, plan_recovery
from tests.protocols.rounds_kit import (
    FOUNDER,
    IDS,
    RINGS,
    TRAIN,
    A,
    B,
    C,
    D,
    Log,
    Net,
    full,
    hash_of,
    opening,
)

COUNT = 5


def trained(rounds: int = 2) -> Net:
    """Five members in step; three of them vote."""
    net = Net(COUNT)
    net.model()
    for _ in range(rounds):
        step(net)
    return net


def step(net: Net, *, run_s: float = 3.0) -> None:
    for index in range(COUNT):
        if IDS[index] in net.peers and IDS[index] not in net.down:
            net.contribute(index, full(1.0))
    net.run(run_s)


def voters(net: Net) -> list[int]:
    ledger = next(p.node.ledger for p in net.peers.values() if p.id not in net.down)
    return [IDS.index(v) for v in ledger.voters]


def recover(net: Net, index: int, founder: Keyring = FOUNDER) -> Plan:
    """What the founder does on the machine of a member that survived."""
    peer = net[index]
    net.run(2.0)  # the newest certificate is on every disk
    if peer.id not in net.down:
        net.kill(index)
    plan = plan_recovery(net.manifest, peer.records, RINGS[index], [founder])
    net.start(index, records=[plan.log.record])
    state = peer.data.states[TRAIN]
    restarted = net[index]
    restarted.data.states[TRAIN] = state
    net._serve(restarted, TRAIN)
    restarted.node.restore(net.now, TRAIN, state.round, state.root())
    restarted.node.set_training(net.now, True)
    net.carry_out(restarted)
    return plan


def alive(net: Net) -> list[int]:
    return [i for i in range(COUNT) if IDS[i] in net.peers and IDS[i] not in net.down]


def hashes(net: Net) -> set[bytes]:
    return {net[i].data.states[TRAIN].root() for i in alive(net)}


def test_survivors_train_on_and_old_stewards_come_back_as_members() -> None:
    net = trained()
    lost = voters(net)[:2]
    others = [i for i in range(COUNT) if i not in voters(net)]
    old = {i: list(net[i].records) for i in lost}
    for index in lost:
        net.kill(index)
    net.run(5.0)
    before = net[others[0]].node.ledger.channels[TRAIN].round
    assert before >= 2
    plan = recover(net, others[0])
    assert set(plan.lost) <= {IDS[i] for i in range(COUNT)} and len(plan.lost) == 3
    net.run(60.0)
    generation = plan.log.recovery.generation
    assert {net[i].node.ledger.generation for i in alive(net)} == {generation}
    assert sorted(net[others[0]].node.ledger.members) == sorted(IDS[i] for i in alive(net))
    assert len(voters(net)) == 3, "the surviving members vote now"
    step(net, run_s=30.0)
    assert net[others[0]].node.ledger.channels[TRAIN].round > before
    assert len(hashes(net)) == 1

    for index in lost:
        state = net[index].data.states[TRAIN]
        back = net.start(index, records=old[index])
        back.data.states[TRAIN] = state
        back.node.restore(net.now, TRAIN, state.round, state.root())
        back.node.set_training(net.now, True)
        net.carry_out(back)
    net.run(60.0)
    for index in lost:
        (told,) = net[index].told_of(Superseded)
        assert (told.generation, told.ours) == (generation, 0)
        assert IDS[index] in net[others[0]].node.ledger.members
    assert len(hashes(net)) == 1
    now = net[others[0]].node.ledger.channels[TRAIN].round
    step(net, run_s=30.0)
    assert net[others[0]].node.ledger.channels[TRAIN].round > now
    assert len(hashes(net)) == 1 and len(alive(net)) == COUNT


def test_a_member_that_was_further_takes_the_state_of_the_new_log() -> None:
    """The survivor's log ends before rounds that others have seen committed."""
    net = trained()
    behind, further = [i for i in range(COUNT) if i not in voters(net)]
    net.run(2.0)
    early = list(net[behind].records)
    state = net[behind].data.states[TRAIN].copy()
    was = state.round
    net.kill(behind)
    step(net, run_s=60.0)
    step(net, run_s=10.0)
    assert net[further].data.states[TRAIN].round > was
    for index in voters(net):
        net.kill(index)
    net.peers[IDS[behind]].records[:] = early
    net.peers[IDS[behind]].data.states[TRAIN] = state
    recover(net, behind)
    net.run(60.0)
    assert net[further].data.states[TRAIN].round == was
    assert len(hashes(net)) == 1
    step(net, run_s=30.0)
    assert net[further].data.states[TRAIN].round > was and len(hashes(net)) == 1


def test_after_a_hand_over_the_heir_begins_again_and_the_founder_does_not() -> None:
    net = trained(1)
    heir = next(i for i in range(COUNT) if i not in voters(net))
    deed = make_deed(FOUNDER, net.manifest.run_id, 0, IDS[heir])
    body = e.FounderChanged(IDS[heir], True, "holiday", deed.signature)
    order = sign_order(FOUNDER, net.manifest.run_id, net[heir].node.ledger.index, body)
    net[heir].node.propose(net.now, order)
    net.carry_out(net[heir])
    net.run(3.0)
    for index in voters(net):
        net.kill(index)
    net.run(2.0)
    with pytest.raises(LocalProtocolError, match=f"founder is {IDS[heir].hex()[:16]}, since"):
        recover(net, heir)
    plan = recover(net, heir, RINGS[heir])
    assert [deed.heir for deed in plan.log.recovery.deeds] == [IDS[heir]]
    net.run(60.0)
    generation = plan.log.recovery.generation
    assert {net[i].node.ledger.generation for i in alive(net)} == {generation}
    before = net[heir].node.ledger.channels[TRAIN].round
    step(net, run_s=30.0)
    assert net[heir].node.ledger.channels[TRAIN].round > before and len(hashes(net)) == 1


def test_only_a_live_run_and_only_its_founder() -> None:
    net = trained(0)
    net.run(2.0)
    peer = net[1]
    with pytest.raises(LocalProtocolError, match="founder"):
        plan_recovery(net.manifest, peer.records, RINGS[1], [RINGS[2]])
    ledger = peer.node.ledger
    order = sign_order(FOUNDER, net.manifest.run_id, ledger.index, e.RunEnded("enough"))
    assert isinstance(order, Propose)
    peer.node.propose(net.now, order)
    net.carry_out(peer)
    net.run(3.0)
    with pytest.raises(ConfigError, match="ended"):
        plan_recovery(net.manifest, peer.records, RINGS[1], [FOUNDER])


def test_the_ledger_keeps_what_is_proven_and_drops_what_is_open() -> None:
    log = Log(A, B, C, D)
    log.add(e.StewardsChanged(tuple(sorted((A, B, C)))))
    done = log.open([A, B])
    log.choose(done)
    log.commit(done, hash_of("result"))
    assert log.add(opening(log.ledger, [A, B]))
    ledger = log.ledger
    assert begin_again(ledger, D, 1003, ledger.index + limits.RECOVERY_GAP) == tuple(
        sorted((A, B, C))
    )
    assert (ledger.voters, ledger.joint, list(ledger.members)) == ((D,), (), [D])
    channel = ledger.channels[TRAIN]
    assert (channel.round, channel.open, channel.attempt) == (1, None, 0)
    assert channel.outcome(0) is not None
    key = ledger.next_key(TRAIN)
    assert key is not None and (key.generation, key.round) == (1003, 1)
    assert ledger.may_vote(D) and not ledger.may_vote(A)
