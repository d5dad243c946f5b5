"""docs/reliability.md says of every invariant what watches it, and that is so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ROOT / "protocols" / "swarmtrain_protocols" / "testing" / "checks"
FAMILIES = {"MB": 6, "GF": 5, "AR": 8, "OS": 5, "CK": 5, "CO": 2, "CF": 5, "PL": 22}
"""How many there are: those of the goals by family, of pipelines those of spec 11."""
NUMBER = re.compile(r"\b(?:MB|GF|AR|OS|CK|CO|CF|PL)\d+\b")


def rows(text: str) -> dict[str, str]:
    """By number: the cell that says what watches it."""
    part = text[text.index("## Invariants") : text.index("## Goals")]
    found: dict[str, str] = {}
    for line in part.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and NUMBER.fullmatch(cells[0]):
            assert cells[0] not in found, f"{cells[0]} twice"
            found[cells[0]] = cells[-1]
    return found


def watched() -> dict[str, str]:
    return rows((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))


def missing_from(cell: str) -> list[str]:
    """Files and tests that a cell names and that do not exist."""
    wrong = []
    for named in re.findall(r"`([^`]+)`", cell):
        path, _, test = named.partition("::")
        file = CHECKS.parent / path if path.startswith("checks/") else ROOT / path
        file = CHECKS.parent.parent / path if path.startswith("testing/") else file
        if not file.is_file() or (test and f"def {test}(" not in file.read_text(encoding="utf-8")):
            wrong.append(named)
    return wrong


def test_every_number_is_there_and_none_is_made_up() -> None:
    wanted = {f"{family}{n}" for family, count in FAMILIES.items() for n in range(1, count + 1)}
    assert set(watched()) == wanted


def test_what_is_said_to_watch_exists_or_it_says_not_yet() -> None:
    for number, cell in watched().items():
        assert missing_from(cell) == [], number
        assert "`" in cell or "not yet" in cell, number


@pytest.mark.parametrize("file", sorted(p.name for p in CHECKS.glob("*.py")))
def test_a_checker_stands_in_the_rows_of_the_numbers_that_it_begins_with(file: str) -> None:
    doc = ast.get_docstring(ast.parse((CHECKS / file).read_text(encoding="utf-8"))) or ""
    head = re.match(r"((?:[A-Z]{2}\d+(?:, | and )?)+)", doc)
    for number in NUMBER.findall(head.group(1)) if head else []:
        assert f"checks/{file}" in watched()[number], f"{file} says that it watches {number}"


def test_a_row_without_a_file_is_noticed() -> None:
    assert missing_from("`checks/ar1.py`, `tests/sim/test_nothing.py`") == [
        "tests/sim/test_nothing.py"
    ]
    assert missing_from("`tests/test_invariants.py::test_nothing`")
