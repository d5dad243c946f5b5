"""``st.serve``: a model of one's own in a pipeline run, with text or tokens of one's own.

Code never travels: every member that serves stages runs the same script, as with ``st.join``.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from swarmtrain.training.place import (
    Place,
    RunArgument,
    await_run_keys,
    check_given,
    ensure_peer,
    resolve,
    show_ticket,
)
from swarmtrain.training.stage_worker import run_stages
from swarmtrain.training.stages.cut import CannotCut, Cut, cut_sequential
from swarmtrain.training.stages.families import OWN_PRESET, cut_model
from swarmtrain.training.trainer import choose_device
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import ConfigError, DataUnavailable, UsageError
from swarmtrain_protocols.manifest import RunKeys

I64 = NDArray[np.int64]
Model = nn.Module | Cut | Callable[[int], Cut]
Data = Callable[[int], ArrayLike]


class OwnData:
    """Sequences by number: 0, 1, … to train on, -1, -2, … the held-out set.

    Args:
        data: number → whole numbers [context + 1], the same ones whenever and wherever asked.
    """

    def __init__(self, data: Data, context: int, vocabulary: int) -> None:
        self._data = data
        self._context = context
        self._vocabulary = vocabulary

    def batch(self, seed: int, position: int, batch_size: int, context: int) -> tuple[I64, I64]:
        """As ``data.Corpus.batch``, from the sequences at this position."""
        return self._rows(range(position * batch_size, (position + 1) * batch_size))

    def evaluation(self, windows: int, context: int) -> tuple[I64, I64]:
        """As ``data.Corpus.evaluation``."""
        return self._rows(range(-1, -1 - windows, -1))

    def _rows(self, numbers: range) -> tuple[I64, I64]:
        rows = np.stack([self._row(number) for number in numbers])
        return rows[:, :-1], rows[:, 1:]

    def _row(self, number: int) -> I64:
        row = np.asarray(self._data(number))
        if row.shape != (self._context + 1,) or row.dtype.kind not in "iu":
            raise DataUnavailable(
                f"sequence {number} of the script's data",
                f"shape {row.shape} of {row.dtype}, not {self._context + 1} whole numbers",
                "return context + 1 token ids: each one but the last is followed by its target",
            )
        if row.min() < 0 or row.max() >= self._vocabulary:
            raise DataUnavailable(
                f"sequence {number} of the script's data",
                f"token ids from {row.min()} to {row.max()}, the model knows {self._vocabulary}",
                "use a tokenizer that fits the model",
            )
        return row.astype(np.int64)


def cut_own(model: Model, stages: int, context: int | None) -> Cut:
    """Cut what a script gave to ``serve``.

    Raises:
        CannotCut: which part is in the way. ConfigError: no equal stages, or no context.
    """
    if isinstance(model, Cut):
        found = model
    elif isinstance(model, nn.Sequential):
        if context is None:
            raise ConfigError(
                "st.serve: context", "an nn.Sequential does not say it", "give context=TOKENS"
            )
        names = [name for name, _ in model.named_children()]
        if len(names) < 3:
            raise CannotCut("the model", f"{len(names)} parts: no embedding, blocks and head")
        found = cut_sequential(model, stages, context=context, embedding=names[0], head=names[-1])
    elif isinstance(model, nn.Module):
        found = cut_model(model, stages)
    else:
        found = model(stages)
    if found.stages != stages:
        raise ConfigError(
            f"st.serve: a model in {found.stages} stages",
            f"the run has stages = {stages}",
            "cut it into as many as the run has",
        )
    return found


def serve(
    model: Model,
    *,
    ticket: str | None = None,
    run: RunArgument = None,
    context: int | None = None,
    data: Data | None = None,
    device: str = "auto",
) -> None:
    """Serve stages of ``model`` until the run ends or this site leaves it.

    Where: as for ``st.join`` (``place.py``). The model given by the first trainer of a run is where
    it starts from; the weights of all others are overwritten. Which stages this site computes is
    decided by the run; the others' weights are only looked at for their shapes.

    Args:
        model: an ``nn.Sequential`` of an embedding, equal blocks and a head; a decoder of Hugging
            Face transformers; or a ``Cut`` (or a function of the number of stages that makes one),
            see ``stages.cut.cut_parts``.
        ticket: ``swarm://…``; default ``SWARMTRAIN_TICKET``.
        run: run keys or a TOML file of a run to found; default ``run.toml`` if it is there.
        context: the most tokens of a sequence, for an ``nn.Sequential``.
        data: number → token ids [context + 1], for every whole number, the same ones at every
            member; negative ones are held out. Default: the run's corpus, byte by byte.
        device: ``auto``, ``cpu``, ``cuda``, …

    Raises:
        UsageError: no run to serve. CannotCut, ConfigError: the model or a key does not fit.
        SwarmError: a refusal, nobody in reach, or a computation that is not finite any more.
    """
    place = resolve(ticket, run, {"preset": OWN_PRESET}, os.environ, pinned=data is None)
    if place is None:
        raise UsageError(
            "st.serve",
            "no ticket, no site and no run: stages are of no use to anybody alone",
            "give run={'stages': 2, ...}, or start it with `swarmtrain join TICKET -- python ...`",
        )
    owned = ensure_peer(place.site)
    try:
        if place.founded:
            show_ticket(place.site)
        keys = await_run_keys(place.site, limits.TRAINER_WAIT_S_MAX)
        _serve_at(place, keys, model, context, data, device)
    finally:
        if owned is not None:
            owned.close()


def _serve_at(
    place: Place,
    keys: RunKeys,
    model: Model,
    context: int | None,
    data: Data | None,
    device: str,
) -> None:
    check_given(keys, place.given)
    if not keys.stages:
        raise ConfigError(
            "st.serve", "this run is no pipeline: stages = 0", "use st.join, or found one"
        )
    cut = cut_own(model, keys.stages, context)
    texts = None if data is None else OwnData(data, cut.context, cut.vocabulary)
    sys.stderr.write(f"swarmtrain: serving stages of {keys.name}; see `swarmtrain status`\n")
    stop = threading.Event()
    why = run_stages(place.site, keys, choose_device(device), stop, 0.0, cut=cut, texts=texts)
    sys.stderr.write(f"swarmtrain: it is over: {why or 'the peer process is gone'}\n")
