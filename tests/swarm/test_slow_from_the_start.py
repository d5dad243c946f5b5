"""Links that are slow from the first byte: members join, stewards elect and keep a leader."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.swarm.harness import Seat, Swarm, closing_all, poll_until, wait_same_stand
from tests.swarm.proxy import Proxy
from tests.swarm.synthetic import Plan, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def train(seats: list[Seat]) -> list[Trainer]:
    plans = [Plan(key=key, phase_s=0.5, decision_s=300.0) for key in range(1, len(seats) + 1)]
    return [Trainer(s.site, plan).start() for s, plan in zip(seats, plans, strict=True)]


def behind(line: Proxy, seat: Seat) -> None:
    line.target_port = int(seat.site.port_path.read_text())


def test_a_member_joins_over_five_seconds_one_way_and_trains(tmp_path: Path) -> None:
    """A handshake takes 20 s there, a round about a minute."""
    line = Proxy()
    line.delay_s = 5.0
    with Swarm(tmp_path) as swarm, closing_all(line):
        founder = swarm.found(
            config={"announce": (line.address,)}, start_peers=2, grace_s=120.0, overlap="eager"
        )
        behind(line, founder)
        ticket = founder.ticket()
        assert ticket.addresses == (line.address,)
        far = swarm.enter("far", ticket, config={"votes": False}, start=False)
        far.start(timeout_s=120.0)
        with closing_all(*train([founder, far])):
            committed = far.wait_event("round_committed", timeout_s=200.0)
            assert committed["round"] == 0
            far.wait_applied(1, timeout_s=60.0)
        opened = founder.wait_event("round_opened")
        assert set(opened["contributors"]) == {founder.id, far.id}
        assert not far.events("quorum_lost") and not founder.events("quorum_lost")
        swarm.check_hashes()


def test_stewards_a_second_apart_elect_a_leader_and_keep_it(tmp_path: Path) -> None:
    """The round trip is longer than the shortest election timeout: patience has to grow."""
    lines = [Proxy() for _ in range(3)]
    with Swarm(tmp_path) as swarm, closing_all(*lines):
        founder = swarm.found(config={"announce": (lines[0].address,)}, start_peers=3, grace_s=60.0)
        behind(lines[0], founder)
        seats = [founder]
        for name, line in zip(("ada", "bob"), lines[1:], strict=True):
            seat = swarm.enter(name, founder.ticket(), config={"announce": (line.address,)})
            behind(line, seat)
            seats.append(seat)
        founder.wait_event("stewards_changed", lambda r: len(r["voters"]) == 3)
        for line in lines:
            line.delay_s = 0.6
        with closing_all(*train(seats)):
            calm = founder.wait_event("round_committed", lambda r: r["round"] >= 2, timeout_s=120.0)
            terms = {seat.status()["term"] for seat in seats}
            founder.wait_event("round_committed", lambda r: r["round"] >= 6, timeout_s=180.0)
            assert {seat.status()["term"] for seat in seats} == terms, "nobody stood for election"
            for seat in seats:
                changes = [r for r in seat.events("leader_changed") if r["leader"] is None]
                assert all(r["mono_s"] < calm["mono_s"] for r in changes)
            leader = swarm.leader()
            leader.kill()
            rest = [seat for seat in seats if seat is not leader]
            poll_until(
                lambda: any(seat.status()["is_leader"] for seat in rest), "another leads", 120.0
            )
            since = rest[0].last_seq
            rest[0].wait_event("round_committed", since_seq=since, timeout_s=120.0)
        wait_same_stand(rest)
        swarm.check_hashes()
