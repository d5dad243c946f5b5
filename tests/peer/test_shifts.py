"""Hours and data caps: parsed or refused, obeyed within 5 %, across restarts. Simulated clocks."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from swarmtrain_peer.allowance import DataCap, Hours
from swarmtrain_peer.shifts import Meter, resting
from swarmtrain_protocols.errors import ConfigError


def at(day: int, hour: int = 0, minute: int = 0, month: int = 2) -> datetime:
    return datetime(2026, month, day, hour, minute, tzinfo=UTC)


NOON = at(4, 12)  # a Wednesday
MINUTE = timedelta(minutes=1)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 1.0),
        ("22:00-06:00", 8 / 24),
        ("08:00-09:30, 20:00-22:00", 3.5 / 24),
        ("0:00-12:00,10:00-18:00", 18 / 24),
    ],
)
def test_a_site_works_in_its_hours_and_only_then(text: str, share: float, tmp_path: Path) -> None:
    """A week minute by minute; whoever rests wakes when it was told to."""
    hours, meter = Hours.parse(text), Meter(tmp_path / "traffic.json", DataCap())
    minutes = worked = 0
    rest = None
    for minute in range(7 * 24 * 60):
        now = NOON + minute * MINUTE
        before, rest = rest, resting(hours, meter, now)
        if before is not None:
            assert (rest is None) == (now >= before.until), now
        minutes, worked = minutes + 1, worked + (rest is None)
    assert abs(worked / minutes - share) <= 0.05 * share


START = at(1, month=3)
DAYS = 4


class Site:
    """Rounds every two minutes, kills, polite leaving; ``moved``: bytes of each day."""

    def __init__(self, path: Path, cap: DataCap, seed: int, round_bytes: int) -> None:
        self.path, self.cap, self.round_bytes = path, cap, round_bytes
        self.luck = random.Random(seed)
        self.moved = [0] * DAYS
        self.now, self.total = START, 0
        self.kills = 0

    def move(self, meter: Meter, nbytes: int) -> None:
        self.total += nbytes
        self.moved[(self.now - START).days] += nbytes
        meter.count(self.now, self.total)

    def life(self) -> None:
        """One process, until it rests or is killed."""
        meter, self.total = Meter(self.path, self.cap), 0
        while self.now < START + timedelta(days=DAYS):
            rest = resting(Hours(), meter, self.now)
            if rest is not None:
                self.now = rest.until
                return
            self.move(meter, int(self.luck.uniform(0.8, 1.2) * self.round_bytes))
            meter.round_done()
            if meter.due():
                meter.save()
            if meter.is_spent():
                self.move(meter, int(0.002 * self.cap.nbytes))  # goodbyes
                meter.save()
            elif self.luck.random() < 0.02:
                self.kills += 1
                return  # what was not saved is forgotten
            self.now += 2 * MINUTE


@pytest.mark.parametrize("share", [1 / 40, 1 / 300])
def test_a_cap_is_obeyed_within_five_percent(tmp_path: Path, share: float) -> None:
    cap = DataCap.parse("1GB/day")
    site = Site(tmp_path / "traffic.json", cap, 1, int(share * cap.nbytes))
    while site.now < START + timedelta(days=DAYS):
        site.life()
    assert site.kills >= 3
    assert max(site.moved) <= 1.05 * cap.nbytes
    assert min(site.moved) >= 0.95 * cap.nbytes, "there is enough to do: it is used up"


def test_what_is_used_outlives_the_process_and_a_new_period_begins_at_zero(tmp_path: Path) -> None:
    path, cap = tmp_path / "traffic.json", DataCap.parse("1GB/day")
    meter = Meter(path, cap)
    meter.count(NOON, 0)
    meter.count(NOON, 700_000_000)
    assert meter.due() and not meter.is_near()
    meter.count(NOON, 850_000_000)
    assert meter.is_near() and not meter.is_near(), "told once"
    meter.save()
    again = Meter(path, cap)
    again.count(NOON, 100)
    assert again.used.nbytes == 850_000_100
    assert not again.is_near(), "told before the restart"
    again.count(NOON, 145_000_000)
    assert again.is_spent()
    again.save()
    rest = resting(Hours(), Meter(path, cap), NOON)
    assert rest is not None and rest.until == at(5)
    assert rest.sentence == "the data cap of this day is used: resting until 2026-02-05 00:00"
    assert resting(Hours.parse("22:00-06:00"), Meter(path, cap), NOON) == rest
    evening = resting(Hours.parse("22:00-23:00"), Meter(path, cap), NOON)
    assert evening is not None and evening.until == at(5, 22)
    tomorrow = Meter(path, cap)
    assert resting(Hours(), tomorrow, NOON + timedelta(days=1)) is None
    tomorrow.count(NOON + timedelta(days=1), 5)
    assert (tomorrow.used.nbytes, tomorrow.is_spent()) == (5, False)


def test_a_clock_that_is_set_back_renews_no_cap(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "traffic.json", DataCap.parse("1GB/day"))
    meter.count(NOON, 995_000_000)
    meter.count(NOON - timedelta(days=1), 995_000_001)
    assert meter.used.nbytes == 995_000_001 and meter.is_spent()


def test_rounds_larger_than_what_is_left_are_not_begun(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "traffic.json", DataCap.parse("1GB/day"))
    for number in range(1, 9):
        meter.count(NOON, number * 100_000_000)
        meter.round_done()
    assert not meter.is_spent()
    meter.count(NOON, 900_000_000)
    meter.round_done()
    assert meter.is_spent(), "the next one would end above the cap"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "traffic.json"
    for damaged in (b"{", b"[]", b'{"nbytes": "x"}', b"\xff"):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"traffic\.json") as caught:
            Meter(path, DataCap())
        assert caught.value.todo == "remove the file"
