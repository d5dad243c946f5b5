"""How many stewards, and which: the leader's choice."""

from __future__ import annotations

import pytest

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.stewards import FIVE_FROM, SEVEN_FROM, choose, size_wanted
from tests.protocols.rounds_kit import Log, joined

PEERS = [PeerId(bytes([n]) * 32) for n in range(1, 21)]
LEADER = PEERS[0]


class Hall:
    """Members in the order of their coming; the first one leads."""

    def __init__(self, members: int, voters: int = 1) -> None:
        self.log = Log(model=False)
        for peer in PEERS[:members]:
            self.log.add(joined(peer))
        self.log.add(e.StewardsChanged(tuple(PEERS[:voters]), ()))
        self.linked = PEERS[1:members]

    def choose(self, *leaving: bytes, asked: int = 0) -> list[int]:
        """Numbers of the members chosen, counted from 0."""
        found = choose(self.log.ledger, me=LEADER, linked=self.linked, leaving=leaving, asked=asked)
        assert list(found) == sorted(found)
        return [PEERS.index(p) for p in found]


@pytest.mark.parametrize(
    ("able", "current", "asked", "size"),
    [
        (0, 1, 0, 1),
        (2, 1, 0, 1),
        (3, 1, 0, 3),
        (7, 3, 0, 3),
        (FIVE_FROM, 3, 0, 5),
        (SEVEN_FROM, 5, 0, 7),
        (20, 7, 0, 7),
        (6, 7, 0, 5),
        (7, 7, 0, 7),
        (4, 5, 0, 3),
        (2, 3, 0, 1),
        (20, 7, 3, 3),
        (20, 1, 7, 7),
        (6, 3, 7, 5),
        (20, 3, 1, 1),
    ],
)
def test_size(able: int, current: int, asked: int, size: int) -> None:
    assert size_wanted(able, current, asked) == size


def test_the_set_grows_with_the_run_and_shrinks_only_when_it_cannot_be_filled() -> None:
    voters, sizes = 1, []
    for members in [*range(1, 17), *range(15, 0, -1)]:
        voters = len(Hall(members, voters).choose())
        sizes.append(voters)
    assert sizes == [1, 1, *[3] * 5, *[5] * 6, *[7] * 3, *[7] * 9, 5, 5, 3, 3, 1, 1]


def test_those_who_vote_go_on_and_the_longest_there_come_next() -> None:
    hall = Hall(9, voters=3)
    hall.log.add(joined(PEERS[3], name="was away"))  # in again: the youngest of all
    assert hall.choose() == [0, 1, 2, 4, 5]


def test_who_is_cut_off_votes_on_until_it_is_lost_and_is_replaced_then() -> None:
    hall = Hall(6, voters=3)
    hall.linked.remove(PEERS[2])
    assert hall.choose() == [0, 1, 2]
    hall.log.add(e.MemberLeft(PEERS[2], "lost"))
    assert hall.choose() == [0, 1, 3]


def test_a_leaver_is_replaced_or_the_set_shrinks_to_those_that_can_be_reached() -> None:
    assert Hall(6, voters=5).choose(PEERS[4]) == [0, 1, 2, 3, 5]
    hall = Hall(5, voters=5)
    hall.linked.remove(PEERS[1])
    assert hall.choose(PEERS[4]) == [0, 2, 3]
    assert hall.choose(LEADER, PEERS[4]) == [1, 2, 3]
    assert Hall(2, voters=1).choose(LEADER) == [1]


def test_alone_it_must_be_there() -> None:
    hall = Hall(2, voters=1)
    hall.linked.clear()
    assert hall.choose(LEADER) == []


def test_no_grant_no_vote_and_neither_without_an_address() -> None:
    hall = Hall(3)
    hall.log.add(joined(PEERS[1], reachable=False))
    assert hall.choose() == [0]
    other = Hall(2)
    other.log.add(joined(PEERS[2], may_vote=False))
    other.linked.append(PEERS[2])
    assert other.choose() == [0]


def test_the_manifest_may_say_how_many() -> None:
    assert len(Hall(9, voters=3).choose(asked=7)) == 7
    assert Hall(9, voters=7).choose(asked=3) == [0, 1, 2]
