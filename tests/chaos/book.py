"""Writes the histories of a run: what the conductor did and saw, and what every site logged."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from swarmtrain_peer.site import Site

Document = dict[str, Any]


class Tail:
    """Copies complete lines of a site's event log as they come, through rotations."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source = source
        self._file = open(target, "ab")  # noqa: SIM115, closed by close()
        self._inode = 0
        self._at = 0
        self.records: list[Document] = []
        """What came since somebody last took it."""

    def read(self) -> None:
        """Take up what is new."""
        try:
            inode = self._source.stat().st_ino
        except FileNotFoundError:
            return
        if self._inode and inode != self._inode:
            rotated = self._source.with_name(self._source.name + ".1")
            with contextlib.suppress(FileNotFoundError):
                self._take(rotated)
            self._at = 0
        self._inode = inode
        self._take(self._source)

    def _take(self, path: Path) -> None:
        with open(path, "rb") as file:
            file.seek(self._at)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._at += end
        self._file.write(data[:end])
        for line in data[:end].splitlines():
            with contextlib.suppress(ValueError):
                self.records.append(json.loads(line))

    def take(self) -> list[Document]:
        found, self.records = self.records, []
        return found

    def close(self) -> None:
        self.read()
        self._file.close()


class Book:
    """The folder of a run. ``write`` may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("sites", "output"):
            (folder / name).mkdir(parents=True)
        self._file = open(folder / "conductor.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._lock = threading.Lock()
        self._known: set[tuple[str, int]] = set()
        self.samples = 0.0
        """In committed rounds, as far as was asked."""
        self.rounds = 0

    def write(self, what: str, at_s: float | None = None, **fields: Any) -> None:
        """One line; ``at_s`` is now unless given."""
        record = {"at_s": round(time.monotonic() if at_s is None else at_s, 4), "what": what}
        with self._lock:
            if not self._file.closed:
                self._file.write(json.dumps({**record, **fields}) + "\n")

    def tail(self, name: str, site: Site) -> Tail:
        return Tail(site.events_path, self.folder / "sites" / f"{name}.jsonl")

    def listed(self, rounds: list[Document]) -> None:
        """Committed rounds with their contributors, each once."""
        for item in rounds:
            key = item["channel"], item["round"]
            if item["outcome"] == "committed" and key not in self._known:
                self._known.add(key)
                fields = {name: item[name] for name in ("channel", "round", "contributors")}
                self.write("round", generation=0, **fields)
                self.rounds += 1
                self.samples += sum(one["samples"] for one in item["contributors"])

    def keep_output(self, name: str, site: Site) -> None:
        """What the processes of a site have printed."""
        for file in ("peer.log", "trainer.log"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(site.folder / file, self.folder / "output" / f"{name}.{file}")

    def close(self, run: Document) -> None:
        """With it the histories are complete."""
        with self._lock:
            self._file.close()
        partial = self.folder / "run.json.partial"
        partial.write_text(json.dumps(run, indent=1) + "\n")
        os.replace(partial, self.folder / "run.json")
