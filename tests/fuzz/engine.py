"""The engine: feeds a target, watches what every input must keep, and keeps what is new.

For every input the target returns or raises one of its typed errors; nothing else. It takes under
``SLOW_S`` of processor time (an input that took longer is tried again, the machine may be busy).
For every ``MEMORY_EVERY``-th input the peak of memory taken stays below twice the input and
``MEMORY_BYTES`` (more where a target says so). Whatever else a target promises, it asserts itself:
an ``AssertionError`` is a finding like any other exception.

Inputs whose outcome has not been seen before (kind of error, its text without digits, or what the
target returned) join the pool that later inputs are made from.
"""

from __future__ import annotations

import re
import time
import traceback
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz.mutate import Splice, mutate_bytes

CORPUS = Path(__file__).parent / "corpus"
SLOW_S = 0.010
SLOW_TRIES = 5
MEMORY_BYTES = 64 * 1024
MEMORY_EVERY = 256
POOL_MAX = 4096
POOL_BYTES_MAX = 8 * 1024 * 1024
FINDINGS_MAX = 20
_DETAIL = re.compile(r"[0-9a-f]{4,}|\d+|'[^']*'|\"[^\"]*\"|`[^`]*`")


@dataclass(frozen=True)
class Target:
    """Something that takes hostile bytes.

    Args:
        run: takes one input; what it returns names the outcome (None: accepted).
        errors: what it may raise.
        seeds: inputs that mean something.
        splice: changes the structure of an input.
        memory_bytes: what one input may take beyond twice its size.
        slow_s: processor time that one input may take.
        share: its part of the inputs of a run over all targets; slow ones take less.
    """

    name: str
    run: Callable[[bytes], object]
    errors: tuple[type[BaseException], ...]
    seeds: Sequence[bytes]
    splice: Splice | None = None
    memory_bytes: int = MEMORY_BYTES
    slow_s: float = SLOW_S
    close: Callable[[], None] = lambda: None
    share: float = 1.0


@dataclass(frozen=True)
class Finding:
    """An input that broke the promise."""

    target: str
    kind: str
    detail: str
    data: bytes

    @property
    def file_name(self) -> str:
        return f"{zlib.crc32(self.data):08x}.bin"


@dataclass
class Report:
    """What came of one target."""

    target: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    outcomes: int = 0
    slowest_s: float = 0.0
    peak_bytes: int = 0
    wall_s: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    def line(self) -> str:
        rate = self.inputs / self.wall_s if self.wall_s else 0.0
        return (
            f"{self.target:<20}{self.inputs:>10,}{rate:>10,.0f}/s{self.accepted:>10,} taken"
            f"{self.refused:>10,} refused{self.outcomes:>6} outcomes"
            f"{1000 * self.slowest_s:>7.2f} ms{len(self.findings):>4} unexpected"
        )


def shape(error: BaseException) -> str:
    """An error without what differs between inputs."""
    return f"{type(error).__name__}: {_DETAIL.sub('#', str(error))[:60]}"


def regressions(name: str, folder: Path = CORPUS) -> list[bytes]:
    """Inputs that once broke a target, and others worth keeping: ``corpus/NAME/*.bin``."""
    return [path.read_bytes() for path in sorted((folder / name).glob("*.bin"))]


class Engine:
    """Runs one target. Deterministic in (target, seed), but for the times it measures."""

    def __init__(self, target: Target, seed: int = 0) -> None:
        self.target = target
        self.report = Report(target.name)
        self._rng = Random(f"{target.name} {seed}")
        self._pool = [*target.seeds, *regressions(target.name)]
        self._pool_bytes = 0
        self._seen: dict[str, None] = {}
        self._shapes: dict[str, None] = {}
        assert self._pool, "a target needs an input that means something"

    def corpus(self) -> None:
        """Seeds and regressions as they are."""
        for data in list(self._pool):
            self.feed(data)

    def go(self, inputs: int, seconds: float = float("inf")) -> Report:
        """Feed ``inputs`` mutated inputs, for at most ``seconds``."""
        begin_s = time.perf_counter()
        for number in range(inputs):
            self.feed(self._make())
            enough = len(self.report.findings) >= FINDINGS_MAX
            if enough or (number % 64 == 0 and time.perf_counter() - begin_s > seconds):
                break
        self.report.wall_s += time.perf_counter() - begin_s
        return self.report

    def feed(self, data: bytes) -> None:
        """One input."""
        self.report.inputs += 1
        if self.report.inputs % MEMORY_EVERY == 1:
            self._weigh(data)
        begin_s = time.thread_time()
        outcome, finding = self._one(data)
        taken_s = time.thread_time() - begin_s
        if taken_s > self.target.slow_s:
            taken_s = min(taken_s, *(self._time(data) for _ in range(SLOW_TRIES)))
            if taken_s > self.target.slow_s:
                self._found("slow", f"{1000 * taken_s:.1f} ms", data)
        self.report.slowest_s = max(self.report.slowest_s, taken_s)
        if finding:
            self._found("exception", finding, data)
        elif outcome not in self._seen and len(self._seen) < POOL_MAX:
            self._seen[outcome] = None
            self.report.outcomes += 1
            if self._pool_bytes + len(data) <= POOL_BYTES_MAX:
                self._pool_bytes += len(data)
                self._pool.append(data)

    def _make(self) -> bytes:
        rng = self._rng
        data = rng.choice(self._pool)
        if self.target.splice is not None and rng.random() < 0.6:
            return self.target.splice(rng, data)
        return mutate_bytes(rng, data, rng.choice(self._pool))

    def _one(self, data: bytes) -> tuple[str, str]:
        """(outcome, what was unexpected)."""
        try:
            result = self.target.run(data)
        except self.target.errors as error:
            self.report.refused += 1
            return shape(error), ""
        except Exception as error:  # noqa: BLE001, whatever it is, it is what is looked for
            return shape(error), "".join(traceback.format_exception(error)[-4:])
        self.report.accepted += 1
        return f"taken {result}", ""

    def _time(self, data: bytes) -> float:
        begin_s = time.thread_time()
        self._one(data)
        return time.thread_time() - begin_s

    def _weigh(self, data: bytes) -> None:
        """The memory that an input takes, at most; measured a second time if it is much.

        The first time may fill caches that stay.
        """
        allowed = 2 * len(data) + self.target.memory_bytes
        peak = allowed
        for _ in range(3):
            tracemalloc.start()
            try:
                self._one(data)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            if peak <= allowed:
                break
        self.report.peak_bytes = max(self.report.peak_bytes, peak)
        if peak > allowed:
            self._found("memory", f"{peak} bytes for an input of {len(data)}", data)

    def _found(self, kind: str, detail: str, data: bytes) -> None:
        """Once for each shape of trouble."""
        last = detail.strip().splitlines()[-1] if kind == "exception" else ""
        shaped = f"{kind} {_DETAIL.sub('#', last)}"
        if shaped not in self._shapes:
            self._shapes[shaped] = None
            self.report.findings.append(Finding(self.target.name, kind, detail, data))
