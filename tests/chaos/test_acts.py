"""What faults do, on a crew that only writes down what it is told."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarmtrain_protocols.errors import SwarmError
from tests.chaos import machine
from tests.chaos.acts import Acts
from tests.chaos.ground import Plain

Document = dict[str, Any]


class Book:
    def __init__(self) -> None:
        self.lines: list[Document] = []

    def write(self, what: str, at_s: float | None = None, **fields: Any) -> None:
        self.lines.append({"what": what, **fields})

    def of(self, what: str) -> list[Document]:
        return [line for line in self.lines if line["what"] == what]


class Ground(Plain):
    def __init__(self) -> None:
        self.cuts: list[frozenset[tuple[str, str]]] = []
        self.rates: list[tuple[str, int]] = []

    def cut(self, pairs: frozenset[tuple[str, str]]) -> None:
        self.cuts.append(pairs)

    def rate(self, site: str, bits_per_s: int) -> None:
        self.rates.append((site, bits_per_s))


class Home:
    """A site of a pipeline, or not, with the folder of one that has trained a while."""

    def __init__(self, number: int, folder: Path, coverage: list[Document]) -> None:
        self.number, self.name = number, f"site-{number}"
        self.id = self.name
        self.seat = self
        self.site = self
        self.folder = folder / self.name
        self.state_path = self.folder / "state"
        self.log_path = self.folder / "log"
        newest = self.state_path / "checkpoints" / "checkpoint-00000007"
        newest.mkdir(parents=True)
        (newest / "manifest.json").write_bytes(b"m" * 90)
        (newest / "train.safetensors").write_bytes(bytes(3000))
        self.log_path.write_bytes(b"l" * 300)
        self.peer: Any = self
        self.pid = os.getpid()
        self.due_s: Document = {}
        self.ended_by: Document = {}
        self.applied: dict[str, int] = {}
        self.started_s = float(number)
        self.frozen = self.gone = False
        self.damaged: Any = None
        self.broken_until_s = 0.0
        self.trains = True
        self._coverage = coverage

    def config(self) -> Home:
        return self

    def ask(self, call: str, args: Any = None, timeout_s: float = 0.0) -> Document:
        if call != "status":
            return {}
        if not self._coverage:
            raise SwarmError("no answer", "", "")
        return {"pipeline": {"coverage": self._coverage}, "listen": [f"{self.name}:1"]}


class Crew:
    def __init__(self, folder: Path, sites: int, coverage: list[Document]) -> None:
        self.homes = [Home(number, folder, coverage) for number in range(sites)]
        self.book, self.ground = Book(), Ground()
        self.killed: list[tuple[str, str]] = []

    def alive(self) -> list[Home]:
        down = {name for name, what in self.killed if what != "trainer"}
        return [home for home in self.homes if home.name not in down and not home.frozen]

    def there(self) -> list[Home]:
        return self.homes

    def leader(self) -> Home:
        return self.homes[2]

    def kill(self, home: Home, what: str, by: str = "kill") -> None:
        self.killed.append((home.name, what))

    def freeze(self, home: Home, frozen: bool) -> None:
        home.frozen = frozen


@pytest.fixture
def crew(tmp_path: Path) -> Crew:
    return Crew(tmp_path, 5, [])


def acts(crew: Crew) -> Acts:
    return Acts(crew, seed=1)  # type: ignore[arg-type]


def done(crew: Crew, **fault: Any) -> Document:
    """Do one fault; what was written of it."""
    acts(crew).do({"at_s": 0.0, **fault})
    assert crew.book.lines
    return crew.book.lines[-1]


def test_a_kill_is_written_down_and_comes_back(crew: Crew) -> None:
    found = done(crew, kind="kill", site=3, process="both", for_s=2.0, wipe=True)
    assert found["what"] == "fault" and found["site"] == "site-3" and not found["leader"]
    assert crew.killed == [("site-3", "both")]
    assert set(crew.homes[3].due_s) == {"peer", "trainer"}
    assert list(crew.homes[3].state_path.iterdir()) == []


def test_who_is_meant(crew: Crew) -> None:
    for site, name in (("leader", "site-2"), ("newest", "site-4")):
        found = done(crew, kind="kill", site=site, process="peer", for_s=1.0)
        assert (found["site"], found["leader"]) == (name, site == "leader")
    skipped = done(crew, kind="kill", site=0, process="peer", for_s=1.0)
    assert skipped["what"] == "skipped" and "majority" in skipped["why"]
    assert len(crew.killed) == 2


def test_a_checkpoint_is_cut_off_at_its_share(crew: Crew) -> None:
    found = done(crew, kind="kill", site=1, process="peer", for_s=1.0, truncate=0.5)
    assert found["truncated"] == "train.safetensors"
    (path,) = crew.homes[1].state_path.rglob("*.safetensors")
    assert path.stat().st_size == 1500


@pytest.mark.parametrize("file", ["checkpoint", "manifest", "log"])
def test_one_bit_of_a_file_is_flipped(crew: Crew, file: str) -> None:
    before = {p: p.read_bytes() for p in crew.homes[1].folder.rglob("*") if p.is_file()}
    assert done(crew, kind="corrupt", site=1, file=file, for_s=1.0)["site"] == "site-1"
    changed = [p for p, data in before.items() if p.read_bytes() != data]
    assert len(changed) == 1
    pairs = zip(before[changed[0]], changed[0].read_bytes(), strict=True)
    assert sum((a ^ b).bit_count() for a, b in pairs) == 1
    assert (crew.homes[1].damaged is not None) == (file == "log")
    nothing = done(crew, kind="corrupt", site=2, file="result", for_s=1.0)
    assert nothing["what"] == "skipped" and "peer" in crew.homes[2].due_s


def test_cuts_have_directions_and_end(crew: Crew) -> None:
    sides = [[0, 1], [2, 3, 4]]
    one, whole = acts(crew), acts(crew)
    one.do({"at_s": 0, "kind": "cut", "sides": sides, "for_s": 9.0, "one_way": True})
    whole.do({"at_s": 0, "kind": "cut", "sides": sides, "for_s": 20.0, "flap_s": 5.0})
    assert len(crew.ground.cuts[0]) == 6 and ("site-0", "site-2") in crew.ground.cuts[0]
    assert len(crew.ground.cuts[1]) == 12 and ("site-2", "site-0") in crew.ground.cuts[1]
    assert [line["whole"] for line in crew.book.of("fault")] == [False, False]
    whole.heal()
    sizes = [len(pairs) for pairs in crew.ground.cuts[2:]]
    assert sizes == [0, 12, 0, 0]


def test_rates_clocks_and_disks_end(crew: Crew) -> None:
    hands = acts(crew)
    hands.do({"at_s": 0, "kind": "rate", "site": 4, "bits": 1_000_000, "for_s": 9.0})
    hands.do({"at_s": 0, "kind": "clock", "site": 1, "offset_s": 3600.0, "drift": 2e-4})
    hands.do({"at_s": 0, "kind": "disk", "site": 3, "mode": "broken", "sync_s": 5.0, "for_s": 9.0})
    told = json.loads((crew.homes[1].folder / machine.FILE).read_text())
    assert told["offset_s"] == 3600.0 and told["drift"] == 2e-4
    assert machine.Trouble(crew.homes[3].folder)()["disk"] == "broken"
    assert crew.homes[3].broken_until_s > 0.0
    hands.heal()
    assert crew.ground.rates == [("site-4", 1_000_000), ("site-4", 0)]
    assert machine.Trouble(crew.homes[3].folder)()["disk"] == ""


def test_an_older_copy_of_the_log_comes_back(crew: Crew) -> None:
    hands = acts(crew)
    hands.do({"at_s": 0, "kind": "old copy", "site": "leader", "for_s": 1.0})
    assert crew.book.lines[-1]["what"] == "skipped"
    hands.turn()
    crew.homes[2].log_path.write_bytes(b"newer")
    hands.do({"at_s": 0, "kind": "old copy", "site": "leader", "for_s": 1.0})
    assert crew.homes[2].log_path.read_bytes() == b"l" * 300
    assert crew.book.lines[-1]["leader"] is True


COVERAGE: list[Document] = [
    {"stage": stage, "members": [{"id": f"site-{n}"} for n in members]}
    for stage, members in ((0, (1, 2, 3)), (1, (1, 3)), (2, (4, 2)))
]


def test_all_sites_of_a_stage_are_killed_unless_another_stage_hangs_on_them(
    tmp_path: Path,
) -> None:
    crew = Crew(tmp_path / "a", 6, COVERAGE)
    found = done(crew, kind="kill stage", stage=2, for_s=60.0)
    assert found["sites"] == ["site-2", "site-4"]
    assert crew.killed == [("site-2", "both"), ("site-4", "both")]
    shared = [*COVERAGE[:2], {"stage": 2, "members": [{"id": "site-1"}, {"id": "site-3"}]}]
    other = Crew(tmp_path / "b", 6, shared)
    assert done(other, kind="kill stage", stage=2, for_s=60.0)["what"] == "skipped"
    assert other.killed == []


def test_a_frozen_site_is_thawed(crew: Crew) -> None:
    hands = acts(crew)
    hands.do({"at_s": 0, "kind": "freeze", "site": 1, "for_s": 30.0})
    assert crew.homes[1].frozen
    hands.heal()
    assert not crew.homes[1].frozen


# --- bad machines --------------------------------------------------------------------------------


@pytest.fixture
def honest() -> Iterator[None]:
    names = ("write", "ftruncate", "fsync", "fdatasync", "replace", "unlink", "mkdir", "open")
    before = {name: getattr(os, name) for name in names}
    yield
    for name, call in before.items():
        setattr(os, name, call)


def test_a_bad_disk_refuses_files_and_nothing_else(tmp_path: Path, honest: None) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    machine.tell(tmp_path, disk="readonly")
    readable, writable = os.open(file, os.O_RDONLY), os.open(file, os.O_WRONLY)
    one, other = os.pipe()
    machine.bad_disk(machine.Trouble(tmp_path))
    for call in (
        lambda: os.write(writable, b"y"),
        lambda: os.fsync(writable),
        lambda: os.open(file, os.O_WRONLY),
        lambda: os.replace(file, tmp_path / "b"),
        lambda: os.mkdir(tmp_path / "folder"),
    ):
        with pytest.raises(OSError, match="Read-only"):
            call()
    with pytest.raises(FileNotFoundError):  # shared memory is on no disk
        os.unlink(Path("/dev/shm/of-nobody"))
    assert os.write(other, b"z") == 1 and os.read(one, 1) == b"z"
    assert os.read(readable, 1) == b"x"
    for descriptor in (readable, writable, one, other):
        os.close(descriptor)
