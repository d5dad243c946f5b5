"""``Peer``: a member of a run inside the caller's process, without training.

The network runs in a thread of its own; methods block, are thread-safe, and have deadlines.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from swarmtrain_peer import host
from swarmtrain_peer.events import EventLog
from swarmtrain_peer.keys import load_or_create_identity
from swarmtrain_peer.loop import new_event_loop
from swarmtrain_peer.quorum import QuorumChanged
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_peer.settings import PeerSettings
from swarmtrain_protocols import codecs
from swarmtrain_protocols.dht.events import DhtFailed, DhtFound, DhtStored
from swarmtrain_protocols.errors import (
    ConfigError,
    GroupLost,
    LocalProtocolError,
    RoundFailed,
)
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.manifest import RunKeys, make_manifest
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.member import Offer
from swarmtrain_protocols.tickets import Capability, Ticket, sign_capability

F32 = NDArray[np.float32]
T = TypeVar("T")

DEFAULT_TIMEOUT_S = 120.0
DHT_TIMEOUT_S = 30.0
START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Reduced:
    """Outcome of ``Peer.all_reduce``, the same at every contributor.

    ``values`` is a fresh f32 array of the argument's shape: the weighted mean. ``contributors``
    are hex ids in member order, ``weight`` their total weight, ``root_hash`` (hex) names the
    encoded result, ``round`` counts the group's rounds.
    """

    values: F32
    contributors: tuple[str, ...]
    weight: float
    root_hash: str
    round: int


class Dht:
    """Signed records found by anybody in the run. Values are MessagePack of at most 1 kB."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def store(self, key: str, value: object, ttl: float) -> None:
        """Publish ``value`` under ``key`` for ``ttl`` seconds, as this peer's own record.

        Raises:
            LocalProtocolError: the value is larger than 1 kB. RoundFailed: nobody stored it.
        """
        self._peer._call(self._peer._dht_store(key, value, ttl), DHT_TIMEOUT_S + 5)

    def get(self, key: str) -> Any:
        """The value with the latest expiry (ties by id), or None."""
        found = self.get_all(key)
        return found[0][1] if found else None

    def get_all(self, key: str) -> list[tuple[str, Any]]:
        """All publishers' values as (hex id, value), latest expiry first."""
        return self._peer._call(self._peer._dht_get(key), DHT_TIMEOUT_S + 5)


class Peer:
    """A member of a run. Make it with ``Peer.start``; use it as a context manager or ``close`` it.

    ``ticket`` (text) lets others join, ``id`` is hex, ``members`` lists hex ids in member order.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._runtime: PeerRuntime
        self._founder: Ed25519Keyring | None = None
        self._weight = 1.0
        self._groups: dict[str, asyncio.Lock] = {}
        self._waiting: dict[str, asyncio.Future[object]] = {}
        self._dht_waiting: dict[object, asyncio.Future[object]] = {}
        self._closed = False
        self.dht = Dht(self)

    @classmethod
    def start(
        cls,
        *,
        ticket: str | None = None,
        listen: str = "127.0.0.1:0",
        name: str | None = None,
        identity: str | Path | None = None,
        weight: float = 1.0,
    ) -> Peer:
        """Found a run (no ticket) or join one; returns once membership is in the log.

        Args:
            listen: ``host:port``, port 0 for any; empty: outgoing links only.
            identity: key file, made on first use; None: a new identity.
            weight: default weight of this peer's contributions.

        Raises:
            ConfigError: malformed ticket. NoPeerReachable, NotAuthorised, RunMismatch,
            VersionMismatch: joining failed.
        """
        peer = cls()
        peer._weight = weight
        settings = peer._settings(ticket, listen, name, identity)
        started: Future[None] = Future()
        peer._thread = threading.Thread(
            target=peer._run_loop, args=(settings, started), name="swarmtrain-peer", daemon=True
        )
        peer._thread.start()
        try:
            started.result(START_TIMEOUT_S)
        except BaseException:
            peer.close()
            raise
        return peer

    def _settings(
        self, ticket: str | None, listen: str, name: str | None, identity: str | Path | None
    ) -> PeerSettings:
        if identity is None:
            keyring = Ed25519Keyring(host.entropy(32))
        else:
            keyring = load_or_create_identity(Path(identity))
        label = name or f"peer-{keyring.peer_id.hex()[:6]}"
        if ticket is not None:
            parsed = Ticket.parse(ticket)
            return PeerSettings(
                keyring=keyring,
                run=parsed.run,
                name=label,
                listen=listen,
                ticket=parsed,
                fast_kernels=True,
            )
        self._founder = Ed25519Keyring(host.entropy(32))
        manifest = make_manifest(RunKeys(name="group"), self._founder.peer_id, host.entropy(16))
        return PeerSettings(
            keyring=keyring,
            run=manifest.run_id,
            name=label,
            listen=listen,
            manifest=manifest,
            founder=self._founder,
            fast_kernels=True,
        )

    # -- the thread -----------------------------------------------------------------------------

    def _run_loop(self, settings: PeerSettings, started: Future[None]) -> None:
        loop = new_event_loop()
        self._loop = loop
        asyncio.set_event_loop(loop)
        events = EventLog(Path("/dev/null"), settings.keyring.peer_id.hex())
        self._runtime = PeerRuntime(settings, events)
        try:
            loop.run_until_complete(self._begin())
        except BaseException as error:  # noqa: BLE001, raised in the caller's thread
            loop.run_until_complete(self._abandon())
            started.set_exception(error)
            return
        started.set_result(None)
        loop.run_forever()
        loop.run_until_complete(self._runtime.close())
        loop.close()

    async def _begin(self) -> None:
        await self._runtime.start()
        self._runtime.listeners.append(self._on_event)
        self._runtime.failure.add_done_callback(self._ended)
        await self._runtime.wait_member(START_TIMEOUT_S - 5)

    async def _abandon(self) -> None:
        if hasattr(self._runtime, "transport"):
            await self._runtime.close("failed to start")

    def _call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        if self._closed or self._loop is None:
            work.close()
            raise LocalProtocolError("this peer is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise RoundFailed("no answer in time", f"waited {timeout_s:g} s") from None

    # -- facts ------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        return self._runtime.node.me.hex()

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(m.id.hex() for m in self._runtime.node.ledger.ordered_members())

    @property
    def ticket(self) -> str:
        """A ticket that points at this peer and grants votes.

        Raises:
            ConfigError: this peer cannot be dialled.
        """
        settings = self._runtime.settings
        if not self._runtime.addresses:
            raise ConfigError("no ticket", "this peer listens nowhere", "start it with listen=")
        if self._founder is not None:
            capability = Capability(host.entropy(8), settings.run, "trainer", True, 0, 0)
            secret = sign_capability(self._founder, capability)
        else:
            assert settings.ticket is not None
            secret = settings.ticket.capability
        return str(Ticket(self._runtime.addresses, settings.run, secret))

    # -- all-reduce -------------------------------------------------------------------------------

    def all_reduce(
        self,
        array: Any,
        *,
        weight: float = 1.0,
        codec: str = "fp32",
        group: str = "default",
        expect: int | None = None,
        timeout: float | None = None,
    ) -> Reduced:
        """Weighted mean of the group's arrays, with one outcome at all contributors.

        Calls of one group pair up in order. A round opens when ``expect`` contributors are ready
        (default: every member that called in this group before and has not left), or with fewer
        once the others have left, are lost, or the grace time is over.

        Args:
            array: f32[...] as NumPy array or CPU tensor; not written.
            weight: this contribution's weight, finite and not negative.
            timeout: seconds; default 120.

        Raises:
            ConfigError: wrong dtype, empty array, unknown codec.
            RoundFailed: no agreed result; ``retry`` says whether a later call may succeed.
            GroupLost: one of them: no majority of stewards answers.
            Diverged: this peer has ended, for the reason given.
        """
        values = _as_f32(array)
        codecs.get_codec(codec)
        if not (np.isfinite(weight) and weight >= 0):
            raise ConfigError("weight", f"{weight} is not a finite weight", "use 0 or more")
        wait_s = DEFAULT_TIMEOUT_S if timeout is None else timeout
        work = self._all_reduce(
            values.reshape(-1), weight * self._weight, codec, group, expect or 0, wait_s
        )
        reduced = self._call(work, wait_s + 5)
        return Reduced(
            reduced.values.reshape(values.shape),
            reduced.contributors,
            reduced.weight,
            reduced.root_hash,
            reduced.round,
        )

    async def _all_reduce(
        self, values: F32, weight: float, codec: str, group: str, expect: int, timeout_s: float
    ) -> Reduced:
        channel = f"group/{group}"
        lock = self._groups.setdefault(channel, asyncio.Lock())
        runtime = self._runtime
        try:
            async with asyncio.timeout(timeout_s), lock:
                if values.nbytes <= 65536:
                    blob = runtime.data.encode(values, codec)
                else:
                    loop = asyncio.get_running_loop()
                    encode = partial(runtime.data.encode, values, codec, borrow=True)
                    blob = await loop.run_in_executor(runtime.pool, encode)
                return await self._round(channel, blob.root, values.size, codec, weight, expect)
        except GroupLost:
            runtime.driver.run(runtime.node.withdraw, channel)
            raise
        except TimeoutError:
            runtime.driver.run(runtime.node.withdraw, channel)
            raise RoundFailed(
                f"all_reduce in group {group!r} got no result",
                f"waited {timeout_s:g} s",
                "are the others calling it too?",
            ) from None

    async def _round(
        self, channel: str, root: bytes, values: int, codec: str, weight: float, expect: int
    ) -> Reduced:
        runtime = self._runtime
        if runtime.failure.done():
            raise runtime.failure.result()
        if not await runtime.until(lambda: not runtime.quorum.lost, runtime.quorum.patience_s):
            raise _group_lost()
        if runtime.node.member.undecided(channel) is not None:
            why = "the call before this one, which was given up, is not decided yet"
            raise RoundFailed(f"all_reduce in {channel}", why, "call again a little later")
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._waiting[channel] = future
        try:
            offer = Offer(channel, root, values, codec, weight, 0, expect)
            runtime.driver.run(runtime.node.contribute, offer)
            done = await future
        finally:
            self._waiting.pop(channel, None)
        if isinstance(done, BaseException):
            raise done
        assert isinstance(done, fx.GroupDone)
        if values <= 16384:
            result = runtime.data.decoded(done.root)
        else:
            loop = asyncio.get_running_loop()
            result = await loop.run_in_executor(runtime.pool, runtime.data.decoded, done.root)
        return Reduced(
            result,
            tuple(member.hex() for member, _, _ in done.contributors),
            sum(samples for _, samples, _ in done.contributors),
            done.root.hex(),
            done.key.round,
        )

    def _on_event(self, event: object) -> None:
        if isinstance(event, fx.GroupDone):
            self._settle(event.key.channel, event)
        elif isinstance(event, fx.ContributionDecided):
            if event.outcome == "excluded":
                error = RoundFailed(
                    f"{event.key} went on without this contribution",
                    "it did not reach every owner in time",
                    "call again",
                )
                self._settle(event.channel, error)
        elif isinstance(event, QuorumChanged):
            if event.lost:
                self._settle_all(_group_lost())
        elif isinstance(event, DhtStored | DhtFound | DhtFailed):
            future = self._dht_waiting.pop(event.handle, None)
            if future is not None and not future.done():
                future.set_result(event)

    def _settle(self, channel: str, outcome: object) -> None:
        future = self._waiting.get(channel)
        if future is not None and not future.done():
            future.set_result(outcome)

    def _settle_all(self, error: BaseException) -> None:
        for channel in list(self._waiting):
            self._settle(channel, error)

    def _ended(self, failure: asyncio.Future[BaseException]) -> None:
        if not failure.cancelled():
            self._settle_all(failure.result())

    # -- DHT --------------------------------------------------------------------------------------

    async def _dht_store(self, key: str, value: object, ttl_s: float) -> None:
        data = msgspec.msgpack.encode(value)
        handle = self._runtime.driver.run(self._runtime.node.dht_store, key.encode(), data, ttl_s)
        outcome = await self._dht_answer(handle)
        if isinstance(outcome, DhtFailed):
            raise RoundFailed(f"could not store {key!r}", outcome.code, "try again")

    async def _dht_get(self, key: str) -> list[tuple[str, Any]]:
        handle = self._runtime.driver.run(self._runtime.node.dht_get, key.encode())
        outcome = await self._dht_answer(handle)
        if not isinstance(outcome, DhtFound):
            return []
        newest = sorted(outcome.records, key=lambda r: (-r.expires_s, r.publisher))
        return [(r.publisher.hex(), msgspec.msgpack.decode(r.value)) for r in newest]

    async def _dht_answer(self, handle: object) -> object:
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._dht_waiting[handle] = future
        try:
            async with asyncio.timeout(DHT_TIMEOUT_S):
                return await future
        finally:
            self._dht_waiting.pop(handle, None)

    # -- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave politely and stop. Safe to call twice."""
        if self._closed:
            return
        loop, thread = self._loop, self._thread
        if loop is not None and thread is not None and thread.is_alive() and loop.is_running():
            leaving = asyncio.run_coroutine_threadsafe(self._runtime.leave("closed", 2.0), loop)
            try:
                leaving.result(4.0)
            except TimeoutError:
                leaving.cancel()
            loop.call_soon_threadsafe(loop.stop)
        self._closed = True
        if thread is not None:
            thread.join(10.0)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def _group_lost() -> GroupLost:
    return GroupLost(
        "no majority of stewards answers",
        "nothing can be agreed on without one",
        "call again when `members` are back",
    )


def _as_f32(array: Any) -> F32:
    if hasattr(array, "detach"):  # a torch tensor, without importing torch
        array = array.detach().numpy()
    values = np.asarray(array)
    if values.dtype != np.float32 or values.size == 0:
        raise ConfigError(
            "all_reduce needs a non-empty float32 array",
            f"got {values.dtype} of shape {values.shape}",
            "convert it first",
        )
    return np.ascontiguousarray(values)
