"""The one event log of a site: typed, numbered, bounded, safe to print.

``KINDS`` is the catalogue: what is not in it cannot be emitted. A record is one JSON line with the
fields of ``RECORD_FIELDS`` and then the event's own, with units in their names. Text that came
from peers has its control and direction characters escaped; secrets of tickets are cut out.
Dashboards, ``swarmtrain events``, the demo's summary and tests all read this log.

``python -m swarmtrain_peer.events`` prints ``docs/events.md``.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import unicodedata
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from swarmtrain_peer import host
from swarmtrain_peer.event_kinds import KINDS, Kind
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.messages.common import RoundKey

Record = dict[str, Any]

FORMAT_VERSION = 1
RECORD_FIELDS = {
    "v": "format of the record, 1",
    "seq": "number of the record in this site's log, from 1, without gaps",
    "wall_s": "seconds since 1970 UTC on this site's clock",
    "mono_s": "monotonic seconds, comparable within one process only",
    "site": "first 16 hex digits of the site's id",
    "name": "name of the event, from the table below",
    "severity": "info, warning or error",
    "code": "stable code of the event",
    "generation": "generation of the run, or null",
    "channel": "channel such as `train/0/0`, or null",
    "round": "round of the channel, or null",
    "attempt": "attempt of the round, or null",
}
ROUND_FIELDS = ("generation", "channel", "round", "attempt")
TEXT_CHARS_MAX = 512

_TICKET = re.compile(r"(swarm://[^\s#]*)#\S+")


def escape_text(text: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    """``text`` in a form that is safe in a terminal and a log, at most ``chars_max`` long.

    Control, direction, surrogate and private characters become ``\\xNN`` or ``\\uNNNN`` escapes;
    the secret part of a ticket becomes three dots.
    """
    text = _TICKET.sub(r"\1#...", text[: 8 * chars_max])
    out: list[str] = []
    length = 0
    for char in text:
        piece = char
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            piece = char.encode("unicode_escape").decode("ascii")
        length += len(piece)
        if length > chars_max:
            out.append("...")
            break
        out.append(piece)
    return "".join(out)


def clean_value(value: object) -> object:
    """``value`` as plain JSON: bytes as hex, text escaped, containers walked."""
    if isinstance(value, bool) or value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, str):
        return escape_text(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).hex()
    if isinstance(value, dict):
        return {escape_text(str(key), 64): clean_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean_value(item) for item in value]
    return escape_text(str(value))


@dataclass(slots=True)
class _Bucket:
    window_start_s: float
    in_window: int = 0
    suppressed: int = 0


class RateLimit:
    """At most ``PEER_FAULT_EVENTS_PER_S_MAX`` per key and second; what is held back is counted."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[tuple[str, str], _Bucket] = OrderedDict()
        self.suppressed = 0

    def allow(self, now: float, key: tuple[str, str]) -> int | None:
        """None to hold back, else how many of this key were held back since the last allowed."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(now)
            if len(self._buckets) > limits.PEER_FAULT_KEYS_MAX:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        if now - bucket.window_start_s >= 1.0:
            bucket.window_start_s, bucket.in_window = now, 0
        if bucket.in_window >= limits.PEER_FAULT_EVENTS_PER_S_MAX:
            bucket.suppressed += 1
            self.suppressed += 1
            return None
        bucket.in_window += 1
        held_back, bucket.suppressed = bucket.suppressed, 0
        return held_back


class EventLog:
    """Appends records to ``path``, keeps the newest in memory, tells subscribers. Thread-safe.

    ``site`` is the hex id of the site. Sequence numbers go on where the file ends, so a record is
    named by (site, seq) for ever. A disk that takes no more bytes stops the file, not the run:
    ``file_errors`` counts failed writes; what is still in memory is written when there is space.
    """

    def __init__(
        self,
        path: Path,
        site: str,
        *,
        file_bytes_max: int = limits.EVENT_FILE_BYTES_MAX,
        mono_s: Callable[[], float] = host.mono_s,
        wall_s: Callable[[], float] = host.wall_s,
    ) -> None:
        self._path = path
        self._site = site[:16]
        self._file_bytes_max = file_bytes_max
        self._mono_s = mono_s
        self._wall_s = wall_s
        self._lock = threading.RLock()
        # As lines: a record as a dictionary takes three times the memory.
        self._ring: deque[tuple[int, str, bytes]] = deque(maxlen=limits.EVENT_RING_MAX)
        self._subscribers: list[Callable[[Record], None]] = []
        self._limit = RateLimit()
        self.file_errors = 0
        self._unwritten = 0
        damaged: list[Path] = []
        for record in deque(read_events(path, damaged.append), limits.EVENT_RING_MAX):
            self._keep(record, msgspec.json.encode(record) + b"\n")
        self._seq = self._ring[-1][0] if self._ring else 0
        _drop_torn_line(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed by close()
        self._nbytes = self._file.tell()
        if damaged:
            self.emit("fallback", what=f"event log {damaged[0].name}", why="lines are damaged")

    @property
    def last_seq(self) -> int:
        return self._seq

    @property
    def suppressed(self) -> int:
        """Events held back by the rate limit since the start."""
        return self._limit.suppressed

    def emit(self, name: str, key: RoundKey | None = None, /, **fields: object) -> Record | None:
        """Log one event; ``key`` or fields of the same names say which round it is about.

        Returns the record, or None if the rate limit held it back.

        Raises:
            LocalProtocolError: the name is not in the catalogue, or a required field is missing.
        """
        kind = KINDS.get(name)
        if kind is None:
            raise LocalProtocolError("unknown event", name, "add it to event_kinds.KINDS")
        missing = [field for field in kind.required if field not in fields]
        if missing:
            raise LocalProtocolError(f"event {name} lacks a field", ", ".join(missing))
        with self._lock:
            held_back = 0
            if kind.limited:
                who = clean_value(fields.get("peer") or fields.get("address") or "")
                allowed = self._limit.allow(self._mono_s(), (name, str(who)))
                if allowed is None:
                    return None
                held_back = allowed
            record = self._record(kind, key, fields)
            if held_back:
                record["suppressed"] = held_back
            self._append(record)
            subscribers = list(self._subscribers)
        for subscriber in subscribers:
            subscriber(record)
        return record

    def subscribe(self, callback: Callable[[Record], None]) -> Callable[[], None]:
        """Call ``callback`` with every record from now on, on the emitting thread.

        Returns a function that ends it.
        """
        with self._lock:
            self._subscribers.append(callback)

        def unsubscribe() -> None:
            with self._lock:
                if callback in self._subscribers:
                    self._subscribers.remove(callback)

        return unsubscribe

    def query(
        self, *, since_seq: int = 0, last: int | None = None, name: str | None = None
    ) -> list[Record]:
        """Records in memory with ``seq > since_seq``, oldest first, at most the ``last`` newest."""
        with self._lock:
            found = [
                line
                for seq, kind, line in self._ring
                if seq > since_seq and (name is None or kind == name)
            ]
        if last is not None:
            found = found[len(found) - min(last, len(found)) :]
        return [msgspec.json.decode(line, type=Record) for line in found]

    def close(self) -> None:
        """Close the file. Safe to call twice; a later ``emit`` goes to memory only."""
        with self._lock:
            self._file.close()

    def _record(self, kind: Kind, key: RoundKey | None, fields: dict[str, object]) -> Record:
        record: Record = {
            "v": FORMAT_VERSION,
            "seq": self._seq + 1,
            "wall_s": round(self._wall_s(), 6),
            "mono_s": round(self._mono_s(), 6),
            "site": self._site,
            "name": kind.name,
            "severity": kind.severity,
            "code": kind.code,
        }
        for field in ROUND_FIELDS:
            value = fields.get(field) if key is None else getattr(key, field)
            record[field] = clean_value(value)
        for field, value in fields.items():
            if field in ROUND_FIELDS:
                continue
            if field in record:
                raise LocalProtocolError(f"event {kind.name} overwrites a field", field)
            record[field] = clean_value(value)
        return record

    def _keep(self, record: Record, line: bytes) -> None:
        self._ring.append((int(record["seq"]), sys.intern(str(record.get("name"))), line))

    def _append(self, record: Record) -> None:
        line = msgspec.json.encode(record) + b"\n"
        if len(line) > limits.EVENT_RECORD_BYTES_MAX:
            raise LocalProtocolError(f"event {record['name']} is too long", f"{len(line)} bytes")
        self._seq = record["seq"]
        self._keep(record, line)
        if self._file.closed:
            self.file_errors += 1
            return
        if self._unwritten:
            line = b"".join(self._lines_of(self._unwritten)) + line
        try:
            if self._nbytes + len(line) > self._file_bytes_max:
                self._rotate()
            self._write(line)
        except OSError:
            self._unwritten += 1
            self.file_errors += 1
        else:
            self._unwritten = 0

    def _lines_of(self, count: int) -> Iterator[bytes]:
        """The records before the newest that found no space, as far as they are in memory."""
        for _, _, line in list(self._ring)[-count - 1 : -1]:
            yield line

    def _write(self, line: bytes) -> None:
        """All of ``line`` or nothing: half a record must not stand before the next."""
        try:
            done = self._file.write(line)
            if done != len(line):
                raise OSError(errno.ENOSPC, f"{done} of {len(line)} bytes")
        except OSError:
            os.ftruncate(self._file.fileno(), self._nbytes)
            raise
        self._nbytes += len(line)

    def _rotate(self) -> None:
        self._file.close()
        for number in range(limits.EVENT_FILES_KEPT - 1, 0, -1):
            older = _rotated(self._path, number)
            newer = self._path if number == 1 else _rotated(self._path, number - 1)
            if newer.exists():
                os.replace(newer, older)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115, closed by close()
        self._nbytes = self._file.tell()


def _rotated(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _drop_torn_line(path: Path) -> None:
    """Cut an unfinished last line, which a crash in mid-write leaves behind."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def read_events(
    path: Path, on_damage: Callable[[Path], None] = lambda file: None
) -> Iterator[Record]:
    """All records of a log, rotated files first, oldest first.

    A torn last line is left out; any other line that is no record is too, and ``on_damage`` is
    told in which file it stands.
    """
    older = [_rotated(path, number) for number in range(limits.EVENT_FILES_KEPT, 0, -1)]
    for file in (*older, path):
        if not file.exists():
            continue
        with open(file, "rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    continue
                try:
                    record = msgspec.json.decode(line, type=Record)
                    int(record["seq"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    on_damage(file)
                else:
                    yield record


def events_markdown() -> str:
    """The text of ``docs/events.md``."""
    lines = [
        "# Events",
        "",
        "Every site writes `events.jsonl`: one JSON object per line. This page is printed from the",
        "catalogue by `python -m swarmtrain_peer.events`; a test compares them.",
        "",
        "Every record has these fields:",
        "",
        "| field | meaning |",
        "|---|---|",
        *(f"| `{name}` | {meaning} |" for name, meaning in RECORD_FIELDS.items()),
        "",
        "and then those of its kind. Fields with a question mark may be absent. Kinds marked",
        f"*limited* are written at most {limits.PEER_FAULT_EVENTS_PER_S_MAX} times per second and",
        "peer; the next one that is written says in `suppressed` how many were not.",
        "",
        "| name | severity | code | meaning | fields |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS.values():
        mark = " *limited*" if kind.limited else ""
        fields = ", ".join(f"`{field}`" for field in kind.fields)
        lines.append(
            f"| `{kind.name}` | {kind.severity} | {kind.code} | {kind.meaning}{mark} | {fields} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(events_markdown())
