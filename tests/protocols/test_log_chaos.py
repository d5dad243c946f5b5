"""Random fault schedules for the log. The bugs that they must find are in ``tests/mutants``."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.protocols.log_chaos import Chaos

SEEDS = 200
FEW = 12
PER_TEST = 50


EXPECTED = (
    "crash leader_crashed partition leader_isolated hand_over change_asked "
    "snapshot_loaded compacted elected"
)


@pytest.mark.parametrize("start", range(0, SEEDS, PER_TEST))
def test_random_schedules_are_safe_and_end_in_agreement(start: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(start, start + PER_TEST):
        chaos = Chaos(seed)
        try:
            chaos.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        seen.update(set(chaos.seen))
    for kind in EXPECTED.split():  # a fault that hardly ever happens tests nothing
        assert seen[kind.replace("_", " ")] >= PER_TEST // 10, (kind, seen)


def test_a_schedule_replays_exactly() -> None:
    worlds = [Chaos(9).run() for _ in range(2)]
    assert worlds[0].sent == worlds[1].sent and worlds[0].oracle.truth == worlds[1].oracle.truth


@pytest.mark.parametrize("crew", [5, 7])
def test_sets_of_five_and_seven_grow_shrink_and_end_in_agreement(crew: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(FEW):
        chaos = Chaos(seed, crew=crew)
        chaos.run()
        seen.update(set(chaos.seen))
        sizes = {len(core.voters) for s in chaos.world.sites.values() if (core := s.core)}
        seen.update(f"{n} at the end" for n in sizes)
    assert seen["change asked"] >= FEW // 2 and seen["leader crashed"] >= FEW // 4, seen
    assert sum(seen[f"{n} at the end"] > 0 for n in (1, 3, 5, 7)) >= 3, seen


@pytest.mark.parametrize("crew", [3, 5, 7])
def test_a_log_that_is_begun_again_replaces_all_others(crew: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(FEW):
        chaos = Chaos(seed, crew=crew, recovers=True)
        chaos.run()
        seen.update(set(chaos.seen))
    for kind in ("recovered", "superseded", "partition", "leader crashed"):
        assert seen[kind] >= FEW // 4, (kind, seen)
