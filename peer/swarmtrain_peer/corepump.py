"""Drives one small core on the event loop: carries out its effects and calls it when it wants."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, Protocol

from swarmtrain_peer import host
from swarmtrain_protocols.core import Effect

DELAY_S_MIN = 0.001


class Pumped(Protocol):
    """What of ``core.Core`` is needed."""

    def tick(self, now: float) -> None: ...

    def deadline(self) -> float: ...

    def drain(self) -> list[Effect]: ...


class CorePump:
    """``execute(effect)`` may call ``run`` again."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, core: Pumped, execute: Callable[[Effect], None]
    ) -> None:
        self._loop = loop
        self._core = core
        self._execute = execute
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def run(self, call: Callable[..., Any], *args: object, **named: object) -> Any:
        """``call(now, …)`` a method of the core, and carry out what follows."""
        result = call(host.mono_s(), *args, **named)
        self.pump()
        return result

    def pump(self) -> None:
        """Carry out what the core has asked for."""
        while not self._closed and (effects := self._core.drain()):
            for effect in effects:
                self._execute(effect)
        self._arm()

    def close(self) -> None:
        """The core is called no more."""
        self._closed = True
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = math.inf if self._closed else self._core.deadline()
        if deadline < math.inf:
            delay_s = max(DELAY_S_MIN, deadline - host.mono_s())
            self._timer = self._loop.call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.run(self._core.tick)
