"""The onlooker: links to all that can be dialled, and only to those."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from swarmtrain_peer import onlooker as module
from swarmtrain_peer.onlooker import Onlooker
from swarmtrain_protocols.node_events import LedgerChanged


def member(number: int, *addresses: str) -> Any:
    return SimpleNamespace(id=bytes([number]) * 32, addresses=addresses)


def look(members: list[Any], linked: list[bytes]) -> list[bytes]:
    learnt: dict[bytes, tuple[str, ...]] = {}
    dialled: list[bytes] = []
    runtime: Any = SimpleNamespace(
        listeners=[],
        node=SimpleNamespace(
            me=b"\0" * 32,
            linked=lambda: linked,
            ledger=SimpleNamespace(ordered_members=lambda: members),
        ),
        transport=SimpleNamespace(learn=learnt.__setitem__, connect=dialled.append),
    )
    Onlooker(runtime)
    (listener,) = runtime.listeners
    listener(object())
    assert dialled == []
    listener(LedgerChanged(()))
    assert list(learnt) == dialled
    return dialled


def test_missing_links_are_made() -> None:
    members = [member(0, "h:1"), member(1, "h:1"), member(2, "h:2"), member(3), member(4, "h:4")]
    assert look(members, [b"\2" * 32]) == [b"\1" * 32, b"\4" * 32]


def test_links_are_bounded() -> None:
    members = [member(number, "h:1") for number in range(module.LINKS_MAX + 20)]
    linked = [members[number].id for number in range(1, 11)]
    assert len(look(members, linked)) == module.LINKS_MAX - 10
