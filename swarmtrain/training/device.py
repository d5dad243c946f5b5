"""Which device this machine would train on: ``python -m swarmtrain.training.device NAME``.

A process of its own, so that whoever asks need not load torch.
"""

from __future__ import annotations

import json
import sys

import torch

from swarmtrain.training.trainer import choose_device
from swarmtrain_protocols.errors import NoDevice


def describe(name: str) -> dict[str, object]:
    """What ``doctor`` prints about the device ``name``, or why it cannot be used."""
    found: dict[str, object] = {"torch": torch.__version__}
    try:
        device = choose_device(name)
    except NoDevice as error:
        return found | {"ok": False, "why": error.why}
    found |= {"ok": True, "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "memory_bytes": properties.total_memory}
    else:
        found |= {"name": "processor", "threads": torch.get_num_threads()}
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe(sys.argv[1])) + "\n")
