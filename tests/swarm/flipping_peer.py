"""A peer process with bad memory: one bit of its state is another than it was.

``python tests/swarm/flipping_peer.py SITE_DIR`` is ``python -m swarmtrain_peer`` with a layer
around the call that applies a round's result. Nothing of the product knows about it. A file
``flip`` in the site's folder with the number of a bit is the order to flip that bit of θ once,
before the next result is applied, or with a minus sign just after, before the new state is hashed;
``flipped`` says at which round it was.
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
        if not order.exists():
            return apply(plane, applied)
        text = order.read_text()
        order.unlink()
        value, bit = divmod(int(text.removeprefix("-")), 32)
        state = plane.states[applied.channel]
        (folder / "flipped").write_text(str(applied.round))
        if text.startswith("-"):
            apply(plane, applied)
            state.theta.view(np.uint32)[value] ^= np.uint32(1 << bit)
            state.hash_again()
            return state.round, state.root()
        state.theta.view(np.uint32)[value] ^= np.uint32(1 << bit)
        return apply(plane, applied)

    DataPlane.apply = spoilt  # type: ignore[method-assign, assignment]
    return main([str(folder)])


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
