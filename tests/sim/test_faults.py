"""Schedules are data: generated from a seed, printed as source, shrunk to what matters."""

from __future__ import annotations

from swarmtrain_protocols.testing.faults import Fault, Plan, generate, shrink, to_text
from tests.sim.toy import PLAN, toy_run


def test_generated_schedules_are_sorted_bounded_and_repeatable() -> None:
    plan = Plan(("a", "b", "c"), start_s=1.0, end_s=9.0, count=(3, 7), vanish_max=1)
    vanished = 0
    for seed in range(200):
        schedule = generate(seed, plan)
        assert schedule == generate(seed, plan) == sorted(schedule)
        assert 3 <= len(schedule) <= 7
        assert all(1.0 <= f.at_s <= 9.0 for f in schedule)
        assert all(set(f.a.split(",")) <= {"a", "b", "c"} for f in schedule)
        assert all(f.a != f.b for f in schedule)
        gone = [f for f in schedule if f.kind == "vanish"]
        assert len(gone) <= 1
        vanished += len(gone)
    assert vanished >= 10


def test_text_of_a_schedule_is_python_for_it() -> None:
    schedule = generate(3, PLAN)
    assert eval(to_text(schedule), {"Fault": Fault}) == schedule


def test_shrinking_finds_the_two_faults_that_matter() -> None:
    schedule = [Fault(float(i), "crash", "abc"[i % 3], "", 8.0) for i in range(16)]
    culprits = (schedule[3], schedule[11])
    runs: list[int] = []

    def run(candidate: list[Fault]) -> str | None:
        runs.append(len(candidate))
        times = [f.at_s for f in candidate]
        return "x" if all(c.at_s in times for c in culprits) else ("y" if candidate else None)

    found, count = shrink(run, schedule)
    assert [f.at_s for f in found] == [3.0, 11.0]
    assert all(f.duration_s <= 0.1 for f in found)
    assert count == len(runs) < 80


def test_shrinking_reduces_a_planted_failure_to_its_minimum() -> None:
    """Of a schedule with one harmful fault among twelve harmless ones, that one is left."""
    harmless = [Fault(float(i), "pause", "a", "", 0.3) for i in range(12)]
    for seed in range(20):
        culprit = Fault(0.5, "aim-crash", "b", "send:pong", 1.0)
        schedule = sorted([*harmless, culprit])
        if toy_run(seed, schedule, hasty=True)[1] == "lost-ack":
            break
    found, _ = shrink(lambda s: toy_run(seed, s, hasty=True)[1], schedule)
    assert [(f.kind, f.a, f.b) for f in found] == [("aim-crash", "b", "send:pong")]
    assert toy_run(seed, [], hasty=True)[1] is None


def test_removing_a_fault_leaves_the_luck_of_links_alone() -> None:
    """Until the first fault strikes, runs with and without it are equal event by event."""
    calm, _ = toy_run(5, [])
    late = [Fault(11.0, "pause", "a", "", 0.5)]
    other, _ = toy_run(5, late)
    assert calm.trace.digest() != other.trace.digest()
    assert calm.hosts["b"].node.received[:20] == other.hosts["b"].node.received[:20]
