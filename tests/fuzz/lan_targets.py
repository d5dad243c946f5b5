"""Targets of what answers on the local network: routers that map ports (PCP, NAT-PMP, UPnP)."""

from __future__ import annotations

from swarmtrain_protocols import limits, upnp
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.portmap import parse, pcp_map_request, pmp_map_request
from tests.fuzz.engine import Target
from tests.fuzz.mutate import splice_text
from tests.protocols.test_upnp import DESCRIPTION, FAULT, ROUTER, URL, found


def _port_map(data: bytes) -> object:
    answer = parse(data)
    assert len(data) <= limits.PORT_MAP_DATAGRAM_BYTES_MAX
    assert 0 <= answer.port <= 65535 and 0 <= answer.external_port <= 65535
    return answer.version, answer.kind, answer.result, bool(answer.external)


def port_map() -> Target:
    pcp = bytearray(pcp_map_request("192.168.1.20", b"n" * 12, 4000, 7200, 41000))
    pcp[1] |= 0x80
    pmp = bytes((0, 129, 0, 0)) + (7).to_bytes(4, "big") + pmp_map_request(4000, 60)[4:]
    address = bytes((0, 128, 0, 0)) + (7).to_bytes(4, "big") + bytes((203, 0, 113, 7))
    return Target("port_map", _port_map, (PeerFault,), [bytes(pcp), pmp, address])


def _found(data: bytes) -> object:
    url = upnp.parse_found(data, ROUTER)
    assert ROUTER in url and upnp.same_host(url, ROUTER) == url
    return "found"


def search() -> Target:
    return Target("upnp_search", _found, (PeerFault,), [found()], splice_text)


def _description(data: bytes) -> object:
    gateway = upnp.parse_description(data, URL, ROUTER)
    assert upnp.same_host(gateway.url, ROUTER) == gateway.url
    assert gateway.service in upnp.SERVICES
    return gateway.service


def description() -> Target:
    seeds = [DESCRIPTION, DESCRIPTION.replace(b"/ctl/IPConn", URL.encode())]
    return Target("upnp_description", _description, (PeerFault,), seeds, splice_text, 1 << 19)


def _reply(data: bytes) -> object:
    status, body = upnp.http_answer(data)
    upnp.parse_xml(body)
    return status


def reply() -> Target:
    seeds = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + DESCRIPTION,
        b"HTTP/1.0 500 Error\r\n\r\n" + FAULT,
    ]
    return Target("upnp_reply", _reply, (PeerFault,), seeds, splice_text, 1 << 19)


MAKERS = (port_map, search, description, reply)
