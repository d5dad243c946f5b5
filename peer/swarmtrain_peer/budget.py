"""Whether a model fits into the memory of a site, asked before anything is allocated for it."""

from __future__ import annotations

from pathlib import Path

import psutil

from swarmtrain_protocols.errors import NoDevice
from swarmtrain_protocols.manifest import RunKeys

CGROUP = Path("/sys/fs/cgroup")
SHARED_BYTES = 8
"""θ and a hand-over, per value, mapped by the trainer and the peer process."""
STATE_BYTES = 8
"""θ and outer momentum; once more while a checkpoint is written."""
ENCODED_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.02}
RESERVE_BYTES = 64 * 1024 * 1024


def needed_bytes(values: int, keys: RunKeys) -> int:
    """What a peer process takes for a model of ``values`` parameters beside its trainer.

    The own contribution and the parts of others that this site sums (together as large as one),
    and the result, are there encoded.
    """
    scatter = ENCODED_BYTES.get(keys.codec_scatter, 4.0)
    gather = ENCODED_BYTES.get(keys.codec_gather, 4.0)
    per_value = SHARED_BYTES + 2 * STATE_BYTES + 2 * scatter + gather
    return int(values * per_value) + RESERVE_BYTES


def free_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that this process may still take: of the machine, and of its control group."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    if limit == "max":
        return free
    return min(free, int(limit) - used + int(stat.get("inactive_file", 0)))


def check_memory(values: int, keys: RunKeys) -> None:
    """Refuse a model that does not fit.

    Raises:
        NoDevice: fewer bytes are free than its state and one round take.
    """
    needed, free = needed_bytes(values, keys), free_bytes()
    if needed > free:
        raise NoDevice(
            f"a model of {values} values does not fit into memory",
            f"the peer process needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            "use a smaller model, or a machine with more memory",
        )
