"""Leases: nobody gets a micro-batch that another one works at, and none is ever forgotten."""

from __future__ import annotations

import math
import random

import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.pipeline.claims import Settlement
from swarmtrain_protocols.pipeline.leases import Leases, Vacancy

P, Q, R = (PeerId(bytes([n]) * 32) for n in (1, 2, 3))
TTL_S = 3.0


def dealt(leases: Leases, now: float, *linked: PeerId) -> dict[PeerId, list[int]]:
    return {d: g.micro_batches for d, g in leases.deal(now, linked or (P, Q, R)).items()}


def test_drivers_with_room_get_what_is_free_in_turn() -> None:
    leases = Leases(7, TTL_S, 0.0)
    leases.asked(0.0, P, 2, ())
    leases.asked(0.0, Q, 4, ())
    assert dealt(leases, 0.0) == {P: [0, 2], Q: [1, 3, 4, 5]}
    assert dealt(leases, 0.1) == {}
    leases.asked(0.2, P, 5, ())
    assert dealt(leases, 0.2) == {P: [6]}


def test_no_room_and_no_link_get_nothing() -> None:
    leases = Leases(3, TTL_S, 0.0)
    leases.asked(0.0, P, 0, ())
    leases.asked(0.0, Q, 3, ())
    assert dealt(leases, 0.0, P) == {}
    leases.gone(Q)
    assert dealt(leases, 0.0) == {}


def test_a_lease_lives_as_long_as_its_driver_asks() -> None:
    leases = Leases(1, TTL_S, 0.0)
    leases.asked(0.0, P, 1, ())
    leases.asked(0.0, Q, 1, ())
    assert dealt(leases, 0.0) == {P: [0]}
    leases.asked(2.0, P, 0, (0,))
    assert leases.deadline(2.0) == 5.0
    assert dealt(leases, 4.9) == {}
    assert dealt(leases, 5.0) == {Q: [0]}


def test_a_driver_that_has_forgotten_its_leases_does_not_keep_them() -> None:
    """It has died and come back, and asks on: what it does not work at runs out."""
    leases = Leases(2, TTL_S, 0.0)
    leases.asked(0.0, P, 2, ())
    assert dealt(leases, 0.0) == {P: [0, 1]}
    for now in (0.5, 1.0, 1.5, 2.0, 2.5):
        leases.asked(now, P, 4, (1,))
        assert dealt(leases, now) == {}
    leases.asked(3.0, P, 4, (1,))
    assert dealt(leases, 3.0) == {P: [0]}


def test_after_its_link_broke_what_a_driver_does_not_work_at_is_free_at_once() -> None:
    leases = Leases(3, TTL_S, 0.0)
    leases.asked(0.0, P, 3, ())
    assert dealt(leases, 0.0) == {P: [0, 1, 2]}
    leases.gone(P)
    leases.asked(0.1, Q, 3, ())
    assert dealt(leases, 0.1) == {}, "the link alone says nothing: it may work on"
    leases.asked(0.2, P, 0, (1,))
    assert dealt(leases, 0.2) == {Q: [0, 2]}
    leases.asked(0.3, P, 2, ())
    leases.asked(0.3, Q, 0, (0, 2))
    assert dealt(leases, 0.3) == {}, "on its way again, as long as the link holds"


def test_a_vacancy_counts_from_the_last_sign_of_the_old_leader() -> None:
    vacancy = Vacancy()
    assert vacancy.over_at(5.0, TTL_S) == 8.0, "nothing is known of another leader"
    vacancy.leader_changed(5.0, P)
    vacancy.disconnected(6.0, Q)
    assert vacancy.over_at(7.0, TTL_S) == 10.0, "handed over: the other one led until now"
    vacancy.disconnected(7.0, P)
    assert vacancy.over_at(7.5, TTL_S) == 10.0
    vacancy.leader_changed(8.0, None)
    vacancy.connected(P)
    assert vacancy.over_at(8.5, TTL_S) == 10.0, "it is back, and does not lead"
    assert vacancy.over_at(12.0, TTL_S) == 13.0, "drivers have a third of their time to tell"


def test_a_leader_that_is_seen_again_may_have_leased_until_then() -> None:
    vacancy = Vacancy()
    vacancy.leader_changed(1.0, P)
    vacancy.disconnected(2.0, P)
    vacancy.connected(P)
    assert vacancy.over_at(4.0, TTL_S) == 7.0
    vacancy.leader_changed(4.0, None)
    vacancy.leader_changed(5.0, Q)
    assert vacancy.over_at(6.0, TTL_S) == 9.0


def test_leases_on_their_way_take_of_the_room() -> None:
    """A request that crosses a lease does not get the same room again."""
    leases = Leases(9, TTL_S, 0.0)
    leases.asked(0.0, P, 4, ())
    assert dealt(leases, 0.0) == {P: [0, 1, 2, 3]}
    leases.asked(0.1, P, 4, ())
    assert dealt(leases, 0.1) == {}
    leases.finished(P, 0, 1.0)
    leases.asked(0.2, P, 1, (1, 2, 3))
    assert dealt(leases, 0.2) == {P: [4]}


def test_a_new_leader_waits_and_adopts_what_is_under_way() -> None:
    leases = Leases(3, TTL_S, 10.0)
    leases.asked(8.0, P, 3, (1,))
    assert dealt(leases, 9.9) == {} and leases.deadline(9.0) == 10.0
    leases.asked(9.0, Q, 0, (1,))
    assert dealt(leases, 10.0) == {P: [0, 2]}, "1 was adopted, by who said it first"
    leases.asked(10.0, R, 9, (7,))
    assert dealt(leases, 10.0) == {}, "there is no such micro-batch"


def test_what_is_finished_is_done_until_workers_say_otherwise() -> None:
    leases = Leases(3, TTL_S, 0.0)
    leases.asked(0.0, P, 3, ())
    leases.deal(0.0, (P,))
    leases.finished(P, 0, 1.5)
    leases.finished(P, 1, 2.5)
    leases.finished(Q, 1, 7.0)
    assert leases.done() == 2
    assert leases.losses([0, 1, 2]) == [1.5, 2.5], "the first one's; nobody has said the third"
    settled = Settlement(micro_batches=[0], missing={1: [2], 2: [0, 1, 2, 3]})
    leases.settle(1.0, settled, [P])
    assert leases.done() == 1
    assert (leases.redoers(), leases.redo_of(P)) == ([P], [(2, 1)])
    assert leases.redo_of(Q) == []
    leases.finished(P, 1, 2.5)
    assert leases.done() == 2 and leases.redoers() == []


def test_work_in_progress_goes_on_while_workers_are_asked() -> None:
    leases = Leases(1, TTL_S, 0.0)
    leases.asked(0.0, P, 1, ())
    leases.deal(0.0, (P,))
    leases.settle(1.0, Settlement(missing={0: [0, 1]}), [P])
    leases.asked(1.0, Q, 1, ())
    assert leases.redoers() == [] and dealt(leases, 2.9) == {}


def test_what_a_lost_driver_had_finished_is_leased_anew_if_anything_is_missing() -> None:
    leases = Leases(2, TTL_S, 0.0)
    leases.asked(0.0, P, 2, ())
    leases.deal(0.0, (P,))
    for number in (0, 1):
        leases.finished(P, number, 1.0)
    leases.gone(P)
    leases.settle(1.0, Settlement(micro_batches=[1], missing={0: [3]}), [Q])
    leases.asked(1.0, Q, 5, ())
    assert dealt(leases, 1.0, Q) == {Q: [0]}, "1 is complete without its driver"


def test_a_driver_that_does_not_send_again_loses_it() -> None:
    leases = Leases(1, TTL_S, 0.0)
    leases.asked(0.0, P, 1, ())
    leases.deal(0.0, (P,))
    leases.finished(P, 0, 1.0)
    leases.settle(1.0, Settlement(missing={0: [1]}), [P])
    leases.asked(1.0, Q, 1, ())
    leases.asked(2.0, P, 0, ())
    assert dealt(leases, 4.9) == {}, "renewed at 2"
    assert dealt(leases, 5.0) == {Q: [0]}
    leases.finished(Q, 0, 1.0)
    leases.settle(6.0, Settlement(missing={0: [1]}), [Q])
    leases.abandoned(Q, 0)
    leases.asked(6.0, P, 1, ())
    assert dealt(leases, 6.0) == {P: [0]}, "it said that it keeps nothing"
    assert leases.done() == 0


def test_only_the_holder_of_a_lease_gives_it_up() -> None:
    leases = Leases(1, TTL_S, 0.0)
    leases.asked(0.0, P, 1, ())
    leases.deal(0.0, (P,))
    leases.asked(0.0, Q, 1, ())
    leases.abandoned(Q, 0)
    assert dealt(leases, 1.0) == {}
    leases.abandoned(P, 0)
    assert dealt(leases, 1.0) == {Q: [0]}


def test_complete_without_a_word_of_its_driver() -> None:
    """It died between its last backward and saying so."""
    leases = Leases(1, TTL_S, 0.0)
    leases.settle(0.0, Settlement(micro_batches=[0]), [])
    assert leases.done() == 1 and leases.losses([0]) == []
    assert leases.deadline(0.0) == math.inf


def test_a_list_of_what_to_send_again_has_a_bound() -> None:
    leases = Leases(40, TTL_S, 0.0)
    leases.asked(0.0, P, 40, ())
    leases.deal(0.0, (P,))
    for number in range(40):
        leases.finished(P, number, 1.0)
    leases.settle(0.0, Settlement(missing={k: list(range(100)) for k in range(40)}), [P])
    assert len(leases.redo_of(P)) == limits.REDO_MAX


@pytest.mark.parametrize("seed", range(20))
def test_no_two_drivers_work_at_one_micro_batch_and_all_get_done(seed: int) -> None:
    """Drivers come, work, crash and return at random; each renews what it works at."""
    rng = random.Random(seed)
    leases, total, now = Leases(30, TTL_S, 0.0), 30, 0.0
    working: dict[PeerId, dict[int, float]] = {P: {}, Q: {}, R: {}}
    alive = dict.fromkeys((P, Q, R), True)
    for _ in range(2000):
        now += rng.random()
        driver = rng.choice((P, Q, R))
        mine = {k: t for k, t in working[driver].items() if t > now}
        if rng.random() < 0.1:
            alive[driver] = not alive[driver]
            mine = {}
            leases.gone(driver)
        elif alive[driver] and rng.random() < 0.6:
            leases.asked(now, driver, max(0, 4 - len(mine)), tuple(mine))
            mine = dict.fromkeys(mine, now + TTL_S)
        elif alive[driver] and mine:
            number = rng.choice(sorted(mine))
            del mine[number]
            leases.finished(driver, number, 1.0)
        working[driver] = mine
        for to, grant in leases.deal(now, [d for d in alive if alive[d]]).items():
            for number in grant.micro_batches:
                others = [d for d in working if working[d].get(number, 0.0) > now and alive[d]]
                assert others in ([], [to]), (number, to, others)
                working[to][number] = now + TTL_S
    assert leases.done() == total
