"""A port mapped by gateways on loopback: PCP, NAT-PMP, UPnP, none, and broken ones."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from swarmtrain_peer.loop import run
from swarmtrain_peer.portmapping import News, PortMapper
from swarmtrain_protocols import limits
from swarmtrain_protocols.portmap import Mapped, NotMapped, map_address

HERE, PUBLIC = "127.0.0.1", "203.0.113.5"
WAIT_S = 10.0


class Gateway(asyncio.DatagramProtocol):
    """Answers by a rule; ``heard`` has what it was asked."""

    def __init__(self, rule: Callable[[bytes], list[bytes]]) -> None:
        self.heard: list[bytes] = []
        self._rule = rule

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.address = transport.get_extra_info("sockname")

    def datagram_received(self, data: bytes, sender: Any) -> None:
        self.heard.append(data)
        for answer in self._rule(data):
            self.transport.sendto(answer, sender)


def pcp(data: bytes) -> list[bytes]:
    """RFC 6887: the answer repeats nonce, protocol and port."""
    head = bytes([2, 0x81, 0, 0]) + data[4:8] + struct.pack("!I", 50) + bytes(12)
    return [head + data[24:42] + struct.pack("!H", 41000) + map_address(PUBLIC)]


def pmp(data: bytes) -> list[bytes]:
    """RFC 6886; to anything of version 2: unsupported version."""
    if data[0] != 0:
        return [bytes([0, data[1] | 128]) + struct.pack("!HI", 1, 50)]
    if data[1] == 0:
        return [bytes([0, 128, 0, 0]) + struct.pack("!I", 50) + bytes([203, 0, 113, 5])]
    port, lease = data[4:6], data[8:12]
    return [bytes([0, 130, 0, 0]) + struct.pack("!I", 50) + port + struct.pack("!H", 41000) + lease]


@contextlib.asynccontextmanager
async def gateway(rule: Callable[[bytes], list[bytes]]) -> AsyncIterator[Gateway]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(
        lambda: Gateway(rule), local_addr=(HERE, 0)
    )
    try:
        yield protocol
    finally:
        transport.close()


class Box:
    """A UPnP gateway: description and control over HTTP."""

    def __init__(self, errors: dict[str, int] | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self.errors = errors or {}

    async def __aenter__(self) -> Box:
        self.server = await asyncio.start_server(self._serve, HERE, 0)
        self.url = f"http://{HERE}:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *trouble: object) -> None:
        self.server.close()

    def found(self, data: bytes) -> list[bytes]:
        wanted = data.decode().split("\r\nST: ")[1].split("\r\n")[0]
        return [f"HTTP/1.1 200 OK\r\nST: {wanted}\r\nLOCATION: {self.url}/d.xml\r\n\r\n".encode()]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(x.split(":")[1]) for x in head.split("\r\n") if "ength:" in x)
        body = (await reader.readexactly(length)).decode()
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + self._answer(head, body).encode())
        await writer.drain()
        writer.close()

    def _answer(self, head: str, body: str) -> str:
        if head.startswith("GET"):
            service = "urn:schemas-upnp-org:service:WANIPConnection:1"
            inner = f"<serviceType>{service}</serviceType><controlURL>/c</controlURL>"
            return f"<root><device><service>{inner}</service></device></root>"
        action = head.split("#")[1].split('"')[0]
        self.calls.append((action, body))
        lease = body.partition("<NewLeaseDuration>")[2].partition("<")[0]
        if code := self.errors.get(f"{action} {lease}".strip()):
            return f"<e><errorCode>{code}</errorCode></e>"
        return f"<ok><NewExternalIPAddress>{PUBLIC}</NewExternalIPAddress></ok>"


class Asking:
    """A mapper at work; what it tells can be waited for. Use ``async with``."""

    def __init__(self, gateway: str = "", **where: Any) -> None:
        self.news: list[News] = []
        self._changed = asyncio.Event()
        self._mapper = PortMapper(gateway, HERE, 4000, self._told, **where)

    def _told(self, news: News) -> None:
        self.news.append(news)
        self._changed.set()

    async def __aenter__(self) -> Asking:
        self.task = asyncio.create_task(self._mapper.run())
        return self

    async def __aexit__(self, *trouble: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def first(self) -> News:
        async with asyncio.timeout(WAIT_S):
            await self._changed.wait()
        return self.news[0]


def nobody(data: bytes) -> list[bytes]:
    return []


def go(main: Any) -> None:
    run(main())


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UPNP_TIMEOUT_S", 0.3)
    monkeypatch.setattr(limits, "PORT_MAP_RETRY_S", 0.01)


@pytest.mark.parametrize(("rule", "name"), [(pcp, "PCP"), (pmp, "NAT-PMP")])
def test_a_gateway_maps_and_gets_it_back(rule: Callable[[bytes], list[bytes]], name: str) -> None:
    async def main() -> None:
        async with gateway(rule) as box:
            async with Asking(HERE, pcp_port=box.address[1]) as asking:
                assert await asking.first() == Mapped(PUBLIC, 41000, 7200, name)
            async with asyncio.timeout(WAIT_S):
                while True:
                    last = box.heard[-1]
                    lease = last[4:8] if name == "PCP" else last[8:12]
                    if lease == bytes(4):
                        break  # a request with no lifetime deletes
                    await asyncio.sleep(0.01)

    go(main)


def test_upnp_where_nothing_else_answers() -> None:
    async def main() -> None:
        async with Box() as box, gateway(nobody) as silent, gateway(box.found) as ssdp:
            where = {"pcp_port": silent.address[1], "ssdp": ssdp.address}
            async with Asking(HERE, **where) as asking:
                assert await asking.first() == Mapped(PUBLIC, 4000, 7200, "UPnP")
            assert len(silent.heard) == 2 * limits.PORT_MAP_TRIES
            assert [name for name, _ in box.calls] == [
                "AddPortMapping",
                "GetExternalIPAddress",
                "DeletePortMapping",
            ]

    go(main)


def test_a_gateway_that_grants_endless_leases_only() -> None:
    async def main() -> None:
        async with Box({"AddPortMapping 7200": 725}) as box, gateway(box.found) as ssdp:
            async with Asking(ssdp=ssdp.address) as asking:
                assert isinstance(await asking.first(), Mapped)
            assert "<NewLeaseDuration>0<" in box.calls[1][1]

    go(main)


def test_no_gateway_and_refusals_are_told() -> None:
    async def main() -> None:
        async with gateway(nobody) as silent, Asking(ssdp=silent.address) as asking:
            news = await asking.first()
            assert isinstance(news, NotMapped) and "no gateway" in news.reason
        async with Box({"AddPortMapping 7200": 718}) as box, gateway(box.found) as ssdp:
            async with Asking(ssdp=ssdp.address) as asking:
                news = await asking.first()
                assert isinstance(news, NotMapped) and "718" in news.reason

    go(main)


ELSEWHERE = (
    b"HTTP/1.1 200 OK\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n"
    b"LOCATION: http://203.0.113.9/d.xml\r\n\r\n"
)


@pytest.mark.parametrize("answer", [ELSEWHERE, b"\xff" * 200])
def test_a_box_that_sends_us_elsewhere_or_sends_rubbish_maps_nothing(answer: bytes) -> None:
    async def main() -> None:
        async with gateway(lambda data: [answer]) as ssdp, Asking(ssdp=ssdp.address) as asking:
            assert isinstance(await asking.first(), NotMapped)

    go(main)
