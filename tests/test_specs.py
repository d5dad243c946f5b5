"""The specifications as a set: headers, parts, vectors, and the table that lists them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROTOCOLS = ROOT / "protocols"
CORE = PROTOCOLS / "swarmtrain_protocols"
STATUS = re.compile(
    r"^Status: (Draft|Stable|Retired) · Revision: \d+ · Date: \d{4}-\d\d-\d\d ·\s"
    r"Modules: (?P<modules>.*?) ·\sVectors: (?P<vectors>.*?)\n\n",
    re.DOTALL,
)
PARTS = ("Wire", "Theory", "Rationale", "Vectors")
SPECS = sorted((PROTOCOLS / "spec").glob("[0-9][0-9]-*.md"))
# Vectors that nobody of ours wrote.
PUBLISHED = {"noise_xx.json"}


def complaints(text: str, *, parts: tuple[str, ...] = PARTS) -> list[str]:
    """What is wrong with the shape of one specification."""
    lines = text.split("\n", 2)
    found = []
    if not re.match(r"^# \d\d \S", lines[0]):
        found.append("the title is not `# NN Name`")
    status = STATUS.match(lines[2]) if len(lines) > 2 else None
    if status is None:
        return [*found, "no status line in the form of 00-conventions"]
    for name in re.findall(r"`([^`]+)`", status["modules"]):
        roots = (CORE, ROOT / "peer" / "swarmtrain_peer", ROOT)
        if not any((root / name).exists() for root in roots):
            found.append(f"no module {name}")
    found += [
        f"no vectors {name}"
        for name in re.findall(r"`([^`]+\.json)`", status["vectors"])
        if not (PROTOCOLS / "vectors" / name).is_file()
    ]
    headings = re.findall(r"^## (?:\d+\.? )?(\w+)", text, re.MULTILINE)
    found += [f"no part {part}" for part in parts if part not in headings]
    return found


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_specification_has_its_header_and_parts(path: Path) -> None:
    general = path.name.startswith("00-")
    text = path.read_text(encoding="utf-8")
    assert complaints(text, parts=("Rationale",) if general else PARTS) == []


def test_a_badly_shaped_specification_is_noticed() -> None:
    good = (
        "# 01 Name\n\nStatus: Draft · Revision: 1 · Date: 2026-01-01 · Modules: `core.py` · "
        "Vectors: none\n\n## 1. Wire\n\n## 2. Theory\n\n## 3. Rationale\n\n## 4. Vectors\n"
    )
    assert complaints(good) == []
    assert complaints(good.replace("Draft", "Finished"))
    assert complaints(good.replace("core.py", "no_such.py")) == ["no module no_such.py"]
    assert complaints(good.replace("none", "`no_such.json`")) == ["no vectors no_such.json"]
    assert complaints(good.replace("## 2. Theory\n", "")) == ["no part Theory"]
    assert complaints(good.replace("# 01 Name", "# Name"))


def test_the_generated_tables_are_up_to_date() -> None:
    location = importlib.util.spec_from_file_location("update", PROTOCOLS / "spec" / "update.py")
    assert location is not None and location.loader is not None
    update = importlib.util.module_from_spec(location)
    location.loader.exec_module(update)
    for path, text in update.pages().items():
        assert path.read_text(encoding="utf-8") == text, "run `make spec`"


def test_the_table_lists_every_specification() -> None:
    table = (PROTOCOLS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[([^\]]+)\]\(spec/([^)]+)\)", table, re.MULTILINE)
    assert listed == [(path.stem, path.name) for path in SPECS]


def test_numbers_are_given_once() -> None:
    numbers = [path.name[:2] for path in SPECS]
    assert len(set(numbers)) == len(numbers)


def test_vectors_are_named_by_a_specification_and_read_by_a_test() -> None:
    specs = "".join(path.read_text(encoding="utf-8") for path in SPECS)
    tests = "".join(
        path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path != Path(__file__).resolve()
    )
    for path in sorted((PROTOCOLS / "vectors").glob("*.json")):
        assert json.loads(path.read_text(encoding="utf-8")), f"{path.name} is empty"
        assert path.name in tests or path.stem in tests, f"no test reads {path.name}"
        if path.name not in PUBLISHED:
            assert path.name in specs, f"no specification names {path.name}"
