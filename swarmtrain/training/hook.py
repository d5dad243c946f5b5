"""``st.join``: put a training loop into a swarm, or let it run alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from swarmtrain.training.place import (
    Place,
    RunArgument,
    await_run_keys,
    check_given,
    ensure_peer,
    resolve,
    show_ticket,
)
from swarmtrain.training.port import Control, Document
from swarmtrain.training.swarm import Swarm
from swarmtrain.training.view import SwarmState
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import ConfigError

Outer = tuple[float, float] | Mapping[str, float] | None


def join(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    ticket: str | None = None,
    run: RunArgument = None,
    outer: Outer = None,
    inner_steps: int | None = None,
    overlap: str | None = None,
    codec: str | None = None,
    fragments: int | None = None,
    state: Mapping[str, Any] | None = None,
    on_event: Callable[[Document], None] | None = None,
) -> Swarm:
    """Hook ``optimizer`` so that the loop around it trains with the swarm.

    Where: see ``place.py``; without ticket, site and run, or with ``SWARMTRAIN_OFFLINE=1``, the
    loop simply trains. A peer process is started if none serves the run on this machine. Blocks
    until the run's parameters are in ``model``, overwriting what was there unless this is the first
    trainer of the run.

    Args:
        model: its trainable parameters, in its own order, are what is shared.
        ticket: ``swarm://…``; default ``SWARMTRAIN_TICKET``.
        run: run keys or a TOML file of a run to found; default ``run.toml`` if it is there.
        outer: outer (learning rate, momentum), or a mapping with ``lr`` and ``momentum``.
        inner_steps: optimizer steps between hand-overs.
        overlap: ``off``, ``delayed``, ``eager`` or ``auto``.
        codec: on the wire, both ways.
        fragments: number of parts of the model that are shared in turn.
        state: reserved; must be empty.
        on_event: called with every event, on the training thread.

    The arguments from ``outer`` to ``fragments`` are run keys: they found a run or must equal it.

    Raises:
        SwarmError: a bad argument, a refusal, nobody in reach. Later trouble is an event.
    """
    if state:
        raise ConfigError("st.join: state", "extra state is not shared by this version", "omit it")
    given = _run_keys(outer, inner_steps, overlap, codec, fragments)
    place = resolve(ticket, run, given, os.environ)
    if place is None:
        return Swarm(model, optimizer, fragments=fragments or 1, on_event=on_event)
    return _join_at(place, model, optimizer, on_event)


def _join_at(
    place: Place,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    on_event: Callable[[Document], None] | None,
) -> Swarm:
    owned = ensure_peer(place.site)
    try:
        if place.founded:
            show_ticket(place.site)
        keys = await_run_keys(place.site, limits.TRAINER_WAIT_S_MAX)
        check_given(keys, place.given)

        def connect() -> Control:
            return place.site.connect()

        return Swarm(
            model,
            optimizer,
            connect=connect,
            fragments=keys.fragments,
            on_event=on_event,
            on_close=owned.close if owned is not None else None,
        )
    except BaseException:
        if owned is not None:
            owned.close()
        raise


def _run_keys(
    outer: Outer,
    inner_steps: int | None,
    overlap: str | None,
    codec: str | None,
    fragments: int | None,
) -> dict[str, object]:
    given: dict[str, object] = {}
    if outer is not None:
        pair = (outer["lr"], outer["momentum"]) if isinstance(outer, Mapping) else outer
        given["outer_lr"], given["outer_momentum"] = pair
    if codec is not None:
        given["codec_scatter"] = given["codec_gather"] = codec
    named = {"inner_steps": inner_steps, "overlap": overlap, "fragments": fragments}
    given |= {name: value for name, value in named.items() if value is not None}
    return given


__all__ = ["Swarm", "SwarmState", "join"]
