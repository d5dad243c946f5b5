"""Event files for TensorBoard, written with its own package; TensorFlow is not needed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from swarmtrain.trackers.base import Document, Scalars
from swarmtrain_protocols.errors import ConfigError


class TensorBoardFiles:
    """One event file per life of a site, in ``FOLDER/NAME-SITE``.

    Raises:
        ConfigError: the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._writers = importlib.import_module("tensorboard.summary.writer.event_file_writer")
            self._events = importlib.import_module("tensorboard.compat.proto.event_pb2")
            self._summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        except ImportError as error:
            todo = "pip install 'swarmtrain[log]', or leave log.tensorboard out"
            raise ConfigError(f"log.tensorboard = {folder}", str(error), todo) from None
        self._folder = folder
        self._writer: Any = None

    def begin(self, run: Document) -> None:
        """Open the file.

        Raises:
            ConfigError: it cannot be written.
        """
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in str(run["name"]))
        folder = self._folder / f"{name}-{str(run['site'])[:8]}"
        try:
            self._writer = self._writers.EventFileWriter(str(folder))
        except OSError as error:
            why = error.strerror or str(error)
            raise ConfigError(f"log.tensorboard = {folder}", why, "name another folder") from None

    def scalars(self, step: int, wall_s: float, values: Scalars) -> None:
        """Queue one event; a thread of the package writes it."""
        rows = [
            self._summaries.Summary.Value(tag=tag, simple_value=value)
            for tag, value in values.items()
        ]
        summary = self._summaries.Summary(value=rows)
        self._writer.add_event(self._events.Event(wall_time=wall_s, step=step, summary=summary))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
