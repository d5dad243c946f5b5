"""A checker that cannot fail proves nothing: one history in order, and one broken in each way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import criteria, special
from tests.chaos.check import judge, main, result
from tests.chaos.criteria import COMMON
from tests.chaos.history import Finding, History, longest, majority_up, meet
from tests.chaos.script import (
    BEGAN,
    CHANNEL,
    FAULTS,
    HEALED,
    ROUND_S,
    SITES,
    TRACE,
    Script,
    applied_backwards,
    data_loss,
    each_life_larger,
    ended_by_itself,
    ends_differ,
    fatal,
    first_missing,
    gap,
    grows,
    holds_descriptors,
    internal_error,
    leaks_descriptors,
    leaves_files,
    leaves_mappings,
    left_badly,
    long_wait,
    lost_round,
    member_waits,
    nobody_asked,
    nobody_died,
    none_counted,
    not_done,
    nothing_committed,
    one_behind,
    rewound,
    said_twice,
    torn_root,
    torn_state,
    trace,
    twice_counted,
    two_attempts,
)
from tests.chaos.special import SPECIAL

ROOT = Path(__file__).resolve().parent.parent.parent
BROKEN: list[tuple[Callable[[History], Finding], Callable[[Script], None]]] = [
    (criteria.one_hash, torn_root),
    (criteria.one_hash, torn_state),
    (criteria.one_hash, two_attempts),
    (criteria.one_hash, nothing_committed),
    (criteria.no_gap_no_repeat, gap),
    (criteria.no_gap_no_repeat, first_missing),
    (criteria.no_gap_no_repeat, said_twice),
    (criteria.no_gap_no_repeat, applied_backwards),
    (criteria.nothing_lost, lost_round),
    (criteria.nothing_lost, one_behind),
    (criteria.nothing_lost, ends_differ),
    (criteria.nothing_lost, nobody_asked),
    (criteria.nothing_lost, data_loss),
    (criteria.nothing_lost, rewound),
    (criteria.counted_once, twice_counted),
    (criteria.counted_once, none_counted),
    (criteria.no_long_wait, long_wait),
    (criteria.no_member_waits, member_waits),
    (criteria.memory, grows),
    (criteria.memory, each_life_larger),
    (criteria.no_leaks, leaks_descriptors),
    (criteria.no_leaks, holds_descriptors),
    (criteria.no_leaks, leaves_files),
    (criteria.no_leaks, leaves_mappings),
    (criteria.no_traceback, trace),
    (criteria.no_traceback, fatal),
    (criteria.no_traceback, internal_error),
    (criteria.no_traceback, ended_by_itself),
    (criteria.no_traceback, left_badly),
    (criteria.faults_happened, not_done),
    (criteria.faults_happened, nobody_died),
]


def test_a_history_in_order_violates_nothing() -> None:
    script = Script()
    script.run["criteria"] = ["counted_once", "rate", "reborn"]
    found = judge(script.history())
    assert [one for one in found if one.ok is not True] == []
    assert result(script.history(), found)["ok"] is True


@pytest.mark.parametrize(("criterion", "breaks"), BROKEN, ids=lambda one: one.__name__)
def test_each_criterion_can_fail(
    criterion: Callable[[History], Finding], breaks: Callable[[Script], None]
) -> None:
    script = Script()
    breaks(script)
    assert criterion(script.history()).ok is False


def test_every_criterion_is_shown_to_fail() -> None:
    shown = {criterion for criterion, _ in BROKEN} | {SPECIAL[name] for name in UNLIKE}
    assert shown == {*COMMON, *SPECIAL.values()}


# --- criteria of single scenarios: a history that is fine, and one that is not --------------------


def curve(s: Script, factor: float) -> History:
    clean = s.history()
    script = Script()
    for records in script.sites.values():
        for record in records:
            if record["name"] == "evaluated":
                record["loss"] *= factor
    found = script.history()
    found.clean = clean
    return found


def with_kill(back_in_s: float) -> History:
    """The site is counted again so many seconds after its start."""
    s = Script()
    s.killed("site-3", 1200.0, 2.0)
    for record in s.conductor:
        if record["what"] == "round" and 1200.0 < record["at_s"] - 1 < 1202.0 + back_in_s:
            record["contributors"] = record["contributors"][:3]
    return s.history()


def with_freeze(back_in_s: float) -> History:
    s = Script()
    s.fault("freeze", 1200.0, 8.0, site="site-3", leader=False)
    for record in s.conductor:
        if record["what"] == "round" and 1200.0 < record["at_s"] - 1 < 1208.0 + back_in_s:
            record["contributors"] = record["contributors"][:3]
    return s.history()


def without_leader(seconds: float) -> History:
    s = Script()
    s.fault("kill", 1200.5, 3.0, site="site-0", leader=True)
    s.drop_rounds(1200.4, 1200.4 + seconds)
    return s.history()


def slower(every: int) -> History:
    s = Script()
    for round_ in range(101):
        at = BEGAN + 10 + ROUND_S * round_
        if at > FAULTS and round_ % every:
            s.silence(at - 0.5, at + 0.5)
    return s.history()


def parted(*, both: bool, healed_s: float) -> History:
    """Two against two; the second side commits nothing, unless it does."""
    s = Script()
    sides = [["site-0", "site-1"], ["site-2", "site-3"]]
    s.fault("cut", 1200.0, 20.0, sides=sides, whole=True)
    s.drop_rounds(1200.0, 1220.0 + healed_s)
    if both:
        for site, root in (("site-0", "a"), ("site-3", "b")):
            where = {"generation": 0, "channel": CHANNEL, "round": 48, "attempt": 0}
            s.log(site, "round_committed", 1210.0, root=root, **where)
    return s.history()


def dropped_link(seconds: float) -> History:
    s = Script()
    for at in range(1110, 1300, 10):
        s.log("site-0", "peer_disconnected", float(at), peer=SITES["site-1"])
        s.log("site-1", "peer_connected", at + seconds, peer=SITES["site-0"])
    return s.history()


def flipped(*, closed_s: float | None, file_seen: bool) -> History:
    s = Script()
    s.note("flip", 1200.0, site="site-1", how="flip", closed_after_s=closed_s)
    s.fault("corrupt", 1210.0, site="site-2", file="checkpoint", path="x")
    if file_seen:
        s.log("site-2", "checkpoint_refused", 1215.0, reason="hash")
    return s.history()


def full(names: tuple[str, ...]) -> History:
    s = Script()
    s.fault("disk", 1200.0, 10.0, site="site-1", mode="full")
    for number, name in enumerate(names):
        s.log("site-1", name, 1201.0 + number)
    return s.history()


def born(round_: int, digest: str) -> History:
    s = Script()
    next(r for r in s.conductor if r["what"] == "after rebirth").update(round=round_, hash=digest)
    return s.history()


def jumped(*, told: bool, left: bool) -> History:
    s = Script()
    s.fault("clock", 1200.0, site="site-1", offset_s=3600.0, drift=0.0)
    if told:
        s.log("site-1", "clock_off", 1210.0, off_s=-3600.0)
    if left:
        s.log("site-0", "member_left", 1220.0, peer=SITES["site-1"], reason="lost")
    return s.history()


def flooded(took_s: float, more_mb: int) -> History:
    s = Script()
    s.fault("flood", FAULTS, 300.0, per_s=200)
    s.note("flooded", HEALED, opened=60000)
    for record in s.conductor:
        if FAULTS <= record["at_s"] <= HEALED and record["what"] == "probe":
            record["took_s"] = took_s
        if FAULTS <= record["at_s"] <= HEALED and record["what"] == "sample":
            record["rss_bytes"] += more_mb << 20
    return s.history()


def staged(gap_s: float, *, choices: tuple[str, ...] = ("average",), batches: int = 6) -> History:
    s = Script()
    s.fault("kill stage", 1200.0, 60.0, sites=["site-1"])
    for step in range(60):
        at = 1100.0 + step if step <= 100 else 0.0
        at += gap_s if at > 1200.0 else 0.0
        s.log("site-0", "step_committed", at, step=step, attempt=0, micro_batches=batches)
    at = 1200.0 + gap_s
    s.log("site-0", "step_committed", at, step=60, attempt=0, micro_batches=batches)
    for site, choice in zip(SITES, choices, strict=False):
        s.log(site, "stage_recovered", 1210.0, stage=2, step=55, choice=choice)
    return s.history()


UNLIKE: dict[str, tuple[Callable[[], History], list[Callable[[], History]]]] = {
    "counted_once": (lambda: Script().history(), []),
    "loss": (lambda: curve(Script(), 1.01), [lambda: curve(Script(), 1.03)]),
    "restarted": (lambda: with_kill(25.0), [lambda: with_kill(40.0), lambda: with_kill(900.0)]),
    "thawed": (lambda: with_freeze(15.0), [lambda: with_freeze(30.0)]),
    "leader_back": (lambda: without_leader(10.0), [lambda: without_leader(20.0)]),
    "rate": (lambda: slower(1), [lambda: slower(2)]),
    "one_side": (
        lambda: parted(both=False, healed_s=10.0),
        [lambda: parted(both=True, healed_s=10.0), lambda: parted(both=False, healed_s=40.0)],
    ),
    "reconnected": (lambda: dropped_link(1.0), [lambda: dropped_link(7.0)]),
    "flips_detected": (
        lambda: flipped(closed_s=0.1, file_seen=True),
        [
            lambda: flipped(closed_s=None, file_seen=True),
            lambda: flipped(closed_s=0.1, file_seen=False),
        ],
    ),
    "disk_alarms": (
        lambda: full(("disk_full", "disk_freed")),
        [lambda: full(()), lambda: full(("disk_full",))],
    ),
    "reborn": (
        lambda: Script().history(),
        [lambda: born(100, "h100"), lambda: born(101, "other")],
    ),
    "no_expiry_storm": (
        lambda: jumped(told=True, left=False),
        [lambda: jumped(told=False, left=False), lambda: jumped(told=True, left=True)],
    ),
    "flood_withstood": (
        lambda: flooded(0.02, 60),
        [lambda: flooded(0.04, 60), lambda: flooded(0.02, 140), lambda: Script().history()],
    ),
    "stages_back": (
        lambda: staged(30.0),
        [lambda: staged(60.0), lambda: staged(30.0, choices=("average", "snapshot"))],
    ),
    "full_steps": (lambda: staged(30.0), [lambda: staged(30.0, batches=4)]),
}
CASES = [(name, fine, False) for name, (fine, _) in UNLIKE.items()]
CASES += [(name, bad, True) for name, (_, broken) in UNLIKE.items() for bad in broken]


@pytest.mark.parametrize(("name", "made", "fails"), CASES)
def test_a_special_criterion_tells_one_from_the_other(
    name: str, made: Callable[[], History], fails: bool
) -> None:
    found = SPECIAL[name](made())
    assert found.ok is not fails, found.said


# --- what is not judged is not a pass, and what is excused is excused ----------------------------


def test_a_wait_without_a_majority_is_excused() -> None:
    script = Script()
    script.drop_rounds(1200.0, 1290.0)
    script.killed("site-0", 1201.0, 60.0)
    script.killed("site-1", 1201.0, 60.0)
    found = criteria.no_long_wait(script.history())
    assert found.ok is True and found.figures["longest_s"] < 40.0
    assert not any(a < 1220.0 < b for a, b in majority_up(script.history()))


def test_a_freeze_and_a_cut_take_a_majority_away() -> None:
    script = Script()
    for site in ("site-0", "site-1"):
        script.fault("freeze", 1200.0, 20.0, site=site, leader=False)
    script.fault("cut", 1300.0, 20.0, whole=True, sides=[["site-0", "site-1"], list(SITES)[2:]])
    spans = majority_up(script.history())
    assert [any(a < at < b for a, b in spans) for at in (1195.0, 1210.0, 1250.0, 1310.0)] == [
        True, False, True, False,
    ]  # fmt: skip


def test_too_little_is_not_judged() -> None:
    script = Script()
    script.conductor = [r for r in script.conductor if r["what"] not in ("sample", "left over")]
    history = script.history()
    assert criteria.memory(history).ok is None and criteria.no_leaks(history).ok is None
    assert criteria.loss(history).ok is None
    assert special.restarted(history).ok is None and special.thawed(history).ok is None
    assert "not judged" in criteria.memory(history).line


def test_a_return_that_was_cut_short_is_no_return() -> None:
    script = Script()
    script.killed("site-3", 1200.0, 2.0)
    script.fault("freeze", 1203.0, 5.0, site="site-3", leader=False)
    assert special.restarted(script.history()).figures["never"] == 0


def test_what_an_interrupt_prints_is_known() -> None:
    script = Script()
    script.outputs["a"] = TRACE.replace("AssertionError: a broken invariant", "KeyboardInterrupt")
    assert criteria.no_traceback(script.history()).ok is True


def test_states_from_before_a_recovery_may_differ() -> None:
    script = Script()
    for site, digest in (("site-0", "a"), ("site-1", "b")):
        script.log(site, "state_applied", 1000.5, channel="train/2/0", round=7, state_hash=digest)
    assert criteria.one_hash(script.history()).ok is False
    script.log("site-0", "stage_recovered", 1250.0, stage=2, step=7, choice="average")
    assert criteria.one_hash(script.history()).ok is True


def test_spans_and_stretches() -> None:
    assert meet([(0.0, 10.0)], [(2.0, 4.0), (8.0, 12.0)]) == [(2.0, 4.0), (8.0, 10.0)]
    assert longest([1.0, 5.0, 9.0], [(0.0, 4.0), (6.0, 10.0)]) == (3.0, 6.0)


# --- as a program --------------------------------------------------------------------------------


def write(history: History, folder: Path) -> None:
    for name in ("sites", "output"):
        (folder / name).mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(history.run))
    lines = "".join(json.dumps(record) + "\n" for record in history.conductor)
    (folder / "conductor.jsonl").write_text(lines)
    for site, records in history.sites.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "sites" / f"{site}.jsonl").write_text(text)
    for name, text in history.outputs.items():
        (folder / "output" / name).write_text(text)


def test_the_program_reads_files_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = Script(), Script()
    torn_state(bad)
    write(good.history(), tmp_path / "good")
    write(bad.history(), tmp_path / "bad")
    assert main([str(tmp_path / "good")]) == 0
    assert "VIOLATED" not in capsys.readouterr().out
    assert main([str(tmp_path / "bad")]) == 1
    assert "VIOLATED  one hash: state" in capsys.readouterr().out
    kept = json.loads((tmp_path / "bad" / "result.json").read_text())
    assert kept["ok"] is False and kept["criteria"]["one hash"]["divergent"] == 1


def test_where_a_run_took_place_is_not_kept() -> None:
    script = Script()
    why = "cannot write /srv/st-x/site-3/runs/75aa/log: train/0/0, 4/3"
    script.note("exit", 1200.0, site="site-1", process="peer", by="itself", code=1, last=why)
    found = result(script.history(), judge(script.history()))
    said = found["criteria"]["no traceback"]["said"]
    assert said.endswith("cannot write log: train/0/0, 4/3")


def test_the_checker_knows_nothing_of_the_program() -> None:
    code = "import sys, tests.chaos.check; print([m for m in sys.modules if 'swarmtrain' in m])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
