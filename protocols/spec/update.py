"""Writes the two tables that follow from other files: `make spec`.

The limits in 00-conventions.md come from limits.py, the list of specifications in ../README.md from
the status lines of the specifications themselves.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from swarmtrain_protocols import limits

SPEC = Path(__file__).resolve().parent
ROOT = SPEC.parent.parent
CONVENTIONS = SPEC / "00-conventions.md"
README = SPEC.parent / "README.md"
STATUS = re.compile(
    r"^Status: (?P<status>Draft|Stable|Retired) · Revision: \d+ · Date: \d{4}-\d\d-\d\d ·\s"
    r"Modules: (?P<modules>.*?) ·\sVectors: (?P<vectors>.*?)\n\n",
    re.DOTALL,
)


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


def limits_table(source: str) -> str:
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


def tests_of(modules: list[str]) -> list[str]:
    """Names of the test files and folders that cover the modules of a specification."""
    found: list[str] = []
    tests = ROOT / "tests"
    for module in modules:
        stem = module.rstrip("/").removesuffix(".py").split("/")[-1]
        if module.endswith("/"):
            names = [f"{path.name}/" for path in sorted(tests.glob(f"*/{stem}")) if path.is_dir()]
            if any(tests.rglob(f"test_{stem}_*.py")):
                names.append(f"test_{stem}_*")
        else:
            names = []
        names += sorted({path.stem for path in tests.rglob(f"test_{stem}.py")})
        found += [name for name in names if name not in found]
    return found


def spec_table(specs: list[Path]) -> str:
    """Markdown rows of the specifications, from their status lines."""
    rows = ["| spec | modules | vectors | tests | status |\n|---|---|---|---|---|\n"]
    for path in specs:
        text = path.read_text(encoding="utf-8").split("\n", 2)[2]
        match = STATUS.match(text)
        if match is None:
            raise SystemExit(f"{path.name}: no status line in the form of 00-conventions")
        modules = re.findall(r"`([^`]+)`", match["modules"])
        vectors = re.findall(r"`([^`]+\.json)`", match["vectors"])
        cells = [
            f"[{path.stem}](spec/{path.name})",
            ", ".join(f"`{name}`" for name in modules),
            ", ".join(f"[`{name}`](vectors/{name})" for name in vectors) or "-",
            ", ".join(f"`{name}`" for name in tests_of(modules)) or "-",
            match["status"],
        ]
        rows.append(f"| {' | '.join(cells)} |\n")
    return "".join(rows)


def replaced(text: str, marker: str, table: str) -> str:
    """``text`` with ``table`` between the comments `marker` and `end`."""
    start, end = f"<!-- {marker} -->\n", "<!-- end -->"
    before, rest = text.split(start)
    _, after = rest.split(end, 1)
    return before + start + table + end + after


def pages() -> dict[Path, str]:
    """The two pages as they should read."""
    source = Path(limits.__file__).read_text(encoding="utf-8")
    conventions = CONVENTIONS.read_text(encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    specs = sorted(SPEC.glob("[0-9][0-9]-*.md"))
    return {
        CONVENTIONS: replaced(conventions, "limits", limits_table(source)),
        README: replaced(readme, "specs", spec_table(specs)),
    }


def main() -> None:
    """Rewrite the tables in place."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path.name}: written\n")


if __name__ == "__main__":
    main()
