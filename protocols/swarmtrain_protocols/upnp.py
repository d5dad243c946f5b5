"""UPnP internet gateways, sans-I/O: the search, the description, the calls (IGD 1 and 2; spec 14).

Everything here comes from a box on the local network that nobody vouches for: sizes and depth are
bounded, XML may hold elements and text and nothing else, and whoever fetches goes back only to the
address that has answered (``same_host``).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit
from xml.parsers import expat
from xml.sax.saxutils import escape

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import PeerFault

GROUP = "239.255.255.250"
PORT = 1900
_URL = re.compile(r"[!-~]+")
_DEVICES = (
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
)
SERVICES = (
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
)
_ENVELOPE = (
    '<?xml version="1.0"?>\r\n'
    '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
    's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/">'
    "<s:Body><u:{action} xmlns:u={service!r}>{fields}</u:{action}></s:Body></s:Envelope>\r\n"
)
ONLY_PERMANENT = 725
"""The gateway grants no lease but an endless one."""


def _bad(why: str) -> PeerFault:
    return PeerFault("malformed", f"UPnP: {why}")


# -- search (SSDP) -------------------------------------------------------------------------------


def searches() -> list[bytes]:
    """Datagrams for ``GROUP``: who here is a gateway?"""
    return [
        (
            f"M-SEARCH * HTTP/1.1\r\nHOST: {GROUP}:{PORT}\r\n"
            f'MAN: "ssdp:discover"\r\nMX: 2\r\nST: {device}\r\n\r\n'
        ).encode("ascii")
        for device in _DEVICES
    ]


def parse_found(data: bytes, sender: str) -> str:
    """The URL of the description in an answer to a search.

    Raises:
        PeerFault: ``malformed``: no such answer, or a URL on another host than ``sender``.
    """
    if len(data) > 4096:
        raise _bad("an answer of more than 4 kB")
    lines = data.decode("latin-1").split("\r\n")
    if lines[0].split(" ")[:2] != ["HTTP/1.1", "200"]:
        raise _bad("not an answer to a search")
    headers = {}
    for line in lines[1:64]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    if headers.get("st") not in _DEVICES:
        raise _bad("something else than a gateway")
    return same_host(headers.get("location", ""), sender)


def same_host(url: str, sender: str) -> str:
    """``url``, if it is plain HTTP to the very address ``sender``.

    Raises:
        PeerFault: ``malformed``. A box that has us fetch elsewhere gets nothing.
    """
    if not _URL.fullmatch(url):  # urlsplit takes line breaks out, and so would hide them
        raise _bad("a URL with characters that none has")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        same = ipaddress.ip_address(host) == ipaddress.ip_address(sender)
    except ValueError:
        raise _bad("a URL without an address") from None
    if parts.scheme != "http" or not same or parts.username is not None or port == 0:
        raise _bad("a URL that leads elsewhere")
    return url


# -- XML -----------------------------------------------------------------------------------------


@dataclass
class Element:
    """A local name, its text, its children."""

    name: str
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def child(self, name: str) -> str:
        """Text of the first child of that name, '' if there is none."""
        return next((c.text.strip() for c in self.children if c.name == name), "")

    def all(self, name: str) -> list[Element]:
        """All descendants of that name, in document order."""
        found = [self] if self.name == name else []
        for one in self.children:
            found += one.all(name)
        return found


def parse_xml(data: bytes) -> Element:
    """Elements and text of a small document.

    Raises:
        PeerFault: ``malformed``: not XML, too large or deep, or with a document type, entities or
            processing instructions (no expansion, nothing external: nothing to attack with).
    """
    if len(data) > limits.UPNP_DESCRIPTION_BYTES_MAX:
        raise _bad(f"a document of {len(data)} bytes")
    root = Element("")
    stack = [root]

    def forbidden(*_: object) -> None:
        raise _bad("XML with a document type, an entity or an instruction")

    def elsewhere(*_: object) -> int:
        raise _bad("XML that wants something from elsewhere")

    def begin(name: str, _: dict[str, str]) -> None:
        if len(stack) > limits.UPNP_XML_DEPTH_MAX:
            raise _bad("XML nested too deeply")
        one = Element(name.rpartition(":")[2])
        stack[-1].children.append(one)
        stack.append(one)

    def text(data: str) -> None:
        stack[-1].text += data

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = forbidden
    parser.EntityDeclHandler = forbidden
    parser.ExternalEntityRefHandler = elsewhere
    parser.ProcessingInstructionHandler = forbidden
    parser.StartElementHandler = begin
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = text
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise _bad(f"not XML: {error}") from None
    return root


# -- control (SOAP) ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gateway:
    """Where to call, and as which service."""

    url: str
    service: str


def parse_description(data: bytes, url: str, sender: str) -> Gateway:
    """The service of a gateway that maps ports.

    Raises:
        PeerFault: ``malformed``: no such service, or its control is elsewhere.
    """
    found = {s.child("serviceType"): s for s in parse_xml(data).all("service")}
    for service in SERVICES:
        if service in found:
            try:
                control = urljoin(url, found[service].child("controlURL"))
            except ValueError as error:
                raise _bad(f"a control URL that is none: {error}") from None
            return Gateway(same_host(control, sender), service)
    raise _bad("a gateway that maps no ports")


def call(gateway: Gateway, action: str, **fields: object) -> tuple[dict[str, str], bytes]:
    """(headers, body) of a POST to ``gateway.url``."""
    inner = "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in fields.items())
    body = _ENVELOPE.format(action=action, service=gateway.service, fields=inner)
    headers = {
        "Content-Type": 'text/xml; charset="utf-8"',
        "SOAPAction": f'"{gateway.service}#{action}"',
    }
    return headers, body.encode("utf-8")


def add_mapping(
    gateway: Gateway, client: str, port: int, external_port: int, lease_s: int
) -> tuple[dict[str, str], bytes]:
    """AddPortMapping for TCP."""
    return call(
        gateway,
        "AddPortMapping",
        NewRemoteHost="",
        NewExternalPort=external_port,
        NewProtocol="TCP",
        NewInternalPort=port,
        NewInternalClient=client,
        NewEnabled=1,
        NewPortMappingDescription="swarmtrain",
        NewLeaseDuration=lease_s,
    )


def delete_mapping(gateway: Gateway, external_port: int) -> tuple[dict[str, str], bytes]:
    """DeletePortMapping for TCP."""
    fields = {"NewRemoteHost": "", "NewExternalPort": external_port, "NewProtocol": "TCP"}
    return call(gateway, "DeletePortMapping", **fields)


def error_code(data: bytes) -> int:
    """The UPnP error of an answer, 0 for none. Raises PeerFault ``malformed``."""
    codes = [e.text.strip() for e in parse_xml(data).all("errorCode")]
    if codes and not codes[0].isdecimal():
        raise _bad("an error that is no number")
    return int(codes[0][:6]) if codes else 0


def external_address(data: bytes) -> str:
    """The address in an answer to GetExternalIPAddress. Raises PeerFault ``malformed``."""
    found = [e.text.strip() for e in parse_xml(data).all("NewExternalIPAddress")]
    try:
        return str(ipaddress.IPv4Address(found[0] if found else ""))
    except ValueError:
        raise _bad("no external address") from None


# -- HTTP, as much as is needed ------------------------------------------------------------------


def http_request(method: str, url: str, headers: dict[str, str], body: bytes) -> bytes:
    """One HTTP/1.0 request: the answer ends with the connection."""
    parts = urlsplit(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if any(c in path or c in parts.netloc for c in "\r\n "):
        raise _bad("a URL with blanks")
    lines = [f"{method} {path} HTTP/1.0", f"Host: {parts.netloc}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def http_answer(data: bytes) -> tuple[int, bytes]:
    """(status, body). Raises PeerFault ``malformed``; redirects are not followed by anybody."""
    head, blank, body = data.partition(b"\r\n\r\n")
    words = head.split(b"\r\n")[0].split(b" ")
    if not blank or len(words) < 2 or not words[0].startswith(b"HTTP/1."):
        raise _bad("not an HTTP answer")
    if not words[1].isdigit() or len(words[1]) != 3:
        raise _bad("an HTTP answer without a status")
    return int(words[1]), body
