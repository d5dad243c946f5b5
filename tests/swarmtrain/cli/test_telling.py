"""What a demo says of many members' events: each thing once, and not too often."""

from __future__ import annotations

from swarmtrain.cli.telling import LINES, WIDTH_MAX, Teller

NAMES = {"aa" * 32: "peer-0", "bb" * 32: "peer-1"}


def step(number: int, loss: float | None = 3.5) -> dict[str, object]:
    return {"name": "step_committed", "step": number, "loss": loss, "micro_batches": 8}


def test_commits_are_told_now_and_then() -> None:
    teller = Teller(NAMES)
    total = 10 * LINES
    lines = [teller.committed(step(n), n, total, 10.0 + 0.5 * n) for n in range(1, total + 1)]
    told = [line for line in lines if line is not None]
    assert len(told) == LINES + 1, "the first one, too"
    assert told[0] == f"step 1 of {total}: loss 3.500, 8 micro-batches"
    assert told[-1] == f"step {total} of {total}: loss 3.500, 8 micro-batches, one every 0.50 s"


def test_rounds_have_neither_loss_nor_micro_batches() -> None:
    record = {"name": "round_committed", "channel": "train/0/0", "round": 0}
    assert Teller(NAMES).committed(record, 1, 5, 1.0) == "round 1 of 5 committed"


def test_a_loss_is_told_once_whoever_says_it() -> None:
    teller, record = Teller(NAMES), {"name": "evaluated", "generation": 0, "round": 20, "loss": 2.5}
    assert teller.evaluated(record, steps=True) == "held-out loss 2.500 after step 20"
    assert teller.evaluated(record, steps=True) is None
    assert teller.evaluated(record | {"generation": 1}, steps=False) is not None


def test_coverage_is_told_when_it_has_changed() -> None:
    teller = Teller(NAMES)
    assert teller.coverage() is None
    teller.assigned({"peer": "bb" * 32, "stages": [0, 2]})
    teller.assigned({"peer": "aa" * 32, "stages": [0, 1]})
    assert teller.coverage() == "stages: ends peer-0, peer-1; stage 1 peer-0; stage 2 peer-1"
    assert teller.coverage() is None
    teller.assigned({"peer": "bb" * 32, "stages": []})
    teller.assigned({"peer": "cc" * 32, "stages": [2]})
    assert teller.coverage() == "stages: ends peer-0; stage 1 peer-0; stage 2 cccccccc"


def test_trouble_says_what_it_is_about() -> None:
    record = {"name": "fallback", "severity": "warning", "what": "evaluation", "why": "x" * 500}
    line = Teller.trouble("peer-2", record)
    assert line.startswith("peer-2: ! fallback  what=evaluation  why=xxx")
    assert len(line) == WIDTH_MAX
