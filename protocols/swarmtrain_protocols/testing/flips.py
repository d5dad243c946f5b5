"""A bit that flips in the memory of one member: named by that member, and mended from the others.

Whoever finds its state to differ from its own hash (``flip``, between two steps) or from what most
holders report (``misstep``: within a step) throws it away, says so (``resync``) and fetches the
right one, before it counts as a holder of another round (10 §2.2). A misstep is for schedules made
by hand: where nobody else in step can be heard, nobody could tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.checks.base import Checker

if TYPE_CHECKING:
    from swarmtrain_protocols.state import CanonicalState
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World

HOLDERS_MIN = 3
"""In step when a bit flips: of two that differ nobody could say which is right."""


def may_flip(world: World, host: Host) -> bool:
    """Only where most others hold what is right."""
    if world.trouble.flipped:
        return False
    holders = 0
    for other in world.hosts.values():
        if other.alive:
            catchup = other.node.core.catchup
            channels = catchup.followed() if catchup.active else []
            holders += bool(channels) and all(catchup.in_step(c) for c in channels)
    return holders >= HOLDERS_MIN and not any(h.vanished for h in world.hosts.values())


class Known(Protocol):
    """A state that the log made: the bytes of theta and then of its slots."""

    @property
    def raw(self) -> bytes: ...


class FlipsAreNamed(Checker):
    """``states``: the right states of each channel by round, as they become known."""

    def __init__(self, states: Mapping[str, Sequence[Known]]) -> None:
        self._states = states

    def always(self, world: World, host: Host) -> None:
        for name, channel in [key for key in world.trouble.flipped if key[0] == host.name]:
            state = host.node.plane.states.get(channel)
            track = host.node.core.catchup.tracks.get(channel)
            if state is None or track is None or track.state_hash is None:
                continue
            known = self._states.get(channel, ())
            if state.round < len(known) and known[state.round].raw == _raw(state):
                world.seen["flip:mended"] += 1
                del world.trouble.flipped[name, channel]

    def emitted(self, world: World, host: Host, event: object) -> None:
        if isinstance(event, fx.Resync) and (host.name, event.channel) in world.trouble.flipped:
            world.seen["flip:named"] += event.reason.startswith("own state differs")
        elif isinstance(event, fx.StateAdvanced):
            since = world.trouble.flipped.get((host.name, event.channel))
            if since is not None and event.round > since + 1:
                self.always(world, host)
                if (host.name, event.channel) in world.trouble.flipped:
                    world.violation("flip", f"{host.name} goes on with a flipped bit: {event}")

    def finish(self, world: World) -> None:
        left = [key for key in world.trouble.flipped if not world.hosts[key[0]].vanished]
        if left:
            world.violation("flip", f"nobody noticed the flipped bits of {left}")


def _raw(state: CanonicalState) -> bytes:
    return b"".join(array.tobytes() for array in state.arrays)
