"""300 simulated members for an hour, with the cores compiled: `python -m benchmarks.hour`.

The simulation is `swarmtrain_protocols.testing.hour`: one process, Python that calls small methods
by the hundred million. mypyc (it comes with mypy) makes C of a copy of the package in `build/hour`,
which takes some minutes once and wants a C compiler; a short swarm is then played twice, as it is
and compiled, and must leave the same trace. `--interpreted` plays without compiling anything.

Gigabytes of small objects miss the processor's table of pages all the time: on Linux they lie in
huge pages, large ones by a tunable of glibc's allocator, small ones by ``arenas.c``.

Prints what the simulation prints, with the real and the processor time of all of it but compiling
(growing to all members included, and told apart), how many modules were compiled and whether small
objects lay in arenas of our own; exits with 1 if a bar of the simulation is missed, or if all of it
took ten real minutes or more.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "protocols"
TARGET = ROOT / "build" / "hour"
PACKAGE = "swarmtrain_protocols"
ENTRY = f"{PACKAGE}.testing.hour"
REAL_S_MAX = 600.0
SHORT = ("--members", "20", "--grow", "40", "--seconds", "30")
LEFT_OUT = {
    "pipeline": "this swarm has no stages: only what is asked all the same",
    "errors": "exceptions stay classes of Python",
}
ASKED = tuple(f"pipeline.{name}" for name in ("core", "whole", "errands", "workqueue"))
NOT_FOR_C = ("Struct", "NamedTuple", "numba")
"""Modules with these words stay as they are: schemas of msgspec, named tuples, other compilers."""
PLAY = """
import importlib, importlib.util, os, sys
if importlib.util.find_spec("arenas"):
    import arenas
from swarmtrain_protocols.testing import hour
suffix, *names = sys.argv[1].split()
for name in names:
    path = importlib.import_module(name).__file__
    if not path.endswith(suffix):
        sys.exit(f"{name} is not compiled: {path}")
hour.lighten()
hour.main(sys.argv[2:], leave=os._exit)
"""
ARENAS = ROOT / "benchmarks" / "arenas.c"
ROOMY = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.tcache_count=4096"}
GROWN = re.compile(r"\d+ s: \d+ members")
"""The first line that the simulation tells: all members are there."""
LIST = "import sys, swarmtrain_protocols.testing.hour; print(*sys.modules)"


def environment(path: Path) -> dict[str, str]:
    """For this interpreter with the package at ``path``."""
    env = {**os.environ, "PYTHONPATH": str(path), "MYPYC_OPT_LEVEL": "1", "MYPYC_DEBUG_LEVEL": "0"}
    if platform.libc_ver()[0] == "glibc":
        env.update(ROOMY)
    return env


def python(path: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with the package at ``path``."""
    command, env = [sys.executable, *arguments], environment(path)
    return subprocess.run(command, env=env, text=True, check=False, **options)


def candidates() -> list[str]:
    """The modules that the simulation imports and that are compiled, by dotted name."""
    listed = python(SOURCE, "-c", LIST, stdout=subprocess.PIPE)
    names = [n for n in listed.stdout.split() if n.startswith(PACKAGE + ".")]
    chosen = []
    for name in sorted(names):
        path = SOURCE / (name.replace(".", "/") + ".py")
        short = name.removeprefix(PACKAGE + ".")
        left_out = short in LEFT_OUT or short.split(".")[0] in LEFT_OUT
        if not path.is_file() or (left_out and short not in ASKED):
            continue  # a package, or named above
        text = path.read_text().replace("struct.Struct", "")  # that one is no schema
        if not any(word in text for word in NOT_FOR_C):
            chosen.append(name)
    return chosen


def prepare(path: Path) -> None:
    """Make annotations of dataclasses' fields harmless that mypyc would look up while it imports.

    Names that are imported for type checkers only are not there then, and of ``object`` it does
    not know where to look. A union is no name, so ``X`` becomes ``X | Any``.
    """
    text = path.read_text()
    tree = ast.parse(text)
    absent = {"object"}
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            absent |= {
                alias.asname or alias.name
                for item in node.body
                if isinstance(item, ast.ImportFrom | ast.Import)
                for alias in item.names
            }
    lines = text.splitlines()
    changed = False
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or not node.decorator_list:
            continue
        for field in node.body:
            if not isinstance(field, ast.AnnAssign):
                continue
            if ast.unparse(field.annotation).split(".")[0].split("[")[0] in absent:
                line, end = field.annotation.end_lineno, field.annotation.end_col_offset
                assert line is not None and end is not None
                lines[line - 1] = f"{lines[line - 1][:end]} | _Any{lines[line - 1][end:]}"
                changed = True
    if changed:
        future = lines.index("from __future__ import annotations")
        lines.insert(future + 1, "from typing import Any as _Any")
        path.write_text("\n".join(lines) + "\n")


def digest_of_sources() -> str:
    """Changes whenever something has to be compiled again."""
    hasher = hashlib.sha256(f"{version('mypy')} {sys.version}".encode())
    for path in [Path(__file__), ARENAS, *sorted((SOURCE / PACKAGE).rglob("*.py"))]:
        hasher.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return hasher.hexdigest()


def compile_cores(names: Sequence[str]) -> None:
    """Fill ``build/hour``, unless it is from these sources.

    Raises:
        SystemExit: there is no compiler, or it refused.
    """
    stamp, digest = TARGET / "compiled", digest_of_sources()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    if shutil.which(os.environ.get("CC", "cc")) is None:
        raise SystemExit("no C compiler: install one, or use --interpreted")
    shutil.rmtree(TARGET, ignore_errors=True)
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE / PACKAGE, TARGET / PACKAGE, ignore=hidden)
    files = [name.replace(".", "/") + ".py" for name in names]
    for file in files:
        prepare(TARGET / file)
    flags = ("--ignore-missing-imports", "--follow-imports=silent")
    with (TARGET / "log").open("w") as log:
        sys.stderr.write(f"compiling {len(files)} modules, some minutes\n")
        done = python(
            TARGET, "-m", "mypyc", *flags, *files, cwd=TARGET, stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode:
        tail = (TARGET / "log").read_text()[-2000:]
        raise SystemExit(f"mypyc ended with {done.returncode}; see {TARGET / 'log'}\n{tail}")
    if sys.platform == "linux":
        build_arenas(TARGET)
    stamp.write_text(digest)


def build_arenas(folder: Path) -> None:
    """Make the module ``arenas`` in ``folder``, for a process that starts with that on its path.

    Raises:
        CalledProcessError: the compiler refused, and has said why.
    """
    built = folder / f"arenas{EXTENSION_SUFFIXES[0]}"
    compiler = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC"]
    include = f"-I{sysconfig.get_config_var('INCLUDEPY')}"
    subprocess.run([*compiler, include, str(ARENAS), "-o", str(built)], check=True)


def play(path: Path, names: Sequence[str], arguments: Sequence[str], quiet: bool) -> dict[str, Any]:
    """The figures of one swarm, and what it took; ``names`` must be compiled."""
    suffix = EXTENSION_SUFFIXES[0] if names else ".py"
    began_s, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    grown_s = began_s
    command = [sys.executable, "-c", PLAY, " ".join([suffix, *names]), *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment(path), text=True, stdout=pipe, stderr=pipe
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if grown_s == began_s and GROWN.match(line):
                grown_s = time.monotonic()
            if not quiet:
                sys.stderr.write(line)
        printed = process.stdout.read()
    ended_s, after = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if not printed:
        raise SystemExit(f"the simulation ended with {process.returncode}")
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    figures: dict[str, Any] = json.loads(printed)
    return {
        **figures,
        "real_s": round(ended_s - began_s, 1),
        "growing_real_s": round(grown_s - began_s, 1),
        "hour_real_s": round(ended_s - grown_s, 1),
        "cpu_s": round(cpu_s, 1),
        "modules_compiled": len(names),
        "arenas": any(path.glob("arenas.*")),
    }


def same_trace(names: Sequence[str]) -> str:
    """The trace of a short swarm, equal with and without compiling.

    Raises:
        SystemExit: it is not.
    """
    plain = play(SOURCE, (), SHORT, quiet=True)["trace"]
    compiled = play(TARGET, names, SHORT, quiet=True)["trace"]
    if plain != compiled:
        raise SystemExit(f"compiled cores do something else: {compiled}, not {plain}")
    return str(plain)


def commit() -> str:
    """What is checked out, with a ``+`` if files differ from it."""
    git = ("git", "-C", str(ROOT))
    found = subprocess.run(
        [*git, "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status. Other options go to the simulation."""
    parser = argparse.ArgumentParser(prog="hour", description=__doc__)
    parser.add_argument("--interpreted", action="store_true", help="compile nothing")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    given, rest = parser.parse_known_args(argv)
    names: list[str] = []
    checked: dict[str, str] = {}
    if not given.interpreted:
        names = candidates()
        compile_cores(names)
        checked = {"trace_short": same_trace(names)}
    figures = play(TARGET if names else SOURCE, names, rest, quiet=False)
    if figures["real_s"] >= REAL_S_MAX:
        figures["missed"].append("real_s")
    machine = {"machine": platform.machine(), "python": platform.python_version()}
    result = json.dumps({**figures, **checked, **machine, "commit": commit()}, indent=1)
    if given.output is not None:
        given.output.write_text(result + "\n")
    sys.stdout.write(result + "\n")
    return int(bool(figures["missed"]))


if __name__ == "__main__":
    sys.exit(main())
