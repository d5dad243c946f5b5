"""The disk of a site that serves stages: several channels, given up, endangered, fetched slowly."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from swarmtrain_peer import host
from swarmtrain_peer.alarm import DiskAlarm
from swarmtrain_peer.events import EventLog, Record
from swarmtrain_peer.files import FileSystem
from swarmtrain_peer.keeper import Keeper
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.errors import CheckpointError, ConfigError
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.state import CanonicalState
from tests.peer.store_helpers import files
from tests.protocols.pipeline.stage_kit import StageLog
from tests.protocols.rounds_kit import A, B

ONE, TWO = "train/1/0", "train/2/0"
VALUES, EVERY, KEPT = 64, 10, 2
KEYS = RunKeys(stages=2, inner_warmup_steps=0, inner_lr=0.01)


class Site:
    """A keeper with its data plane; steps are applied by hand."""

    def __init__(self, folder: Path) -> None:
        self.data = DataPlane(keys=KEYS)
        self.snapshots: dict[str, list[tuple[int, bytes]]] = {}
        self.disk = ThreadPoolExecutor(1)
        self.restored: dict[str, tuple[int, bytes]] = {}
        self.durable = False
        self.stored: list[tuple[str, int]] = []
        self.events = events = EventLog(folder / "events.jsonl", "ab" * 32)
        self.keeper = Keeper(
            folder,
            data=self.data,
            snapshots=self.snapshots,
            events=events,
            alarm=DiskAlarm(events, folder),
            disk=self.disk,
            every_rounds=EVERY,
            kept=KEPT,
            replicas_min=2,
        )

    def begin(self, channel: str) -> CanonicalState:
        state = self.data.new_state(channel, 0, VALUES)
        state.theta[:] = np.random.default_rng(len(channel)).standard_normal(VALUES)
        self.data.states[channel] = state
        self.keeper.advanced(state)
        return state

    async def step(self, channel: str) -> bytes:
        """One committed step: on disk, then applied; returns its root."""
        state = self.data.states[channel]
        rng = np.random.default_rng([state.round, int(channel.split("/")[1])])
        blob = DataPlane().encode(rng.standard_normal(VALUES).astype(np.float32), "fp32")
        number = state.round
        self.durable = self.keeper.store_result(channel, number, blob, "fp32")
        await asyncio.sleep(0)
        self.data.adopt_result(blob, VALUES, "fp32", channel)
        self.data.apply(fx.ApplyResult(channel, number, blob.root))
        self.keeper.advanced(state)
        return blob.root

    async def settle(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self.disk, lambda: None)
        await asyncio.sleep(0)

    async def recover(self) -> None:
        def restored(state: CanonicalState) -> None:
            self.restored[state.channel] = state.round, state.root()

        def stored(channel: str, number: int, root: bytes) -> None:
            self.stored.append((channel, number))

        await self.keeper.recover(restored, stored)

    def told(self) -> list[Record]:
        return self.events.query()

    def offered(self, channel: str) -> list[int]:
        return [number for number, _ in self.snapshots.get(channel, [])]


def run(folder: Path, story: Callable[[Site], Awaitable[None]]) -> None:
    async def main() -> None:
        site = Site(folder)
        await story(site)
        site.disk.shutdown()

    asyncio.run(main())


def test_each_stage_has_its_own_checkpoints_and_results(tmp_path: Path) -> None:
    roots: dict[str, bytes] = {}

    async def first(site: Site) -> None:
        for channel, steps in ((ONE, 13), (TWO, 27)):
            state = site.begin(channel)
            for _ in range(steps):
                await site.step(channel)
                await site.settle()
            roots[channel] = state.root()
        assert (site.offered(ONE), site.offered(TWO)) == ([0, 10], [10, 20])

    async def second(site: Site) -> None:
        await site.recover()
        assert {c: r for c, (r, _) in site.restored.items()} == {ONE: 10, TWO: 20}
        assert site.stored == [(ONE, n) for n in (10, 11, 12)] + [(TWO, n) for n in range(20, 27)]
        for channel in (ONE, TWO):
            state = site.data.states[channel]
            assert state.slot_names == ("m", "v")
            for number in [n for c, n in site.stored if c == channel]:
                found = site.keeper.store.result(channel, number)
                assert found is not None
                site.data.apply(fx.ApplyResult(channel, number, found.root))
            assert state.root() == roots[channel]

    run(tmp_path, first)
    run(tmp_path, second)


def test_a_stage_that_is_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        for channel in (ONE, TWO):
            site.begin(channel)
        result, other = await site.step(ONE), await site.step(TWO)
        await site.settle()
        root = site.snapshots[ONE][0][1]
        assert site.keeper.provide(root, site.data.provide(root)) is not None
        site.data.drop_state(ONE)
        site.keeper.drop_state(ONE)
        await site.settle()
        for gone in (root, result):
            assert site.keeper.provide(gone, site.data.provide(gone)) is None
        assert site.keeper.provide(other) is not None and site.offered(TWO) == [0]
        assert list(site.data.states) == [TWO] and ONE not in site.snapshots
        assert {p.parent.name[:7] for p in files(tmp_path, ".result")} == {"train-2"}
        assert {p.name[:7] for p in files(tmp_path, ".safetensors")} == {"train-2"}
        site.begin(ONE)  # and back: its first state is saved again
        await site.settle()
        assert site.offered(ONE) == [0]

    run(tmp_path, story)


def test_a_stage_that_comes_back_at_once_keeps_its_new_files(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        site.begin(ONE)
        await site.settle()
        gate = asyncio.Event()
        loop = asyncio.get_running_loop()
        held = asyncio.run_coroutine_threadsafe(gate.wait(), loop)
        site.disk.submit(held.result)  # the disk is busy
        site.data.drop_state(ONE)
        site.keeper.drop_state(ONE)
        site.begin(ONE)
        await site.step(ONE)
        gate.set()
        await site.settle()
        await site.settle()
        assert site.keeper.store.result(ONE, 0) is not None
        assert site.offered(ONE) == [0]

    run(tmp_path, story)


def test_an_endangered_stage_is_saved_at_every_step_the_disk_can_follow(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        log = StageLog(A, B)
        log.assign(A, 1, 2)
        log.assign(B, 2)
        site.keeper.look(log.ledger)
        for channel in (ONE, TWO):
            site.begin(channel)
            await site.settle()
            for _ in range(3):
                await site.step(channel)
                await site.settle()
        assert (site.offered(ONE), site.offered(TWO)) == ([2, 3], [0])
        log.assign(B, 1, 2)
        site.keeper.look(log.ledger)
        await site.step(ONE)
        await site.settle()
        assert site.offered(ONE) == [2, 3], "two serve it again"

    run(tmp_path, story)


def test_what_was_fetched_is_saved_because_later_results_follow_it(tmp_path: Path) -> None:
    """A state that does not continue what is on disk: fetched, or made for a lost stage."""

    async def first(site: Site) -> None:
        site.begin(ONE)
        for _ in range(3):
            await site.step(ONE)
        for number in (17, 12):  # a jump ahead, then a stage that was rebuilt
            other = site.data.new_state(ONE, number, VALUES)
            other.theta[:] = number
            site.data.states[ONE] = other
            site.keeper.advanced(other)
            await site.settle()
            assert site.offered(ONE)[-1] == number
            await site.step(ONE)
            await site.settle()
            assert site.offered(ONE)[-1] == number, "what follows from it waits for its turn"
        made = site.data.new_state(ONE, 12, VALUES)
        await site.keeper.adopt(made)
        assert site.snapshots[ONE][-1] == (12, made.root())

    async def second(site: Site) -> None:
        await site.recover()
        made = site.data.new_state(ONE, 12, VALUES)
        assert site.restored == {ONE: (12, made.root())}

    run(tmp_path, first)
    run(tmp_path, second)


def test_whoever_fetches_an_older_snapshot_gets_it_and_all_results_after_it(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        site.begin(ONE)
        await site.settle()
        root, results = site.snapshots[ONE][0][1], []
        for _ in range(35):
            results.append(await site.step(ONE))
            await site.settle()
        assert site.offered(ONE) == [20, 30]
        blob = site.keeper.provide(root, site.data.provide(root))
        assert blob is not None and Blob.of(blob.chunks).root == root
        for result in results:
            found = site.keeper.provide(result)
            assert found is not None and Blob.of(found.chunks).root == result

    run(tmp_path, story)


class SmallDisk(FileSystem):
    """A disk that is full at times."""

    full = False

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(descriptor, data)


def test_after_a_full_disk_the_chain_is_whole_again_before_anything_counts_as_kept(
    tmp_path: Path,
) -> None:
    roots: list[bytes] = []

    async def first(site: Site) -> None:
        disk = site.keeper.store._fs = SmallDisk()
        state = site.begin(ONE)
        await site.settle()
        await site.step(ONE)
        assert site.durable
        disk.full = True
        for _ in range(2):
            await site.step(ONE)
            await site.settle()
            assert not site.durable
        disk.full = False
        await site.step(ONE)
        assert not site.durable, "it is on disk, but what leads to it is not"
        await site.settle()
        for _ in range(2):
            await site.step(ONE)
            assert site.durable
        roots.append(state.root())
        told = [record["name"] for record in site.events.query() if "disk" in record["name"]]
        assert told == ["disk_full", "disk_freed"]

    async def second(site: Site) -> None:
        await site.recover()
        assert site.restored[ONE][0] == 4 and site.stored == [(ONE, 4), (ONE, 5)]
        for channel, number in site.stored:
            found = site.keeper.store.result(channel, number)
            assert found is not None
            site.data.apply(fx.ApplyResult(channel, number, found.root))
        assert site.data.states[ONE].root() == roots[0]

    run(tmp_path, first)
    run(tmp_path, second)


def test_another_attempt_of_the_round_that_found_no_space_is_enough(tmp_path: Path) -> None:
    """Of two holders both must have it on disk: nothing is committed in between."""

    async def story(site: Site) -> None:
        disk = site.keeper.store._fs = SmallDisk()
        site.begin(ONE)
        await site.settle()
        blob = DataPlane().encode(np.ones(VALUES, np.float32), "fp32")
        disk.full = True
        assert not site.keeper.store_result(ONE, 0, blob, "fp32")
        assert not site.keeper.store_result(ONE, 0, blob, "fp32")
        disk.full = False
        assert site.keeper.store_result(ONE, 0, blob, "fp32")

    run(tmp_path, story)


def test_a_checkpoint_that_found_no_space_is_tried_again_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmtrain_protocols.limits.DISK_FULL_RETRY_S", 0.01)

    async def story(site: Site) -> None:
        disk = site.keeper.store._fs = SmallDisk()
        disk.full = True
        site.begin(ONE)
        await site.settle()
        loop, saved = asyncio.get_running_loop(), asyncio.Event()

        def watch(record: Record) -> None:
            if record["name"] == "checkpoint_saved":
                loop.call_soon_threadsafe(saved.set)

        site.events.subscribe(watch)
        disk.full = False
        async with asyncio.timeout(10.0):
            await saved.wait()
        await site.settle()
        assert site.offered(ONE) == [0]
        blob = DataPlane().encode(np.ones(VALUES, np.float32), "fp32")
        assert site.keeper.store_result(ONE, 0, blob, "fp32")

    run(tmp_path, story)


def test_what_is_on_offer_outlives_its_files(tmp_path: Path) -> None:
    """A member that lives is enough: its disk is emptied under it, and it serves and saves on."""

    async def story(site: Site) -> None:
        state = site.begin(ONE)
        roots = [await site.step(ONE) for _ in range(6)]
        await site.settle()
        first = site.snapshots[ONE][0]
        shutil.rmtree(tmp_path / "checkpoints")
        shutil.rmtree(tmp_path / "results")
        for root in roots:
            blob = site.keeper.provide(root)
            assert blob is not None and Blob.of(blob.chunks).root == root
        offered = site.keeper.provide(first[1], site.data.provide(first[1]))
        assert offered is not None and Blob.of(offered.chunks).root == first[1]
        await site.step(ONE)
        assert not site.durable, "a result that nothing leads to is not on disk"
        await site.settle()
        await site.step(ONE)
        await site.settle()
        assert site.durable
        saved = site.keeper.store.load().channels[ONE]
        assert saved.state.round == 7 and len(saved.results) == 1
        assert state.round == 8
        told = [r for r in site.told() if r["name"] == "fallback"]
        assert [r["what"] for r in told] == ["checkpoint"]

    run(tmp_path, story)


def test_with_a_disk_that_fails_joiners_are_served_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: FileSystem, descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def story(site: Site) -> None:
        state = site.begin(ONE)
        await site.settle()
        monkeypatch.setattr(FileSystem, "write", full)
        roots = [await site.step(ONE) for _ in range(EVERY + 3)]
        await site.settle()
        assert not site.durable
        assert site.offered(ONE)[-1] >= EVERY
        number, root = site.snapshots[ONE][-1]
        blob = site.data.provide(root)
        assert blob is not None and Blob.of(blob.chunks).root == root
        for later in roots[number:]:
            assert site.keeper.provide(later) is not None
        told = [r for r in site.told() if r["name"] == "memory_offered"]
        assert told and told[-1]["round"] == number
        assert state.round == EVERY + 3

    run(tmp_path, story)


def test_results_before_the_oldest_offer_are_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(host, "mono_s", lambda: now[0])

    async def story(site: Site) -> None:
        site.begin(ONE)
        roots = []
        for _ in range(4 * EVERY):
            now[0] += 4.0
            roots.append(await site.step(ONE))
            await site.settle()
        oldest = min(site.keeper.offers.oldest().values())
        assert oldest >= EVERY
        assert [site.keeper.provide(root) is not None for root in roots] == [
            number >= oldest for number in range(len(roots))
        ]

    run(tmp_path, story)


def test_people_prune_and_pin_what_a_live_site_has(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        site.begin(ONE)
        for _ in range(EVERY + 1):
            await site.step(ONE)
            await site.settle()
        assert site.keeper.curate("pin", 1, 0) == {"number": 1, "pinned": True}
        assert site.keeper.curate("prune", 0, 1)["removed"] == []
        site.keeper.curate("unpin", 1, 0)
        site.keeper.provide(site.snapshots[ONE][0][1])  # somebody fetches it
        assert site.keeper.curate("prune", 0, 1)["removed"] == []
        with pytest.raises(CheckpointError, match="fetches it"):
            site.keeper.curate("remove", 1, 0)
        for action, keep in (("prune", 0), ("shred", 1)):
            with pytest.raises(ConfigError):
                site.keeper.curate(action, 0, keep)
        first = site.snapshots[ONE][0][1]
        monotonic = host.mono_s()
        site.keeper.offers._mono_s = lambda: monotonic + 60.0
        assert site.keeper.curate("prune", 0, 1)["removed"] == [1]
        blob = site.keeper.provide(first, site.data.provide(first))
        assert blob is not None and Blob.of(blob.chunks).root == first, "its mapping stays"

    run(tmp_path, story)
