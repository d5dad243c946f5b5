"""The run's corpus at this site: fetched from members that have it, and served to others.

Runs on the event loop; what blocks on the disk or hashes goes to the disk thread. The file is
mapped, so serving it takes no memory. Nothing is fetched before the trainer asks: a site without
one has no use for the text.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from swarmtrain_peer import host
from swarmtrain_peer.corpusfile import CorpusFile, PartialCorpus, corpus_path, open_corpus
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_protocols.core import CancelFetch, Effect, Emit, Fetch, PeerId
from swarmtrain_protocols.corpus import DESCRIPTOR_BYTES, Descriptor
from swarmtrain_protocols.corpus_download import CorpusDownload, Finish, Prepare, Refused
from swarmtrain_protocols.errors import DataUnavailable, LocalProtocolError, SwarmError

Document = dict[str, Any]
T = TypeVar("T")

ANSWER_S = 5.0
"""A call is answered after that time at the latest; the trainer calls again."""
PATIENCE_S = 60.0
"""How long to look for a member that has the corpus before the trainer is told to give up."""
PROGRESS_S = 5.0
_FETCH_TIMEOUT_S = 3600.0
"""The core has its own, shorter deadlines; this one only bounds a forgotten transfer."""


class Librarian:
    """One per peer process; ``Driver.guest`` for the fetches of ``GUEST_TICKETS``."""

    def __init__(
        self, runtime: PeerRuntime, folder: Path, *, patience_s: float = PATIENCE_S
    ) -> None:
        self._runtime = runtime
        self._folder = folder
        self._patience_s = patience_s
        self._loop = asyncio.get_running_loop()
        self._file: CorpusFile | None = None
        self._looking = asyncio.Lock()
        self._download: CorpusDownload | None = None
        self._place: PartialCorpus | None = None
        self._next_ticket = -1
        self._reading: dict[int, tuple[int, bytearray]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._error: SwarmError | None = None
        self._begin_s = 0.0
        self._told_s = -math.inf
        self._closed = False
        runtime.driver.guest = self

    @property
    def corpus_hash(self) -> bytes:
        """What the run pins; empty if it pins nothing."""
        return self._runtime.manifest.keys.corpus_hash

    async def look(self) -> bool:
        """Serve the corpus if its file is here; a damaged one is removed, and said so."""
        async with self._looking:
            path = corpus_path(self._folder, self.corpus_hash)
            if self._file is None and self.corpus_hash and path.exists():
                try:
                    self._serve(await self._on_disk(open_corpus, path))
                except DataUnavailable as error:
                    path.unlink(missing_ok=True)
                    self._runtime.events.emit("fallback", what="corpus file", why=error.why)
        return self._file is not None

    async def obtain(self, args: Document) -> Document:
        """The trainer asks for the corpus: fetch it if it is not here.

        ``{"ready", "bytes_have", "bytes"}``, at the latest after ``ANSWER_S``; ask again until it
        is ready. ``args["why"]`` says why the trainer could not make it from what is here, and
        ``args["wait_s"]`` how long the answer may take at most.

        Raises:
            DataUnavailable: the run pins none, no member in reach has it, or what is pinned is no
                corpus. A later call tries again.
            DiskFull, CheckpointError: it cannot be written.
        """
        if not self.corpus_hash:
            raise DataUnavailable("corpus", "this run pins none", "found it with a corpus")
        if not await self.look():
            if self._download is None:
                self._begin(str(args.get("why") or ""))
            await self._runtime.until(
                lambda: self._file is not None or self._error is not None,
                min(ANSWER_S, float(args.get("wait_s", ANSWER_S))),
            )
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        download = self._download
        described = download.descriptor if download is not None else None
        return {
            "ready": self._file is not None,
            "bytes_have": download.have_bytes if download is not None else 0,
            "bytes": described.nbytes if described is not None else 0,
        }

    def close(self) -> None:
        """Stop fetching; what has come stays on disk."""
        self._closed = True
        self._end()

    # -- a download ----------------------------------------------------------------------------

    def _begin(self, why: str) -> None:
        runtime = self._runtime
        if why:
            what = f"corpus {runtime.manifest.keys.corpus}"
            runtime.events.emit("fallback", what=what, why=why, using="other members' copy")
        self._begin_s = host.mono_s()
        self._told_s = -math.inf
        self._download = CorpusDownload(
            now=self._begin_s,
            root=self.corpus_hash,
            rng=random.Random(host.entropy(8)),
            candidates=self._others,
            first_ticket=self._next_ticket,
        )
        self._run(self._download.tick)

    def _others(self) -> list[PeerId]:
        node = self._runtime.node
        linked = node.linked()
        return [
            PeerId(m.id)
            for m in node.ledger.ordered_members()
            if m.id != node.me and (m.addresses or m.id in linked)
        ]

    def _run(self, call: Callable[..., None], *args: object) -> None:
        """Call a method of the core with the time first, then carry out what follows."""
        download = self._download
        if download is None or self._closed:
            return
        call(host.mono_s(), *args)
        for effect in download.drain():
            self._execute(effect)
        if self._download is not download:
            return
        now = host.mono_s()
        self._tell(now, download)
        if now - download.alone_since_s > self._patience_s:
            self._nobody(download)
            return
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.01, min(download.deadline() - now, self._patience_s))
        self._timer = self._loop.call_later(delay_s, self._run, download.tick)

    def _execute(self, effect: Effect) -> None:
        if isinstance(effect, Fetch):
            self._fetch(effect)
        elif isinstance(effect, CancelFetch):
            self._reading.pop(effect.ticket, None)
            self._runtime.transport.cancel(effect.ticket)
        elif isinstance(effect, Prepare):
            self._later(self._prepare(effect.descriptor))
        elif isinstance(effect, Finish):
            self._later(self._finish())
        else:
            assert isinstance(effect, Emit) and isinstance(effect.event, Refused), effect
            why = f"what the run pins is none: {effect.event.reason}"
            self._give_up(DataUnavailable("corpus", why, "found another run"))

    def _fetch(self, effect: Fetch) -> None:
        transport, ledger = self._runtime.transport, self._runtime.node.ledger
        download = self._download
        assert download is not None
        descriptor, total = bytearray(), 1
        if effect.purpose == "descriptor":
            descriptor = bytearray(DESCRIPTOR_BYTES)
            places = [memoryview(descriptor)]
        else:
            assert self._place is not None and download.descriptor is not None
            total = download.descriptor.chunks
            places = [self._place.place(effect.first + i) for i in range(effect.count)]
        self._reading[effect.ticket] = (effect.first, descriptor)
        self._next_ticket = effect.ticket - 1
        if effect.peer in ledger.members:
            transport.learn(effect.peer, ledger.members[effect.peer].addresses)
        try:
            transport.fetch(
                effect.ticket,
                effect.peer,
                effect.root,
                effect.first,
                total,
                places,
                _FETCH_TIMEOUT_S,
            )
        except LocalProtocolError:  # too many wait for this peer already
            self._loop.call_soon(self.fetch_failed, effect.ticket, "busy")

    def fetched(self, ticket: int, leaves: Sequence[bytes]) -> None:
        """See ``handler.Guest``: verified bytes are in place."""
        download, asked = self._download, self._reading.pop(ticket, None)
        if download is None or asked is None:
            return
        first, descriptor = asked
        if not descriptor and self._place is not None:
            self._place.proven(first, leaves)
        self._run(download.fetched, ticket, bytes(descriptor))

    def fetch_failed(self, ticket: int, reason: str) -> None:
        """See ``handler.Guest``."""
        self._reading.pop(ticket, None)
        if self._download is not None:
            self._run(self._download.fetch_failed, ticket, reason)

    # -- the disk ------------------------------------------------------------------------------

    async def _on_disk(self, work: Callable[..., T], *args: object) -> T:
        return await self._loop.run_in_executor(self._runtime.disk_pool, partial(work, *args))

    def _later(self, work: Any) -> None:
        task = self._loop.create_task(work)
        task.add_done_callback(self._settled)

    def _settled(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._closed:
            return
        error = task.exception()
        if isinstance(error, SwarmError):
            self._give_up(error)
        elif error is not None:
            raise error

    async def _prepare(self, descriptor: Descriptor) -> None:
        download = self._download
        place = await self._on_disk(PartialCorpus, self._folder, descriptor)
        there = await self._on_disk(place.there)
        if download is not None and download is self._download:
            self._place = place
            self._run(download.prepared, there)

    async def _finish(self) -> None:
        download, place = self._download, self._place
        assert download is not None and place is not None
        try:
            file = await self._on_disk(place.finish)
        except DataUnavailable as error:
            self._runtime.events.emit("fallback", what="corpus download", why=error.why)
            self._run(download.restart)
            return
        if self._download is not download or self._closed:
            return
        self._serve(file)
        self._runtime.events.emit(
            "corpus_ready",
            bytes=file.descriptor.nbytes,
            donors=len(download.donors),
            fetch_s=round(host.mono_s() - self._begin_s, 3),
        )
        self._end()
        self._runtime.changed()

    def _serve(self, file: CorpusFile) -> None:
        self._file = file
        for blob in file.blobs():
            self._runtime.data.register(blob)
            self._runtime.archives[blob.root] = None

    # -- what people see -----------------------------------------------------------------------

    def _tell(self, now: float, download: CorpusDownload) -> None:
        described = download.descriptor
        if described is None or self._place is None or now - self._told_s < PROGRESS_S:
            return
        self._told_s = now
        self._runtime.events.emit(
            "corpus_progress",
            bytes_have=download.have_bytes,
            bytes=described.nbytes,
            donors=len(download.donors),
        )

    def _nobody(self, download: CorpusDownload) -> None:
        """No holder for too long. Asking again begins anew, with what is already on disk."""
        asked = len(download.asked)
        why = f"none of {asked} member(s) in reach has it" if asked else "no other member in reach"
        self._give_up(
            DataUnavailable(
                "the run's corpus is not here",
                f"{why}, looked for {self._patience_s:g} s",
                "stay connected to a member that has it, or put the same files here",
            )
        )

    def _give_up(self, error: SwarmError) -> None:
        self._runtime.events.emit("corpus_missing", reason=str(error))
        self._error = error
        self._end()
        self._runtime.changed()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        download, self._download = self._download, None
        self._place = None
        if download is not None:
            download.abandon()
            for effect in download.drain():
                if isinstance(effect, CancelFetch):
                    self._reading.pop(effect.ticket, None)
                    self._runtime.transport.cancel(effect.ticket)
