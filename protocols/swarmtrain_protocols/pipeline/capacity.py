"""What a swarm of workers can do: micro-batches per second through all stages.

A worker does ``speed`` units of work per second and may divide it freely between the stages it
serves; one micro-batch costs ``cost`` units at a stage. Routing by least finish time drives the
workers towards the division that the slowest stage needs most, so the throughput is that of the
best division: by Hall's condition (max flow, min cut)

    mu = min over sets X of stages: speed of all who serve a stage of X / cost of X.

Where every worker serves one stage, this is the rate of the slowest stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

EPSILON = 1e-9
"""Relative: what is closer than this is equal."""

Sets = Mapping[tuple[int, ...], float]
"""Sum of the speeds of the workers that serve exactly these stages."""


def throughput(speeds: Sets, costs: Mapping[int, float]) -> tuple[float, tuple[int, ...]]:
    """The throughput, and the largest set of stages found that holds it down.

    Newton's method on the ratio (Dinkelbach): each set of stages that cannot be served at the
    rate tried gives the next, lower one; it ends after at most one round per stage.
    """
    assert costs and all(cost > 0 for cost in costs.values()), costs
    tight = tuple(sorted(costs))
    rate = _ratio(tight, speeds, costs)
    while rate > 0.0:
        short = _unserved(rate, speeds, costs)
        lower = _ratio(short, speeds, costs) if short else rate
        if not lower < rate * (1.0 - EPSILON):
            break
        tight, rate = short, lower
    return rate, tight


def _ratio(stages: tuple[int, ...], speeds: Sets, costs: Mapping[int, float]) -> float:
    chosen = frozenset(stages)
    work = sum(speed for served, speed in speeds.items() if not chosen.isdisjoint(served))
    return work / sum(costs[stage] for stage in stages)


def _unserved(rate: float, speeds: Sets, costs: Mapping[int, float]) -> tuple[int, ...]:
    """Stages that lack work at ``rate`` however it is divided, with all that share their workers.

    Workers of a single stage give it all they have; the rest is a flow from the others.
    """
    need = {stage: rate * cost - speeds.get((stage,), 0.0) for stage, cost in costs.items()}
    spare = {served: speed for served, speed in sorted(speeds.items()) if len(served) > 1}
    given: dict[tuple[int, ...], dict[int, float]] = {served: {} for served in spare}
    floor = {stage: EPSILON * rate * cost for stage, cost in costs.items()}
    short: list[int] = []
    for stage in sorted(costs):
        while need[stage] > floor[stage]:
            path = _augmenting(stage, spare, given, floor[stage])
            if not path:
                short.append(stage)
                break
            amount = min(need[stage], spare[path[-1][0]])
            for (served, _), (_, later) in itertools.pairwise(path):
                amount = min(amount, given[served][later])
            _push(path, amount, spare, given)
            need[stage] -= amount
    return _closure(short, given)


_Path = list[tuple[tuple[int, ...], int]]
"""(worker set, stage it is to serve more): each stage but the first was served by the set before,
which gives it up; the last set has work to spare."""


def _augmenting(
    stage: int,
    spare: Mapping[tuple[int, ...], float],
    given: Mapping[tuple[int, ...], Mapping[int, float]],
    floor: float,
) -> _Path:
    """The shortest chain of hand-overs that frees work for ``stage``; empty: there is none."""
    seen = {stage}
    paths: list[tuple[int, _Path]] = [(stage, [])]
    used: set[tuple[int, ...]] = set()
    for target, path in paths:  # grows while it is read: breadth first
        for served in spare:
            if target not in served or served in used:
                continue
            used.add(served)
            here = [*path, (served, target)]
            if spare[served] > floor:
                return here
            for other in served:
                if other not in seen and given[served].get(other, 0.0) > floor:
                    seen.add(other)
                    paths.append((other, here))
    return []


def _push(
    path: _Path,
    amount: float,
    spare: dict[tuple[int, ...], float],
    given: Mapping[tuple[int, ...], dict[int, float]],
) -> None:
    for index, (served, stage) in enumerate(path):
        given[served][stage] = given[served].get(stage, 0.0) + amount
        if index + 1 < len(path):
            given[served][path[index + 1][1]] -= amount
        else:
            spare[served] -= amount


def _closure(
    short: list[int], given: Mapping[tuple[int, ...], Mapping[int, float]]
) -> tuple[int, ...]:
    """With every stage, those that are served by workers who could serve it instead."""
    reached = list(short)
    for stage in reached:  # grows while it is read
        for served, flows in given.items():
            if stage in served:
                reached += [s for s, flow in flows.items() if flow > 0.0 and s not in reached]
    return tuple(sorted(reached))
