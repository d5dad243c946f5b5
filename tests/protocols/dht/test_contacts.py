"""The book of contacts: bounded, fair between subnets, and the same after a restart."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.contacts import BookEntry, ContactBook, decode_book, encode_book
from swarmtrain_protocols.dht.ids import Contact

RUN = bytes(range(32))


def contact(number: int, address: str = "") -> Contact:
    return Contact(PeerId(number.to_bytes(32, "big")), (address or f"10.0.0.1:{number + 1}",))


def test_the_longest_unseen_goes_first() -> None:
    book = ContactBook()
    for number in range(limits.DHT_BOOK_MAX + 10):
        book.seen(contact(number), 1000.0 + number)
    assert len(book) == limits.DHT_BOOK_MAX
    newest = book.entries()[0]
    assert newest.peer == contact(limits.DHT_BOOK_MAX + 9).peer
    assert min(entry.seen_s for entry in book.entries()) == 1010
    book.seen(contact(20), 5000.0)
    assert book.entries()[0] == BookEntry(contact(20).peer, contact(20).addresses, 5000)
    book.seen(Contact(PeerId(b"c" * 32)), 6000.0)  # cannot be dialled: not worth remembering
    assert book.entries()[0].seen_s == 5000


def test_one_public_subnet_gets_few_places() -> None:
    book = ContactBook()
    for number in range(50):
        book.seen(contact(number, f"8.8.4.{number}:1"), float(number))
    assert len(book) == limits.DHT_PER_SUBNET_IN_TABLE_MAX
    assert book.entries()[-1].seen_s == 40
    for number in range(50):  # those who have gone are counted no more
        book.forget(contact(number).peer)
    assert (len(book), book._blocks) == (0, {})


def test_only_those_out_of_sight_are_drawn() -> None:
    book = ContactBook()
    for number in range(20):
        book.seen(contact(number), 1.0)
    assert book.draw(Random(1), 8) == []
    hidden = {contact(n).peer for n in (3, 4, 5)}
    for peer in (*hidden, contact(99).peer):  # the last is not in the book
        book.lost(peer)
    drawn = book.draw(Random(1), 2)
    assert len({c.peer for c in drawn}) == 2
    assert {c.peer for c in drawn} <= hidden
    book.forget(contact(3).peer)
    book.seen(contact(4), 1.5)  # it answers again
    assert [c.peer for c in book.draw(Random(1), 8)] == [contact(5).peer]
    for number in range(100, 100 + limits.DHT_BOOK_MAX):
        book.seen(contact(number), 2.0)
    assert book.draw(Random(1), 8) == []


def test_old_contacts_are_forgotten() -> None:
    book = ContactBook()
    book.seen(contact(1), 1000.0)
    book.seen(contact(2), 2000.0)
    book.purge(1000.0 + limits.DHT_BOOK_AGE_S)
    assert [entry.peer for entry in book.entries()] == [contact(2).peer]


def test_there_and_back() -> None:
    book = ContactBook()
    for number in range(5):
        book.seen(contact(number), 1000.0 + number)
    data = encode_book(RUN, book.entries())
    again = ContactBook()
    again.seen(contact(3, "10.9.9.9:1"), 3000.0)  # of this life: it stays in front
    again.load(decode_book(data, RUN), 3000.0)
    assert {c.peer for c in again.draw(Random(1), 8)} == {contact(n).peer for n in (0, 1, 2, 4)}
    assert len(again) == 5
    assert again.entries()[0].addresses == ("10.9.9.9:1",)


def test_a_full_book_can_be_read_again() -> None:
    addresses = ("a" * (limits.ADDRESS_CHARS_MAX - 2) + ":1",) * limits.ADDRESSES_PER_PEER_MAX
    entries = [BookEntry(bytes([n]) * 32, addresses, 1 << 53) for n in range(limits.DHT_BOOK_MAX)]
    data = encode_book(RUN, entries)
    assert len(data) <= limits.DHT_BOOK_BYTES_MAX
    assert list(decode_book(data, RUN)) == entries


GOOD = encode_book(RUN, [BookEntry(b"p" * 32, ("h:1",), 7)])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        GOOD[:-1],
        GOOD + b"\x00",
        encode_book(bytes(32), []),
        msgspec.msgpack.encode([2, RUN, []]),
        msgspec.msgpack.encode([1, RUN, [[b"p" * 31, ["h:1"], 7]]]),
        msgspec.msgpack.encode([1, RUN, [[b"p" * 32, ["h:1"] * 9, 7]]]),
        msgspec.msgpack.encode([1, RUN, [[b"p" * 32, ["h:1"], -7]]]),
        encode_book(RUN, [BookEntry(b"p" * 32, (), 7)] * (limits.DHT_BOOK_MAX + 1)),
        bytes(limits.DHT_BOOK_BYTES_MAX + 1),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    assert len(decode_book(GOOD, RUN)) == 1
    with pytest.raises(ValueError):
        decode_book(data, RUN)
