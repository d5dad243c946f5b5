"""The founder begins a log again whose stewards are lost: who adopts it, who is refused."""

from __future__ import annotations

import msgspec
import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Emit
from swarmtrain_protocols.entries import Paused
from swarmtrain_protocols.errors import CheckpointError, LocalProtocolError, PeerFault
from swarmtrain_protocols.log.anchor import DOMAIN, digest, make_deed, statement
from swarmtrain_protocols.log.certificate import (
    SnapshotFile,
    encode_snapshot_body,
    encode_snapshot_file,
)
from swarmtrain_protocols.log.records import SnapshotRecord, decode_record
from swarmtrain_protocols.log.recovery import Restarted, read_log, recover
from swarmtrain_protocols.messages.log import Recovered, Recovery
from tests.protocols.log_world import FOUNDER, RUN, KeyedHash, Site, World


def world_of(names: str, voters: str, seed: int = 1) -> World:
    world = World(seed, names).settled(voters)
    for _ in range(3):
        assert world.propose()
    world.run(2.0)
    return world


def lose(world: World, names: str) -> None:
    world.run(2.0)  # the newest certificate is on every disk
    for name in names:
        world.sites[name].crash()


def begin_again(world: World, name: str) -> Recovery:
    made = world.sites[name].recover()
    world.run(0.1)  # others notice that it is gone
    world.sites[name].start()
    return made.recovery


def leads(site: Site) -> bool:
    return site.core is not None and site.core.is_leader and site.core.ready


def test_a_run_goes_on_after_losing_a_majority_of_its_stewards_for_ever() -> None:
    world = world_of("abcde", "abc")
    before = world.oracle.end
    lose(world, "bc")
    world.run(5.0)  # a leader notices that it has no majority
    assert not world.run(20.0, lambda: leads(world.sites["a"])), "two of three are gone"
    recovery = begin_again(world, "a")
    assert world.run(5.0, lambda: leads(world.sites["a"]))
    assert world.propose()
    assert world.run(20.0, world.caught_up), "d and e have the new log"
    assert world.oracle.end == before, "nothing was added to the old log"
    for name in "ade":
        core = world.sites[name].core
        assert core is not None and core.generation == recovery.generation
        assert core.voters == (world.sites["a"].id,)
    world.check()


def test_any_member_can_be_the_one_that_survives() -> None:
    world = world_of("abcde", "abc")
    lose(world, "abc")
    begin_again(world, "e")
    assert world.run(5.0, lambda: leads(world.sites["e"]))
    world.vote_with("e")  # the same set: nothing to do
    world.propose()
    assert world.run(20.0, world.caught_up)


def test_old_stewards_that_come_back_are_told_and_take_the_new_log() -> None:
    """Also when they are a majority, lead each other, and have written more."""
    world = world_of("abcde", "abc")
    world.split("ade", "bc")
    assert world.run(20.0, lambda: any(leads(world.sites[n]) for n in "bc"))
    old = next(world.sites[n] for n in "bc" if leads(world.sites[n]))
    for _ in range(20):
        assert world.propose(old)
    world.run(2.0)
    begin_again(world, "a")
    world.run(10.0)
    assert world.propose(world.sites["a"])
    assert leads(old), "nobody has told it yet"
    world.cut = set()
    assert world.run(20.0, world.caught_up)
    assert not old.core._s.votes  # type: ignore[union-attr]
    assert world.oracle.seen["superseded"] == 5 - 1
    world.check()
    world.admit("bc")
    world.run(1.0)
    world.vote_with("abc")
    assert world.run(20.0, lambda: world.set_in_force("abc")), "they may be let in again"


def test_a_site_that_was_away_catches_up_across_the_new_beginning() -> None:
    world = world_of("abcdef", "abc")
    lose(world, "bcf")
    begin_again(world, "a")
    for _ in range(2 * world.compact_every):
        world.propose(world.sites["a"])
        world.run(0.2)
    world.sites["f"].start()
    assert world.run(20.0, world.caught_up)
    world.check()


def test_a_newcomer_may_meet_the_old_log_first() -> None:
    world = World(3, "abcdef")
    world.start("abcde")
    world.admit("bcdef")
    world.vote_with("abc")
    assert world.run(10.0, world.caught_up)
    lose(world, "bc")
    world.split("d", "aef")
    begin_again(world, "a")
    world.run(5.0)
    world.split("df", "ae")
    world.sites["f"].start()
    assert world.run(20.0, lambda: world.sites["f"].shown.index >= 0), "d passes on what it has"
    assert world.sites["f"].shown.index < limits.RECOVERY_GAP
    world.cut = set()
    world.propose(world.sites["a"])
    assert world.run(20.0, world.caught_up)


def test_two_recoveries_of_one_log_end_as_one() -> None:
    """The founder should not do that. The greater generation is adopted by all, who are told."""
    world = world_of("abcde", "abc")
    lose(world, "abc")
    made = {name: recover_of(world, name) for name in "de"}
    generations = {name: found.recovery.generation for name, found in made.items()}
    assert generations["d"] != generations["e"]
    assert {g // limits.RECOVERY_GENERATIONS for g in generations.values()} == {1}
    lesser, greater = sorted(generations, key=lambda name: generations[name])
    old, new = (world.sites[name].core for name in (lesser, greater))
    assert old is not None and new is not None
    old.receive(world.now, world.sites[greater].id, Recovered(made[greater].recovery))
    assert old._s.superseded == made[greater].recovery
    new._s.superseded = made[greater].recovery
    new.receive(world.now, world.sites[lesser].id, Recovered(made[lesser].recovery))
    assert new._s.superseded == made[greater].recovery


def recover_of(world: World, name: str) -> Restarted:
    site = world.sites[name]
    return recover(site.trust(), site.disk, [FOUNDER], site._restart)


def test_it_may_happen_again() -> None:
    world = world_of("abcdef", "abc")
    lose(world, "bc")
    first = begin_again(world, "a")
    world.run(10.0)
    lose(world, "a")
    second = begin_again(world, "d")
    assert second.generation // limits.RECOVERY_GENERATIONS == 2
    assert second.index > first.index + limits.RECOVERY_GAP
    world.propose(world.sites["d"])
    world.run(5.0)
    for name in "abc":
        world.sites[name].start()
    assert world.run(30.0, world.caught_up)
    world.check()


# --- what is checked -----------------------------------------------------------------------------


def recovered_record(world: World, name: str = "a") -> SnapshotRecord:
    record = decode_record(recover_of(world, name).record)
    assert isinstance(record, SnapshotRecord)
    return record


def test_the_snapshot_proves_itself_down_to_the_founder() -> None:
    world = world_of("a", "a")
    site = world.sites["a"]
    snapshot = site.trust().snapshot(recovered_record(world).file)
    recovery = snapshot.file.recovery
    assert recovery is not None
    assert snapshot.view.digest == snapshot.body.chain_hash == digest(site.trust().run, recovery)
    assert snapshot.view.voters == (site.id,)


def _other_ledger(file: SnapshotFile) -> SnapshotFile:
    body = msgspec.msgpack.decode(file.body)
    body[-1] = b"another ledger"
    return msgspec.structs.replace(file, body=msgspec.msgpack.encode(body))


def _signed_by(name: str, file: SnapshotFile) -> SnapshotFile:
    assert file.recovery is not None
    signature = KeyedHash(name).sign(b"recovery", b"whatever")
    changed = msgspec.structs.replace(file.recovery, signature=signature)
    return msgspec.structs.replace(file, recovery=changed)


def _without(file: SnapshotFile) -> SnapshotFile:
    return msgspec.structs.replace(file, recovery=None)


@pytest.mark.parametrize(
    "forge", [_other_ledger, lambda f: _signed_by("somebody", f), _without], ids=str
)
def test_a_forged_recovery_is_refused(forge: object) -> None:
    world = world_of("a", "a")
    record = recovered_record(world)
    file = msgspec.msgpack.decode(record.file, type=SnapshotFile)
    with pytest.raises(PeerFault, match=r"bad_(recovery|certificate)"):
        world.sites["a"].trust().snapshot(encode_snapshot_file(forge(file)))  # type: ignore[operator]


def test_a_steward_alone_cannot_pass_off_another_ledger_as_recovered() -> None:
    """It signs snapshots by itself, but not in place of the founder."""
    world = world_of("a", "a")
    site = world.sites["a"]
    record = recovered_record(world)
    file = msgspec.msgpack.decode(record.file, type=SnapshotFile)
    snapshot = site.trust().snapshot(record.file)
    b = snapshot.body
    data, hashed = encode_snapshot_body(msgspec.structs.replace(b, ledger=b"mine"))
    vote = site.trust().sign_snapshot(snapshot.view, b.term, b.index, b.chain_hash, hashed)
    endorsement = msgspec.structs.replace(file.certificate.endorsements[0], signature=vote)
    certificate = msgspec.structs.replace(
        file.certificate, snapshot_hash=hashed, endorsements=(endorsement,)
    )
    forged = msgspec.structs.replace(file, body=data, certificate=certificate)
    with pytest.raises(PeerFault, match="bad_recovery"):
        site.trust().snapshot(encode_snapshot_file(forged))


def test_only_the_founder_may() -> None:
    world = world_of("a", "a")
    site = world.sites["a"]
    with pytest.raises(LocalProtocolError, match="founder"):
        recover(site.trust(), site.disk, [KeyedHash("somebody")], site._restart)
    with pytest.raises(CheckpointError, match="no log"):
        read_log(site.trust(), [])


def test_what_no_certificate_covered_is_left_behind() -> None:
    world = world_of("abc", "abc")
    lose(world, "bc")
    leader = world.sites["a"]
    if not leads(leader):
        pytest.fail("seed 1 has a lead")
    before = leader.shown.index
    world.propose(leader, Paused("never certified"))
    world.run(0.1)
    leader.crash()
    made = leader.recover()
    assert (made.cut, made.dropped) == (before, 1)


def test_a_proof_that_the_founder_did_not_sign_moves_nobody() -> None:
    world = world_of("abc", "abc")
    leader = world.leader()
    assert leader is not None and leader.core is not None
    forged = Recovery(1000, 1 << 21, 1 << 21, leader.id, bytes(32), bytes(64))
    other = next(s for s in world.sites.values() if s is not leader)
    leader.core.receive(world.now, other.id, Recovered(forged))
    events = [e.event for e in leader.core.drain() if hasattr(e, "event")]
    assert [e.code for e in events if isinstance(e, PeerFault)] == ["bad_recovery"]
    assert leader.core.is_leader


def test_a_former_founder_does_not_begin_the_log_again() -> None:
    """Its proof is refused, as a message and as a snapshot; that of the heir counts."""
    world = world_of("abc", "abc")
    follower = world.sites["c"]
    made = recover_of(world, "a")
    core = follower.core
    assert core is not None
    core.set_handed_over(1)
    core.receive(world.now, world.sites["a"].id, Recovered(made.recovery))
    events = [e.event for e in core.drain() if isinstance(e, Emit)]
    assert [e.code for e in events if isinstance(e, PeerFault)] == ["bad_recovery"]
    assert core._s.superseded is None
    heir = KeyedHash("heir")
    deed = make_deed(FOUNDER, RUN, 0, heir.peer_id)
    unsigned = msgspec.structs.replace(made.recovery, deeds=(deed,))
    signature = heir.sign(DOMAIN, statement(RUN, unsigned))
    core.receive(
        world.now,
        world.sites["a"].id,
        Recovered(msgspec.structs.replace(unsigned, signature=signature)),
    )
    assert core._s.superseded is not None
