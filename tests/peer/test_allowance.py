"""Hours and data caps: parsed, or refused with what to write."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from swarmtrain_peer.allowance import DataCap, Hours
from swarmtrain_protocols.errors import ConfigError

GB = 10**9


def at(day: int, hour: int = 0, minute: int = 0, month: int = 2) -> datetime:
    return datetime(2026, month, day, hour, minute, tzinfo=UTC)


NOON = at(4, 12)  # a Wednesday


@pytest.mark.parametrize(
    "text", ["22-06", "22:00", "24:00-06:00", "22:60-06:00", "06:00-06:00", "a:b-c:d", "1:00-2:00,"]
)
def test_hours_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not windows of a day") as caught:
        Hours.parse(text)
    assert "22:00-06:00" in caught.value.todo


def test_the_next_opening_is_told() -> None:
    hours = Hours.parse("22:00-06:00")
    assert hours.opens_at(NOON) == at(4, 22)
    assert hours.opens_at(at(4, 23, 30)) == at(4, 23, 30)
    assert Hours.parse("01:00-02:00").opens_at(NOON) == at(5, 1)


@pytest.mark.parametrize(
    ("text", "nbytes", "begins", "ends"),
    [
        ("50GB/month", 50 * GB, (2026, 2, 1), (2026, 3, 1)),
        ("2.5 GB/day", 2_500_000_000, (2026, 2, 4), (2026, 2, 5)),
        ("500MiB/week", 500 * 2**20, (2026, 2, 2), (2026, 2, 9)),
    ],
)
def test_a_cap_is_bytes_in_a_period(
    text: str, nbytes: int, begins: tuple[int, int, int], ends: tuple[int, int, int]
) -> None:
    cap = DataCap.parse(text)
    assert cap.nbytes == nbytes
    assert cap.begins(NOON) == datetime(*begins, tzinfo=UTC)
    assert cap.ends(NOON) == datetime(*ends, tzinfo=UTC)
    assert cap.ends(at(31, month=12)) > at(31, month=12)
    assert DataCap.parse("") == DataCap()


@pytest.mark.parametrize("text", ["50GB", "50/day", "0GB/day", "-1GB/day", "50Gbit/day", "x"])
def test_caps_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size per day") as caught:
        DataCap.parse(text)
    assert "50GB/month" in caught.value.todo
