"""Writes the table of limits in 00-conventions.md from limits.py: `make spec`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from swarmtrain_protocols import limits

CONVENTIONS = Path(__file__).with_name("00-conventions.md")
START, END = "<!-- limits -->\n", "<!-- end -->"


def spelled(name: str, value: float) -> str:
    """A number as the specifications write it: `64 KiB`, `2^36`, `0.2`."""
    power = 2 ** (len(f"{int(value):b}") - 1)
    if value >= 1 << 16 and "BYTES" not in name and value == power:
        return f"2^{len(f'{int(value):b}') - 1}"
    if "BYTES" in name:
        for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value >= size and value % size == 0:
                return f"{int(value) // size} {unit}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(source: str) -> str:
    """Markdown rows of every constant in the source of limits.py, by its sections."""
    rows = ["| name | value | section |\n|---|---|---|\n"]
    section = ""
    for line in source.splitlines():
        if match := re.match(r"# ([^(]*?)\s*(\(|$)", line):
            section = match[1]
        elif match := re.match(r"([A-Z][A-Z0-9_]+)\s*(:[^=]+)?=", line):
            name = match[1]
            rows.append(f"| `{name}` | {spelled(name, getattr(limits, name))} | {section} |\n")
    return "".join(rows)


def updated(text: str, source: str) -> str:
    """The conventions with a fresh table."""
    before, rest = text.split(START)
    _, after = rest.split(END, 1)
    return before + START + table(source) + END + after


def main() -> None:
    """Rewrite the table in place."""
    source = Path(limits.__file__).read_text(encoding="utf-8")
    text = CONVENTIONS.read_text(encoding="utf-8")
    CONVENTIONS.write_text(updated(text, source), encoding="utf-8")
    sys.stdout.write(f"{CONVENTIONS.name}: written\n")


if __name__ == "__main__":
    main()
