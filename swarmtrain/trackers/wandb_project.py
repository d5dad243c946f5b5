"""Figures for Weights & Biases. ``WANDB_MODE=offline`` and the like do what they always do."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from swarmtrain.trackers.base import Document, Scalars
from swarmtrain_protocols.errors import ConfigError


class WandbProject:
    """One run of the project per site and life, grouped by the run that all sites train.

    Raises:
        ConfigError: the package ``wandb`` is not installed.
    """

    def __init__(self, project: str, folder: Path) -> None:
        try:
            self._package = importlib.import_module("wandb")
        except ImportError as error:
            todo = "pip install 'swarmtrain[log]', or leave log.wandb out"
            raise ConfigError(f"log.wandb = {project}", str(error), todo) from None
        self._project = project
        self._folder = folder
        self._run: Any = None

    def begin(self, run: Document) -> None:
        """Start the run there; asks no questions.

        Raises:
            ConfigError: it does not start, for example without an API key.
        """
        try:
            self._run = self._package.init(
                project=self._project,
                group=str(run["run"])[:16],
                name=str(run["site_name"]),
                config={"run": run["run"], "run_name": run["name"], "site": run["site"]},
                dir=str(self._folder),
                settings=self._package.Settings(silent=True, console="off", x_disable_meta=True),
            )
            self._run.define_metric("*", step_metric="round")
        except (self._package.errors.Error, OSError, ValueError, RuntimeError) as error:
            todo = "log in with `wandb login`, or set WANDB_MODE=offline"
            why = f"{type(error).__name__}: {error}"
            raise ConfigError(f"log.wandb = {self._project}", why, todo) from error

    def scalars(self, step: int, wall_s: float, values: Scalars) -> None:
        """Queue one row; a process of the package sends it."""
        self._run.log({**values, "round": step})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
