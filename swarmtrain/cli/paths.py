"""Words for who can be dialled, and by which way a link goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def reached(peer: Mapping[str, Any]) -> str:
    """Where a member listens, or that nobody can dial it; and who relays the link to it."""
    addresses = ", ".join(peer.get("addresses") or [])
    words = addresses or "outgoing only"
    if addresses and peer.get("reachability") == "unknown":
        words += " (not tried from here)"
    via = peer.get("via")
    return f"{words}, relayed by {str(via)[:8]}" if via else words


def reachability(answer: dict[str, Any]) -> str:
    """What others find when they dial this site; empty where an old peer process says nothing."""
    found = answer.get("reachability") or {}
    state = str(found.get("state") or "")
    asked, agree = found.get("asked") or 0, found.get("agree") or 0
    if state == "unknown":
        return (
            "unknown: nobody has tried to dial this site" if not asked else "unknown: no two agree"
        )
    if state and asked:
        by = f" ({found['mapped']})" if found.get("mapped") and state == "reachable" else ""
        return f"{state}{by}, as {agree} of {asked} others found"
    return f"{state}: it does not listen" if state else ""


def carried(answer: dict[str, Any]) -> dict[str, Any]:
    """What this site relays for others, where it does."""
    return dict(answer.get("relay") or {})
