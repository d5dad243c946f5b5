"""Train one model together over ordinary internet links.

Public names are loaded on first use: ``import swarmtrain`` imports neither torch nor NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Peer": "swarmtrain_peer.peer",
    "Reduced": "swarmtrain_peer.peer",
    "Swarm": "swarmtrain.training.hook",
    "join": "swarmtrain.training.hook",
    "serve": "swarmtrain.training.own",
    "SwarmError": "swarmtrain_protocols.errors",
    "RoundFailed": "swarmtrain_protocols.errors",
}

__all__ = ["Peer", "Reduced", "RoundFailed", "Swarm", "SwarmError", "__version__", "join", "serve"]

if TYPE_CHECKING:
    from swarmtrain.training.hook import Swarm, join
    from swarmtrain.training.own import serve
    from swarmtrain_peer.peer import Peer, Reduced
    from swarmtrain_protocols.errors import RoundFailed, SwarmError


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'swarmtrain' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
