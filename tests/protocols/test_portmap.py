"""PCP and NAT-PMP byte by byte, and a client against gateways that behave and misbehave."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.portmap import (
    Mapped,
    NotMapped,
    PortMap,
    SendDatagram,
    map_address,
    parse,
    pcp_map_request,
    pmp_address_request,
    pmp_map_request,
    unmap_address,
)

VECTORS = Path(__file__).resolve().parents[2] / "protocols" / "vectors"
NONCE = bytes(range(12))
LAN, PUBLIC = "192.168.1.20", "203.0.113.5"


def word(value: int) -> bytes:
    return struct.pack("!I", value)


def pcp_answer(
    *,
    result: int = 0,
    lease_s: int = 3600,
    epoch_s: int = 100,
    nonce: bytes = NONCE,
    port: int = 4000,
) -> bytes:
    """Field by field as in the diagrams of RFC 6887 §7.2 and §11.1."""
    head = bytes([2, 0x81, 0, result]) + word(lease_s) + word(epoch_s) + bytes(12)
    place = bytes(10) + b"\xff\xff" + bytes([203, 0, 113, 5])
    ports = struct.pack("!HH", port, 41000)
    return head + nonce + bytes([6, 0, 0, 0]) + ports + place


def pmp_mapped(result: int = 0, lease_s: int = 3600, epoch_s: int = 100) -> bytes:
    """RFC 6886 §3.3."""
    head = bytes([0, 0x82]) + struct.pack("!H", result) + word(epoch_s)
    return head + struct.pack("!HH", 4000, 41000) + word(lease_s)


def pmp_address(epoch_s: int = 100) -> bytes:
    """RFC 6886 §3.2."""
    return bytes([0, 0x80, 0, 0]) + word(epoch_s) + bytes([203, 0, 113, 5])


def test_requests_are_laid_out_as_the_diagrams_say() -> None:
    request = pcp_map_request(LAN, NONCE, 4000, 7200, 4000)
    assert len(request) == 60
    assert request[:4] == bytes([2, 1, 0, 0]) and request[4:8] == word(7200)
    assert request[8:24] == bytes(10) + b"\xff\xff" + bytes([192, 168, 1, 20])
    assert request[24:36] == NONCE and request[36:40] == bytes([6, 0, 0, 0])
    assert request[40:44] == struct.pack("!HH", 4000, 4000)
    assert request[44:] == bytes(10) + b"\xff\xff" + bytes(4), "no address is suggested"
    assert pmp_address_request() == b"\0\0"
    assert pmp_map_request(4000, 7200, 4000) == (
        bytes([0, 2, 0, 0]) + struct.pack("!HHI", 4000, 4000, 7200)
    )


def test_the_vectors() -> None:
    vectors = json.loads((VECTORS / "portmap.json").read_text(encoding="utf-8"))
    for case in vectors["requests"]:
        make = {"pcp": pcp_map_request, "pmp": pmp_map_request}[case["protocol"]]
        fields = dict(case["fields"])
        if "nonce" in fields:
            fields["nonce"] = bytes.fromhex(fields["nonce"])
        assert make(**fields).hex() == case["bytes"]
    for case in vectors["answers"]:
        answer = parse(bytes.fromhex(case["bytes"]))
        for name, value in case["fields"].items():
            found = getattr(answer, name)
            assert (found.hex() if isinstance(found, bytes) else found) == value


@pytest.mark.parametrize("ip", [LAN, PUBLIC, "2001:db8::7"])
def test_addresses_survive(ip: str) -> None:
    assert unmap_address(map_address(ip)) == ip


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\2\x81\0",
        bytes([2, 1, 0, 0]) + bytes(56),  # a request
        bytes([2, 0x82, 0, 0]) + bytes(56),  # another operation
        bytes([3, 0x81, 0, 0]) + bytes(56),
        bytes([2, 0x81, 0, 0]) + bytes(20),  # success without a mapping
        pcp_answer() + b"x",
        bytes([2, 0x81]) + bytes(limits.PORT_MAP_DATAGRAM_BYTES_MAX),
        bytes([0, 0x82, 0, 0]),
        bytes([0, 0x83, 0, 0]) + bytes(12),
        pcp_answer()[:36] + bytes([17]) + pcp_answer()[37:],  # UDP
    ],
)
def test_what_is_no_answer_is_malformed_and_changes_nothing(data: bytes) -> None:
    client = asking()
    before = client.deadline()
    with pytest.raises(PeerFault, match="malformed"):
        client.receive(0.1, data)
    assert (client.mapping, client.deadline(), client.drain()) == (None, before, [])


@given(st.binary(max_size=80))
def test_no_datagram_does_anything_else(data: bytes) -> None:
    client = asking()
    try:
        client.receive(0.1, data)
    except PeerFault as fault:
        assert fault.code == "malformed"
    else:
        assert client.mapping is None or data[24:36] == NONCE


def asking() -> PortMap:
    client = PortMap(LAN, 4000, lambda n: NONCE[:n])
    client.tick(0.0)
    assert sent(client) == [pcp_map_request(LAN, NONCE, 4000, limits.PORT_MAP_LEASE_S, 4000)]
    return client


def sent(client: PortMap) -> list[bytes]:
    return [e.data for e in client.drain() if isinstance(e, SendDatagram)]


def told(effects: list[Effect]) -> list[object]:
    return [e.event for e in effects if isinstance(e, Emit)]


def test_a_mapping_is_renewed_at_half_its_time_and_given_back() -> None:
    client = asking()
    client.receive(0.1, pcp_answer())
    assert told(client.drain()) == [Mapped(PUBLIC, 41000, 3600, "PCP")]
    assert client.deadline() == pytest.approx(1800.1)
    client.tick(1800.1)
    renewal = pcp_map_request(LAN, NONCE, 4000, limits.PORT_MAP_LEASE_S, 41000, PUBLIC)
    assert sent(client) == [renewal], "it asks for what it has"
    client.receive(1800.2, pcp_answer(epoch_s=1900))
    assert not client.drain(), "nothing new"
    client.close()
    assert sent(client) == [pcp_map_request(LAN, NONCE, 4000, 0)]
    client.tick(9999.0)
    assert not client.drain()


def test_a_lease_that_is_not_renewed_ends() -> None:
    client = asking()
    client.receive(0.0, pcp_answer(lease_s=60))
    client.drain()
    for now in (30.0, 31.0, 33.0, 61.0):
        client.tick(now)
    assert NotMapped("the lease is over") in told(client.drain())
    assert client.mapping is None


def test_an_old_gateway_is_asked_in_its_own_protocol() -> None:
    client = asking()
    client.receive(0.1, bytes([0, 0x81, 0, 1]) + word(5) + bytes(4))
    assert sent(client) == [pmp_address_request()]
    client.receive(0.2, pmp_address())
    assert sent(client) == [pmp_map_request(4000, limits.PORT_MAP_LEASE_S, 4000)]
    client.receive(0.3, pmp_mapped())
    assert told(client.drain()) == [Mapped(PUBLIC, 41000, 3600, "NAT-PMP")]
    client.close()
    assert sent(client) == [pmp_map_request(4000, 0)]


def test_a_gateway_that_is_silent_is_left_alone_for_a_while() -> None:
    client = asking()
    count = 1
    while not (events := told(effects := client.drain())):
        count += sum(isinstance(e, SendDatagram) for e in effects)
        assert count < 100
        client.tick(client.deadline())
    assert events == [NotMapped("the gateway does not answer")]
    assert count == 2 * limits.PORT_MAP_TRIES
    assert client.deadline() > limits.PORT_MAP_PAUSE_S


@pytest.mark.parametrize(
    ("result", "why"), [(2, "not authorized"), (8, "no resources"), (99, "result 99")]
)
def test_refusals_are_told_in_words(result: int, why: str) -> None:
    client = asking()
    client.receive(0.1, pcp_answer(result=result))
    assert told(client.drain()) == [NotMapped(why)]
    assert client.mapping is None


def test_answers_to_others_are_ignored() -> None:
    client = asking()
    client.receive(0.1, pcp_answer(nonce=bytes(12)))
    client.receive(0.1, pcp_answer(port=4001))
    client.receive(0.1, pmp_mapped())
    assert client.mapping is None and not client.drain()


def test_a_gateway_that_has_restarted_is_asked_again() -> None:
    client = asking()
    client.receive(0.1, pcp_answer(epoch_s=5000))
    client.drain()
    client.receive(10.0, pcp_answer(epoch_s=3))
    assert len(sent(client)) == 1
