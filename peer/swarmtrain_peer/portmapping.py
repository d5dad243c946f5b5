"""Asks the gateway of this network for a port: PCP, NAT-PMP, then UPnP (spec 14 §2.3)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from swarmtrain_peer import host
from swarmtrain_protocols import limits, portmap, upnp
from swarmtrain_protocols.core import Emit
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.portmap import Mapped, NotMapped, PortMap, SendDatagram

News = Mapped | NotMapped
UPNP = "UPnP"


class _Ears(asyncio.DatagramProtocol):
    """Keeps a few answers to a search, with who sent them."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[tuple[bytes, str]] = asyncio.Queue(limits.UPNP_ANSWERS_MAX)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if not self.heard.full():
            self.heard.put_nowait((data, addr[0]))


class PortMapper:
    """Keeps one TCP port mapped while ``run`` runs; ``tell`` hears of each change.

    Args:
        gateway: IPv4 address, '' if it is not known (UPnP finds its own).
        client: this machine's address on that network; ``port``: where it listens.
        pcp_port, ssdp: where gateways listen; others only in tests.
    """

    def __init__(
        self,
        gateway: str,
        client: str,
        port: int,
        tell: Callable[[News], None],
        *,
        pcp_port: int = portmap.PORT,
        ssdp: tuple[str, int] = (upnp.GROUP, upnp.PORT),
    ) -> None:
        self._gateway = gateway
        self._client = client
        self._port = port
        self._tell = tell
        self._pcp_port = pcp_port
        self._ssdp = ssdp

    async def run(self) -> None:
        """Until cancelled; then the mapping is given back."""
        while True:
            reason = await self._pcp() if self._gateway else "no gateway is known"
            try:
                async with asyncio.timeout(4 * limits.UPNP_TIMEOUT_S):
                    gateway = await self._find()
                    mapped = await self._add(gateway)
            except (OSError, TimeoutError, PeerFault) as error:
                self._tell(NotMapped(f"{reason}; UPnP: {str(error) or 'no answer'}"))
                await asyncio.sleep(limits.PORT_MAP_PAUSE_S)
                continue
            await self._keep(gateway, mapped)

    # -- PCP and NAT-PMP ---------------------------------------------------------------------------

    async def _pcp(self) -> str:
        """Why there is no mapping; returns when there is none (any more)."""
        loop = asyncio.get_running_loop()
        core = PortMap(self._client, self._port, host.entropy)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                # Connected: nobody but the gateway's own port is heard.
                await loop.sock_connect(sock, (self._gateway, self._pcp_port))
            except OSError as error:
                return str(error)
            try:
                while True:
                    core.tick(host.mono_s())
                    for effect in core.drain():
                        if isinstance(effect, SendDatagram):
                            with contextlib.suppress(OSError):  # refused: as good as no answer
                                await loop.sock_sendall(sock, effect.data)
                        elif isinstance(effect, Emit) and isinstance(effect.event, Mapped):
                            self._tell(effect.event)
                        elif isinstance(effect, Emit) and isinstance(effect.event, NotMapped):
                            return effect.event.reason
                    wait_s = max(0.001, core.deadline() - host.mono_s())
                    await self._hear(loop, sock, core, wait_s)
            finally:
                core.close()
                with contextlib.suppress(OSError):
                    for effect in core.drain():
                        if isinstance(effect, SendDatagram):
                            sock.send(effect.data)

    @staticmethod
    async def _hear(
        loop: asyncio.AbstractEventLoop, sock: socket.socket, core: PortMap, wait_s: float
    ) -> None:
        with contextlib.suppress(TimeoutError, OSError, PeerFault):  # what is malformed is nothing
            async with asyncio.timeout(wait_s):
                data = await loop.sock_recv(sock, limits.PORT_MAP_DATAGRAM_BYTES_MAX + 1)
                core.receive(host.mono_s(), data)

    # -- UPnP --------------------------------------------------------------------------------------

    async def _find(self) -> upnp.Gateway:
        """The first box that answers as a gateway and means it. Raises PeerFault, TimeoutError."""
        loop = asyncio.get_running_loop()
        fault = PeerFault("malformed", "no gateway")
        transport, ears = await loop.create_datagram_endpoint(_Ears, (self._client, 0))
        try:
            for data in upnp.searches():
                transport.sendto(data, self._ssdp)
            for _ in range(limits.UPNP_ANSWERS_MAX):
                try:
                    async with asyncio.timeout(limits.UPNP_TIMEOUT_S):
                        data, sender = await ears.heard.get()
                except TimeoutError:
                    break
                try:
                    url = upnp.parse_found(data, sender)
                    found = upnp.http_answer(await self._http("GET", url, {}, b""))[1]
                    return upnp.parse_description(found, url, sender)
                except (OSError, PeerFault) as error:
                    fault = PeerFault("malformed", str(error))
        finally:
            transport.close()
        raise fault

    async def _http(self, method: str, url: str, headers: dict[str, str], body: bytes) -> bytes:
        parts = urlsplit(url)
        async with asyncio.timeout(limits.UPNP_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
            try:
                writer.write(upnp.http_request(method, url, headers, body))
                answer = b""
                while piece := await reader.read(8192):
                    answer += piece
                    if len(answer) > 2 * limits.UPNP_DESCRIPTION_BYTES_MAX:
                        raise PeerFault("malformed", "UPnP: an answer without an end")
                return answer
            finally:
                writer.close()

    async def _call(self, gateway: upnp.Gateway, made: tuple[dict[str, str], bytes]) -> bytes:
        """The answer's body, errors included. Raises PeerFault, OSError, TimeoutError."""
        headers, body = made
        return upnp.http_answer(await self._http("POST", gateway.url, headers, body))[1]

    async def _add(self, gateway: upnp.Gateway) -> Mapped:
        """Raises PeerFault: it refuses."""
        lease_s = limits.PORT_MAP_LEASE_S
        for wanted in (lease_s, 0):
            made = upnp.add_mapping(gateway, self._client, self._port, self._port, wanted)
            code = upnp.error_code(await self._call(gateway, made))
            if code != upnp.ONLY_PERMANENT:
                break
        if code:
            raise PeerFault("malformed", f"the gateway refuses with error {code}")
        answer = await self._call(gateway, upnp.call(gateway, "GetExternalIPAddress"))
        return Mapped(upnp.external_address(answer), self._port, lease_s, UPNP)

    async def _keep(self, gateway: upnp.Gateway, mapped: Mapped) -> None:
        """Renew it at half of its time; returns when the gateway does not answer any more."""
        told: Mapped | None = None
        try:
            while True:
                if mapped != told:
                    told = mapped
                    self._tell(mapped)
                await asyncio.sleep(limits.PORT_MAP_LEASE_S / 2)
                mapped = await self._add(gateway)
        except (OSError, TimeoutError, PeerFault) as error:
            self._tell(NotMapped(f"UPnP: {str(error) or 'no answer'}"))
        except asyncio.CancelledError:
            with contextlib.suppress(OSError, TimeoutError, PeerFault):
                await self._call(gateway, upnp.delete_mapping(gateway, mapped.port))
            raise
