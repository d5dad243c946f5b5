"""A run of real processes is changed in flight, taken back, closed to strangers and handed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from swarmtrain_peer.spawn import output_tail
from swarmtrain_protocols.errors import CheckpointError, ConfigError, NotAuthorised
from swarmtrain_protocols.manifest import Ticket
from tests.swarm.harness import (
    CHANNEL,
    WAIT_S,
    Seat,
    Swarm,
    closing_all,
    poll_until,
    wait_same_stand,
)
from tests.swarm.synthetic import Plan, Trainer
from tests.swarm.test_orders import order

pytestmark = [pytest.mark.slow, pytest.mark.timeout(160)]


def made(seat: Seat, *options: str) -> Ticket:
    return Ticket.parse(order(seat, "ticket", "create", *options)["ticket"])


def refused(swarm: Swarm, name: str, ticket: Ticket) -> str:
    """Why a newcomer is turned away; its process ends with exit code 6."""
    seat = swarm.enter(name, ticket, start=False)
    try:
        seat.start()
    except NotAuthorised as error:
        return f"{error.what}: {error.why}"
    assert seat.process is not None  # the link was let up, and the leader says no
    assert seat.process.wait(WAIT_S) == NotAuthorised.exit_code
    return output_tail(seat.site.output_path)


def wait_lr(seat: Seat, lr: float) -> None:
    poll_until(lambda: seat.status()["outer_lr"] == lr, f"{seat.name}: outer_lr {lr}")


def test_keys_change_at_one_round_and_the_run_goes_back(tmp_path: Path) -> None:
    keys = {"start_peers": 3, "checkpoint_every_rounds": 5}
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(**keys)
        ada, bob = (swarm.enter(name, founder.ticket(vote=False)) for name in ("ada", "bob"))
        seats = {founder: 1, ada: 2, bob: 3}
        trainers = [Trainer(s.site, Plan(key=k, phase_s=0.05)).start() for s, k in seats.items()]
        with closing_all(*trainers):
            founder.wait_applied(3)
            with pytest.raises(ConfigError, match="inner_stebs"):
                order(founder, "run", "set", "inner_stebs=5")
            with pytest.raises(ConfigError, match="fixed for the whole run"):
                order(founder, "run", "set", "comm.codec_scatter=int8")
            with pytest.raises(ConfigError, match="under way"):
                order(founder, "run", "set", "outer_lr=0.25", "--at-round", "1")
            answer = order(founder, "run", "set", "train.outer_lr=0.25", "--reason", "too fast")
            at = int(answer["at_round"])
            for seat in seats:
                said = seat.wait_event("config_changed")
                assert (said["round"], said["key"], said["value"]) == (at, "outer_lr", "0.25")
            founder.wait_applied(at + 6)
            for seat in seats:
                wait_lr(seat, 0.25)
            order(founder, "run", "pause")
            wait_same_stand(list(seats))
            before = swarm.check_hashes()
            _roll_back(founder, list(seats), before)
        _replayed_from_the_start(founder, before, at)


def _roll_back(founder: Seat, seats: list[Seat], before: dict[int, str]) -> None:
    held = order(founder, "run", "rollback")["rounds"]
    assert held and all(before[one["round"]] == one["states"][CHANNEL] for one in held)
    with pytest.raises(CheckpointError, match="no member in reach"):
        order(founder, "run", "rollback", "1")
    with pytest.raises(ConfigError, match="the run is at round"):
        order(founder, "run", "rollback", "9999")
    target = max(one["round"] for one in held)
    since = {seat: seat.last_seq for seat in seats}
    answer = order(founder, "run", "rollback", str(target), "--reason", "a loss spike")
    assert (answer["round"], answer["generation"]) == (target, 1)
    for seat in seats:
        said = seat.wait_event("rewound", lambda r: True, since[seat])
        assert (said["reason"], said["round"]) == ("a loss spike", target)
        assert not seat.events("data_loss")
    assert wait_same_stand(seats) == (target, before[target]), "the very state of then"
    order(founder, "run", "resume")
    for seat in seats:
        seat.wait_event(
            "round_committed",
            lambda r: r["generation"] == 1 and r["round"] == target + 2,
            since[seat],
        )
    assert founder.status()["generation"] == 1
    order(founder, "run", "pause")
    wait_same_stand(seats, target + 2)


def _replayed_from_the_start(founder: Seat, before: dict[int, str], at: int) -> None:
    """The state after a restart is the one before it: the log says every round's step again."""
    stand = founder.stand()
    founder.kill()
    founder.start()
    poll_until(lambda: founder.stand() == stand, "the same state after a restart")


def test_a_run_with_one_member_goes_back_from_its_own_disk(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(checkpoint_every_rounds=2)
        trainer = Trainer(founder.site, Plan(key=1, phase_s=0.05)).start()
        with closing_all(trainer):
            founder.wait_applied(7)
            before = swarm.check_hashes()
            held = order(founder, "run", "rollback")["rounds"]
            target = max(one["round"] for one in held)
            answer = order(founder, "run", "rollback", str(target))
            since = founder.wait_event("rewound", lambda r: r["generation"] == 1)["seq"]
            assert answer["round"] == target
            founder.wait_event(
                "round_committed",
                lambda r: r["generation"] == 1 and r["round"] == target + 1,
                since,
            )
            first = founder.wait_event("state_applied", lambda r: True, since)
            assert first["round"] in (target, target + 1)
            opened = founder.wait_event("round_opened", lambda r: r["round"] == target, since)
            assert opened["generation"] == 1 and target in before


def test_tickets_are_counted_revoked_and_lists_hold(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found()
        once = made(founder, "--uses", "1", "--note", "for ada")
        ada = swarm.enter("ada", once)
        assert "used_up" in refused(swarm, "thief", once)
        leaked = made(founder)
        order(founder, "ticket", "revoke", leaked.unverified.id.hex()[:8], "--reason", "leaked")
        assert "revoked" in refused(swarm, "late", leaked)
        rows = {row["id"]: row for row in order(founder, "ticket", "list")["tickets"]}
        states = {row["state"]: row for row in rows.values()}
        assert states["used up"]["bearers"] == [ada.id] and states["used up"]["note"] == "for ada"
        assert states["revoked"]["revoked"] == "leaked"
        assert once.unverified.id.hex() in rows and "#" not in str(rows)
        seeds = made(founder, "--role", "seed")
        assert "role" in refused(swarm, "sly", seeds)
        _allow(swarm, founder)
        peers = {one["id"]: one for one in founder.call("peers")["peers"]}
        assert peers[ada.id]["ticket"] == once.unverified.id.hex()
        ada.stop()
        ada.start()  # a member returns with the ticket that it came with
        ada.wait_event("member_joined", lambda r: r["peer"] == ada.id)


def _allow(swarm: Swarm, founder: Seat) -> None:
    anyone = made(founder)
    bob = swarm.enter("bob", anyone, start=False)
    order(founder, "allow", "add", bob.id, "--note", "bob")
    assert "not_allowed" in refused(swarm, "carol", anyone)
    bob.start()
    assert order(founder, "allow", "list")["allowed"] == [{"key": bob.id, "note": "bob"}]
    order(founder, "allow", "off")
    carol = next(seat for seat in swarm.seats if seat.name == "carol")
    carol.start()
    order(founder, "ban", carol.id, "--reason", "noise")
    assert carol.process is not None
    assert carol.process.wait(WAIT_S) == NotAuthorised.exit_code
    order(founder, "ban", carol.id, "--lift")
    carol.start()


def test_a_run_is_handed_over_and_back(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found()
        old = made(founder)
        ada = swarm.enter("ada", old)
        trainer = Trainer(ada.site, Plan(key=2, phase_s=0.05)).start()
        with closing_all(trainer):
            ada.wait_applied(2)
            answer = order(founder, "run", "handover", ada.id[:12], "--reason", "holiday")
            assert answer["founder"] == ada.id
            ada.wait_event("founder_changed", lambda r: r["peer"] == ada.id)
            with pytest.raises(NotAuthorised, match="only the founder"):
                order(founder, "run", "pause")
            order(ada, "run", "pause", "--reason", "mine now")
            founder.wait_event("paused", lambda r: r["reason"] == "mine now")
            order(ada, "run", "resume")
            swarm.enter("bob", old).stop()  # a ticket of the first founder is still good
            swarm.enter("carol", made(ada, "--uses", "1"))
            order(ada, "run", "handover", founder.id[:12], "--void-tickets")
            order(founder, "run", "stop", "--reason", "done")
            assert ada.wait_event("run_ended")["reason"] == "done"
            for seat in (founder, ada):
                status: dict[str, Any] = seat.status()
                assert (status["founder"], status["is_founder"]) == (founder.id, seat is founder)
