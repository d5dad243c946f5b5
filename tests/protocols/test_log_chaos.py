"""Random fault schedules for the log, and planted bugs that they must find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import CheckpointError, PeerFault
from swarmtrain_protocols.log import recovery
from swarmtrain_protocols.log.certificate import Snapshot, SnapshotFile
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.log.election import Election
from swarmtrain_protocols.log.entrylog import EntryLog
from swarmtrain_protocols.log.fence import Fence
from swarmtrain_protocols.log.records import EntriesRecord, VoteRecord, decode_record
from swarmtrain_protocols.log.state import LogState
from swarmtrain_protocols.log.view import View
from swarmtrain_protocols.messages.log import Recovered, VoteRequest
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


def _votes_on(chaos: Chaos, patch: pytest.MonkeyPatch) -> None:
    def votes(self: LogState) -> bool:
        views = (self.log.view, self.log.committed_view)
        return any(v is not None and v.has_voter(self.me) for v in views)

    patch.setattr(LogState, "votes", property(votes))


def _leads_on(chaos: Chaos, patch: pytest.MonkeyPatch) -> None:
    def on_recovered(self: LogCore, peer: PeerId, message: Recovered) -> None:
        if self._fence.proven(peer, message.recovery):
            self._follower.reload(peer)

    patch.setattr(LogCore, "_on_recovered", on_recovered)


def _nobody_is_told(chaos: Chaos, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Fence, "_tell", lambda self, peer, recovery: None)


def _later_snapshots_do_not_say_where_they_began(chaos: Chaos, patch: pytest.MonkeyPatch) -> None:
    def file(self: EntryLog, snapshot: Snapshot) -> SnapshotFile:
        links = tuple(link for link in self.links if link.index <= snapshot.body.index)
        return SnapshotFile(self.genesis, links, snapshot.file.body, snapshot.file.certificate)

    patch.setattr(EntryLog, "snapshot_file", file)


def _the_generation_goes_on(chaos: Chaos, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "_generation", lambda log, steward: log.generation + 0)


MUTANTS = {
    "votes are not durable": _forgetting(VoteRecord),
    "entries are not durable": _forgetting(EntriesRecord),
    "votes for anybody's log": _votes_for_anybodys_log,
    "the new set alone decides": _new_set_alone_decides,
    "half is enough": _half_is_enough,
}
OF_LARGER_SETS = {
    (5, "the new set alone decides"): _new_set_alone_decides,
    (5, "entries are not durable"): _forgetting(EntriesRecord),
    (7, "half is enough"): _half_is_enough,
}
OF_RECOVERY = {
    "an old steward goes on voting": _votes_on,
    "an old leader goes on leading": _leads_on,
    "nobody is told": _nobody_is_told,
    "later snapshots do not say where they began": _later_snapshots_do_not_say_where_they_began,
    "the generation goes on": _the_generation_goes_on,
}


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


@pytest.mark.parametrize("name", OF_RECOVERY)
def test_a_planted_bug_of_recoveries_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(OF_RECOVERY[name], monkeypatch, recovers=True), name


@pytest.mark.parametrize(("crew", "name"), OF_LARGER_SETS)
def test_a_planted_bug_of_larger_sets_is_found(
    crew: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(OF_LARGER_SETS[crew, name], monkeypatch, crew=crew), name


def found(
    plant: Callable[[Chaos, pytest.MonkeyPatch], None],
    patch: pytest.MonkeyPatch,
    *,
    crew: int = 3,
    recovers: bool = False,
) -> bool:
    """Whether some schedule goes wrong with that bug in place."""
    for seed in range(SEEDS):
        chaos = Chaos(seed, crew=crew, recovers=recovers)
        plant(chaos, patch)
        try:
            chaos.run()
        except (AssertionError, PeerFault, CheckpointError):
            return True
    return False


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(MUTANTS[name], monkeypatch), f"{SEEDS} schedules did not notice: {name}"
