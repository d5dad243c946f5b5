"""Faults aimed at a state: by whom, at what, how often until then, and whom they strike."""

from __future__ import annotations

import pytest

from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.testing.aims import Aim
from swarmtrain_protocols.testing.faults import Fault
from swarmtrain_protocols.testing.schedules import from_json, to_json
from swarmtrain_protocols.testing.small import run_small
from tests.sim.toy import toy_run, toy_world

CRASH = "aim-crash"


@pytest.mark.parametrize(
    ("victim", "trigger", "wanted"),
    [
        ("b", "synced", ("b", "synced", 1)),
        ("b", "synced#3", ("b", "synced", 3)),
        ("@leader", "append:RoundCommitted", ("@leader", "append:RoundCommitted", 1)),
        ("a", "b/send:pong", ("b", "send:pong", 1)),
        ("@actor", "*/effect#1234", ("*", "effect", 1234)),
    ],
)
def test_a_trigger_says_who_does_what_how_often(
    victim: str, trigger: str, wanted: tuple[str, str, int]
) -> None:
    aim = Aim.of(Fault(0.0, CRASH, victim, trigger, 1.0))
    assert (aim.actor, aim.label, aim.left) == wanted


def test_the_third_answer_kills_whoever_gets_it() -> None:
    world = toy_world(3)
    world.plan([Fault(0.0, CRASH, "a", "b/send:pong#3", 1.0)])
    world.run(10.0, lambda: world.hosts["a"].incarnation == 1)
    assert world.hosts["b"].node.received == [1, 2, 3]
    assert world.hosts["a"].incarnation == 1 and world.hosts["b"].incarnation == 0


def test_a_message_that_was_taken_in_is_a_trigger() -> None:
    world = toy_world(3)
    world.plan([Fault(0.0, "aim-power", "b", "receive:ping#2", 1.0)])
    world.run(10.0, lambda: world.hosts["b"].incarnation == 1)
    assert world.hosts["b"].incarnation == 1
    assert len(world.hosts["b"].disk.records) == 1  # the second one was not synced yet


def test_every_effect_of_a_clean_run_is_a_moment() -> None:
    """The same effect of the same run each time, and never one that did not take place."""
    ends = []
    for number in (5, 6, 7, 100_000):
        schedule = [Fault(0.0, CRASH, "@actor", f"*/effect#{number}", 0.5)]
        world, wrong = toy_run(5, schedule)
        assert wrong is None
        died = [name for name, host in world.hosts.items() if host.incarnation]
        ends.append(died)
    assert [len(died) for died in ends] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("fault", "point"),
    [
        (Fault(1.0, "aim-isolate", "@leader", "append:RoundCommitted", 2.0), "@leader"),
        (Fault(1.0, CRASH, "@owner0", "send:result#1", 1.0), "@owner0"),
        (Fault(1.0, CRASH, "@owner1", "fetched", 1.0), "@owner1"),
        (Fault(1.0, "aim-power", "@steward", "persist:entries#4", 1.0), "@steward"),
        (Fault(1.0, "aim-pause", "@leader", "@member/send:holding#2", 2.0), "@leader"),
    ],
)
def test_roles_are_those_of_the_moment(fault: Fault, point: str) -> None:
    outcome = run_small(3, [fault])
    assert outcome.violation == "", outcome.text
    assert any(name.startswith(f"aim:{point}:") for name in outcome.seen), outcome.seen


def test_a_schedule_is_a_file_and_comes_back_as_it_was() -> None:
    faults = [
        Fault(2.5, "crash", "@leader", "", 1.0),
        Fault(0.0, "aim-cut", "@owner3", "send:result#2", 3.0),
        Fault(1.0, "wall", "a", "-3600.0", 0.0),
    ]
    found = from_json(to_json("small", 7, faults, 'about "this"'))
    assert (found.kind, found.seed, found.about) == ("small", 7, 'about "this"')
    assert found.listed() == sorted(faults)
    assert from_json(to_json("rounds", 1, [])).listed() == []


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        '{"kind": "rounds"}',
        '{"kind": "rounds", "seed": 1, "fault": []}',
        '{"kind": "rounds", "seed": 1, "faults": [[1.0, "crash", "a"]]}',
        '{"kind": "rounds", "seed": 1, "faults": [[1.0, "explode", "a", "", 1.0]]}',
        "[" * 100_000,
    ],
)
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        from_json(text)
