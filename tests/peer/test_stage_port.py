"""The peer process talks to the trainer of its stages: in order, and through its deaths."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from swarmtrain_peer import stage_link as sl
from swarmtrain_peer.stage_port import StagePort

HELLO = sl.Hello(1, "cpu", b"h" * 32, (4, 8), 12)


def trainer(path: Path, script: Callable[[sl.StageLine], None]) -> threading.Thread:
    """A trainer that greets, then does what ``script`` says, then goes away."""

    def run() -> None:
        line = sl.connect(path)
        line.send(HELLO)
        script(line)
        line.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


class Seen:
    """What the port has called, and waiting for it."""

    def __init__(self) -> None:
        self.said: list[object] = []
        self._changed = asyncio.Event()

    def __call__(self, *what: object) -> None:
        self.said.append(what[0] if len(what) == 1 else what)
        self._changed.set()

    async def until(self, count: int) -> list[object]:
        async with asyncio.timeout(10):
            while len(self.said) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.said


def test_commands_are_answered_in_order(tmp_path: Path) -> None:
    def script(line: sl.StageLine) -> None:
        for number in range(3):
            command, payload = line.receive()
            assert isinstance(command, sl.Load) and command.version == number
            line.send(sl.Done(float(number)), [bytes(payload) * 2])

    async def main() -> None:
        seen = Seen()
        port = StagePort(tmp_path / "s", seen, lambda why: seen("lost"))
        thread = trainer(tmp_path / "s", script)
        assert await seen.until(1) == [HELLO]
        for number in range(3):
            port.submit(sl.Load(0, number), [b"ab", b"c"], seen)
        found = await seen.until(5)
        assert found[1:4] == [(sl.Done(float(n)), bytearray(b"abcabc")) for n in range(3)]
        assert found[4] == "lost", "noticed though nothing was asked"
        thread.join()
        port.close()

    asyncio.run(main())


def test_a_trainer_that_dies_fails_what_waits_and_the_next_is_welcome(tmp_path: Path) -> None:
    async def main() -> None:
        seen = Seen()
        port = StagePort(tmp_path / "s", seen, lambda why: seen("lost"))
        port.submit(sl.Clear((0,)), [], seen)
        (none,) = await seen.until(1)
        assert isinstance(none, tuple) and none[0].code == "no_trainer"
        reached = threading.Event()

        def dies(line: sl.StageLine) -> None:
            line.receive()
            reached.set()

        thread = trainer(tmp_path / "s", dies)
        await seen.until(2)
        for _ in range(3):
            port.submit(sl.Clear((0,)), [], seen)
        found = await seen.until(6)
        assert [one[0].code for one in found[2:5]] == ["no_trainer"] * 3
        assert found[5] == "lost" and reached.is_set()
        thread.join()

        def answers(line: sl.StageLine) -> None:
            line.receive()
            line.send(sl.Failed("malformed", "why"))

        thread = trainer(tmp_path / "s", answers)
        await seen.until(7)
        port.submit(sl.Clear((0,)), [], seen)
        found = await seen.until(8)
        assert found[6:8] == [HELLO, (sl.Failed("malformed", "why"), bytearray())]
        thread.join()
        port.close()

    asyncio.run(main())
