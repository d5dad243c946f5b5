"""A peer process with bad memory: one bit of its state is another than it was.

``python tests/swarm/flipping_peer.py SITE_DIR`` is ``python -m swarmtrain_peer`` with a layer
around the call that applies a round's result. Nothing of the product knows about it. A file
``flip`` in the site's folder with the number of a bit is the order to flip that bit of θ once,
before the next result is applied; ``flipped`` says at which round it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from swarmtrain_peer.process import main
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.rounds import effects as fx


def run(folder: Path) -> int:
    """The peer process, with that memory."""
    apply = DataPlane.apply

    def spoilt(plane: DataPlane, applied: fx.ApplyResult) -> tuple[int, bytes]:
        order = folder / "flip"
        if order.exists():
            value, bit = divmod(int(order.read_text()), 32)
            order.unlink()
            theta = plane.states[applied.channel].theta.view(np.uint32)
            theta[value] ^= np.uint32(1 << bit)
            (folder / "flipped").write_text(str(applied.round))
        return apply(plane, applied)

    DataPlane.apply = spoilt  # type: ignore[method-assign, assignment]
    return main([str(folder)])


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
