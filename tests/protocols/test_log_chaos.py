"""Random fault schedules for the log, and planted bugs that they must find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import CheckpointError, PeerFault
from swarmtrain_protocols.log.election import Election
from swarmtrain_protocols.log.records import EntriesRecord, VoteRecord, decode_record
from swarmtrain_protocols.log.view import View
from swarmtrain_protocols.messages.log import (
    VoteRequest,
)
from tests.protocols.log_chaos import Chaos

SEEDS = 200
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


def _forgetting(kind: type) -> Callable[[Chaos, pytest.MonkeyPatch], None]:
    def plant(chaos: Chaos, patch: pytest.MonkeyPatch) -> None:
        for site in chaos.world.sites.values():
            site.forget = lambda record: isinstance(decode_record(record), kind)

    return plant


def _votes_for_anybodys_log(chaos: Chaos, patch: pytest.MonkeyPatch) -> None:
    def grant(self: Election, peer: PeerId, request: VoteRequest) -> bool:
        s = self._s
        if request.term < s.term or (request.pre and request.term == s.term):
            return False
        return request.term > s.term or s.voted_for in (b"", peer)

    patch.setattr(Election, "_would_grant", grant)


def _new_set_alone_decides(chaos: Chaos, patch: pytest.MonkeyPatch) -> None:
    def quorum(self: View, agrees: Callable[[bytes], bool]) -> bool:
        return 2 * sum(1 for p in self.voters if agrees(p)) > len(self.voters)

    patch.setattr(View, "quorum", quorum)


def _half_is_enough(chaos: Chaos, patch: pytest.MonkeyPatch) -> None:
    def quorum(self: View, agrees: Callable[[bytes], bool]) -> bool:
        groups = [g for g in (self.voters, self.joint) if g]
        return all(2 * sum(1 for p in g if agrees(p)) >= max(2, len(g) - 1) for g in groups)

    patch.setattr(View, "quorum", quorum)


MUTANTS = {
    "votes are not durable": _forgetting(VoteRecord),
    "entries are not durable": _forgetting(EntriesRecord),
    "votes for anybody's log": _votes_for_anybodys_log,
    "the new set alone decides": _new_set_alone_decides,
    "half is enough": _half_is_enough,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(SEEDS):
        chaos = Chaos(seed)
        MUTANTS[name](chaos, monkeypatch)
        try:
            chaos.run()
        except (AssertionError, PeerFault, CheckpointError):
            return
    raise AssertionError(f"{SEEDS} schedules did not notice: {name}")
