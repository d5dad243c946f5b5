"""A member whose disk is full: the run trains on, an alarm says so, and space brings it back.

The disk of a process is full for as long as its limit on file sizes is zero: every write fails, and
what is there stays (``setrlimit(2)``).
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.swarm.harness import CHANNEL, Seat, Swarm, closing_all, poll_until, wait_same_stand
from tests.swarm.synthetic import Plan, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@contextmanager
def full_disk(seat: Seat) -> Iterator[None]:
    assert seat.process is not None
    soft, hard = resource.prlimit(seat.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(seat.process.pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        if seat.process is not None and seat.process.poll() is None:
            resource.prlimit(seat.process.pid, resource.RLIMIT_FSIZE, (soft, hard))


def three(swarm: Swarm, *, votes: bool) -> list[Seat]:
    founder = swarm.found(start_peers=3, checkpoint_every_rounds=10)
    ticket = founder.ticket()
    config = {"votes": votes}
    return [founder, *[swarm.enter(name, ticket, config=config) for name in ("ada", "bob")]]


def train(seats: list[Seat]) -> list[Trainer]:
    return [Trainer(s.site, Plan(key=key, phase_s=0.05)).start() for key, s in enumerate(seats, 1)]


def wait_commits(seat: Seat, count: int, with_member: str = "") -> int:
    """Until ``count`` more rounds are committed; the number of the last."""
    since = seat.last_seq
    found = -1
    for _ in range(count):
        done = seat.wait_event("round_committed", since_seq=since, timeout_s=30.0)
        since, found = done["seq"], int(done["round"])
    return found


def test_a_member_with_a_full_disk_trains_on_and_is_whole_again_with_space(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        seats = three(swarm, votes=False)
        founder, ada, _ = seats
        with closing_all(*train(seats)):
            wait_commits(founder, 3)
            with full_disk(ada):
                alarm = ada.wait_event("disk_full")
                aborted = founder.status()["rounds_aborted"]
                last = wait_commits(founder, 12)  # beyond the next checkpoint
                listed = founder.call("rounds", {"last": 8})["rounds"]
                ids = {c["id"] for item in listed for c in item["contributors"]}
                assert ada.id in ids, "it goes on contributing"
                assert ada.stand()[0] >= last - 2, "and follows the state"
                assert founder.status()["rounds_aborted"] == aborted
                assert len(ada.events("disk_full")) == 1, "one alarm, not one per round"
                assert ada.status()["disk_full"], "and status says so"
            assert alarm["severity"] == "error" and alarm["reason"]
            ada.wait_event("disk_freed")
            assert ada.status()["disk_full"] == []
            ada.wait_event("checkpoint_saved", since_seq=alarm["seq"])
            last = wait_commits(founder, 3)
            poll_until(lambda: ada.stand()[0] >= last, "ada follows")
            before = ada.last_seq
            ada.kill()
            ada.start()
            wait_commits(founder, 3)
        wait_same_stand(seats)
        assert not ada.events("resync") and not ada.events("checkpoint_refused", before)
        assert not founder.events("rewound")
        swarm.check_hashes()


def test_a_steward_with_a_full_disk_is_led_past_and_returns(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        seats = three(swarm, votes=True)
        seats[0].wait_event("stewards_changed", lambda r: len(r["voters"]) == 3)
        with closing_all(*train(seats)):
            wait_commits(seats[0], 3)
            leader = swarm.leader()
            others = [seat for seat in seats if seat is not leader]
            with full_disk(leader):
                assert leader.wait_event("disk_full")["what"] in ("log", "results", "position")
                wait_commits(others[0], 5)
                assert others[0].status()["leader"] != leader.id
                assert leader.process is not None and leader.process.poll() is None
            leader.wait_event("disk_freed")
            last = wait_commits(others[0], 3)
            poll_until(lambda: leader.stand()[0] >= last, "it catches up")
            listed = others[0].call("rounds", {"last": 64})["rounds"]
            since = others[0].last_seq
            others[0].wait_event(
                "round_opened", lambda r: leader.id in r["contributors"], since, 30.0
            )
            assert listed
        wait_same_stand(seats)
        assert {CHANNEL} == set(leader.status()["channels"])
        swarm.check_hashes()


def test_two_members_wait_for_space_and_say_why(tmp_path: Path) -> None:
    """A commit of two holders rests on both disks: nothing is committed meanwhile, or lost."""
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(start_peers=2)
        other = swarm.enter("ada", founder.ticket(), config={"votes": False})
        with closing_all(*train([founder, other])):
            wait_commits(founder, 3)
            with full_disk(other):
                other.wait_event("disk_full")
                founder.wait_event(
                    "round_aborted", lambda r: r["reason"] == "a result is not on disk"
                )
            other.wait_event("disk_freed")
            wait_commits(founder, 3)
        wait_same_stand([founder, other])
        swarm.check_hashes()
