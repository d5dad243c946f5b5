"""Faults aimed at a state: what they wait for, and whom they strike.

A trigger is ``[ACTOR/]LABEL[#N]``: the N-th time (the first, if nothing is said) that the actor
does what the label says. The actor is the victim itself, or the name of another site, a role, or
``*`` for anybody. The victim ``@leader`` with the trigger ``append:RoundCommitted``: cut the leader
off as it commits. ``@owner3`` with ``send:result#2``: kill the owner of part 3 after it has told
two of the members. ``*/effect#1234`` is one moment of a clean run (``sweep``), and the victim
``@actor`` is whoever was about to go on.

| label                               | right after                                          |
| ----------------------------------- | ---------------------------------------------------- |
| ``persist``, ``synced``             | a record was handed to the disk, was made durable    |
| ``persist:vote``, ``persist:entries`` | the same, by what the record is                    |
| ``send:TAG``, ``receive:TAG``       | a message was sent, was taken in                     |
| ``append:ENTRY``                    | an entry of that class was sent to another steward   |
| ``entry:ENTRY``                     | an entry of that class was applied                   |
| ``emit:CLASS``, ``do:CLASS``        | an event, an effect of the data plane                |
| ``fetch``, ``fetched``              | a fetch was asked for, has arrived                   |
| ``effect``, ``event``               | any effect, any event                                |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarmtrain_protocols import core
from swarmtrain_protocols import entries as e
from swarmtrain_protocols.errors import SwarmError
from swarmtrain_protocols.log.records import decode_record
from swarmtrain_protocols.messages.log import Append
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.testing.faults import Fault

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host

ANYBODY = "*"
ACTOR = "@actor"

Plays = Callable[["Host", str], bool]
"""(host, role without its @) -> whether it has that role now."""


def nobody_plays(host: Host, role: str) -> bool:
    """In a world without roles."""
    return False


@dataclass(eq=False, slots=True)
class Aim:
    """One aimed fault that waits. ``left``: how often its label must still be seen."""

    fault: Fault
    actor: str
    label: str
    left: int

    @classmethod
    def of(cls, fault: Fault) -> Aim:
        """Read the trigger of ``fault``; without an actor it is the victim's own doing."""
        actor, slash, rest = fault.b.partition("/")
        if not slash:
            actor, rest = fault.a, fault.b
        label, _, number = rest.partition("#")
        return cls(fault, actor, label, int(number or 1))

    def wants(self, host: Host, label: str, plays: Plays) -> bool:
        """Whether ``host`` doing ``label`` is what it waits for."""
        if label != self.label:
            return False
        if self.actor in (ANYBODY, host.name):
            return True
        return self.actor.startswith("@") and plays(host, self.actor[1:])


def victim_of(name: str, hosts: dict[str, Host], actor: Host | None, plays: Plays) -> Host | None:
    """The host that ``name`` means now: itself, who acted, or the first that has the role."""
    if not name.startswith("@"):
        return hosts[name]
    if name == ACTOR:
        return actor
    if actor is not None and plays(actor, name[1:]):
        return actor
    return next((host for host in hosts.values() if plays(host, name[1:])), None)


def labels_of(effect: object) -> Iterator[str]:
    """What else an effect is called, beside its plain label."""
    yield "effect"
    if isinstance(effect, core.Persist):
        try:
            tag = decode_record(effect.record).__struct_config__.tag
        except SwarmError:
            return  # of another core than the log
        yield f"persist:{tag}"
    elif isinstance(effect, core.Send) and isinstance(effect.message, Append):
        for entry in effect.message.entries:
            yield "append:" + type(e.decode_body(entry.body)).__name__
    elif isinstance(effect, core.Emit) and isinstance(effect.event, LedgerChanged):
        for _, body, _ in effect.event.entries:
            yield "entry:" + type(body).__name__
