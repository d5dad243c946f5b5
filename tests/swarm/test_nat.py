"""Members behind routers that refuse inbound connections: real processes in network namespaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from swarmtrain_protocols.tickets import Ticket
from tests.swarm.harness import Seat, Swarm, closing_all, poll_until, wait_same_stand
from tests.swarm.homenat import MAPPED_PORT, Lab, inside
from tests.swarm.synthetic import VALUES
from tests.swarm.test_faults import commits_with, round_of, train, wait_round

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

HOME = {"listen": "0.0.0.0:0", "votes": False}
STATE_BYTES = 8 * VALUES
"""θ and momentum, fp32."""
ROUND_BYTES = 4 * VALUES
"""One contribution, or one result."""


def reachability(seat: Seat) -> dict[str, Any]:
    found: dict[str, Any] = seat.status()["reachability"]
    return found


def wait_verdict(seat: Seat, state: str, asked: int) -> None:
    poll_until(
        lambda: reachability(seat)["state"] == state and reachability(seat)["asked"] >= asked,
        f"{seat.name} is found {state} by {asked}",
    )


def as_seen(viewer: Seat, other: Seat) -> dict[str, Any]:
    """What ``swarmtrain peers`` of one site says of another."""
    (found,) = [p for p in viewer.call("peers")["peers"] if p["id"] == other.id]
    return dict(found)


def relayed_bytes(seats: list[Seat]) -> list[int]:
    return [seat.status()["relay"]["relayed_bytes"] for seat in seats]


def test_a_member_behind_a_router_trains_with_two_that_can_be_dialled(tmp_path: Path) -> None:
    """It is found out before it enters, owns no part, and nobody relays anything for it."""
    with Lab() as lab, Swarm(tmp_path) as swarm:
        home, router = lab.home("44.9.0.1")
        with inside(lab.public("44.1.0.1")):
            founder = swarm.found(start_peers=3, config={"listen": "44.1.0.1:0"})
        ticket = founder.ticket()
        with inside(lab.public("44.2.0.1")):
            ada = swarm.enter("ada", ticket, config={"listen": "0.0.0.0:0"})
        with inside(home):
            hidden = swarm.enter("nat", ticket, config=HOME)
        trainers = [train(s, key, phase_s=0.02) for key, s in enumerate(swarm.seats, 1)]
        with closing_all(*trainers):
            wait_round(founder, 8)
            wait_verdict(hidden, "outgoing only", 2)
            wait_verdict(ada, "reachable", 1)
        wait_same_stand(swarm.seats, 8)
        assert {0, 1, 2, 3, 4, 5, 6, 7} <= set(commits_with(founder, hidden.id))
        assert founder.status()["rounds_aborted"] == 0
        swarm.check_hashes()
        seen = as_seen(founder, hidden)
        assert (seen["reachable"], seen["addresses"]) == (False, [])
        assert (seen["reachability"], seen["path"]) == ("outgoing only", "direct")
        assert as_seen(hidden, ada)["reachability"] == "reachable"
        assert hidden.status()["listen"] == [], "it tells nobody an address that leads nowhere"
        assert reachability(hidden)["seen"] == "44.9.0.1"
        assert router.dropped >= 2, "the knocks of both"
        assert relayed_bytes(swarm.seats) == [0, 0, 0]


def test_two_members_behind_routers_and_one_seed_train(tmp_path: Path) -> None:
    """The seed holds no state: the second member gets it from the first, through the seed."""
    with Lab() as lab, Swarm(tmp_path) as swarm:
        homes = [lab.home("44.9.0.1"), lab.home("44.8.0.1")]
        with inside(lab.public("44.1.0.1")):
            config = {"listen": "44.1.0.1:0", "trains": False, "holds_state": False}
            seed = swarm.found(config=config)
        ticket = seed.ticket()
        with inside(homes[0][0]):
            one = swarm.enter("one", ticket, config=HOME)
        with closing_all(train(one, 1, phase_s=0.1)):
            wait_round(seed, 3)
            assert relayed_bytes([seed]) == [0], "nobody needed it so far"
            with inside(homes[1][0]):
                two = swarm.enter("two", ticket, config=HOME)
            with closing_all(train(two, 2, phase_s=0.1)):
                poll_until(lambda: len(commits_with(seed, two.id)) >= 3, "rounds of both")
                caught_up = relayed_bytes([seed])[0]
                poll_until(lambda: len(commits_with(seed, two.id)) >= 13, "ten more")
                rounds_cost = relayed_bytes([seed])[0] - caught_up
                path = as_seen(two, one)
                last = round_of(seed)
        wait_same_stand([one, two], last)
        assert set(commits_with(seed, two.id)) <= set(commits_with(seed, one.id)), "together"
        assert path["path"] == "relayed" and path["via"] == seed.id
        assert path["reachability"] == "outgoing only"
        assert caught_up > STATE_BYTES, "it came from the first member, there is no other"
        assert rounds_cost < ROUND_BYTES, "ten rounds: the seed sums, nothing is relayed"
        assert seed.status()["rounds_aborted"] == 0
        assert [record["via"] for record in two.events("link_relayed")] == [seed.id]
        assert two.events("state_fetched"), "it did not begin anew"
        assert [reachability(s)["state"] for s in (one, two)] == ["outgoing only"] * 2
        swarm.check_hashes()


def test_a_router_that_maps_ports_makes_its_member_reachable(tmp_path: Path) -> None:
    """Outgoing only at first; the mapped port is tried by both others, then told; given back."""
    with Lab() as lab, Swarm(tmp_path) as swarm:
        home, router = lab.home("44.9.0.1", maps=True)
        with inside(lab.public("44.1.0.1")):
            founder = swarm.found(start_peers=2, config={"listen": "44.1.0.1:0"})
        ticket = founder.ticket()
        with inside(lab.public("44.2.0.1")):
            swarm.enter("ada", ticket, config={"listen": "0.0.0.0:0"})
        with inside(home):
            hidden = swarm.enter("nat", ticket, config=HOME)
        first = hidden.wait_event("reachability", lambda r: r["state"] == "outgoing only")
        mapped = hidden.wait_event("port_mapped")
        address = f"44.9.0.1:{MAPPED_PORT}"
        assert (mapped["address"], mapped["protocol"]) == (address, "PCP")
        assert first["seq"] < mapped["seq"], "a site that can be dialled asks for nothing"
        wait_verdict(hidden, "reachable", 2)
        poll_until(lambda: as_seen(founder, hidden)["reachable"], "the log says so")
        assert as_seen(founder, hidden)["addresses"][0] == address
        assert reachability(hidden)["mapped"] == "PCP"
        assert Ticket.parse(str(hidden.ticket())).addresses[0] == address
        assert router.mapped, "the mapping is there"
        assert hidden.stop() == 0
        assert not router.mapped, "it is given back"
