"""What a trainer is told of the swarm's pace and of how far the run is (spec 07 §2.5, 08 §2.8)."""

from __future__ import annotations

from swarmtrain_protocols.ledger import Ledger


def tempo_of(ledger: Ledger) -> dict[str, float]:
    """``pace_s``: seconds between two contributions of most members, 0 if nobody knows.

    ``progress``: samples that count, of all members, in the channel that is least far. ``gain``:
    how many the last round of that channel added.
    """
    channels = ledger.train_channels()
    if not channels:
        return {"pace_s": 0.0, "progress": 0.0, "gain": 0.0}
    last = min(channels, key=lambda channel: (channel.samples, channel.name))
    newest = last.history[-1] if last.history else None
    gain = last.samples - newest.progress if newest is not None else 0.0
    pace_s = max(channel.phase_s for channel in channels)
    return {"pace_s": pace_s, "progress": last.samples, "gain": gain}
