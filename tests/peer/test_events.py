"""The event log: what a record holds, what is refused, what is bounded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from swarmtrain_peer.event_kinds import KINDS
from swarmtrain_peer.events import (
    RECORD_FIELDS,
    EventLog,
    escape_text,
    events_markdown,
    read_events,
)
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.messages.common import RoundKey

SITE = "ab" * 32
ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Time that only tests move."""

    def __init__(self) -> None:
        self.now = 10.0

    def mono_s(self) -> float:
        return self.now

    def wall_s(self) -> float:
        return 1_700_000_000.0 + self.now


def make(path: Path, clock: Clock | None = None, **keys: int) -> EventLog:
    clock = clock or Clock()
    return EventLog(path, SITE, mono_s=clock.mono_s, wall_s=clock.wall_s, **keys)


def test_a_record_has_the_common_fields_first_and_its_own_after(tmp_path: Path) -> None:
    log = make(tmp_path / "events.jsonl")
    key = RoundKey(0, "train/0/0", 7, 1)
    log.emit("round_aborted", key, reason="owner lost")
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert list(record) == [*RECORD_FIELDS, "reason"]
    assert record == {
        "v": 1,
        "seq": 1,
        "wall_s": 1_700_000_010.0,
        "mono_s": 10.0,
        "site": "ab" * 8,
        "name": "round_aborted",
        "severity": "warning",
        "code": "R321",
        "generation": 0,
        "channel": "train/0/0",
        "round": 7,
        "attempt": 1,
        "reason": "owner lost",
    }


def test_what_is_not_in_the_catalogue_is_refused(tmp_path: Path) -> None:
    log = make(tmp_path / "events.jsonl")
    with pytest.raises(LocalProtocolError, match="unknown event"):
        log.emit("something_else")
    with pytest.raises(LocalProtocolError, match="reason"):
        log.emit("round_aborted")
    with pytest.raises(LocalProtocolError, match="overwrites"):
        log.emit("run_ended", reason="done", site="me")
    assert log.last_seq == 0


def test_codes_are_unique_and_grouped() -> None:
    codes = [kind.code for kind in KINDS.values()]
    assert len(set(codes)) == len(codes)
    assert all(len(code) == 4 and code[0].isupper() and code[1:].isdigit() for code in codes)
    for kind in KINDS.values():
        required = len(kind.required)
        assert all(not name.endswith("?") for name in kind.fields[:required]), kind.name
        assert not {name.rstrip("?") for name in kind.fields} & set(RECORD_FIELDS), kind.name


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain é 漢", "plain é 漢"),
        ("a\x1b[31mred\n", "a\\x1b[31mred\\n"),
        ("evil\u202egnp.exe", "evil\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
        ("x" * 600, "x" * 512 + "..."),
        ("go swarm://h:1,g:2/RUN#SECRET now", "go swarm://h:1,g:2/RUN#... now"),
    ],
)
def test_peer_text_is_escaped_and_secrets_are_cut(tmp_path: Path, text: str, safe: str) -> None:
    assert escape_text(text) == safe
    log = make(tmp_path / "events.jsonl")
    record = log.emit("member_left", peer=b"\x01\xff", reason=text)
    assert record is not None
    assert (record["peer"], record["reason"]) == ("01ff", safe)
    assert "SECRET" not in (tmp_path / "events.jsonl").read_text()


def test_peer_faults_are_counted_beyond_a_rate(tmp_path: Path) -> None:
    clock = Clock()
    log = make(tmp_path / "events.jsonl", clock)
    written = [log.emit("peer_fault", peer=b"\1" * 32, fault="malformed") for _ in range(100)]
    assert [record is not None for record in written] == [True] * 5 + [False] * 95
    assert log.emit("peer_fault", peer=b"\2" * 32, fault="malformed") is not None
    assert log.suppressed == 95
    clock.now += 1.0
    record = log.emit("peer_fault", peer=b"\1" * 32, fault="malformed")
    assert record is not None
    assert record["suppressed"] == 95
    assert record["seq"] == 7
    # Events that no peer can cause at will are never held back.
    assert all(log.emit("evaluated", loss=1.0) for _ in range(100))


def test_the_table_of_limited_peers_is_bounded(tmp_path: Path) -> None:
    log = make(tmp_path / "events.jsonl")
    for number in range(limits.PEER_FAULT_KEYS_MAX + 50):
        log.emit("peer_fault", peer=number.to_bytes(32, "big"), fault="x")
    assert len(log._limit._buckets) == limits.PEER_FAULT_KEYS_MAX


def test_sequence_and_memory_go_on_after_a_restart_with_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = make(path)
    for number in range(3):
        log.emit("run_ended", reason=str(number))
    log.close()
    with open(path, "ab") as file:
        file.write(b'{"v":1,"seq":4,"na')
    log = make(path)
    assert [record["reason"] for record in log.query()] == ["0", "1", "2"]
    log.emit("run_ended", reason="3")
    assert [record["seq"] for record in read_events(path)] == [1, 2, 3, 4]
    assert [record["reason"] for record in log.query(since_seq=2)] == ["2", "3"]
    assert [record["reason"] for record in log.query(last=1)] == ["3"]
    assert log.query(last=0) == []
    assert log.query(name="paused") == []


def test_damaged_lines_are_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = make(path)
    for number in range(3):
        log.emit("run_ended", reason=str(number))
    log.close()
    data = bytearray(path.read_bytes())
    data[data.index(b'"seq":2') + 3] = 0xFF
    path.write_bytes(data)
    log = make(path)
    assert [(record["seq"], record["name"]) for record in log.query()] == [
        (1, "run_ended"),
        (3, "run_ended"),
        (4, "fallback"),
    ]


def test_files_rotate_at_a_bound_and_reading_spans_them(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = make(path, file_bytes_max=1000)
    for number in range(40):
        log.emit("run_ended", reason=str(number))
    files = sorted(tmp_path.iterdir())
    assert len(files) == limits.EVENT_FILES_KEPT
    assert all(file.stat().st_size <= 1000 for file in files)
    numbers = [record["seq"] for record in read_events(path)]
    assert numbers == list(range(numbers[0], 41))
    assert len(numbers) > 8


def test_subscribers_hear_each_record_until_they_stop(tmp_path: Path) -> None:
    log = make(tmp_path / "events.jsonl")
    heard: list[int] = []
    stop = log.subscribe(lambda record: heard.append(record["seq"]))
    log.emit("run_ended", reason="a")
    log.emit("run_ended", reason="b")
    stop()
    log.emit("run_ended", reason="c")
    assert heard == [1, 2]


def test_a_file_that_takes_no_bytes_stops_the_file_not_the_run(tmp_path: Path) -> None:
    log = make(tmp_path / "events.jsonl")
    os.close(log._file.fileno())
    heard: list[str] = []
    log.subscribe(lambda record: heard.append(record["name"]))
    log.emit("run_ended", reason="full")
    assert heard == ["run_ended"]
    assert log.file_errors == 1
    assert [record["reason"] for record in log.query()] == ["full"]
    log._file = (tmp_path / "other").open("ab", buffering=0)  # the old descriptor is gone


def test_a_record_over_the_bound_is_a_local_error(tmp_path: Path) -> None:
    log = make(tmp_path / "events.jsonl")
    with pytest.raises(LocalProtocolError, match="too long"):
        log.emit("stewards_changed", voters=["x" * 500] * 40)
    assert log.last_seq == 0


def test_the_page_about_events_is_current() -> None:
    page = ROOT / "docs" / "events.md"
    assert page.read_text() == events_markdown(), (
        "run: python -m swarmtrain_peer.events > docs/events.md"
    )


class _FullDisk:
    """A file on a disk that takes ``free_bytes`` more."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, the log closes it
        self.free_bytes = 10
        self.closed = False

    def write(self, data: bytes) -> int:
        if not self.free_bytes:
            raise OSError(28, "No space left on device")
        done = self._file.write(data[: self.free_bytes])
        self.free_bytes -= done
        return done

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self.closed = True
        self._file.close()


def test_a_full_disk_tears_no_line_and_what_it_missed_is_written_later(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = make(path)
    log.emit("fallback", what="first", why="")
    disk = _FullDisk(path)
    log._file.close()
    log._file = disk  # type: ignore[assignment]
    for number in range(3):
        log.emit("fallback", what=f"full {number}", why="")
    assert [record["what"] for record in read_events(path)] == ["first"]
    assert path.read_bytes().endswith(b"\n"), "the ten bytes that there was room for are gone again"
    assert log.file_errors == 3
    disk.free_bytes = 1 << 20
    log.emit("fallback", what="after", why="")
    log.close()
    found = list(read_events(path))
    assert [record["what"] for record in found] == ["first", "full 0", "full 1", "full 2", "after"]
    assert [record["seq"] for record in found] == [1, 2, 3, 4, 5]
