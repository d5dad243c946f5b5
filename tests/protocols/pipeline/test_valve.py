"""The valve opens for an overloaded stage, if the run allows it, and says so once."""

from __future__ import annotations

from swarmtrain_protocols.core import Effect, Emit
from swarmtrain_protocols.pipeline.valve import Valve
from swarmtrain_protocols.rounds import effects as fx


def told(out: list[Effect]) -> list[str]:
    events = [x.event for x in out if isinstance(x, Emit)]
    return [str(x.fields["what"]) for x in events if isinstance(x, fx.Notice)]


def test_it_names_the_overloaded_stage_and_tells_it_once() -> None:
    out: list[Effect] = []
    stages = iter([0, 2, 2, 3, 0, 3])
    valve = Valve(out, 4, lambda: next(stages))
    assert [valve() for _ in range(6)] == [0, 2, 2, 3, 0, 3]
    assert told(out) == [f"4 micro-batches a step leave out stage {s}" for s in (2, 3, 3)]


def test_it_stays_shut_in_runs_that_allow_no_skips() -> None:
    out: list[Effect] = []
    valve = Valve(out, 0, lambda: 2)
    assert valve() == 0 and out == []
