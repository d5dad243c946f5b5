"""Bounds for each host at the door, and bars for identities that misbehave."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from swarmtrain_peer.gate import Bars, Knocks, host_block
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from tests.peer.transport_kit import HELLO, Node

EVE, BOB = PeerId(b"e" * 32), PeerId(b"b" * 32)


@pytest.mark.parametrize(
    ("host", "block"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("127.0.0.1", ""),
        ("::1", ""),
        ("no address", "no address"),
    ],
)
def test_what_one_machine_holds(host: str, block: str) -> None:
    assert host_block(host) == block


def test_a_host_may_come_often_at_once_and_then_at_a_rate() -> None:
    knocks, burst = Knocks(), int(limits.CONNECTIONS_PER_HOST_BURST)
    told = [knocks.refusal(0.0, "203.0.113.7", 0) for _ in range(burst + 3)]
    assert told == [""] * burst + ["host_over_rate"] * 3
    assert knocks.refusal(0.0, "203.0.113.8", 0) == "", "another host"
    rate = int(limits.CONNECTIONS_PER_HOST_RATE_PER_S)
    told = [knocks.refusal(1.0, "203.0.113.7", 0) for _ in range(rate + 1)]
    assert told == [""] * rate + ["host_over_rate"]
    assert all(knocks.refusal(0.0, "", 99) == "" for _ in range(2 * burst)), "loopback"


def test_a_host_holds_a_part_of_the_half_open_connections() -> None:
    knocks, most = Knocks(), limits.CONNECTIONS_HALF_OPEN_PER_HOST_MAX
    assert knocks.refusal(0.0, "203.0.113.7", most - 1) == ""
    assert knocks.refusal(0.0, "203.0.113.7", most) == "host_half_open_over_limit"


def test_hosts_are_forgotten_beyond_a_bound() -> None:
    knocks = Knocks()
    for number in range(limits.CONNECTIONS_HOSTS_MAX + 50):
        knocks.refusal(0.0, f"2001:db8:0:{number:x}::/64", 0)
    assert len(knocks._meters) == limits.CONNECTIONS_HOSTS_MAX


def _struck(bars: Bars, now: float, count: int = limits.STRIKES_MAX) -> list[bool]:
    return [bars.fault(now, EVE, "malformed") for _ in range(count)]


def test_strikes_lead_to_a_bar_that_doubles_and_ends() -> None:
    bars, now = Bars(), 0.0
    expected_s = limits.BAR_S_MIN
    for _ in range(14):
        assert _struck(bars, now) == [False, False, True]
        assert bars.barred_s(now, EVE) == expected_s and bars.barred_s(now, BOB) == 0.0
        now += expected_s
        assert bars.barred_s(now, EVE) == 0.0
        expected_s = min(2 * expected_s, limits.BAR_S_MAX)
    assert expected_s == limits.BAR_S_MAX


def test_strikes_and_bars_are_forgotten_after_good_behaviour() -> None:
    bars = Bars()
    assert _struck(bars, 0.0, 2) == [False, False]
    assert _struck(bars, limits.STRIKES_FORGOTTEN_S, 3) == [False, False, True]
    later = limits.STRIKES_FORGOTTEN_S + limits.BAR_S_MIN + limits.STRIKES_FORGOTTEN_S
    assert _struck(bars, later) == [False, False, True]
    assert bars.barred_s(later, EVE) == limits.BAR_S_MIN


def test_what_others_can_cause_is_no_strike() -> None:
    bars = Bars()
    for code in ("tampered", "timeout", "disconnected", "idle"):
        assert not any(bars.fault(0.0, EVE, code) for _ in range(9))
    assert not any(bars.fault(0.0, None, "malformed") for _ in range(9))
    assert bars.barred_s(0.0, EVE) == 0.0


def test_identities_are_forgotten_beyond_a_bound() -> None:
    bars = Bars()
    for number in range(limits.BARRED_MAX + 9):
        bars.fault(0.0, PeerId(number.to_bytes(32, "big")), "malformed")
    assert len(bars._records) == limits.BARRED_MAX


def test_a_barred_identity_is_refused_and_others_are_judged_as_before() -> None:
    bars, clock = Bars(), [0.0]
    admit = bars.guard(lambda peer, hello: None, lambda: clock[0])
    _struck(bars, 0.0)
    refused = admit(EVE, HELLO)
    assert refused is not None and refused.code == "barred"
    assert admit(BOB, HELLO) is None
    clock[0] = limits.BAR_S_MIN
    assert admit(EVE, HELLO) is None


def test_a_peer_that_sends_rubbish_is_cut_off_named_and_not_let_in_again() -> None:
    async def main() -> None:
        async with Node(1) as victim, Node(2) as liar, Node(3) as friend:
            await liar.join(victim)
            await friend.join(victim)
            session = liar.transport.route(victim.id).session  # type: ignore[union-attr]
            for _ in range(limits.STRIKES_MAX):
                rubbish = b"\x04\x00\x00\x00\x02\x00\xc1\xc1"
                session._outbox.put_last(rubbish)
            liar.transport.route(victim.id).wake()  # type: ignore[union-attr]
            gone: tuple[Any, ...] = await victim.until("disconnected", liar.id)
            assert gone[2] == "malformed"
            faults = [event for event in victim.events if event[0] == "fault"]
            assert len(faults) == limits.STRIKES_MAX
            assert {event[1] for event in faults} == {liar.id}
            with pytest.raises(Exception, match="barred"):
                await liar.transport.connect_address(victim.address, 5.0)
            assert victim.transport.stats["counts"]["barred"] == 1
            assert victim.transport.connected_peers() == [friend.id]

    asyncio.run(main())
