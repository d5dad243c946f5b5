"""Bytes that went over links and bulk connections, in total and per peer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swarmtrain_protocols.core import PeerId

_KEYS = ("control_sent", "control_received", "bulk_sent", "bulk_received")
_NOTHING = (0, 0)


def traffic(
    control: Mapping[PeerId, tuple[int, int]], bulk: Mapping[PeerId, tuple[int, int]]
) -> dict[str, Any]:
    """Given (sent, received) bytes by peer: ``KIND_WAY_bytes`` in total, and so by ``peers``."""
    peers = {
        peer: dict(
            zip(
                (f"{key}_bytes" for key in _KEYS),
                (*control.get(peer, _NOTHING), *bulk.get(peer, _NOTHING)),
                strict=True,
            )
        )
        for peer in sorted({*control, *bulk})
    }
    totals = {f"{k}_bytes": sum(p[f"{k}_bytes"] for p in peers.values()) for k in _KEYS}
    return {**totals, "peers": peers}
