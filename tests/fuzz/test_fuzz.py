"""A short pass over every target, every input that once broke one, and an engine that notices."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from random import Random

import msgpack
import pytest

from swarmtrain_protocols import messages
from swarmtrain_protocols.errors import PeerFault
from tests.fuzz.__main__ import add_up, log_line
from tests.fuzz.engine import CORPUS, SLOW_S, Engine, Report, Target
from tests.fuzz.mutate import mutate_bytes, splice_json, splice_msgpack, splice_text
from tests.fuzz.schema import SchemaSplice
from tests.fuzz.targets import COVERS, PLANNED, make_targets
from tests.fuzz.wire_targets import ENCODED, SAMPLES

INPUTS = 12_000
"""Of the short pass, over all targets; ``python -m tests.fuzz`` for long ones."""
NAMES = sorted(name for names in COVERS.values() for name in names)


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, Target]]:
    made = {target.name: target for target in make_targets()}
    yield made
    for target in made.values():
        target.close()


@pytest.mark.parametrize("name", NAMES)
def test_hostile_bytes_are_taken_or_refused_and_nothing_else(
    name: str, targets: dict[str, Target]
) -> None:
    engine = Engine(targets[name], seed=1)
    engine.corpus()
    shares = sum(target.share for target in targets.values())
    report = engine.go(round(INPUTS * targets[name].share / shares))
    assert not report.findings, "\n".join(
        f"{found.kind}: {found.detail}\n{found.data!r}" for found in report.findings
    )
    assert report.accepted > 0, "only refusals: what is behind them is never tried"


def test_every_planned_target_is_there(targets: dict[str, Target]) -> None:
    assert tuple(COVERS) == PLANNED and all(COVERS.values())
    assert sorted(targets) == NAMES
    folders = sorted(path.name for path in CORPUS.iterdir())
    assert folders and set(folders) <= set(NAMES)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*.bin")) < 256 * 1024


# -- the engine notices ---------------------------------------------------------------------------

SEED = msgpack.packb({"type": "ping", "nonce": 7})


def _fuzzed(target: Target, inputs: int = 3000) -> Report:
    engine = Engine(target)
    engine.corpus()
    return engine.go(inputs)


def _crashes(data: bytes) -> object:
    if b"ping" not in data:
        raise ValueError("no ping")
    return msgpack.unpackb(data)["nonce"] + 1  # no number: TypeError


def test_an_error_of_another_type_is_found() -> None:
    report = _fuzzed(Target("planted", _crashes, (ValueError,), [SEED], splice_msgpack))
    assert {found.kind for found in report.findings} == {"exception"}
    assert any("TypeError" in found.detail for found in report.findings)
    assert report.refused > 0 and report.accepted > 0


def _slow(data: bytes) -> object:
    """Takes three times what is allowed by the engine's own clock, however fast the machine is."""
    until_s = time.thread_time() + 3 * SLOW_S * (data[-1:] == b"\xff")
    while time.thread_time() < until_s:
        pass
    return 0


def _big(data: bytes) -> object:
    return len(bytearray(int.from_bytes(data[:3], "big")))


def test_a_slow_input_and_one_that_takes_memory_are_found() -> None:
    slow = _fuzzed(Target("slow", _slow, (), [b"abc\xff"]), inputs=10)
    assert [found.kind for found in slow.findings] == ["slow"]
    big = _fuzzed(Target("big", _big, (), [b"\x08\x00\x00"]), inputs=10)
    assert [found.kind for found in big.findings] == ["memory"]


def test_inputs_are_a_function_of_target_and_seed() -> None:
    def inputs_of(seed: int) -> list[bytes]:
        seen: list[bytes] = []
        Engine(Target("same", seen.append, (), [SEED], splice_msgpack), seed).go(200)
        return seen

    assert inputs_of(5) == inputs_of(5) != inputs_of(6)


def test_a_log_of_several_runs_is_added_up_and_no_seed_counts_twice() -> None:
    report = _fuzzed(Target("planted", _crashes, (ValueError,), [SEED], splice_msgpack), 50)
    lines = [log_line(report, seed) for seed in (1, 2)]
    found = add_up(lines)
    assert found["inputs"] == 2 * report.inputs == found["by_target"]["planted"]["inputs"]
    assert found["unexpected"] == 2 * len(report.findings) and found["targets"] == 1
    with pytest.raises(ValueError, match="twice"):
        add_up([*lines, lines[0]])


def test_every_kind_of_change_happens() -> None:
    rng = Random(3)
    changed = [mutate_bytes(rng, SEED * 3, b"other") for _ in range(3000)]
    sizes = {len(data) for data in changed}
    assert min(sizes) < len(SEED) and max(sizes) > 6 * len(SEED)
    assert any(data.endswith(b"her") for data in changed)
    values = [splice_msgpack(rng, SEED) for _ in range(3000)]
    for wanted in (b"\xcb\x7f\xf8", b"\xcb\x7f\xf0", b"no such key", b"\x81\xa4type\xa4ping"):
        assert any(wanted in data for data in values), wanted
    assert any(b"NaN" in splice_json(rng, b'{"a": 1.5}') for _ in range(500))
    assert any(b"../" in splice_text(rng, b"text") for _ in range(500))


def test_changes_within_the_schema_mostly_decode_again() -> None:
    splice = SchemaSplice(messages.decode, messages.encode, SAMPLES, lambda rng, data: data)
    rng, legal, same = Random(4), 0, 0
    for data in itertools.islice(itertools.cycle(ENCODED), 2000):
        found = splice(rng, data)
        same += found == data
        try:
            legal += type(messages.decode(found)) is type(messages.decode(data))
        except PeerFault:
            pass  # one item more than a list may have
    assert legal > 1900 and same < 1500
