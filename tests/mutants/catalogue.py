"""The catalogue of planted bugs: what each takes away, where it comes from, who must find it.

Half of them follow from a sentence of a specification and were written down before the code was
read (``from_spec``); the others take out a check that stands in the code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.mutants.patching import Patch


@dataclass(frozen=True)
class Finder:
    """``seeds`` of a suite of ``suites.SUITES``, tried in order."""

    suite: str
    seeds: range


@dataclass(frozen=True)
class Mutant:
    """One planted bug.

    ``name`` says what holds without it. ``source``: the sentence, as document and section, or the
    module whose check is gone.
    """

    name: str
    area: str
    source: str
    from_spec: bool
    patches: tuple[Patch, ...]
    finders: tuple[Finder, ...]


AREAS = ("rounds", "log", "transfer", "membership", "pipelines", "data")


def find(suite: str, first: int, stop: int | None = None) -> Finder:
    """One seed, or those from ``first`` to before ``stop``."""
    return Finder(suite, range(first, first + 1 if stop is None else stop))


def maker(area: str, from_spec: bool, *default: Finder) -> Callable[..., Mutant]:
    """``make(name, source, patch or patches, *finders)`` of a mutant of that area.

    ``default``: who looks for it if no finder is named.
    """

    def make(
        name: str, source: str, patches: Patch | tuple[Patch, ...], *finders: Finder
    ) -> Mutant:
        listed = (patches,) if isinstance(patches, Patch) else patches
        return Mutant(name, area, source, from_spec, listed, finders or default)

    return make


def catalogue() -> tuple[Mutant, ...]:
    """All of them, in the order of their areas."""
    from tests.mutants import clip, data, log, members, pipelines, rounds, transfer

    tables = (rounds, clip, log, transfer, members, pipelines, data)
    return tuple(item for table in tables for item in table.MUTANTS)
