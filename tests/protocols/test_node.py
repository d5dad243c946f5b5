"""Whole nodes in one process: rounds, deaths, restarts, lies; numbers against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Connect, PeerId, Send
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.messages import dht as dm
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.messages import rounds as rm
from swarmtrain_protocols.messages.common import Span
from swarmtrain_protocols.node_events import JoinFailed, LedgerChanged
from swarmtrain_protocols.rounds import effects as fx
from tests.protocols.rounds_kit import (
    GROUP,
    IDS,
    TRAIN,
    VALUES,
    Net,
    events,
    faults,
    full,
    hash_of,
    ignored,
    of_kind,
)


def thetas(net: Net) -> list[np.ndarray]:
    return [p.data.states[TRAIN].theta for p in net.peers.values() if p.id not in net.down]


def step_all(net: Net, *values: float, run_s: float = 2.0) -> None:
    for index, value in enumerate(values):
        if IDS[index] not in net.down:
            net.contribute(index, full(value))
    net.run(run_s)


def test_three_nodes_join_train_and_hold_the_same_state() -> None:
    net = Net(3)
    theta = net.model()
    assert [len(p.node.ledger.voters) for p in net.peers.values()] == [3, 3, 3]
    # lr 1, no momentum, equal weights: θ loses the mean, every operation rounded to fp32.
    third = np.float32(np.float64(4) / 12)
    mean = np.zeros(VALUES, np.float32)
    for value in (1.0, 2.0, 3.0):  # nobody is loud
        mean = mean + third * np.float32(value)
    for _ in range(3):
        step_all(net, 1.0, 2.0, 3.0)
        theta = theta - mean
    for found in thetas(net):
        assert found.tobytes() == theta.tobytes()
    for peer in net.peers.values():
        decided = peer.told_of(fx.ContributionDecided)
        assert [x.outcome for x in decided] == ["committed"] * 3
        assert [x.coefficient for x in decided] == [float(third)] * 3
        assert peer.told_of(fx.Resync) == []
    assert net[0].node.ledger.rounds_aborted == 0


def test_a_question_to_the_dht_moves_no_other_core() -> None:
    net = Net(2)
    net.model()
    node, asker = net[0].node, net[1].node.me
    before = [part.deadline() for part in (node.log, node.member, node.leader, node.pipeline)]
    assert node.receive_dht(net.now, asker, dm.FindNode(1 << 40, bytes(20)))
    (answer,) = node.drain()
    assert isinstance(answer, Send) and isinstance(answer.message, dm.Nodes)
    assert before == [
        part.deadline() for part in (node.log, node.member, node.leader, node.pipeline)
    ]


def test_what_is_found_in_the_dht_moves_others() -> None:
    """Addresses that were looked for are dialled: the finder hears of them, not the caller."""
    net = Net(2)
    net.model()
    one, two = net[0].node, net[1].node
    one.finder.look_up(net.now, PeerId(b"s" * 32))
    sent = [e for e in [*one.dht.drain()] if isinstance(e, Send)]
    assert [effect.peer for effect in sent] == [two.me]
    two.receive(net.now, one.me, sent[0].message)
    (answer,) = [e for e in two.drain() if isinstance(e, Send)]
    assert not one.receive_dht(net.now, two.me, answer.message)


def test_weights_count() -> None:
    net = Net(2)
    theta = net.model()
    net.contribute(0, full(1.0), samples=1.0)
    net.contribute(1, full(5.0), samples=3.0)
    net.run(2.0)
    for found in thetas(net):
        assert found.tobytes() == (theta - np.float32(4.0)).tobytes()


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_member_costs_at_most_one_attempt(victim: int) -> None:
    """Peer 0 leads at first: its death is a change of leader in the middle of a round."""
    net = Net(4)
    net.model()
    step_all(net, 1.0, 1.0, 1.0, 1.0)
    for index in range(4):
        net.contribute(index, full(1.0))
    net.kill(victim)
    net.run(30.0)
    rest = [i for i in range(4) if i != victim]
    undecided = [i for i in rest if net[i].node.member.undecided(TRAIN)]
    assert undecided == []
    step_all(net, 1.0, 1.0, 1.0, 1.0, run_s=30.0)
    rounds = {net[i].data.states[TRAIN].round for i in rest}
    assert len(rounds) == 1 and rounds.pop() >= 2
    assert len({found.tobytes() for found in thetas(net)}) == 1
    assert net.leader().node.ledger.rounds_aborted <= 1


def test_a_restarted_node_catches_up_and_its_dead_contribution_is_left_out() -> None:
    net = Net(3)
    theta = net.model()
    step_all(net, 3.0, 3.0, 3.0)
    records = list(net[1].records)
    net.kill(1)
    net.run(1.0)
    step_all(net, 2.0, 2.0, 2.0, run_s=20.0)
    peer = net.start(1, records=records)
    net.run(10.0)
    peer.node.set_training(net.now, True)
    net.carry_out(peer)
    assert peer.data.states[TRAIN].theta.tobytes() == (theta - np.float32(5.0)).tobytes()
    step_all(net, 1.0, 1.0, 1.0, run_s=5.0)
    for found in thetas(net):
        assert found.tobytes() == (theta - np.float32(6.0)).tobytes()


def test_a_late_joiner_gets_the_state_before_it_counts() -> None:
    net = Net(2)
    theta = net.model()
    step_all(net, 1.0, 1.0)
    late = net.start(2)
    net.run(5.0)
    track = late.node.catchup.tracks[TRAIN]
    assert (track.round, track.state_hash) == (1, late.data.states[TRAIN].root())
    assert late.data.states[TRAIN].theta.tobytes() == (theta - np.float32(1.0)).tobytes()


def test_a_group_sums_without_a_model() -> None:
    net = Net(3)
    net.run(5.0)
    for index in range(3):
        net.contribute(index, full(float(index)), GROUP, expect=3, samples=1.0)
    net.run(1.0)
    for peer in net.peers.values():
        (done,) = peer.told_of(fx.GroupDone)
        third = np.float32(1 / 3)
        mean = np.float32(third * np.float32(1)) + np.float32(third * np.float32(2))
        assert peer.data.decoded(done.root).tobytes() == np.full(VALUES, mean).tobytes()
        assert [member for member, _, _ in done.contributors] == IDS[:3]


def test_members_of_a_group_may_differ_in_length_and_only_the_majority_is_summed() -> None:
    """Bad input, wrong shape: the odd one is named and left out, whoever it is."""
    net = Net(3)
    net.run(5.0)
    for odd in range(3):
        for index in range(3):
            net.contribute(index, full(1.0) if index != odd else np.ones(7, np.float32), GROUP)
        net.run(2.5)
        rest = [i for i in range(3) if i != odd]
        for index in rest:
            last = net[index].told_of(fx.GroupDone)[-1]
            assert [m for m, _, _ in last.contributors] == [IDS[i] for i in rest]
        net[odd].node.withdraw(net.now, GROUP)
        net.carry_out(net[odd])
        net.run(0.1)
        net[odd].told.clear()
    told = [x.fields for x in net.leader().told_of(fx.Notice) if x.name == "peer_fault"]
    assert {"bad_shape"} == {x["fault"] for x in told}


# --- defects that were found by reading ----------------------------------------------------------


def test_an_attempt_that_opens_and_ends_in_one_batch_still_decides_the_contribution() -> None:
    """A member whose log is late but whose bytes are served: counted, and told so (AR3)."""
    net = Net(2)
    net.start(2, reachable=False, addresses=())  # it owns no part
    theta = net.model()
    late = IDS[2]

    def log_is_late(sender: bytes, to: bytes, message: object) -> bool:
        return to == late and type(message).__name__ in ("Append", "Update")

    for index in (0, 1):
        net.contribute(index, full(1.0))
    net.contribute(2, full(1.75))  # not loud: clipping is not what this is about
    net.lose = log_is_late
    net.run(1.5)
    assert net[0].node.ledger.channels[TRAIN].round == 1
    assert net[2].node.member.undecided(TRAIN) is not None
    net.lose = lambda *_: False
    net.run(5.0)
    (decided,) = net[2].told_of(fx.ContributionDecided)
    counted = late in [m for m, _, _ in net[0].node.ledger.channels[TRAIN].history[0].contributors]
    assert decided.outcome == ("committed" if counted else "excluded")
    assert counted
    for found in thetas(net):
        assert found.tobytes() == (theta - np.float32(1.25)).tobytes()


def test_what_is_said_to_a_leader_that_is_not_ready_yet_is_not_lost() -> None:
    """Its first entry is not committed: it does not know yet what is open (GF4, AR7)."""
    net = Net(3)
    net.model()
    follower = net[1].node
    net.kill(0)
    appends: list[bytes] = []

    def hold_replies(sender: bytes, to: bytes, message: object) -> bool:
        if type(message).__name__ == "AppendReply":
            appends.append(sender)
            return True
        return False

    net.lose = hold_replies
    for index in (1, 2):
        net.contribute(index, full(2.0))
    for _ in range(100):
        net.run(0.1)
        leading = [net[i].node for i in (1, 2) if net[i].node.log.is_leader]
        if leading and appends:
            break
    assert follower.leader.active is False and not leading[0].leader.active
    net.lose = lambda *_: False
    net.run(4.0)
    first = net[1].node.ledger.channels[TRAIN].history[0]
    assert [member for member, _, _ in first.contributors] == IDS[1:3]


def test_a_rewind_is_reported_so_that_the_run_goes_on() -> None:
    """After data loss nobody applies anything, and still the leader has to hear where all are."""
    net = Net(3)
    theta = net.model()
    step_all(net, 1.0, 1.0, 1.0)
    channel = net[0].node.ledger.channels[TRAIN]
    root = channel.history[0].state_hash
    body = e.Rewound(1, "data loss", (TRAIN,), (0,), (root,))
    leader = net.leader()
    assert leader.node.log.propose(net.now, body) > 0
    leader.node.tick(net.now)
    net.carry_out(leader)
    net.run(5.0)
    for peer in net.peers.values():
        assert peer.node.ledger.generation == 1
        assert peer.node.catchup.tracks[TRAIN].round == 0
    step_all(net, 5.0, 5.0, 5.0)
    assert [found.tobytes() for found in thetas(net)] == [(theta - np.float32(5.0)).tobytes()] * 3


def test_a_rewind_to_where_everybody_stands_is_reported_too() -> None:
    net = Net(2)
    net.model()
    root = net[0].data.states[TRAIN].root()
    leader = net.leader()
    leader.node.log.propose(net.now, e.Rewound(1, "test", (TRAIN,), (0,), (root,)))
    leader.node.tick(net.now)
    net.carry_out(leader)
    net.run(2.0)
    step_all(net, 1.0, 1.0)
    assert [p.data.states[TRAIN].round for p in net.peers.values()] == [1, 1]


def test_a_steward_can_be_dialled() -> None:
    """Who leads must be reachable for joiners; an outgoing-only member never votes."""
    net = Net(1)
    net.run(1.0)
    net.start(1, reachable=False, addresses=())
    net.start(2)
    net.run(5.0)
    assert net[0].node.ledger.voters == (IDS[0],)
    net.start(3)
    net.run(5.0)
    assert net[0].node.ledger.voters == tuple(sorted((IDS[0], IDS[2], IDS[3])))


def test_a_ticket_for_two_members_admits_two() -> None:
    net = Net(1)
    net.run(1.0)
    capability = net.capability(id=b"for two!", uses=2)
    for index in (1, 2, 3):
        net.start(index, capability=capability)
    net.run(3.0)
    assert sorted(net[0].node.ledger.members) == sorted(IDS[:3])
    (refused,) = net[3].told_of(JoinFailed)
    why = "the ticket was for 2 member(s), and they have come"
    assert (refused.code, refused.reason) == ("used_up", why)
    # A bearer that was away comes back with it.
    net[1].node.leave(net.now, "leave")
    net.carry_out(net[1])
    net.run(5.0)
    assert IDS[1] not in net[0].node.ledger.members
    net.start(1, records=net[1].records, capability=capability)
    net.run(5.0)
    assert IDS[1] in net[0].node.ledger.members


def test_a_leave_waits_for_the_round_in_progress() -> None:
    net = Net(3)
    theta = net.model()
    for index in range(3):
        net.contribute(index, full(3.0))
    net[1].node.leave(net.now, "leave")
    net.carry_out(net[1])
    net.run(5.0)
    ledger = net[0].node.ledger
    assert IDS[1] not in ledger.members
    assert ledger.rounds_aborted == 0
    outcome = ledger.channels[TRAIN].history[0]
    assert [m for m, _, _ in outcome.contributors] == IDS[:3]
    assert net[0].data.states[TRAIN].theta.tobytes() == (theta - np.float32(3.0)).tobytes()


def test_announcements_and_reports_that_got_lost_come_again() -> None:
    """The links stay up and lose every single one: all are counted, later."""
    net = Net(3)
    net.model()
    opened = net.leader().node.ledger.channels[TRAIN].round
    for room in net.leader().node.leader._lobbies.rooms.values():
        room.reports.clear()
    net.lose = lambda sender, to, message: isinstance(message, rm.Ready | mm.StateReport)
    followers = [i for i in range(3) if net[i] is not net.leader()]
    for index in followers:
        net.contribute(index, full(1.0))
    net.run(5.0)
    net.lose = lambda sender, to, message: False
    assert net.leader().node.ledger.channels[TRAIN].round == opened
    net.run(30.0)
    history = net[0].node.ledger.channels[TRAIN].history
    counted = [member for outcome in history for member, _, _ in outcome.contributors]
    assert sorted(counted) == [IDS[i] for i in followers]


# --- bad input -----------------------------------------------------------------------------------


def test_bad_input_of_members_and_strangers_names_them_and_changes_nothing() -> None:
    """Wrong weight, shape, codec, channel are faults; who knows too little is only not heard."""
    net = Net(3)
    net.model()
    leader, member = net.leader(), IDS[1]
    stranger = IDS[6]
    generation = leader.node.ledger.generation
    good = rm.Ready(generation, TRAIN, hash_of("x"), VALUES, "fp32", 1.0, 0)

    def changed(**fields: object) -> rm.Ready:
        return rm.Ready(**{**{f: getattr(good, f) for f in good.__struct_fields__}, **fields})

    unheard = [
        (member, changed(generation=7), "stale_generation"),
        (stranger, good, "not_a_member"),
        (member, changed(base_round=9), "base_from_the_future"),
    ]
    cases = [
        (member, changed(samples=float("nan")), "bad_weight"),
        (member, changed(samples=float("inf")), "bad_weight"),
        (member, changed(samples=-1.0), "bad_weight"),
        (member, changed(samples=1e300), "bad_weight"),
        (member, changed(values=VALUES + 1), "bad_shape"),
        (member, changed(values=0), "bad_shape"),
        (member, changed(codec="int8"), "bad_codec"),
        (member, changed(channel=GROUP, codec="no such"), "bad_codec"),
        (member, changed(channel="train/9/9"), "unknown_channel"),
        (member, changed(channel="other"), "unknown_channel"),
        (member, changed(claims=(Span(0, 1),)), "bad_claim"),
        (member, changed(channel=GROUP, claims=(Span(0, 1),)), "bad_claim"),
    ]
    before = leader.node.ledger.snapshot()
    for sender, message, code in cases:
        leader.node.receive(net.now, PeerId(sender), message)
        told = faults(leader.node.drain())
        assert told == [(code, sender)], (message, told)
    for sender, message, code in unheard:
        leader.node.receive(net.now, PeerId(sender), message)
        effects = leader.node.drain()
        assert (ignored(effects), faults(effects)) == ([(code, sender)], []), message
    assert leader.node.ledger.snapshot() == before
    assert not any(room.ready for room in leader.node.leader._lobbies.rooms.values())


def test_only_whom_a_node_asked_may_turn_it_away() -> None:
    net = Net(2)
    net.run(2.0)
    newcomer = net.start(2)
    newcomer.node.receive(net.now, PeerId(IDS[5]), mm.JoinRefused("banned", "go away"))
    told = newcomer.node.drain()
    assert (ignored(told), faults(told)) == ([("unexpected", IDS[5])], [])
    assert events(told, JoinFailed) == []
    hint = mm.Redirect(IDS[5], ("127.0.0.1:9",))
    newcomer.node.receive(net.now, PeerId(IDS[5]), hint)
    assert [x for x in of_kind(newcomer.node.drain(), Connect) if x.peer == IDS[5]] == []
    net.run(3.0)
    assert newcomer.node.joiner.is_member


def test_a_member_without_a_leader_cannot_propose() -> None:
    net = Net(0)
    lone = net.start(1)
    with pytest.raises(LocalProtocolError, match="no leader"):
        lone.node.propose(net.now, mm.Propose(e.encode_body(e.Paused("x"))))


def test_only_one_contribution_at_a_time() -> None:
    net = Net(2, min_peers=2)
    net.model()
    net.contribute(0, full(1.0))
    with pytest.raises(LocalProtocolError, match="one contribution"):
        net.contribute(0, full(2.0))


def test_the_manifest_is_given_to_anybody_who_names_the_run() -> None:
    net = Net(1)
    node = net[0].node
    node.receive(0.0, IDS[4], mm.ManifestRequest(net.manifest.run_id))
    node.receive(0.0, IDS[4], mm.ManifestRequest(bytes(32)))
    replies = [x.message for x in of_kind(node.drain(), Send) if x.peer == IDS[4]]
    assert replies == [mm.ManifestReply(net.manifest.to_bytes())]


def test_entries_are_told_with_whether_they_count() -> None:
    net = Net(1)
    net.run(1.0)
    told = [x for change in net[0].told_of(LedgerChanged) for x in change.entries]
    assert [type(body).__name__ for _, body, accepted in told if accepted][:1] == ["Genesis"]
    assert [index for index, _, _ in told] == list(range(len(told)))
