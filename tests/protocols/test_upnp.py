"""UPnP: what is asked, what is understood, and what a hostile box on the local network gets."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols import limits, upnp
from swarmtrain_protocols.errors import PeerFault

ROUTER = "192.168.1.1"
URL = f"http://{ROUTER}:5000/root.xml"
DESCRIPTION = b"""<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><device>
<deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:1</deviceType>
<deviceList><device><deviceList><device><serviceList>
<service><serviceType>urn:schemas-upnp-org:service:WANCommonInterfaceConfig:1</serviceType>
<controlURL>/other</controlURL></service>
<service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType>
<controlURL>/ctl/IPConn</controlURL></service>
</serviceList></device></deviceList></device></deviceList></device></root>"""
FAULT = b"""<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body><s:Fault>
<detail><UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>718</errorCode>
</UPnPError></detail></s:Fault></s:Body></s:Envelope>"""


def found(
    location: str = URL, st_: str = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"
) -> bytes:
    return f"HTTP/1.1 200 OK\r\nST: {st_}\r\nLocation: {location}\r\n\r\n".encode()


def test_a_gateway_is_found_and_asked() -> None:
    for data in upnp.searches():
        assert data.startswith(b"M-SEARCH * HTTP/1.1\r\n") and data.endswith(b"\r\n\r\n")
    assert upnp.parse_found(found(), ROUTER) == URL
    gateway = upnp.parse_description(DESCRIPTION, URL, ROUTER)
    service = "urn:schemas-upnp-org:service:WANIPConnection:1"
    assert gateway == upnp.Gateway(f"http://{ROUTER}:5000/ctl/IPConn", service)
    headers, body = upnp.add_mapping(gateway, "192.168.1.20", 4000, 41000, 7200)
    assert headers["SOAPAction"] == f'"{service}#AddPortMapping"'
    (call,) = ET.fromstring(body)[0]  # another parser, which knows namespaces
    assert call.tag == f"{{{service}}}AddPortMapping"
    assert {e.tag: e.text for e in call} == {
        "NewRemoteHost": None,
        "NewExternalPort": "41000",
        "NewProtocol": "TCP",
        "NewInternalPort": "4000",
        "NewInternalClient": "192.168.1.20",
        "NewEnabled": "1",
        "NewPortMappingDescription": "swarmtrain",
        "NewLeaseDuration": "7200",
    }
    (call,) = ET.fromstring(upnp.delete_mapping(gateway, 41000)[1])[0]
    assert [e.text for e in call] == [None, "41000", "TCP"]


def test_answers() -> None:
    assert upnp.error_code(FAULT) == 718
    assert upnp.error_code(b"<ok/>") == 0
    assert upnp.external_address(
        b"<a><NewExternalIPAddress>203.0.113.5</NewExternalIPAddress></a>"
    ) == ("203.0.113.5")
    assert upnp.http_answer(b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\nbody") == (200, b"body")
    request = upnp.http_request("GET", URL + "?a=b", {"X": "1"}, b"")
    assert request.split(b"\r\n")[:2] == [b"GET /root.xml?a=b HTTP/1.0", b"Host: 192.168.1.1:5000"]


@pytest.mark.parametrize(
    "location",
    [
        "http://192.168.1.2:5000/root.xml",
        "http://203.0.113.9/root.xml",
        "https://192.168.1.1/root.xml",
        "http://router.local/root.xml",
        "http://192.168.1.1@203.0.113.9/",
        "http://user@192.168.1.1/",
        "file:///etc/passwd",
        "http://192.168.1.1:99999/",
        "http://192.168.1.1/root.xml HTTP/1.1\nHost: bank.example",
        "",
    ],
)
def test_nobody_has_us_fetch_from_elsewhere(location: str) -> None:
    with pytest.raises(PeerFault, match="malformed"):
        upnp.parse_found(found(location), ROUTER)
    with pytest.raises(PeerFault, match="malformed"):
        upnp.same_host(URL.replace("168", "168\n"), ROUTER)  # urlsplit would not see the break
    hostile = DESCRIPTION.replace(b"/ctl/IPConn", location.encode() or b"http://x/")
    with pytest.raises(PeerFault, match="malformed"):
        upnp.parse_description(hostile, URL, ROUTER)


@pytest.mark.parametrize(
    "data",
    [
        b'<!DOCTYPE a [<!ENTITY b "bbbb">]><a>&b;</a>',
        b'<!DOCTYPE a SYSTEM "http://203.0.113.9/x.dtd"><a/>',
        b'<?xml version="1.0"?><?php x ?><a/>',
        b"<a>&undefined;</a>",
        b"<a><b></a>",
        b"",
        b"\xff\xfe\0",
        b"<a>" * (limits.UPNP_XML_DEPTH_MAX + 1) + b"</a>" * (limits.UPNP_XML_DEPTH_MAX + 1),
        b"<a>" + b" " * limits.UPNP_DESCRIPTION_BYTES_MAX + b"</a>",
        b'<?xml version="1.0" encoding="no-such"?><a/>',
    ],
)
def test_hostile_xml_is_malformed(data: bytes) -> None:
    with pytest.raises(PeerFault, match="malformed"):
        upnp.parse_xml(data)


@given(st.binary(max_size=300))
def test_no_bytes_do_anything_else(data: bytes) -> None:
    outcomes = []
    for parse in (
        upnp.parse_xml,
        upnp.http_answer,
        upnp.external_address,
        upnp.error_code,
        lambda d: upnp.parse_found(d, ROUTER),
    ):
        try:
            parse(data)
            outcomes.append("ok")
        except PeerFault as fault:
            outcomes.append(fault.code)
    assert set(outcomes) <= {"ok", "malformed"}


def test_other_answers_are_malformed() -> None:
    with pytest.raises(PeerFault):
        upnp.parse_found(found(st_="urn:schemas-upnp-org:device:MediaServer:1"), ROUTER)
    with pytest.raises(PeerFault):
        upnp.parse_found(b"NOTIFY * HTTP/1.1\r\n\r\n", ROUTER)
    with pytest.raises(PeerFault):
        upnp.parse_description(b"<root/>", URL, ROUTER)
    with pytest.raises(PeerFault):
        upnp.error_code(b"<errorCode>x</errorCode>")
    with pytest.raises(PeerFault):
        upnp.external_address(b"<a/>")
    with pytest.raises(PeerFault):
        upnp.http_request("GET", "http://192.168.1.1/a b", {}, b"")
