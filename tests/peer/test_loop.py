"""What a callback raises ends the process in good order, not only one thing in it."""

from __future__ import annotations

import asyncio

import pytest

from swarmtrain_peer import loop as loops


def test_what_a_callback_raises_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[Exception] = []

    def breaks() -> None:
        raise KeyError("a result")

    async def go() -> None:
        loop = asyncio.get_running_loop()
        heard = asyncio.Event()

        def tell(error: Exception) -> None:
            told.append(error)
            heard.set()

        loops.on_bug(loop, tell)
        loop.call_soon(breaks)
        # Of transports that die of the network, and of tasks, only the trace is printed.
        loop.call_exception_handler({"message": "Fatal error", "exception": OSError("no route")})
        await asyncio.wait_for(heard.wait(), 5.0)

    loops.run(go())
    assert [repr(error) for error in told] == ["KeyError('a result')"]
