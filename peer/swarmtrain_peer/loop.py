"""The event loop of a peer process: uvloop where it exists, plain asyncio elsewhere."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A fresh loop; ``type(loop).__module__`` tells which (``doctor`` shows it)."""
    try:
        uvloop = importlib.import_module("uvloop")
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def on_bug(loop: asyncio.AbstractEventLoop, tell: Callable[[Exception], None]) -> None:
    """Have ``tell`` hear what a callback of ``loop`` raises, besides its trace on standard error.

    What the callback was to do is not done, and nothing else would ever notice.
    """

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        error = context.get("exception")
        if "handle" in context and isinstance(error, Exception):
            tell(error)

    loop.set_exception_handler(handle)


def run(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` on ``new_event_loop``."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
