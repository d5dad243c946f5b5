"""Planting a bug: a piece of the source of one function is replaced, and put back afterwards.

A patch whose old text is no longer in the source fails loudly, so a catalogue cannot rot.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

PACKAGE = "swarmtrain_protocols"


@dataclass(frozen=True)
class Patch:
    """``edits`` of the source of ``where``: ``module:function`` or ``module:Class.method``.

    The module is named below the package of the cores; each old text stands there exactly once.
    """

    where: str
    edits: tuple[tuple[str, str], ...]


def patch(where: str, *texts: str) -> Patch:
    """A patch from old and new texts in turn."""
    assert len(texts) % 2 == 0, where
    return Patch(where, tuple(zip(texts[::2], texts[1::2], strict=True)))


class Gone(AssertionError):
    """The text that a patch replaces is not in the source any more."""


def changed(item: Patch) -> tuple[Any, str, Any, Any]:
    """(owner, attribute, original as it stands there, replacement)."""
    module_name, _, path = item.where.partition(":")
    module = importlib.import_module(f"{PACKAGE}.{module_name}")
    owner: Any = module
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    found = inspect.getattr_static(owner, name)
    wrap: Callable[[Any], Any] = lambda made: made  # noqa: E731
    plain = found
    if isinstance(found, property):
        plain, wrap = found.fget, property
    elif isinstance(found, staticmethod | classmethod):
        plain, wrap = found.__func__, type(found)
    source = textwrap.dedent(inspect.getsource(plain))
    source = source[source.index("def ") :]  # without decorators: they are put on again
    for old, new in item.edits:
        if source.count(old) != 1:
            raise Gone(f"{item.where}: {source.count(old)} times in the source: {old!r}")
        source = source.replace(old, new)
    space = dict(vars(module))
    exec(compile(source, f"<planted in {item.where}>", "exec"), space)
    return owner, name, found, wrap(space[name])


def _places(original: object) -> Iterator[tuple[Any, Any]]:
    """(container, key) wherever cores and tests hold a function, also in tables of modules."""
    for name in [n for n in sys.modules if n.startswith((PACKAGE, "tests."))]:
        space = vars(sys.modules[name])
        for key, value in list(space.items()):
            if value is original:
                yield space, key
            elif isinstance(value, dict) and not key.startswith("__"):
                yield from ((value, k) for k, v in list(value.items()) if v is original)


@contextlib.contextmanager
def planted(*patches: Patch) -> Iterator[None]:
    """Within this block the bug is there, in every module that has imported the function."""
    undo: list[Callable[[], None]] = []

    def exchange(old: Any, new: Any) -> None:
        for container, key in list(_places(old)):
            container[key] = new

    try:
        for item in patches:
            owner, name, found, made = changed(item)
            if isinstance(owner, types.ModuleType):
                # Looked for again at the end: a test that is imported meanwhile has it, too.
                undo.append(lambda m=made, f=found: exchange(m, f))  # type: ignore[misc]
                exchange(found, made)
            else:
                undo.append(lambda o=owner, n=name, f=found: setattr(o, n, f))  # type: ignore[misc]
                setattr(owner, name, made)
        yield
    finally:
        for back in reversed(undo):
            back()
