"""The corpus in a peer process: who cannot get it is told why, and nothing is half done."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from swarmtrain_peer import corpusfile, host
from swarmtrain_peer.corpusfile import build_corpus, corpus_path
from swarmtrain_peer.events import EventLog
from swarmtrain_peer.librarian import Librarian
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_peer.settings import PeerSettings
from swarmtrain_protocols.errors import DataUnavailable, DiskFull
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.manifest import RunKeys, make_manifest
from swarmtrain_protocols.merkle import Blob
from swarmtrain_protocols.tickets import Capability, Ticket, sign_capability

WAIT_S = 20.0


class Member:
    """A runtime with its librarian, in this process."""

    def __init__(self, runtime: PeerRuntime, folder: Path, patience_s: float) -> None:
        self.runtime = runtime
        self.folder = folder
        self.librarian = Librarian(runtime, folder, patience_s=patience_s)

    async def obtain(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while not (await self.librarian.obtain({"why": "none here"}))["ready"]:
                pass

    def names(self) -> list[str]:
        return [str(record["name"]) for record in self.runtime.events.query()]


class Run:
    """A founder and those who join it."""

    def __init__(self, tmp_path: Path, pinned: bytes) -> None:
        self.tmp_path = tmp_path
        self.founder = Ed25519Keyring(host.entropy(32))
        keys = RunKeys(corpus="path:/does/not/exist", corpus_hash=pinned)
        self.manifest = make_manifest(keys, self.founder.peer_id, host.entropy(16))
        self.addresses: tuple[str, ...] = ()

    @asynccontextmanager
    async def member(self, name: str, patience_s: float = WAIT_S) -> AsyncIterator[Member]:
        first = not self.addresses
        right = Capability(host.entropy(8), self.manifest.run_id, "trainer", True, 0, 0)
        secret = sign_capability(self.founder, right)
        ticket = None if first else Ticket(self.addresses, self.manifest.run_id, secret)
        keyring = Ed25519Keyring(host.entropy(32))
        settings = PeerSettings(
            keyring=keyring,
            run=self.manifest.run_id,
            name=name,
            manifest=self.manifest,
            founder=self.founder if first else None,
            ticket=ticket,
            threads=2,
        )
        log = EventLog(self.tmp_path / f"{name}.jsonl", keyring.peer_id.hex())
        runtime = PeerRuntime(settings, log)
        await runtime.start()
        await runtime.wait_member()
        self.addresses = self.addresses or runtime.addresses
        made = Member(runtime, self.tmp_path / name, patience_s)
        try:
            yield made
        finally:
            made.librarian.close()
            await runtime.close()
            log.close()


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(b"0123456789" * 250_000)
    return f"path:{tmp_path / 'text'}"


def test_alone_it_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        run = Run(tmp_path, b"h" * 32)
        async with run.member("founder", patience_s=0.3) as founder:
            with pytest.raises(DataUnavailable) as caught:
                await founder.obtain()
            assert "no other member in reach" in caught.value.why
            assert founder.names().count("corpus_missing") == 1
            assert not founder.folder.exists()

    asyncio.run(main())


def test_nobody_has_it_and_then_somebody_has(tmp_path: Path, corpus: str) -> None:
    async def main() -> None:
        pinned = build_corpus(corpus, tmp_path / "made").hash
        run = Run(tmp_path, pinned)
        async with run.member("founder") as founder, run.member("b", patience_s=0.5) as other:
            with pytest.raises(DataUnavailable, match="none of 1 member"):
                await other.obtain()
            build_corpus(corpus, founder.folder)
            assert await founder.librarian.look()
            await other.obtain()
            assert other.names()[-1] == "corpus_ready"
            assert corpus_path(other.folder, pinned).exists()

    asyncio.run(main())


def test_what_is_pinned_may_be_no_corpus(tmp_path: Path) -> None:
    async def main() -> None:
        junk = Blob.of([b"x" * 56])
        run = Run(tmp_path, junk.root)
        async with run.member("founder") as founder, run.member("b") as other:
            founder.runtime.data.register(junk)
            with pytest.raises(DataUnavailable, match="malformed"):
                await other.obtain()

    asyncio.run(main())


def test_a_run_that_pins_nothing_has_nothing_to_fetch(tmp_path: Path) -> None:
    async def main() -> None:
        async with Run(tmp_path, b"").member("founder") as founder:
            assert not await founder.librarian.look()
            with pytest.raises(DataUnavailable, match="pins none"):
                await founder.obtain()

    asyncio.run(main())


def test_a_full_disk_is_said_and_nothing_is_fetched(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def main() -> None:
        pinned = build_corpus(corpus, tmp_path / "founder").hash
        run = Run(tmp_path, pinned)
        async with run.member("founder") as founder, run.member("b") as other:
            assert await founder.librarian.look()
            monkeypatch.setattr(corpusfile, "reserve", full)
            with pytest.raises(DiskFull):
                await other.obtain()
            assert "corpus_missing" in other.names()
            monkeypatch.undo()
            await other.obtain()

    asyncio.run(main())


def test_a_damaged_file_is_removed_and_fetched_again(tmp_path: Path, corpus: str) -> None:
    async def main() -> None:
        pinned = build_corpus(corpus, tmp_path / "founder").hash
        run = Run(tmp_path, pinned)
        async with run.member("founder") as founder, run.member("b") as other:
            assert await founder.librarian.look()
            path = build_corpus(corpus, other.folder).path
            data = bytearray(path.read_bytes())
            data[7] ^= 1
            path.write_bytes(bytes(data))
            await other.obtain()
            assert path.read_bytes() == corpus_path(founder.folder, pinned).read_bytes()
            assert "fallback" in other.names()

    asyncio.run(main())
