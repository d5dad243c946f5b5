"""Which rounds count as delayed by a joiner; and the emulated path."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import state_transfer
from tests.swarm.harness import CHANNEL


class Leader:
    """A round every two seconds, its exchange one second long; some take longer."""

    def __init__(self, rounds: int, longer: dict[int, float]) -> None:
        self.records: dict[str, list[dict[str, Any]]] = {"round_opened": [], "round_committed": []}
        at = 100.0
        for number in range(rounds):
            at += 1.0
            self._add("round_opened", number, at)
            at += 1.0 + longer.get(number, 0.0)
            self._add("round_committed", number, at)

    def _add(self, name: str, number: int, at: float) -> None:
        self.records[name].append({"round": number, "mono_s": at, "channel": CHANNEL})

    def events(self, name: str) -> list[dict[str, Any]]:
        return self.records[name]


def test_rounds_are_told_apart_by_whether_a_joiner_was_there() -> None:
    """Some meet the joiner; those in which its process starts or ends are of neither kind."""
    leader = Leader(12, {6: 0.5})
    joins = [{"spawned_s": 107.0, "begin_s": 109.5, "end_s": 116.4, "left_s": 117.9}]
    found = state_transfer.split(leader, joins, 103.0)  # type: ignore[arg-type]
    assert found["with"]["interval_s"] == [2.0, 2.5]
    assert found["with"]["exchange_s"] == [1.0, 1.5]
    assert len(found["without"]["interval_s"]) == 12 - 1 - 1 - 2 - 2 - 2
    assert set(found["without"]["interval_s"]) == {2.0}


def test_the_report_has_ratios() -> None:
    join = {"begin_s": 0.0, "end_s": 9.0, "fetch_s": 8.0, "donors": 3}
    seconds = {"interval_s": [2.0, 2.0, 2.0], "exchange_s": [1.0, 1.0, 1.0]}
    slower = {"interval_s": [2.0, 2.2, 2.4], "exchange_s": [1.0, 1.0, 1.0]}
    told = state_transfer.report({"without": seconds, "with": slower}, [join], 0, 1000, 40.0, 7)
    assert told["interval_s"]["ratio"]["mean"] == pytest.approx(1.1)
    assert told["interval_s"]["ratio"]["max"] == pytest.approx(1.2)
    assert told["exchange_s"]["ratio"] == {"mean": 1.0, "median": 1.0, "p90": 1.0, "max": 1.0}
    assert told["interval_s"]["beyond"] == {"without": 0, "with": 2}
    assert told["joiner"]["in_step_s"] == [9.0]
    assert told["joiner"]["fetch_s"] == [8.0] and told["joiner"]["donors"] == [3]
