"""Addresses that others name: used in the lookup that learned them, and not for long if wrong.

Whoever answers a lookup may name any address with an invented identity, and so have a third party
dialled by everybody who asks. Here that ends: a public host at which several named peers were
sought and none has answered is not dialled on hearsay for ten minutes, whatever port or identity is
named next. Private hosts are shared by many, so there it is the single address that counts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache

from swarmtrain_protocols import limits
from swarmtrain_protocols.addresses import is_private, split_address
from swarmtrain_protocols.dht.ids import Contact


class Hearsay:
    """Dials without an answer by host, for at most ``DHT_HEARSAY_HOSTS_MAX`` hosts."""

    def __init__(self) -> None:
        self._tries: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tries)

    def allowed(self, now: float, addresses: Iterable[str]) -> tuple[str, ...]:
        """Those of ``addresses`` that may be dialled because somebody has named them."""
        if not self._tries:
            return tuple(addresses)
        return tuple(address for address in addresses if not self._blocked(now, address))

    def tried(self, now: float, contact: Contact) -> None:
        """The addresses of a peer that was named are being dialled; ``found`` if it answers."""
        for place in dict.fromkeys(_place(address) for address in contact.addresses):
            count, since = self._tries.pop(place, (0, now))
            if now - since > limits.DHT_HEARSAY_PAUSE_S:
                count, since = 0, now
            self._tries[place] = (count + 1, since)
            if len(self._tries) > limits.DHT_HEARSAY_HOSTS_MAX:
                self._tries.popitem(last=False)

    def found(self, contact: Contact) -> None:
        """Somebody has answered there: the place is real."""
        for address in contact.addresses if self._tries else ():
            self._tries.pop(_place(address), None)

    def _blocked(self, now: float, address: str) -> bool:
        count, since = self._tries.get(_place(address), (0, now))
        recent = now - since <= limits.DHT_HEARSAY_PAUSE_S
        return recent and count >= limits.DHT_HEARSAY_TRIES_MAX


@lru_cache(maxsize=4096)
def _place(address: str) -> str:
    return address if is_private(address) else split_address(address)[0].lower()
