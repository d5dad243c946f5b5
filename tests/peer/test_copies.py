"""Copies of other stages: kept below a bound, offered, replaced, found again after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from swarmtrain_peer.copies import Copies
from swarmtrain_peer.events import EventLog
from swarmtrain_peer.offers import Offers
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.state import CanonicalState
from tests.peer.store_helpers import files

VALUES = 100
NBYTES = 3 * 4 * VALUES
ONE, TWO, THREE = "train/1/0", "train/2/0", "train/3/0"


class Shelf:
    """The copies of one site, with room for two of three."""

    def __init__(self, folder: Path, bytes_max: int = 2 * NBYTES) -> None:
        folder.mkdir(exist_ok=True)
        self.data = DataPlane(keys=RunKeys(stages=3))
        self.snapshots: dict[str, list[tuple[int, bytes]]] = {}
        self.events = EventLog(folder / "events.jsonl", "ab" * 32)
        self.disk = ThreadPoolExecutor(1)
        offers = Offers(self.data, self.snapshots, 2, lambda: 0.0)
        self.copies = Copies(
            folder / "copies",
            offers=offers,
            events=self.events,
            disk=self.disk,
            bytes_max=bytes_max,
        )

    def state(self, channel: str, round_number: int) -> CanonicalState:
        state = self.data.new_state(channel, round_number, VALUES)
        for seed, array in enumerate(state.arrays):
            array[:] = np.random.default_rng([seed, round_number]).standard_normal(VALUES)
        return state

    async def settle(self) -> None:
        """Wait for the disk, and for what it tells the loop."""
        await asyncio.get_running_loop().run_in_executor(self.disk, lambda: None)
        await asyncio.sleep(0)

    def told(self, name: str) -> int:
        return sum(record["name"] == name for record in self.events.query())


def run(folder: Path, story: Callable[[Shelf], Awaitable[None]], **fields: int) -> None:
    async def main() -> None:
        shelf = Shelf(folder, **fields)
        await story(shelf)
        shelf.disk.shutdown()

    asyncio.run(main())


def test_a_copy_is_offered_like_a_snapshot_and_replaced_by_a_newer_one(tmp_path: Path) -> None:
    async def story(shelf: Shelf) -> None:
        old, new = shelf.state(ONE, 20), shelf.state(ONE, 40)
        assert shelf.copies.keep(old)
        assert shelf.snapshots == {}, "not before it is on disk"
        await shelf.settle()
        assert shelf.snapshots == {ONE: [(20, old.root())]}
        blob = shelf.data.provide(old.root())
        assert blob is not None and [bytes(c) for c in blob.chunks] == [
            old.chunk(i) for i in range(len(blob.chunks))
        ]
        shelf.copies.keep(new)
        assert shelf.snapshots == {ONE: [(20, old.root())]}
        await shelf.settle()
        assert shelf.snapshots == {ONE: [(40, new.root())]}
        assert shelf.data.provide(old.root()) is not None, "somebody may be fetching it"
        assert len(files(tmp_path, ".safetensors")) == 1
        assert shelf.data.states == {}
        shelf.copies.drop(ONE)
        await shelf.settle()
        assert shelf.snapshots == {ONE: []} and files(tmp_path, ".safetensors") == []
        assert shelf.told("copy_saved") == 2

    run(tmp_path, story)


def test_the_oldest_makes_room_and_what_never_fits_is_not_kept(tmp_path: Path) -> None:
    async def story(shelf: Shelf) -> None:
        for channel in (ONE, TWO):
            shelf.copies.keep(shelf.state(channel, 5))
        shelf.copies.keep(shelf.state(ONE, 25))
        shelf.copies.keep(shelf.state(THREE, 5))
        assert shelf.copies.rounds() == {ONE: 25, THREE: 5}
        await shelf.settle()
        assert {c: len(have) for c, have in shelf.snapshots.items()} == {ONE: 1, THREE: 1}
        assert len(files(tmp_path, ".safetensors")) == 2

    run(tmp_path, story)

    async def too_large(shelf: Shelf) -> None:
        assert not shelf.copies.keep(shelf.state(TWO, 5))
        assert shelf.copies.rounds() == {} and shelf.told("fallback") == 1

    run(tmp_path / "small", too_large, bytes_max=NBYTES - 1)


def test_a_copy_that_is_dropped_while_it_is_written_is_not_offered(tmp_path: Path) -> None:
    async def story(shelf: Shelf) -> None:
        shelf.copies.keep(shelf.state(ONE, 20))
        shelf.copies.drop(ONE)
        await shelf.settle()
        assert shelf.snapshots == {} and shelf.copies.rounds() == {}
        assert files(tmp_path, ".safetensors") == []

    run(tmp_path, story)


def test_a_restart_offers_what_is_whole(tmp_path: Path) -> None:
    roots: list[bytes] = []

    async def first(shelf: Shelf) -> None:
        for channel in (ONE, TWO):
            state = shelf.state(channel, 20)
            roots.append(state.root())
            shelf.copies.keep(state)
        await shelf.settle()

    async def second(shelf: Shelf) -> None:
        await shelf.copies.recover()
        assert shelf.snapshots == {TWO: [(20, roots[1])]}
        assert shelf.told("checkpoint_refused") == 1

    run(tmp_path, first)
    (broken,) = [p for p in files(tmp_path, ".safetensors") if p.name.startswith("train-1")]
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    run(tmp_path, second)
