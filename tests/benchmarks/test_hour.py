"""The hour's own machinery: what is compiled and how, and that nothing is judged kindly."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import hour

CLASSES = '''"""A module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from there import Absent


@dataclass(slots=True)
class Item:
    one: Absent
    two: random.Random = None
    three: int = 3
    four: object = None


class Plain:
    five: Absent
'''


def test_only_fields_whose_types_are_not_there_are_changed(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(CLASSES)
    hour.prepare(path)
    before, after = CLASSES.splitlines(), path.read_text().splitlines()
    assert [line for line in after if line not in before] == [
        "from typing import Any as _Any",
        "    one: Absent | _Any",
        "    two: random.Random | _Any = None",
        "    four: object | _Any = None",
    ]
    path.write_text(untouched := "from __future__ import annotations\n\nX: int = 1\n")
    hour.prepare(path)
    assert path.read_text() == untouched


def test_cores_are_compiled_and_schemas_are_not() -> None:
    names = hour.candidates()
    package = hour.PACKAGE
    for core in ("node", "dht.kademlia", "log.core", "rounds.leader", "testing.world"):
        assert f"{package}.{core}" in names
    assert not any(name.startswith(f"{package}.messages") for name in names)
    assert f"{package}.ledger" not in names


def test_without_a_compiler_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hour, "TARGET", tmp_path / "hour")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(SystemExit, match="no C compiler"):
        hour.compile_cores(["swarmtrain_protocols.node"])


def test_a_module_that_is_not_compiled_ends_it() -> None:
    with pytest.raises(SystemExit, match="ended with 1"):
        hour.play(hour.SOURCE, [f"{hour.PACKAGE}.order"], hour.SHORT, quiet=True)


def _pretend(
    monkeypatch: pytest.MonkeyPatch, real_s: float, traces: tuple[str, str] = ("t", "t")
) -> None:
    def play(path: Path, names: Sequence[str], rest: Sequence[str], quiet: bool) -> dict[str, Any]:
        trace = traces[bool(names)]
        return {"trace": trace, "missed": [], "real_s": real_s, "modules_compiled": len(names)}

    monkeypatch.setattr(hour, "play", play)
    monkeypatch.setattr(hour, "candidates", lambda: ["a", "b"])
    monkeypatch.setattr(hour, "compile_cores", lambda names: None)


def test_ten_minutes_are_too_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _pretend(monkeypatch, 600.0)
    assert hour.main(["--output", str(tmp_path / "hour.json")]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["missed"] == ["real_s"] and told["modules_compiled"] == 2
    assert told == json.loads((tmp_path / "hour.json").read_text())
    _pretend(monkeypatch, 599.0)
    assert hour.main(["--interpreted"]) == 0
    assert json.loads(capsys.readouterr().out)["modules_compiled"] == 0


def test_another_trace_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, 1.0, ("t", "u"))
    with pytest.raises(SystemExit, match="something else"):
        hour.main([])


@pytest.mark.slow  # not everywhere: it takes Linux, a C compiler and Python's headers
def test_small_objects_lie_in_arenas_of_ours(tmp_path: Path) -> None:
    """What Python asks of the system comes from blocks that may be huge pages."""
    hour.build_arenas(tmp_path)
    code = (
        "import arenas, os, re\n"
        "kept = [object() for _ in range(2_000_000)]\n"
        "flags, size = [], 0\n"
        "for line in open('/proc/self/smaps'):\n"
        "    if re.match('Size:', line): size = int(line.split()[1])\n"
        "    if line.startswith('VmFlags:') and ' hg' in line: flags.append(size)\n"
        "del kept[:1_000_000]\n"
        "again = [object() for _ in range(1_000_000)]\n"
        "print(sum(flags), flush=True)\n"
        "os._exit(0)\n"
    )
    done = hour.python(tmp_path, "-c", code, stdout=subprocess.PIPE)
    assert done.returncode == 0 and int(done.stdout) >= 2_000_000 * 16 / 1024
