"""House style as a test: lengths, twins, docstrings, leftovers, swallowed errors, quoted limits.

Each rule is a function from one file's path and text to complaints, and is shown to fail on a bad
snippet. Two escapes exist, both visible where they apply and both with a reason: a comment
`# tidy: long because ...` within a file's first ten lines lifts the length rules for that file, and
`tidy: allowed because ...` at the end of a line lifts the line rules for that line.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from swarmtrain_protocols import limits

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "protocols" / "spec"
LINES_PER_FILE_MAX = 500
LINES_PER_FUNCTION_MAX = 60
COLUMNS_MAX = 100
LONG = re.compile(r"#\s*tidy: long because \S+")
PRAGMA = re.compile(r"\s*#\s*(type: ignore|noqa).*$")
ALLOWED = re.compile(r"tidy: allowed because \S+")
TEXT_SUFFIXES = (".py", ".md", ".toml", ".yml", ".yaml", ".js", ".css", ".html", ".service", ".sh")
# Core modules without a test of their own name, and what covers them instead.
NO_TWIN = {
    "limits.py": "its relations are asserted at import and its values in this file",
}

Rule = Callable[[str, str], Iterator[str]]


def files(*suffixes: str) -> Iterator[tuple[str, str]]:
    """(path from the repository root, text) of the files git would carry, ignored ones left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout
    for name in sorted(listed.split("\0")):
        path = ROOT / name
        if name.endswith(suffixes) and path.is_file():
            yield name, path.read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def nodes(text: str) -> list[ast.AST]:
    """The syntax tree, its module first; remembered while one file is asked by all rules."""
    return list(ast.walk(ast.parse(text)))


def lifted(text: str, line: int) -> bool:
    """True if the line (counted from 1) carries an escape with a reason."""
    lines = text.splitlines()
    return 0 < line <= len(lines) and bool(ALLOWED.search(lines[line - 1]))


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain, or "" if it is anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


# --- rules on Python files -----------------------------------------------------------------------


def rule_lengths(path: str, text: str) -> Iterator[str]:
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        columns = len(PRAGMA.sub("", line))  # a pragma cannot be wrapped
        if columns > COLUMNS_MAX:
            yield f"{path}:{number}: {columns} columns, at most {COLUMNS_MAX}"
    if LONG.search("\n".join(lines[:10])):
        return
    if len(lines) > LINES_PER_FILE_MAX:
        yield f"{path}: {len(lines)} lines, at most {LINES_PER_FILE_MAX}"
    for node in nodes(text):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LINES_PER_FUNCTION_MAX:
                yield f"{path}:{node.lineno}: {node.name}() has {length} lines"


def rule_module_docstring(path: str, text: str) -> Iterator[str]:
    module = nodes(text)[0]
    assert isinstance(module, ast.Module)
    if not ast.get_docstring(module):
        yield f"{path}:1: the module does not say what it is for"


def rule_errors_are_not_swallowed(path: str, text: str) -> Iterator[str]:
    broad = ("Exception", "BaseException")
    for node in nodes(text):
        if isinstance(node, ast.ExceptHandler):
            silent = all(
                isinstance(statement, (ast.Pass, ast.Continue, ast.Break))
                or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
                for statement in node.body
            )
            if node.type is None and not lifted(text, node.lineno):
                yield f"{path}:{node.lineno}: bare except"
            elif (
                node.type is not None
                and any(dotted(name) in broad for name in _names(node.type))
                and silent
                and not lifted(text, node.lineno)
            ):
                yield f"{path}:{node.lineno}: swallows every exception"
        elif (
            isinstance(node, ast.Call)
            and dotted(node.func) in ("suppress", "contextlib.suppress")
            and any(dotted(argument) in broad for argument in node.args)
            and not lifted(text, node.lineno)
        ):
            yield f"{path}:{node.lineno}: suppresses every exception"


def _names(node: ast.expr) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, ast.Tuple) else [node]


def rule_decoding_expects_bad_text(path: str, text: str) -> Iterator[str]:
    """msgspec also raises UnicodeDecodeError, and RecursionError for what nests deep."""
    text_too = ("UnicodeDecodeError", "ValueError", "Exception")
    depth_too = ("RecursionError", "Exception")
    for node in nodes(text):
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            caught = [dotted(name) for name in _names(node.type)]
            if "msgspec.DecodeError" not in caught:
                continue
            if not set(caught) & set(text_too):
                yield f"{path}:{node.lineno}: also expect UnicodeDecodeError"
            if not set(caught) & set(depth_too):
                yield f"{path}:{node.lineno}: also expect RecursionError"


# --- rules on tests ------------------------------------------------------------------------------

BANNED_IN_TESTS = re.compile(
    r"^(time\.sleep|pytest\.(skip|xfail|importorskip)|pytest\.mark\.(skip|skipif|xfail|flaky\w*)"
    r"|unittest\.(skip\w*|expectedFailure)|pytest\.mark\.rerun\w*)$"
)
CHECKS = re.compile(r"(^|\.|_)(assert|check|expect|verify|raises|fail|warns|require|run)")


def rule_tests_neither_sleep_nor_skip(path: str, text: str) -> Iterator[str]:
    if not path.startswith("tests/"):
        return
    for node in nodes(text):
        if isinstance(node, ast.Attribute) and BANNED_IN_TESTS.match(dotted(node)):
            if not lifted(text, node.lineno):
                yield f"{path}:{node.lineno}: {dotted(node)}"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if BANNED_IN_TESTS.match(name) and not lifted(text, node.lineno):
                    yield f"{path}:{node.lineno}: from {node.module} import {alias.name}"


def rule_tests_can_fail(path: str, text: str) -> Iterator[str]:
    if not re.search(r"(^|/)test_\w+\.py$", path):
        return
    for node in nodes(text):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if not node.name.startswith("test_") or lifted(text, node.lineno):
            continue
        checks = any(
            isinstance(inner, ast.Assert)
            or (isinstance(inner, ast.Call) and CHECKS.search(dotted(inner.func)))
            for inner in ast.walk(node)
        )
        if not checks:
            yield f"{path}:{node.lineno}: {node.name} asserts nothing"


# --- rules on every text file --------------------------------------------------------------------

LEFTOVERS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")  # tidy: allowed because it is the rule itself
MACHINE_PATHS = re.compile(r"/(tmp|work|root|home)/[A-Za-z0-9_.-]+/")


def rule_nothing_left_over(path: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if LEFTOVERS.search(line) and not ALLOWED.search(line):
            yield f"{path}:{number}: {line.strip()[:80]}"


def rule_no_path_of_one_machine(path: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if MACHINE_PATHS.search(line) and not ALLOWED.search(line):
            yield f"{path}:{number}: {line.strip()[:80]}"


# --- specs quote limits.py -----------------------------------------------------------------------

# A table row whose first cell is a name in capitals, or `NAME` = value in running text.
NAME = r"`?(?:limits\.)?([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)`?"
ROW = re.compile(r"^\|\s*" + NAME + r"\s*\|\s*`?([^|`]+?)`?\s*\|")
INLINE = re.compile(NAME + r"\s*=\s*`?(\d[^\s`,;)|]*(?: [KMG]iB)?)")
MENTION = re.compile(r"\blimits\.([A-Z][A-Z0-9_]+)\b")
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
VALUE = re.compile(
    r"^(?:2\^(?P<power>\d+)|(?P<number>\d[\d_]*(?:\.\d+)?))(?:\s*(?P<unit>[KMG]iB))?"
)


def quoted(value: str) -> float | None:
    """The number in a cell: `4 KiB`, `2^18`, `0.2`, `1_024`; words after it are its unit."""
    match = VALUE.match(value.strip())
    if match is None:
        return None
    base = 2 ** int(match["power"]) if match["power"] else float(match["number"].replace("_", ""))
    return float(base) * UNITS[match["unit"] or ""]


def rule_specs_quote_limits(path: str, text: str) -> Iterator[str]:
    if not path.startswith("protocols/spec/"):
        return
    for number, line in enumerate(text.splitlines(), 1):
        pairs = ROW.findall(line) + INLINE.findall(line)
        for name, value in pairs:
            actual = getattr(limits, name, None)
            if actual is None:
                continue  # a constant of another module, or not a limit at all
            if quoted(value) != actual:
                yield f"{path}:{number}: {name} is {actual}, not {value}"
        for name in MENTION.findall(line):
            if not hasattr(limits, name):
                yield f"{path}:{number}: limits.{name} does not exist"


# --- each rule holds, and each rule can fail -----------------------------------------------------

PYTHON_RULES: list[Rule] = [
    rule_lengths,
    rule_module_docstring,
    rule_errors_are_not_swallowed,
    rule_decoding_expects_bad_text,
    rule_tests_neither_sleep_nor_skip,
    rule_tests_can_fail,
]
TEXT_RULES: list[Rule] = [
    rule_nothing_left_over,
    rule_no_path_of_one_machine,
    rule_specs_quote_limits,
]
TEST = "tests/test_x.py"
LONG_FUNCTION = "def f():\n" + "    pass\n" * LINES_PER_FUNCTION_MAX
BAD: list[tuple[Rule, str, str]] = [
    (rule_lengths, "a.py", "x = 1\n" * (LINES_PER_FILE_MAX + 1)),
    (rule_lengths, "a.py", LONG_FUNCTION),
    (rule_lengths, "a.py", "# " + "x" * COLUMNS_MAX),
    (rule_lengths, "a.py", "# tidy: long because\n" + LONG_FUNCTION),
    (rule_module_docstring, "a.py", "x = 1"),
    (rule_errors_are_not_swallowed, "a.py", "try:\n    f()\nexcept:\n    raise"),
    (rule_errors_are_not_swallowed, "a.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (rule_errors_are_not_swallowed, "a.py", "try:\n    f()\nexcept (OSError, Exception): ..."),
    (rule_errors_are_not_swallowed, "a.py", "with contextlib.suppress(Exception):\n    f()"),
    (rule_decoding_expects_bad_text, "a.py", "try: f()\nexcept msgspec.DecodeError as e: g(e)"),
    (
        rule_decoding_expects_bad_text,
        "a.py",
        "try: f()\nexcept (msgspec.DecodeError, UnicodeDecodeError) as e: g(e)",
    ),
    (rule_tests_neither_sleep_nor_skip, TEST, "time.sleep(1)"),
    (rule_tests_neither_sleep_nor_skip, TEST, "from time import sleep"),
    (rule_tests_neither_sleep_nor_skip, TEST, "@pytest.mark.xfail\ndef test_x(): assert 0"),
    (rule_tests_neither_sleep_nor_skip, TEST, "@pytest.mark.skipif(True)\ndef test_x(): pass"),
    (rule_tests_neither_sleep_nor_skip, TEST, "pytest.importorskip('torch')"),
    (rule_tests_can_fail, TEST, "def test_x():\n    f()"),
    (rule_nothing_left_over, "a.md", "TO" + "DO: later"),
    (rule_no_path_of_one_machine, "a.md", "see /ho" + "me/someone/file"),
    (rule_specs_quote_limits, "protocols/spec/a.md", "| `VOTERS_MAX` | 8 | members |"),
    (rule_specs_quote_limits, "protocols/spec/a.md", "at most `limits.VOTERS_MAX` = 8 of them"),
    (rule_specs_quote_limits, "protocols/spec/a.md", "| CHUNK_VALUES | 2^17 | |"),
    (rule_specs_quote_limits, "protocols/spec/a.md", "never more than limits.NO_SUCH_THING"),
]
GOOD: list[tuple[Rule, str, str]] = [
    (rule_lengths, "a.py", "# tidy: long because the table is one\n" + LONG_FUNCTION),
    (rule_module_docstring, "a.py", '"""What it is for."""'),
    (rule_errors_are_not_swallowed, "a.py", "try:\n    f()\nexcept OSError:\n    pass"),
    (rule_errors_are_not_swallowed, "a.py", "try:\n    f()\nexcept Exception as e:\n    log(e)"),
    (
        rule_decoding_expects_bad_text,
        "a.py",
        "try: f()\nexcept (msgspec.DecodeError, ValueError, RecursionError) as e: g(e)",
    ),
    (
        rule_tests_neither_sleep_nor_skip,
        TEST,
        "time.sleep(1)  # tidy: allowed because the clock itself is under test",
    ),
    (rule_tests_neither_sleep_nor_skip, "peer/a.py", "time.sleep(1)"),
    (rule_tests_can_fail, TEST, "def test_x():\n    with pytest.raises(OSError):\n        f()"),
    (rule_specs_quote_limits, "protocols/spec/a.md", "| `CHUNK_VALUES` | 2^18 | values |"),
    (rule_specs_quote_limits, "protocols/spec/a.md", "| FRAME_BYTES_BULK_MAX | 1 MiB | bytes |"),
    (rule_specs_quote_limits, "protocols/spec/a.md", "`KEEPALIVE_INTERVAL_S` = 5 s"),
]


def _ids(cases: list[tuple[Rule, str, str]]) -> list[str]:
    return [f"{rule.__name__}-{number}" for number, (rule, _, _) in enumerate(cases)]


@pytest.fixture(scope="module")
def complaints() -> dict[str, list[str]]:
    """What each rule has to say of the repository; file by file, as reading one takes longest."""
    found: dict[str, list[str]] = {rule.__name__: [] for rule in PYTHON_RULES + TEXT_RULES}
    own = "tests/test_tidy.py"  # holds the bad snippets
    for path, text in files(*TEXT_SUFFIXES):
        rules = PYTHON_RULES + TEXT_RULES if path.endswith(".py") else TEXT_RULES
        for rule in rules:
            if path != own or rule in (rule_lengths, rule_module_docstring):
                found[rule.__name__] += rule(path, text)
    return found


@pytest.mark.timeout(300)  # the first of them reads the whole repository
@pytest.mark.parametrize("rule", PYTHON_RULES + TEXT_RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule: Rule, complaints: dict[str, list[str]]) -> None:
    assert not complaints[rule.__name__], "\n".join(complaints[rule.__name__])


@pytest.mark.parametrize(("rule", "path", "text"), BAD, ids=_ids(BAD))
def test_the_rule_rejects_bad_text(rule: Rule, path: str, text: str) -> None:
    assert list(rule(path, text))


@pytest.mark.parametrize(("rule", "path", "text"), GOOD, ids=_ids(GOOD))
def test_the_rule_accepts_good_text(rule: Rule, path: str, text: str) -> None:
    assert not list(rule(path, text))


def test_every_rule_is_shown_to_fail() -> None:
    used = {rule.__name__ for rule in PYTHON_RULES + TEXT_RULES}
    assert {rule.__name__ for rule, _, _ in BAD} == used
    assert {name for name in globals() if name.startswith("rule_")} == used


# --- rules on the repository as a whole ----------------------------------------------------------


def missing_twins(core: Path, tests: Path) -> list[str]:
    """Modules under `core` that no `test_<name>.py` or `test_<package>_<name>.py` covers."""
    twins = {path.name for path in tests.rglob("test_*.py")}
    missing = []
    for path in sorted(core.rglob("*.py")):
        name = path.relative_to(core).as_posix()
        if path.name == "__init__.py" or name in NO_TWIN:
            continue
        if name.startswith("testing/") or not _has_functions(path):
            continue  # the simulator's equipment, exercised by tests/sim; pure declarations
        package = path.parent.name
        own = {f"test_{path.stem}.py", f"test_{package}_{path.stem}.py"}
        if package == "messages":  # one schema in several files
            own.add("test_messages.py")
        if not own & twins:
            missing.append(name)
    return missing


def _has_functions(path: Path) -> bool:
    tree = ast.parse(path.read_bytes())
    return any(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in ast.walk(tree))


def test_every_core_module_has_a_test_of_its_own() -> None:
    core = ROOT / "protocols" / "swarmtrain_protocols"
    assert missing_twins(core, ROOT / "tests") == []
    assert all((core / name).is_file() for name in NO_TWIN)


def test_a_module_without_a_twin_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "core" / "dht").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    for name in ("core/a.py", "core/dht/b.py", "core/dht/c.py", "tests/test_dht_b.py"):
        (tmp_path / name).write_text("def f(): ...\n", encoding="utf-8")
    (tmp_path / "core" / "declarations.py").write_text("X = 1\n", encoding="utf-8")
    assert missing_twins(tmp_path / "core", tmp_path / "tests") == ["a.py", "dht/c.py"]


CONVENTIONS = SPEC / "00-conventions.md"


def test_the_conventions_list_every_limit() -> None:
    text = CONVENTIONS.read_text(encoding="utf-8")
    rows = dict(match.groups() for line in text.splitlines() if (match := ROW.match(line)))
    constants = {name: value for name, value in vars(limits).items() if name.isupper()}
    assert {name: quoted(value) for name, value in rows.items()} == constants, "run `make spec`"


def raised_codes(source: str) -> set[str]:
    """Literal codes given to PeerFault in one module."""
    return {
        node.args[0].value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and dotted(node.func).endswith("PeerFault")
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }


def test_the_conventions_explain_every_fault_code() -> None:
    assert raised_codes("raise errors.PeerFault('late', 'x')") == {"late"}
    text = CONVENTIONS.read_text(encoding="utf-8").split("<!-- faults -->")[1]
    explained = set(re.findall(r"^\| `(\w+)` \|", text.split("<!-- end -->")[0], re.MULTILINE))
    raised = {
        code
        for path, source in files(".py")
        if not path.startswith("tests/")
        for code in raised_codes(source)
    }
    assert raised - explained == set(), "explain them in protocols/spec/00-conventions.md"


@pytest.mark.parametrize(
    ("cell", "value"),
    [("4 KiB", 4096), ("2^18 values", 262144), ("0.2 s", 0.2), ("1_024", 1024), ("some", None)],
)
def test_how_a_quoted_number_reads(cell: str, value: float | None) -> None:
    assert quoted(cell) == value
