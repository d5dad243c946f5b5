"""What the command line prints: results to stdout, everything else to stderr.

Errors are three lines: what happened, why, what to do. Progress appears only where a person looks
at a terminal. With ``--json`` the last line of stdout is one JSON object, also when it failed.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from swarmtrain_peer import host
from swarmtrain_peer.control import error_to_dict
from swarmtrain_peer.event_kinds import KINDS
from swarmtrain_peer.events import (
    FORMAT_VERSION,
    ROUND_FIELDS,
    Record,
    clean_value,
    escape_text,
)
from swarmtrain_protocols.errors import SwarmError

EXIT_DEGRADED, EXIT_STALLED, EXIT_STOPPED = 20, 21, 22
EXIT_SCRIPT = 16
EXIT_SIGINT, EXIT_SIGTERM = 130, 143


class Output:
    """One command's output."""

    def __init__(self, *, as_json: bool = False, log_format: str = "") -> None:
        self.as_json = as_json
        self.log_json = (log_format or os.environ.get(LOG_FORMAT, "")) == "json"
        self.level = "info"
        self.is_terminal = sys.stderr.isatty()
        self._told: deque[str] = deque(maxlen=ROUTINE_KEPT)

    def text(self, line: str) -> None:
        """A line of the result for people; nothing with ``--json``."""
        if not self.as_json:
            print(line, flush=True)

    def result(self, document: Mapping[str, Any], lines: Sequence[str] = ()) -> None:
        """The result: one JSON object, or ``lines`` for people."""
        if self.as_json:
            print(json.dumps(document), flush=True)
        else:
            for line in lines:
                print(line, flush=True)

    def note(self, line: str) -> None:
        """Something that a person must see wherever stderr goes."""
        if self.log_json:
            self._log(record_of("note", text=line))
            return
        print(line, file=sys.stderr, flush=True)

    def progress(self, line: str) -> None:
        """Something that is only worth a terminal."""
        if self.is_terminal and not self.log_json:
            print(line, file=sys.stderr, flush=True)

    def event(self, record: Record) -> None:
        """Tell an event: a JSON line, or a line for people if it is news to them."""
        if self.log_json:
            self._log(record if "seq" in record else record_of(**record))
        if self.as_json:
            print(json.dumps(record), flush=True)
        if self.as_json or self.log_json:
            return
        line = news_line(record)
        if record.get("name") in ROUTINE_TROUBLE:
            if line not in self._told:  # whoever has left is looked for several times
                self.progress(line)
            self._told.append(line)
        elif record.get("severity") != "info":
            self.note(line)
        elif record.get("name") in NEWS:
            self.progress(line)

    def error(self, error: SwarmError) -> None:
        """Three lines on stderr, and with ``--json`` an object on stdout."""
        if self.as_json:
            document = {"ok": False, "error": error_to_dict(error)}
            print(json.dumps(document), flush=True)
        if self.log_json:
            fields = {"what": error.what, "why": error.why, "do": error.todo}
            self._log(record_of("command_failed", **fields, exit_code=error.exit_code))
            return
        self.note(f"error: {escape_text(error.what)}")
        self.note(f"  why: {escape_text(error.why) or 'not known'}")
        todo = escape_text(error.todo) or f"see docs/exit-codes/{error.exit_code}.md"
        self.note(f"  do:  {todo}")

    def _log(self, record: Record) -> None:
        """One record on a line of stderr, if it is serious enough."""
        if LEVELS.index(record["severity"]) >= LEVELS.index(self.level):
            print(json.dumps(record), file=sys.stderr, flush=True)


LOG_FORMAT = "SWARMTRAIN_LOG__FORMAT"
LEVELS = ("debug", "info", "warning", "error")


def record_of(name: str, **fields: Any) -> Record:
    """A record, in the form of the event log, of what stands in no site's log: ``seq`` is 0."""
    kind = KINDS[name]
    now = {"wall_s": host.wall_s(), "mono_s": host.mono_s()}
    head = {"v": FORMAT_VERSION, "seq": 0, **now, "site": "", "name": name}
    where = dict.fromkeys(ROUND_FIELDS)
    own = {key: clean_value(value) for key, value in fields.items()}
    return {**head, "severity": kind.severity, "code": kind.code, **where, **own}


NEWS = (
    "peer_started",
    "member_joined",
    "member_left",
    "leader_changed",
    "model_defined",
    "trainer_attached",
    "round_committed",
    "stage_assigned",
    "step_committed",
    "evaluated",
    "state_synced",
    "checkpoint_saved",
    "corpus_progress",
    "corpus_ready",
    "leaving",
    "resting",
    "run_ended",
    "resumed",
)
ROUTINE_TROUBLE = ("link_refused", "peer_unreachable", "trainer_lost")
"""Warnings that come with every leaver; they are in the log, and on a terminal."""
ROUTINE_KEPT = 16
"""Of those, so many different ones are told once."""
_HIDDEN = ("v", "seq", "wall_s", "mono_s", "site", "name", "severity", "code", "suppressed")


def event_line(record: Record) -> str:
    """One line for people: name, round, then the event's own fields."""
    parts = [str(record.get("name", "?")).replace("_", " ")]
    if record.get("round") is not None:
        attempt = record.get("attempt")
        tail = f".{attempt}" if attempt else ""
        parts.append(f"{record.get('channel') or ''}#{record['round']}{tail}")
    for key, value in record.items():
        if key in _HIDDEN or key in ("generation", "channel", "round", "attempt"):
            continue
        if value is not None:
            parts.append(f"{key}={_short(value)}")
    mark = {"warning": "! ", "error": "!! "}.get(str(record.get("severity")), "")
    return mark + "  ".join(parts)


SENTENCES: dict[str, str] = {
    "member_joined": "{peer_name} {peer} joined",
    "member_left": "{peer} left: {reason}",
    "leader_changed": "{leader} leads the log",
    "model_defined": "the model has {values} values",
    "trainer_attached": "a trainer is at work on {device}",
    "round_committed": "round {round} committed",
    "stage_assigned": "{peer} serves {stages}",
    "stage_lost": "stage {stage} is lost before step {step}: {host} rebuilds it",
    "stage_recovered": "stage {stage} is back: {choice} was the best of {candidates}",
    "step_aborted": "step {step} was not taken: {reason}; it is closed again",
    "step_committed": "step {step} committed: {micro_batches} micro-batches, loss {loss}",
    "evaluated": "loss {loss} after round {round}",
    "checkpoint_saved": "checkpoint of round {round} saved",
    "corpus_progress": "the corpus comes from {donors} member(s): {bytes_have} of {bytes} bytes",
    "corpus_ready": "the corpus is here: {bytes} bytes in {fetch_s} s",
    "leaving": "leaving the run",
    "resting": "{reason}: this site rests until {until} and comes back by itself",
    "data_cap_near": "{used_bytes} of {cap_bytes} bytes of this {period} are used",
    "data_cap_reached": "the data cap of this {period} is used: {used_bytes} of {cap_bytes} bytes",
    "run_ended": "the run ended: {reason}",
}


def news_line(record: Record) -> str:
    """One line for people who follow a run: a sentence, where there is one for this event."""
    sentence = SENTENCES.get(str(record.get("name")))
    if sentence is None:
        return event_line(record)
    fields = {key: "nobody" if value is None else _short(value) for key, value in record.items()}
    fields |= _of_stages(record)
    mark = {"warning": "! ", "error": "!! "}.get(str(record.get("severity")), "")
    try:
        return mark + sentence.format_map(fields)
    except KeyError:
        return event_line(record)


def _of_stages(record: Record) -> dict[str, str]:
    """Lists of a pipeline's events, in words."""
    found = {}
    if "stages" in record:
        stages = [f"stage {one}" if one else "the ends" for one in record["stages"]]
        found["stages"] = ", ".join(stages) or "no stage any more"
    if "losses" in record and "candidates" in record:
        scores = zip(record["candidates"], record["losses"], strict=False)
        told = [f"{name} {loss:.3f}" for name, loss in scores]
        found["candidates"] = escape_text(", ".join(told), 200)
    return found


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        if len(value) > 3 or any(isinstance(one, (list, tuple)) for one in value):
            return f"({len(value)})"
        return ",".join(_short(one) for one in value)
    text = escape_text(str(value), 200)
    is_id = len(text) >= 32 and all(char in "0123456789abcdef" for char in text)
    return text[:8] if is_id else text


def human_bytes(nbytes: float) -> str:
    """``1.5 MB``; powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def table(header: Sequence[str], rows: Sequence[Sequence[object]], width: int = 60) -> list[str]:
    """Aligned columns of at most ``width``; escaped, so that no name can move the cursor."""
    cells = [list(header), *([escape_text(str(cell), width) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def wants_json(arguments: Sequence[str]) -> bool:
    """True if ``--json`` stands among this command's own arguments (before ``--``)."""
    own = list(arguments)
    return "--json" in (own[: own.index("--")] if "--" in own else own)


def wants_json_log(arguments: Sequence[str]) -> bool:
    """Whether the log is to be JSON, by this command's own arguments or the environment."""
    own = list(arguments)
    own = own[: own.index("--")] if "--" in own else own
    given = "--log-format=json" in own or ("--log-format", "json") in itertools.pairwise(own)
    return given or os.environ.get(LOG_FORMAT) == "json"


def color_allowed() -> bool:
    """``NO_COLOR`` (https://no-color.org) and pipes turn colour off."""
    return not os.environ.get("NO_COLOR") and sys.stdout.isatty()
