"""The histories of a chaos run, read back: who was there when, and what became of the rounds.

Nothing of the program that was run is imported here. What is read:

``run.json``            what was run: sites with their ids, moments, bars, the calibrated factor
``conductor.jsonl``     what was done to the processes, and what was seen of them from outside
``sites/NAME.jsonl``    the event log of each site, as it wrote it
``output/*``            what the processes printed
``clean/``              the same of the undisturbed run, if there was one

All moments are monotonic seconds of one machine.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Key = tuple[int, str, int]
"""Generation, channel, round; steps of a pipeline have the channel ``steps``."""
Span = tuple[float, float]

COMMITS = {"round_committed": "round", "step_committed": "step"}


@dataclass(frozen=True)
class Finding:
    """What a criterion says. ``ok`` is None if it could not be judged."""

    name: str
    ok: bool | None
    said: str
    figures: Record = field(default_factory=dict)

    @property
    def line(self) -> str:
        verdict = {True: "ok", False: "VIOLATED", None: "not judged"}[self.ok]
        return f"{verdict:>10}  {self.name}: {self.said}"


@dataclass
class History:
    """Everything that was written down."""

    run: Record
    conductor: list[Record]
    sites: dict[str, list[Record]]
    outputs: dict[str, str] = field(default_factory=dict)
    clean: History | None = None

    @classmethod
    def read(cls, folder: Path) -> History:
        """Raises: FileNotFoundError, ValueError: it is none."""
        sites = {p.stem: list(_lines(p)) for p in sorted((folder / "sites").glob("*.jsonl"))}
        outputs = {
            p.name: p.read_text("utf-8", "replace") for p in sorted((folder / "output").glob("*"))
        }
        clean = folder / "clean"
        return cls(
            json.loads((folder / "run.json").read_text()),
            list(_lines(folder / "conductor.jsonl")),
            sites,
            outputs,
            cls.read(clean) if (clean / "run.json").exists() else None,
        )

    # Small views

    @property
    def factor(self) -> float:
        return float(self.run["factor"])

    def bar(self, name: str, default: float) -> float:
        return float(self.run.get("bars", {}).get(name, default))

    def told(self, what: str) -> list[Record]:
        """Records of the conductor of one kind."""
        return [record for record in self.conductor if record["what"] == what]

    def events(self, name: str) -> Iterator[tuple[str, Record]]:
        """(site, record) of one kind of event, everywhere."""
        for site, records in self.sites.items():
            for record in records:
                if record["name"] == name:
                    yield site, record

    def name_of(self, peer: str) -> str:
        return next((n for n, i in self.run["sites"].items() if i == peer), peer[:8])

    def commits(self) -> dict[Key, float]:
        """When each round was first known to be committed, by anybody."""
        found: dict[Key, float] = {}
        for name, number in COMMITS.items():
            for _, record in self.events(name):
                key = _key(record, number)
                found[key] = min(found.get(key, record["mono_s"]), record["mono_s"])
        return found

    def counted(self) -> dict[Key, Record]:
        """Committed rounds as a site listed them: contributors with their samples."""
        found: dict[Key, Record] = {}
        for record in self.told("round"):
            found[record["generation"], record["channel"], record["round"]] = record
        return found

    @property
    def trouble(self) -> Span:
        """From the first fault to the moment at which everything was healed."""
        return float(self.run["faults_from_s"]), float(self.run["faults_until_s"])


def _lines(path: Path) -> Iterator[Record]:
    for line in path.read_text("utf-8", "replace").splitlines():
        if line.strip():
            yield json.loads(line)


def _key(record: Record, number: str = "round") -> Key:
    channel = "steps" if number == "step" else record["channel"]
    return record["generation"] or 0, channel, record[number]


def p95(values: Sequence[float]) -> float:
    """The 95th percentile: the value below which at least 95 of 100 lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def longest(moments: Sequence[float], spans: Sequence[Span]) -> tuple[float, float]:
    """(seconds, begin) of the longest stretch within one span without any of the moments."""
    worst = (0.0, 0.0)
    ordered = sorted(moments)
    for begin, end in spans:
        last = begin
        for at in (*(m for m in ordered if begin < m < end), end):
            worst = max(worst, (at - last, last))
            last = at
    return worst


def meet(one: Sequence[Span], other: Sequence[Span]) -> list[Span]:
    """Where both are."""
    found = [(max(a, c), min(b, d)) for a, b in one for c, d in other]
    return sorted((a, b) for a, b in found if a < b)


def spread(values: Sequence[float]) -> Record:
    """Median, 95th percentile, maximum, count; nothing of nothing."""
    if not values:
        return {"n": 0}
    known = {"median": statistics.median(values), "p95": p95(values), "max": max(values)}
    return {"n": len(values), **{name: round(value, 2) for name, value in known.items()}}


# --- who was there -------------------------------------------------------------------------------


def lives(h: History, process: str = "peer") -> dict[str, list[Record]]:
    """By site the lives of its processes: ``begin``, ``end``, ``pid``, ``by`` (who ended it)."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in h.conductor:
        if record["what"] == "start" and record["process"] == process:
            life = {"begin": record["at_s"], "end": float(h.run["ended_s"]), "pid": record["pid"]}
            found[record["site"]].append(life | {"by": "", "code": None})
        elif record["what"] == "exit" and record["process"] == process and found[record["site"]]:
            end = {"end": record["at_s"], "by": record["by"], "code": record["code"]}
            found[record["site"]][-1] |= end
    return found


def there(h: History) -> dict[str, list[Span]]:
    """By site when its peer process ran and was not frozen."""
    found: dict[str, list[Span]] = {}
    for site, of_site in lives(h).items():
        spans = [(life["begin"], life["end"]) for life in of_site]
        for freeze in h.told("fault"):
            if freeze["kind"] == "freeze" and freeze["site"] == site:
                out = freeze["at_s"], freeze["until_s"]
                spans = meet(spans, [(0.0, out[0]), (out[1], float(h.run["ended_s"]) + 1.0)])
        found[site] = spans
    return found


def _apart(h: History, at: float) -> list[list[str]] | None:
    """The sides of the cut that is in force at a moment."""
    for cut in h.told("fault"):
        if cut["kind"] == "cut" and cut["at_s"] <= at < cut["until_s"]:
            sides: list[list[str]] = cut["sides"]
            return sides
    return None


def majority_up(h: History) -> list[Span]:
    """When more than half of those who vote, and of all members, ran and could reach each other."""
    present = there(h)
    votes: list[tuple[float, list[str]]] = []
    for _, record in h.events("stewards_changed"):
        votes.append((record["mono_s"], [h.name_of(v) for v in record["voters"]]))
    votes.sort()
    edges = {edge for spans in present.values() for span in spans for edge in span}
    edges |= {at for at, _ in votes} | {h.run["began_s"], h.run["ended_s"]}
    for fault in h.told("fault"):
        edges |= {fault["at_s"], fault.get("until_s", fault["at_s"])}
    ordered = sorted(e for e in edges if h.run["began_s"] <= e <= h.run["ended_s"])
    found: list[Span] = []
    gone = _left(h)
    for begin, end in itertools.pairwise(ordered):
        up = [s for s, spans in present.items() if any(a <= begin < b for a, b in spans)]
        members = [s for s in present if gone.get(s, end) >= end and present[s][0][0] <= begin]
        voters = next((v for at, v in reversed(votes) if at <= begin), None)
        sides = _apart(h, begin) or [list(present)]
        if any(_majority(set(up) & set(side), members, voters) for side in sides):
            if found and found[-1][1] == begin:
                begin = found.pop()[0]
            found.append((begin, end))
    return found


def _left(h: History) -> dict[str, float]:
    """When sites left for good."""
    return {record["site"]: record["at_s"] for record in h.told("left")}


def _majority(up: set[str], members: list[str], voters: list[str] | None) -> bool:
    wanted = [members] if voters is None else [members, voters]
    return all(2 * len(up.intersection(group)) > len(group) for group in wanted)
