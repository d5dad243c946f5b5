"""Who may knock: bounds for each host, and bars for those who misbehaved.

One host can hold a part of the half-open connections and not all, and opens connections at a
bounded rate. An identity whose links ended by its own fault too often is turned away for a while,
and for longer each time; that is this site's own judgement and stays here: nobody could prove it.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.requests import Meter
from swarmtrain_protocols.messages.session import Hello, Refused

Admit = Callable[[PeerId, Hello], Refused | None]

OWN_FAULTS = frozenset({"malformed", "oversize", "unexpected", "credit", "flood", "wrong_key"})
"""What a peer does itself. Whoever sits on the path can make ``tampered`` happen, so it is none."""


def host_block(host: str) -> str:
    """What one machine usually holds: its IPv4 address, the /64 of its IPv6 one; "": loopback."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback:
        return ""
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


class Knocks:
    """How often hosts come. Loopback is not bounded: many peers may share a machine."""

    def __init__(self) -> None:
        self._meters: OrderedDict[str, Meter] = OrderedDict()

    def refusal(self, now: float, block: str, half_open: int) -> str:
        """Name of the bound that one connection more of ``block`` would pass, or ""."""
        if not block:
            return ""
        if half_open >= limits.CONNECTIONS_HALF_OPEN_PER_HOST_MAX:
            return "host_half_open_over_limit"
        meter = self._meters.get(block)
        if meter is None:
            meter = Meter(limits.CONNECTIONS_PER_HOST_RATE_PER_S, limits.CONNECTIONS_PER_HOST_BURST)
            self._meters[block] = meter
            if len(self._meters) > limits.CONNECTIONS_HOSTS_MAX:
                self._meters.popitem(last=False)
        self._meters.move_to_end(block)
        return "" if meter.take(now) else "host_over_rate"


class _Record:
    __slots__ = ("bars", "since", "strikes", "until")

    def __init__(self) -> None:
        self.strikes, self.bars = 0, 0
        self.since = self.until = 0.0


class Bars:
    """Strikes of identities over the lives of their links. Bounded; the oldest are forgotten."""

    def __init__(self) -> None:
        self._records: OrderedDict[PeerId, _Record] = OrderedDict()

    def guard(self, admit: Admit, now: Callable[[], float]) -> Admit:
        """``admit``, but for those who are barred."""

        def judge(peer: PeerId, hello: Hello) -> Refused | None:
            left_s = self.barred_s(now(), peer)
            if left_s > 0.0:
                return Refused("barred", f"too many faults: come back in {left_s:.0f} s")
            return admit(peer, hello)

        return judge

    def fault(self, now: float, peer: PeerId | None, code: str) -> bool:
        """Count a fault of ``peer`` (None: of nobody known); True if it is barred from now on."""
        if peer is None or code not in OWN_FAULTS:
            return False
        record = self._records.setdefault(peer, _Record())
        self._records.move_to_end(peer)
        if len(self._records) > limits.BARRED_MAX:
            self._records.popitem(last=False)
        if now >= max(record.since, record.until) + limits.STRIKES_FORGOTTEN_S:
            record.strikes = record.bars = 0
        record.since = now
        record.strikes += 1
        if record.strikes < limits.STRIKES_MAX:
            return False
        bar_s = min(limits.BAR_S_MIN * 2.0**record.bars, limits.BAR_S_MAX)
        record.strikes, record.bars, record.until = 0, min(record.bars + 1, 32), now + bar_s
        return True

    def barred_s(self, now: float, peer: PeerId) -> float:
        """How long ``peer`` is still turned away."""
        record = self._records.get(peer)
        return 0.0 if record is None else max(0.0, record.until - now)
