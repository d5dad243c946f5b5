"""``python -m swarmtrain`` is the command ``swarmtrain``."""

from __future__ import annotations

from swarmtrain.cli.main import main

main()
