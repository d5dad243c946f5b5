"""Judges the histories of a chaos run; reads nothing else, and none of the program's own code.

``python -m tests.chaos.check FOLDER`` prints one line for each criterion and writes ``result.json``
beside the histories; the exit code is 1 if one is violated. A criterion for which there is too
little to go by is *not judged*, and says so; that is not a pass.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.criteria import COMMON
from tests.chaos.history import Finding, History, Record
from tests.chaos.special import SPECIAL

FOLDERS = re.compile(r"(?<![\w./])/(?:[^\s/'\":;|]+/)+")
"""Where a run took place is nobody's affair: of paths the last part is kept."""


def judge(h: History) -> list[Finding]:
    """All criteria that the run names."""
    special = [SPECIAL[name] for name in h.run.get("criteria", ())]
    return [criterion(h) for criterion in (*COMMON, *special)]


def result(h: History, findings: Sequence[Finding]) -> Record:
    """What is kept of a run."""
    kept = ("scenario", "minutes", "played_minutes", "interrupted", "seed", "factor", "machine")
    kept += ("load", "peers", "trainers", "ground")
    commits = sorted(h.commits().values())
    return {
        **{name: h.run[name] for name in kept if name in h.run},
        "ok": all(one.ok is not False for one in findings),
        "faults": dict(sorted(_tally(h).items())),
        "rounds": len(commits),
        "criteria": {
            one.name: {"ok": one.ok, "said": FOLDERS.sub("", one.said), **one.figures}
            for one in findings
        },
    }


def _tally(h: History) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for record in h.told("fault"):
        found[record["kind"]] += 1
    return found


def main(arguments: list[str] | None = None) -> int:
    """Judge a folder; 1 if something is violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.check", description=__doc__)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    history = History.read(given.folder)
    findings = judge(history)
    found = result(history, findings)
    (given.folder / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write("".join(one.line + "\n" for one in findings))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
