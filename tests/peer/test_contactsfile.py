"""The file of contacts, and a site that comes back when all that its ticket names is gone."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from swarmtrain_peer.contactsfile import ContactsFile
from swarmtrain_peer.events import EventLog, read_events
from swarmtrain_peer.runtime import PeerRuntime
from swarmtrain_peer.settings import PeerSettings
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.contacts import ContactBook, encode_book
from swarmtrain_protocols.dht.events import DhtFound, DhtStored
from swarmtrain_protocols.dht.ids import Contact
from swarmtrain_protocols.identity import Ed25519Keyring
from swarmtrain_protocols.manifest import Manifest, RunKeys, make_manifest
from swarmtrain_protocols.tickets import Capability, Ticket, sign_capability

RUN = bytes(range(32))
WAIT_S = 30.0


def book_of(count: int) -> ContactBook:
    book = ContactBook()
    for number in range(count):
        contact = Contact(PeerId(number.to_bytes(32, "big")), (f"10.0.0.1:{number + 1}",))
        book.seen(contact, 1000.0 + number)
    return book


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "me")
    path = tmp_path / "contacts"
    first = ContactsFile(path, RUN, log)
    first.load(ContactBook(), 2000.0)  # there is none yet
    first.save(book_of(5))
    written = path.stat().st_mtime_ns
    first.save(book_of(5))  # nobody new: the disk is left alone
    assert path.stat().st_mtime_ns == written
    assert path.stat().st_mode & 0o077 == 0
    book = ContactBook()
    ContactsFile(path, RUN, log).load(book, 2000.0)
    assert book.entries() == book_of(5).entries()
    ContactsFile(None, RUN, log).save(book)
    log.close()
    assert list(read_events(tmp_path / "events.jsonl")) == []


@pytest.mark.parametrize("data", [b"", b"\xc1", encode_book(bytes(32), []), bytes(1 << 20)])
def test_a_damaged_file_costs_one_warning_and_is_replaced(tmp_path: Path, data: bytes) -> None:
    log = EventLog(tmp_path / "events.jsonl", "me")
    path = tmp_path / "contacts"
    path.write_bytes(data)
    book = book_of(2)
    file = ContactsFile(path, RUN, log)
    file.load(book, 2000.0)
    assert len(book) == 2
    file.save(book_of(3))
    again = ContactBook()
    ContactsFile(path, RUN, log).load(again, 2000.0)
    assert len(again) == 3
    log.close()
    assert [r["name"] for r in read_events(tmp_path / "events.jsonl")] == ["contacts_unreadable"]


def test_a_file_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "me")
    file = ContactsFile(tmp_path / "no folder" / "contacts", RUN, log)
    for count in (1, 2, 3):
        file.save(book_of(count))
    log.close()
    assert [r["name"] for r in read_events(tmp_path / "events.jsonl")] == ["contacts_unreadable"]


class Founder:
    """A run, and members of it in this process: real transport and nodes, one event loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keyring = Ed25519Keyring(b"\x07" * 32)
        self.manifest: Manifest = make_manifest(
            RunKeys(name="contacts"), self.keyring.peer_id, b"n" * 16
        )
        self.run = self.manifest.run_id
        capability = Capability(b"c" * 8, self.run, "trainer", True, 0, 0)
        self.secret = sign_capability(self.keyring, capability)
        self.running: list[PeerRuntime] = []

    async def start(self, name: str, seed: int, *at: str) -> PeerRuntime:
        """The founding member if ``at`` is empty, else one whose ticket names ``at``."""
        founds = not at
        settings = PeerSettings(
            keyring=Ed25519Keyring(bytes([seed]) * 32),
            run=self.run,
            name=name,
            manifest=self.manifest,
            founder=self.keyring if founds else None,
            ticket=None if founds else Ticket(at, self.run, self.secret),
            contacts=self.folder / f"{name}.contacts",
            threads=1,
        )
        runtime = PeerRuntime(settings, EventLog(self.folder / f"{name}.jsonl", name))
        self.running.append(runtime)
        await runtime.start()
        return runtime

    async def close(self, runtime: PeerRuntime) -> None:
        self.running.remove(runtime)
        await runtime.close()
        runtime.events.close()


async def until(condition: object, what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"never: {what}"
        await asyncio.sleep(0.02)


async def outcome(runtime: PeerRuntime, call: object, *args: object) -> object:
    """The event that answers a call of the DHT."""
    heard: list[object] = []
    runtime.listeners.append(heard.append)
    handle = runtime.driver.run(call, *args)  # type: ignore[arg-type]

    def found() -> list[object]:
        return [event for event in heard if getattr(event, "handle", None) == handle]

    await until(found, "an answer")
    runtime.listeners.remove(heard.append)
    return found()[0]


def test_a_restarted_site_finds_the_network_though_its_seeds_are_gone(tmp_path: Path) -> None:
    """It has neither log nor link: ticket's address is dead, only the file knows the others."""

    async def scenario() -> None:
        run = Founder(tmp_path)
        try:
            seed = await run.start("seed", 1)
            await seed.wait_member(WAIT_S)
            others = [await run.start(f"m{n}", 10 + n, *seed.addresses) for n in range(3)]
            for member in others:
                await member.wait_member(WAIT_S)
            home = others[0]
            await until(lambda: len(home.node.dht.book) >= 3, "it has talked to all")
            stored = await outcome(others[2], others[2].node.dht_store, b"k", b"\x2a", 300.0)
            assert isinstance(stored, DhtStored)
            dead = seed.addresses
            await run.close(home)
            await run.close(seed)
            assert (tmp_path / "m0.contacts").stat().st_size > 100

            again = await run.start("m0", 10, *dead)
            living = {other.node.me for other in others[1:]}
            await until(
                lambda: living <= {c.peer for c in again.node.dht.table.contacts()},
                "the others are in its table",
            )
            found = await outcome(again, again.node.dht_get, b"k")
            assert isinstance(found, DhtFound)
            assert [record.value for record in found.records] == [b"\x2a"]

            stranger = await run.start("m9", 99, *dead)  # the same without a file
            await until(
                lambda: stranger.events.query(name="link_refused"), "its ticket leads nowhere"
            )
            assert len(stranger.node.dht.table) == len(stranger.node.dht.book) == 0
        finally:
            for runtime in list(run.running):
                await run.close(runtime)

    asyncio.run(scenario())
    names = [record["name"] for record in read_events(tmp_path / "m0.jsonl")]
    assert "dht_rejoined" in names
