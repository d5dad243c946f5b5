"""Figures of a run for other programs: TensorBoard, Weights & Biases, or a tracker of one's own."""

from __future__ import annotations

from swarmtrain.trackers.base import Tracker, open_trackers
from swarmtrain.trackers.follow import Follower

__all__ = ["Follower", "Tracker", "open_trackers"]
