"""The site that hosts a lost stage: candidates are made and tried in turn, and one is adopted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from swarmtrain_peer import stage_link as sl
from swarmtrain_peer.alarm import DiskAlarm
from swarmtrain_peer.events import EventLog, read_events
from swarmtrain_peer.keeper import Keeper
from swarmtrain_peer.stage_rebuild import CALIBRATION_FIRST, StageRebuild
from swarmtrain_protocols.core import Effect
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.errors import SwarmError
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.candidates import fresh
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.state import CanonicalState

KEYS = RunKeys(stages=3, seed=5)
SHAPES = sl.Shapes(3, (("blocks.0.out.weight", (4, 3)), ("blocks.0.gain", (4,))))
VALUES, LOST, STEP = 16, 2, 9
AWAY = sl.Failed("no_trainer", "it is away")


class Bench:
    """A site with a real data plane and disk; its trainer and its node are played here."""

    def __init__(self, folder: Path) -> None:
        self.loop = asyncio.get_running_loop()
        self.path = folder / "events.jsonl"
        self.events = EventLog(self.path, "ab" * 32)
        self.data = DataPlane(keys=KEYS)
        self.disk, self.pool = ThreadPoolExecutor(1), ThreadPoolExecutor(2)
        self.snapshots: dict[str, list[tuple[int, bytes]]] = {}
        self.keeper = Keeper(
            folder,
            data=self.data,
            snapshots=self.snapshots,
            events=self.events,
            disk=self.disk,
            every_rounds=10,
            kept=2,
            alarm=DiskAlarm(self.events, folder),
        )
        self.told: list[tuple[Any, ...]] = []
        self.news = asyncio.Event()
        self.trainer = True
        self.loaded: list[tuple[int, bytes, int]] = []
        self.reloaded: list[int] = []
        self.served: tuple[int, ...] = (LOST,)
        self.channels: dict[str, Any] = {}
        heard = ("calibration", "candidates_built", "candidate_ready", "candidate_failed")
        node = SimpleNamespace(
            pipeline=SimpleNamespace(**{name: self._hear(name) for name in heard}),
            restore=self._hear("restore"),
            ledger=SimpleNamespace(channels=self.channels),
        )
        runtime: Any = SimpleNamespace(
            events=self.events,
            data=self.data,
            keeper=self.keeper,
            pool=self.pool,
            manifest=SimpleNamespace(keys=KEYS),
            node=node,
            driver=SimpleNamespace(run=lambda call, *args: call(*args), offload=self._offload),
            fail=self._hear("fail"),
        )
        self.runtime = runtime
        self.rebuild = StageRebuild(
            runtime,
            ask=self._ask,
            load=self._load,
            reload=self.reloaded.append,
            served=lambda: self.served,
        )

    def _hear(self, name: str) -> Callable[..., None]:
        def hear(*args: Any) -> None:
            self.told.append((name, *args))
            self.news.set()

        return hear

    def _offload(self, work: Callable[[], Any], done: Any, failed: Any) -> None:
        try:
            done(work())
        except SwarmError as error:
            failed(error)

    def _answer(self, header: Any, data: bytes = b"") -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self.loop.create_future()
        future.set_result((header, bytearray(data)) if self.trainer else (AWAY, bytearray()))
        return future

    def _ask(self, command: sl.Command) -> asyncio.Future[Any]:
        if isinstance(command, sl.Tokens):
            assert command.held_out
            return self._answer(sl.Done(), b"batch %d" % command.micro_batch)
        assert command == sl.Describe(LOST)
        return self._answer(sl.Done(), msgspec.msgpack.encode(SHAPES))

    def _load(self, stage: int, theta: Any, version: int) -> asyncio.Future[Any]:
        self.loaded.append((stage, theta.tobytes(), version))
        return self._answer(sl.Done())

    def do(self, effect: Effect) -> None:
        assert self.rebuild.execute(effect)

    async def heard(self, count: int) -> tuple[Any, ...]:
        """What the node was told last, once that is so many things."""
        async with asyncio.timeout(10):
            while len(self.told) < count:
                self.news.clear()
                await self.news.wait()
        return self.told[-1]

    def state(self, stage: int, round_: int = STEP) -> CanonicalState:
        made = self.data.new_state(stage_channel(stage), round_, VALUES)
        made.theta[:] = np.random.default_rng(stage).standard_normal(VALUES)
        return made

    def here(self, stage: int, what: str) -> px.CandidateInput:
        """A neighbour whose state this site holds."""
        state = self.state(stage)
        self.data.states[state.channel] = state
        snapshot = fx.Snapshot(state.channel, STEP, state.root(), VALUES)
        return px.CandidateInput(what, snapshot, True)

    def foreign(self, stage: int, what: str) -> px.CandidateInput:
        """A state whose chunks have been fetched."""
        state = self.state(stage, 4)
        snapshot = fx.Snapshot(state.channel, 4, state.root(), VALUES, True)
        blob = state.blob()
        for index, place in enumerate(self.data.destinations(snapshot, 0, len(blob.chunks))):
            place[:] = blob.chunks[index]
        return px.CandidateInput(what, snapshot, False)

    async def built(self) -> list[str]:
        inputs = (self.here(1, "left"), self.here(3, "right"), self.foreign(LOST, "snapshot"))
        self.do(px.BuildCandidates(LOST, inputs, (1.0, 2.0)))
        name, stage, names = await self.heard(len(self.told) + 1)
        assert (name, stage) == ("candidates_built", LOST)
        found: list[str] = names
        return found


def run(folder: Path, story: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        bench = Bench(folder)
        await story(bench)
        bench.rebuild.close()
        bench.events.close()
        bench.disk.shutdown()
        bench.pool.shutdown()

    asyncio.run(main())


def test_held_out_data_are_those_that_measure_nothing_else(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        bench.do(px.NeedCalibration(LOST, 3))
        wanted = [b"batch %d" % n for n in range(CALIBRATION_FIRST, CALIBRATION_FIRST + 3)]
        assert await bench.heard(1) == ("calibration", LOST, wanted)

    run(tmp_path, story)


def test_a_trainer_that_is_away_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmtrain_peer.stage_rebuild.TRAINER_AGAIN_S", 0.001)

    async def story(bench: Bench) -> None:
        bench.trainer = False
        bench.do(px.NeedCalibration(LOST, 1))
        bench.loop.call_later(0.02, lambda: setattr(bench, "trainer", True))
        assert (await bench.heard(1))[0] == "calibration"
        names = await bench.built()
        bench.trainer = False
        bench.do(px.TryCandidate(LOST, names[0], STEP))
        await asyncio.wait(bench.rebuild._rebuilds[LOST].tasks)
        assert len(bench.told) == 2, "no verdict on a candidate that nobody has tried"

    run(tmp_path, story)


def test_candidates_are_tried_and_the_choice_is_adopted(tmp_path: Path) -> None:
    """The trial's state, the adopted one and the one on disk are the same."""

    async def story(bench: Bench) -> None:
        names = await bench.built()
        assert names[0] == "snapshot" and {"copy-left", "copy-right", "fresh"} <= set(names)
        expected = {
            "snapshot": bench.state(LOST).theta,
            "copy-left": bench.state(1).theta,
            "copy-right": bench.state(3).theta,
            "fresh": fresh(SHAPES.tensors, KEYS.seed, LOST, SHAPES.depth),
        }
        roots = {}
        for number, (name, theta) in enumerate(expected.items()):
            bench.do(px.TryCandidate(LOST, name, STEP))
            said, stage, tried, roots[name] = await bench.heard(2 + number)
            assert (said, stage, tried) == ("candidate_ready", LOST, name)
            assert bench.loaded[-1] == (LOST, theta.tobytes(), STEP)
            assert bench.rebuild.on_trial(LOST), "other weights of the stage wait"
        assert len(set(roots.values())) == 4
        channel = stage_channel(LOST)
        root = roots["copy-right"]
        bench.channels[channel] = SimpleNamespace(round=STEP, start_hash=root)
        bench.do(px.AdoptCandidate(LOST, "copy-right", STEP, root))
        bench.do(px.DropCandidates(LOST))
        assert not bench.rebuild.on_trial(LOST) and bench.reloaded == [LOST]
        assert await bench.heard(6) == ("restore", channel, STEP, root)
        state = bench.data.states[channel]
        assert state.root() == root and not any(slot.any() for slot in state.slots.values())
        assert bench.reloaded == [LOST, LOST] and bench.snapshots[channel] == [(STEP, root)]
        assert bench.keeper.store.load().channels[channel].state.root() == root

    run(tmp_path, story)


def test_a_choice_that_the_log_has_left_behind_is_not_used(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        await bench.built()
        bench.do(px.TryCandidate(LOST, "copy-left", STEP))
        root = (await bench.heard(2))[3]
        bench.channels[stage_channel(LOST)] = SimpleNamespace(round=STEP, start_hash=bytes(32))
        bench.do(px.AdoptCandidate(LOST, "copy-left", STEP, root))
        await asyncio.wait(bench.rebuild._adopting)
        assert stage_channel(LOST) not in bench.data.states and len(bench.told) == 2

    run(tmp_path, story)
    assert [r for r in read_events(tmp_path / "events.jsonl") if r["name"] == "fallback"]


def test_inputs_that_have_moved_on_are_told_and_left_out(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        left, right = bench.here(1, "left"), bench.here(3, "right")
        bench.data.states[stage_channel(1)].theta[0] += 1
        del bench.data.states[stage_channel(3)]
        bench.do(px.BuildCandidates(LOST, (left, right), (0.0, 0.0)))
        names = (await bench.heard(1))[2]
        assert "fresh" in names and not {"copy-left", "copy-right"} & set(names)

    run(tmp_path, story)
    told = [r for r in read_events(tmp_path / "events.jsonl") if r["name"] == "fallback"]
    assert [record["what"].split()[0] for record in told] == ["left", "right"]


def test_a_site_without_the_module_says_so(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        await bench.built()
        bench.served = (1,)
        bench.do(px.TryCandidate(LOST, "fresh", STEP))
        assert (await bench.heard(2))[:3] == ("candidate_failed", LOST, "fresh")
        assert not bench.loaded and not bench.rebuild.on_trial(LOST)

    run(tmp_path, story)


def test_copies_of_other_stages_go_to_the_disk(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        snapshot = bench.foreign(1, "left").snapshot
        bench.do(px.KeepCopy(snapshot))
        assert bench.keeper.copies.rounds() == {snapshot.channel: 4}
        assert snapshot.channel not in bench.data.states
        bench.do(px.DropCopy(snapshot.channel))
        assert bench.keeper.copies.rounds() == {}
        bench.runtime.keeper = None
        bench.do(px.KeepCopy(bench.foreign(3, "right").snapshot))
        bench.do(px.DropCopy(stage_channel(3)))
        assert not bench.rebuild.execute(px.CancelCompute(1)), "another one's work"

    run(tmp_path, story)
    told = [r for r in read_events(tmp_path / "events.jsonl") if r["name"] == "fallback"]
    assert [record["what"] for record in told] == ["no copy of train/3/0"]
