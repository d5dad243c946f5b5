"""An explicit-state model checker: every state that a small configuration can reach, breadth first.

A model says where it begins, what may happen next and what must hold. Breadth first means that the
trace of a violation is as short as any. Whether a decision stays possible is reachability too: from
every state, by steps that are no faults, a state must be reachable in which all is settled. (That
is the temporal formula AG EF settled, with faults ended; Clarke, Emerson 1981.)
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np

STATES_MAX = 20_000_000

Step = tuple[str, bool, bytes]
"""What happens, whether it is a fault, and the state after it."""


class Model(Protocol):
    """States are byte strings, so that millions of them fit into memory."""

    def begin(self) -> bytes:
        """The one state that everything begins with."""

    def steps(self, state: bytes) -> Iterator[Step]:
        """Everything that may happen next."""

    def broken(self, state: bytes) -> str:
        """The name of the invariant that does not hold here, or ''."""

    def settled(self, state: bytes) -> bool:
        """Whether everybody who is there has one and the same outcome."""

    def show(self, state: bytes) -> str:
        """The state in words, for a trace."""


@dataclass
class Found:
    """What a search came to. ``depth``: steps to the state that is farthest from the beginning.

    ``violation``: the invariant, ``stuck`` if no decision is reachable, or ''; ``trace``: how.
    """

    states: int = 0
    transitions: int = 0
    depth: int = 0
    settled: int = 0
    violation: str = ""
    trace: list[str] = field(default_factory=list)
    happened: dict[str, int] = field(default_factory=dict)
    """How often each kind of step (the first word of its label) was taken."""
    complete: bool = True


class _Search:
    """Numbers of states in order of discovery, their parents, and edges that are no faults."""

    def __init__(self) -> None:
        self.numbers: dict[bytes, int] = {}
        self.parents = array("i")
        self.sources = array("i")
        self.targets = array("i")
        self.settled = array("i")

    def add(self, state: bytes, parent: int) -> int:
        number = self.numbers[state] = len(self.parents)
        self.parents.append(parent)
        return number


def explore(model: Model, states_max: int = STATES_MAX, *, liveness: bool = True) -> Found:
    """Visit all states; ends at the first violation, or with ``complete`` False at the limit."""
    search, found = _Search(), Found()
    layer = [model.begin()]
    search.add(layer[0], -1)
    fine = True
    while layer and fine and found.complete:
        following: list[bytes] = []
        fine = all(_visit(model, state, search, found, following) for state in layer)
        found.complete = len(search.parents) <= states_max
        found.depth += bool(following and fine)
        layer = following
    found.states = len(search.parents)
    if fine and liveness and found.complete:
        _look_for_stuck(model, search, found)
    return found


def _visit(
    model: Model, state: bytes, search: _Search, found: Found, following: list[bytes]
) -> bool:
    """Look at a state and at what may follow; False if an invariant is broken in it."""
    number = search.numbers[state]
    wrong = model.broken(state)
    if wrong:
        found.violation = wrong
        found.trace = trace_to(model, search, number)
        return False
    if model.settled(state):
        found.settled += 1
        search.settled.append(number)
    happened, numbers = found.happened, search.numbers
    for label, fault, after in model.steps(state):
        found.transitions += 1
        kind = label.partition(" ")[0]
        happened[kind] = happened.get(kind, 0) + 1
        target = numbers.get(after)
        if target is None:
            target = search.add(after, number)
            following.append(after)
        if not fault:
            search.sources.append(number)
            search.targets.append(target)
    return True


def _look_for_stuck(model: Model, search: _Search, found: Found) -> None:
    """Walk back from settled states; a state that is not met has no way to any of them."""
    count = len(search.parents)
    sources = np.frombuffer(search.sources, np.int32)
    targets = np.frombuffer(search.targets, np.int32)
    order = np.argsort(targets, kind="stable")
    sources = sources[order]
    starts = np.searchsorted(targets[order], np.arange(count + 1))
    fine = np.zeros(count, bool)
    front = np.frombuffer(search.settled, np.int32)
    fine[front] = True
    while front.size:
        lengths = starts[front + 1] - starts[front]
        offsets = np.repeat(starts[front] - np.cumsum(lengths) + lengths, lengths)
        before = np.unique(sources[offsets + np.arange(lengths.sum())])
        front = before[~fine[before]]
        fine[front] = True
    stuck = np.flatnonzero(~fine)
    if stuck.size:
        found.violation = "stuck"
        found.trace = trace_to(model, search, int(stuck[0]))
        found.trace.append(f"no decision is reachable from here; {stuck.size} such states")


def trace_to(model: Model, search: _Search, number: int) -> list[str]:
    """The steps from the beginning to a state, each with what it led to."""
    path = [number]
    while search.parents[path[-1]] >= 0:
        path.append(search.parents[path[-1]])
    path.reverse()
    wanted = dict.fromkeys(path)
    states = {n: state for state, n in search.numbers.items() if n in wanted}
    lines = ["begin: " + model.show(states[path[0]])]
    for before, after in pairwise(path):
        label = next(text for text, _, s in model.steps(states[before]) if s == states[after])
        lines.append(f"{label}: {model.show(states[after])}")
    return lines


__all__ = ["Found", "Model", "Step", "explore"]
