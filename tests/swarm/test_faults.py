"""What a swarm of real processes survives: every member, killed at a bad moment."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swarmtrain_peer.spawn import Supervisor, child_environment, spawn_peer
from swarmtrain_protocols.errors import NoDevice, NotAuthorised, RunMismatch, VersionMismatch
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.tickets import Capability, Ticket, sign_capability
from tests.swarm.harness import (
    CHANNEL,
    WAIT_S,
    Seat,
    Swarm,
    closing_all,
    poll_until,
    wait_same_stand,
)
from tests.swarm.synthetic import SCHEMA_HASH, VALUES, Plan, Trainer

pytestmark = pytest.mark.timeout(100)


def train(seat: Seat, key: int, **plan: object) -> Trainer:
    return Trainer(seat.site, Plan(key=key, **plan)).start()  # type: ignore[arg-type]


def round_of(seat: Seat) -> int:
    return int(seat.status()["channels"][CHANNEL]["round"])


def wait_round(seat: Seat, round_: int, timeout_s: float = 30.0) -> None:
    """Until the log of ``seat`` says that ``round_`` is the next to commit."""
    seat.wait_event(
        "round_committed",
        lambda r: r["channel"] == CHANNEL and r["round"] >= round_ - 1,
        timeout_s=timeout_s,
    )


def test_a_joiner_killed_in_mid_round_returns_with_the_same_state(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(start_peers=2, checkpoint_every_rounds=1000)
        joiner = swarm.enter("joiner", founder.ticket())
        trainers = train(founder, 1, phase_s=0.05), train(joiner, 2, phase_s=0.05)
        with closing_all(*trainers):
            both = {founder.id, joiner.id}
            opened = founder.wait_event(
                "round_opened", lambda r: r["round"] >= 3 and set(r["contributors"]) == both
            )
            joiner.kill()
            killed_seq = founder.last_seq
            committed = founder.wait_event(
                "round_committed", lambda r: r["round"] > opened["round"], killed_seq, 10.0
            )
            joiner.start()
            back = founder.last_seq
            founder.wait_event("round_opened", lambda r: set(r["contributors"]) == both, back)
            wait_round(founder, committed["round"] + 5)
        wait_same_stand([founder, joiner], committed["round"] + 1)
        swarm.check_hashes()
        assert not joiner.events("resync")


def test_any_steward_may_die_and_any_member_lets_newcomers_in(tmp_path: Path) -> None:
    """Three stewards, killed one after the other and back again; then the seed dies for good."""
    with Swarm(tmp_path) as swarm:
        seed = swarm.found(config={"trains": False}, start_peers=3)
        members = [swarm.enter(name, seed.ticket(), start=False) for name in ("ada", "bob", "cyd")]
        for member in members:
            member.start()
        seed.wait_event("stewards_changed", lambda r: len(r["voters"]) == 3)
        voters = set(seed.status()["stewards"])
        trainers = [train(m, key, phase_s=0.05) for key, m in enumerate(members, 1)]
        with closing_all(*trainers):
            wait_round(seed, 2)
            kill_each_steward(swarm, voters)
            newcomer = lose_the_seed(swarm, seed, members)
        last = wait_same_stand([*members, newcomer])
        assert swarm.check_hashes()[last[0]] == last[1]


def kill_each_steward(swarm: Swarm, voters: set[str]) -> None:
    """The leader first: the next one may well be the new leader."""
    first = swarm.leader()
    victims = [first, *[s for s in swarm.seats if s.id in voters and s is not first]]
    assert len(victims) == 3
    for victim in victims:
        witness = next(s for s in swarm.seats if s is not victim and s.id in voters)
        before = witness.last_seq
        victim.kill()
        for _ in range(2):
            done = witness.wait_event("round_committed", since_seq=before, timeout_s=20.0)
            before = done["seq"]
        victim.start()
        wait_stand(victim, round_of(witness))
    swarm.check_hashes()


def lose_the_seed(swarm: Swarm, seed: Seat, members: list[Seat]) -> Seat:
    """The address that everybody came in by is gone; somebody enters by another and trains."""
    ticket = members[1].ticket()
    assert ticket.addresses == (members[1].address,)
    seed.kill()
    newcomer = swarm.enter("dan", ticket)
    newcomer.wait_event("member_joined", lambda r: r["peer"] == newcomer.id)
    with closing_all(train(newcomer, 9, phase_s=0.05)):
        members[0].wait_event(
            "round_opened", lambda r: newcomer.id in r["contributors"], timeout_s=30.0
        )
        poll_until(lambda: commits_with(members[0], newcomer.id), "a round with the newcomer")
    known = {peer["id"]: peer["connected"] for peer in newcomer.call("peers")["peers"]}
    assert all(known[member.id] for member in members), "one address is enough to find everybody"
    return newcomer


def commits_with(witness: Seat, member: str) -> list[int]:
    """Committed rounds that counted a contribution of ``member``."""
    return [
        item["round"]
        for item in witness.call("rounds", {"last": 64})["rounds"]
        if item["outcome"] == "committed"
        and any(c["id"] == member and c["coefficient"] > 0 for c in item["contributors"])
    ]


def wait_stand(seat: Seat, round_: int) -> None:
    """Until the state of ``seat`` is the one before ``round_`` or a later one."""
    poll_until(lambda: seat.stand()[0] >= round_, f"{seat.name} catches up")


def restart_all(seats: list[Seat]) -> None:
    with ThreadPoolExecutor(len(seats)) as pool:
        list(pool.map(Seat.start, seats))


def test_everything_killed_right_after_a_commit_is_never_older_afterwards(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(start_peers=3)
        others = [swarm.enter(name, founder.ticket(), start=False) for name in ("ada", "bob")]
        restart_all(others)
        seats = [founder, *others]
        trainers = [train(seat, key, phase_s=0.05) for key, seat in enumerate(seats, 1)]
        with closing_all(*trainers):
            for wanted in (2, 14):  # before the first checkpoint after θ⁰, and between two
                wait_round(founder, wanted)
                for trainer in trainers:
                    trainer.pause(True)
                for seat in seats:
                    seat.kill()
                known = max(r["round"] for s in seats for r in s.events("round_committed"))
                restart_all(seats)
                stand = wait_same_stand(seats, known + 1)
                assert not founder.events("rewound")
                assert swarm.check_hashes()[stand[0]] == stand[1]
                for trainer in trainers:
                    trainer.pause(False)
            wait_round(founder, round_of(founder) + 3)
        swarm.check_hashes()
        assert all(trainer.failure is None for trainer in trainers)


@pytest.mark.slow
def test_a_flipped_bit_in_a_checkpoint_is_refused_and_the_one_before_is_used(
    tmp_path: Path,
) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(checkpoint_every_rounds=5)
        other = swarm.enter("ada", founder.ticket(), config={"votes": False})
        trainers = train(founder, 1, phase_s=0.02), train(other, 2, phase_s=0.02)
        with closing_all(*trainers):
            other.wait_event("checkpoint_saved", lambda r: r["round"] >= 10)
            wait_round(founder, 13)
            for trainer in trainers:
                trainer.pause(True)
            wait_stand(other, 13)
            before = other.last_seq
            other.kill()
            newest = max((other.site.state_path / "checkpoints").glob("checkpoint-????????"))
            flip_a_bit(next(newest.glob("*.safetensors")))
            other.start()
            refused = other.wait_event("checkpoint_refused", since_seq=before)
            assert newest.name in refused["reason"]
            stand = wait_same_stand([founder, other], 13)
            assert swarm.check_hashes()[stand[0]] == stand[1]
            assert not other.events("resync", before), "the results on disk lead on from before"
            for trainer in trainers:
                trainer.pause(False)
            wait_round(founder, stand[0] + 3)
        swarm.check_hashes()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.mark.slow
def test_an_outgoing_only_member_trains_with_two_others(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(start_peers=3)
        ticket = founder.ticket()
        others = [
            swarm.enter("ada", ticket, start=False),
            swarm.enter("nat", ticket, start=False, config={"listen": "", "votes": False}),
        ]
        restart_all(others)
        hidden = others[1]
        assert hidden.status()["listen"] == []
        trainers = [train(s, key, phase_s=0.02) for key, s in enumerate(swarm.seats, 1)]
        with closing_all(*trainers):
            wait_round(founder, 5)
        wait_same_stand(swarm.seats, 5)
        assert {0, 1, 2, 3, 4} <= set(commits_with(founder, hidden.id))
        assert founder.status()["rounds_aborted"] == 0
        swarm.check_hashes()


OTHER_VERSION = """
import sys
import swarmtrain_protocols
swarmtrain_protocols.PROTOCOL_VERSION += 1
from swarmtrain_peer.process import main
sys.exit(main(sys.argv[1:]))
"""


def test_bad_tickets_end_with_their_exit_codes_and_change_nothing(tmp_path: Path) -> None:
    """Another model, another run, an expired right, a forged one, another protocol version."""
    with Swarm(tmp_path) as swarm:
        founder = swarm.found()
        huge = {"schema_hash": SCHEMA_HASH.hex(), "layout": [[CHANNEL, 10**13]]}
        with pytest.raises(NoDevice, match="does not fit"):
            founder.call("attach", huge)
        with closing_all(train(founder, 1, seq_max=4)):
            founder.wait_applied(3)
        founder.wait_event("trainer_lost")
        before = founder.status()
        for schema, values in ((bytes(32), VALUES), (SCHEMA_HASH, VALUES + 1)):
            model = {"schema_hash": schema.hex(), "layout": [[CHANNEL, values]]}
            with pytest.raises(RunMismatch, match="not the run's model"):
                founder.call("attach", model)
        good = founder.ticket()
        key = founder.site.founder()
        assert key is not None
        forger = Ed25519Keyring(bytes(range(32)))
        stale = Capability(bytes(8), good.run, "trainer", True, 1, 0)
        forged = Capability(bytes(8), good.run, "trainer", True, 0, 0)
        other = Capability(bytes(8), bytes(32), "trainer", True, 0, 0)
        tickets = {
            "run": Ticket(good.addresses, other.run, sign_capability(key, other)),
            "expired": Ticket(good.addresses, good.run, sign_capability(key, stale)),
            "forged": Ticket(good.addresses, good.run, sign_capability(forger, forged)),
            "version": good,
        }
        with ThreadPoolExecutor(len(tickets)) as pool:
            found = pool.map(lambda name: join(swarm, name, tickets[name]), tickets)
            ends = dict(zip(tickets, found, strict=True))
        assert {name: code for name, (code, _) in ends.items()} == {
            "run": RunMismatch.exit_code,
            "expired": NotAuthorised.exit_code,
            "forged": NotAuthorised.exit_code,
            "version": VersionMismatch.exit_code,
        }, ends
        for lines in (lines for _, lines in ends.values()):
            assert len(lines) == 3, lines
        assert [peer["id"] for peer in founder.call("peers")["peers"]] == [founder.id]
        for field in ("members", "generation", "channels", "stewards", "rounds_aborted"):
            assert founder.status()[field] == before[field]


def join(swarm: Swarm, name: str, ticket: Ticket) -> tuple[int, list[str]]:
    """Exit code and standard error of a peer process that enters with this ticket."""
    seat = swarm.enter(name, ticket, start=False)
    arguments = ["-c", OTHER_VERSION] if name == "version" else ["-m", "swarmtrain_peer"]
    done = subprocess.run(
        [sys.executable, *arguments, str(seat.site.folder)],
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=2 * WAIT_S,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr.strip().splitlines()


def test_a_dead_peer_process_is_started_again_and_its_trainer_goes_on(tmp_path: Path) -> None:
    reports: list[str] = []
    with Swarm(tmp_path) as swarm:
        seat = swarm.found(start=False)
        supervisor = Supervisor(lambda name, fields: reports.append(name))
        one = supervisor.add("peer", lambda: spawn_peer(seat.site))
        seat.process = one.process  # killed by the harness, whatever happens
        seat.follow()
        trainer = train(seat, 1, phase_s=0.02)
        with closing_all(trainer):
            wait_round(seat, 3)
            seat.kill()
            known = max(r["round"] for r in seat.events("round_committed"))

            def back() -> bool:
                supervisor.poll()
                return one.restarts == 1 and one.process.poll() is None

            poll_until(back, "started again")
            seat.process = one.process
            seat.follow()
            seat.wait_event("trainer_attached", since_seq=seat.events("peer_started")[-1]["seq"])
            seat.wait_applied(known + 4)
        assert reports == ["process_restarted"]
        assert len(trainer.attachments) == 2 and trainer.failure is None
        assert trainer.attachments[1]["need_theta0"] is False
        swarm.check_hashes()
