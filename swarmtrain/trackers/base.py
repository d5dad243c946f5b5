"""What a tracker is, and which numbers it gets.

A tracker is any object with the three methods of ``Tracker``. It hears of this site's rounds, of
losses on the held-out text whoever measured them, and now and then how the run stands. Names are
paths (``loss/held_out``, ``round/compute_s``, ``user/accuracy``), steps are rounds, or steps of a
pipeline. No names of peers, no addresses, no tickets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from swarmtrain_peer.events import Record

Document = dict[str, Any]
Scalars = dict[str, float]

_OF_ROUNDS = (
    *("bytes_sent", "bytes_received", "bytes_up", "bytes_down", "compute_s", "wait_s", "encode_s"),
    *("send_s", "receive_s", "reduce_s", "apply_s", "samples", "compute_utilization"),
)
_OF_RUNS = (
    *("members", "connected", "generation", "term", "rounds_committed", "rounds_aborted"),
    *("bytes_sent", "bytes_received"),
)
_OF_DATA = ("epoch", "epochs", "shards_done", "shards_free", "shards_held", "samples_counted")
_OF_TRAINERS = ("step", "samples", "compute_utilization")


class Tracker(Protocol):
    """Takes a run's numbers somewhere. Called on one thread; an exception ends it, not the run."""

    def begin(self, run: Document) -> None:
        """Before anything else: ``run``, ``name``, ``site`` and ``site_name``, as in ``status``."""

    def scalars(self, step: int, wall_s: float, values: Scalars) -> None:
        """Finite numbers at a round, with the Unix time at which they were known."""

    def close(self) -> None:
        """Write what is left. Nothing comes after it."""


def scalars_of_event(record: Record) -> tuple[int, Scalars] | None:
    """(round, numbers) of an event; None if there are none in it."""
    name, found = record.get("name"), {}
    if name == "evaluated":
        found = {"loss/held_out": record.get("loss")}
    elif name == "round_figures":
        found = {f"round/{key}": record.get(key) for key in _OF_ROUNDS}
        found["loss/train"] = record.get("loss")
    elif name == "step_committed":
        found = {"loss/train": record.get("loss")}
    number = record.get("round") if record.get("round") is not None else record.get("step")
    values = _numbers(found)
    return (int(number), values) if values and number is not None else None


def scalars_of_status(status: Mapping[str, Any]) -> tuple[int, Scalars]:
    """(round, numbers) of what ``swarmtrain status`` says."""
    found = {f"run/{key}": status.get(key) for key in _OF_RUNS}
    found |= {f"data/{key}": (status.get("data") or {}).get(key) for key in _OF_DATA}
    found |= {f"trainer/{key}": (status.get("trainer") or {}).get(key) for key in _OF_TRAINERS}
    found |= {f"user/{key}": value for key, value in (status.get("scalars") or {}).items()}
    rounds = [one.get("round") or 0 for one in (status.get("channels") or {}).values()]
    return max(rounds, default=0), _numbers(found)


def _numbers(found: Mapping[str, Any]) -> Scalars:
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def open_trackers(tensorboard: str, wandb: str, folder: Path) -> list[Tracker]:
    """Those that somebody asked for, which are imported now.

    Args:
        tensorboard: folder of event files; empty: none. wandb: project; empty: none.
        folder: where what is not said otherwise goes.

    Raises:
        ConfigError: a package is missing, or the folder cannot be written.
    """
    found: list[Tracker] = []
    if tensorboard:
        from swarmtrain.trackers.tensorboard_files import TensorBoardFiles

        found.append(TensorBoardFiles(Path(tensorboard).expanduser()))
    if wandb:
        from swarmtrain.trackers.wandb_project import WandbProject

        found.append(WandbProject(wandb, folder))
    return found
