"""The demo's summary, from logs written by hand."""

from __future__ import annotations

from typing import Any

from blake3 import blake3

from swarmtrain.cli.summary import summarize, summary_lines

CHANNEL = "train/0/0"


def event(name: str, round: int | None = None, **fields: Any) -> dict[str, Any]:
    base = {"name": name, "generation": 0, "channel": None, "round": round, "attempt": None}
    return base | ({"channel": CHANNEL, "attempt": 0} if round is not None else {}) | fields


def applied(round: int, state: str, channel: str = CHANNEL) -> dict[str, Any]:
    return event("state_applied", round, state_hash=state * 32, channel=channel)


def member(last: str = "bb", *, killed: bool = False) -> list[dict[str, Any]]:
    log = [event("peer_started"), event("round_committed", 0), applied(0, "aa")]
    log.append(event("round_figures", 0, bytes_sent=100, compute_utilization=0.5))
    if killed:
        log.append(event("peer_started"))
        log.append(event("round_figures", 1, bytes_sent=30))
    log += [event("round_aborted", 1, reason="x"), event("round_aborted", 1, attempt=1, reason="y")]
    log += [event("round_committed", 1, attempt=2), applied(1, last)]
    log.append(event("run_ended", reason="max_rounds"))
    log.append(event("peer_stopped", bytes_sent=200, bytes_received=5, compute_utilization=0.9))
    return log


def test_a_good_run() -> None:
    logs = [member(), member(killed=True), member()]
    logs[0] += [event("evaluated", 1, loss=2.25), event("evaluated", 0, loss=5.5)]
    summary = summarize(logs, finished=True, dashboard_url="http://x/")
    assert summary == {
        "ok": True,
        "peers": 3,
        "rounds_committed": 2,
        "rounds_aborted": 2,
        "loss_first": 5.5,
        "loss_last": 2.25,
        "state_hashes_equal": True,
        "state_hash": "bb" * 32,
        "bytes_sent": 200 + (100 + 200) + 200,
        "compute_utilization": 0.9,
        "dashboard_url": "http://x/",
    }
    lines = summary_lines(summary, 12.3)
    assert lines[0] == "3 peers, 2 rounds committed, 2 aborted, 12 s"
    assert lines[1] == "loss 5.500 -> 2.250 nats per byte"


def test_one_different_state_is_not_ok() -> None:
    logs = [member(), member("cc")]
    logs[0].append(event("evaluated", 1, loss=2.0))
    summary = summarize(logs, finished=True, dashboard_url=None)
    assert summary["state_hashes_equal"] is False
    assert summary["state_hash"] is None
    assert summary["ok"] is False
    assert "states NOT equal" in summary_lines(summary, 1.0)


def test_a_member_that_differed_on_the_way_is_seen_even_if_it_ended_equal() -> None:
    odd = member()
    odd[2] = applied(0, "dd")
    assert not summarize([member(), odd], finished=True, dashboard_url=None)["state_hashes_equal"]


def test_a_member_that_stayed_behind_is_not_equal() -> None:
    behind = [one for one in member() if not (one["name"] == "state_applied" and one["round"])]
    summary = summarize([member(), behind], finished=True, dashboard_url=None)
    assert not summary["state_hashes_equal"]


def test_nothing_is_ok_without_rounds_a_loss_or_a_clean_end() -> None:
    good = [*member(), event("evaluated", 1, loss=2.0)]
    assert summarize([good], finished=True, dashboard_url=None)["ok"]
    assert not summarize([good], finished=False, dashboard_url=None)["ok"]
    assert not summarize([member()], finished=True, dashboard_url=None)["ok"]
    assert not summarize([[]], finished=True, dashboard_url=None)["ok"]
    nan = [*member(), event("evaluated", 1, loss=float("nan"))]
    assert not summarize([nan], finished=True, dashboard_url=None)["ok"]


def test_several_channels_have_one_hash_together() -> None:
    log = [*member(), applied(0, "01", "train/0/1"), event("evaluated", 1, loss=2.0)]
    summary = summarize([log, log], finished=True, dashboard_url=None)
    expected = blake3(bytes.fromhex("bb" * 32) + bytes.fromhex("01" * 32)).hexdigest()
    assert summary["state_hash"] == expected


def test_stages_with_rounds_of_their_own_end_in_the_same_one() -> None:
    """Nobody holds all of them; a stage that stayed behind everywhere is not equal."""
    assigned = event("stage_assigned", stages=[0])
    loss = event("evaluated", 1, loss=2.0)
    other = [assigned, event("round_committed", 0, channel="train/1/0")]
    other += [applied(0, "01", "train/1/0")]
    behind = summarize([[*member(), assigned, loss], other], finished=True, dashboard_url=None)
    assert behind["state_hashes_equal"] is False and behind["rounds_committed"] == 3
    other += [applied(1, "02", "train/1/0")]
    summary = summarize([[*member(), assigned, loss], other], finished=True, dashboard_url=None)
    expected = blake3(bytes.fromhex("bb" * 32) + bytes.fromhex("02" * 32)).hexdigest()
    assert summary["ok"] is True and summary["state_hash"] == expected
