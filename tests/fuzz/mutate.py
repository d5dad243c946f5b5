"""The mutator: from inputs that mean something to inputs that nearly do.

Two levels. On bytes: flips, edges of integers in both byte orders, MessagePack heads, cuts,
repeats, splices of two inputs. On structure: the decoded value of a MessagePack or JSON input is
changed at one place (another type, an edge of its range, a key gone, a list grown) and encoded
again, so that what comes behind the first check is reached too. All choices come from one seeded
generator: an input is a function of seed, number and corpus.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from random import Random
from typing import Any

import msgpack

Splice = Callable[[Random, bytes], bytes]

BYTES = bytes([0, 1, 0x7F, 0x80, 0xC0, 0xC1, 0xC4, 0xCA, 0xCB, 0xD9, 0xDC, 0xDD, 0xDF, 0xFE, 0xFF])
EDGES = (0, 1, -1, 127, 128, 255, 256, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
WIDE = (2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))
HEADS = (
    b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xde\xff\xff", b"\xdf\x7f\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff", b"\xdb\x00\xff\xff\xff", b"\xc1", b"\xd8\x00" + bytes(16),
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00", b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b"\xcb\xff\xf0\x00\x00\x00\x00\x00\x00", b"\xca\x7f\xc0\x00\x00", b"\xc7\x08\x05" + bytes(8),
    b"\x91" * 40, b"\x81\xa1a" * 20, b"\x91" * 4000, b"\x81\xa1a" * 4000,
    b"\xa1\xff", b"\xd6\xff" + b"\xff" * 4,
)  # fmt: skip
"""MessagePack heads that claim much, NaN and infinities, extensions, nesting, broken UTF-8."""
SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**64 - 1, -(2**63), 0.0,
    -0.0, 1.5, -1.5, 1e308, 5e-324, math.nan, math.inf, -math.inf, "", "x", "\x00", "\u202e",
    "é" * 70, "x" * 300, b"", b"\0", bytes(20), bytes(32), b"\xff" * 32, bytes(33), bytes(64),
    [], {}, [[]], [None] * 70, {"type": "ping"}, {1: 2},
)  # fmt: skip
SIZE_MAX = 64 * 1024


def _bit(rng: Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _byte(rng: Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] = rng.choice(BYTES)


def _any_byte(rng: Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def _integer(rng: Random, data: bytearray) -> None:
    width = rng.choice((2, 4, 8))
    value = rng.choice(EDGES if width < 8 else EDGES + WIDE) % (1 << 8 * width)
    at = rng.randrange(len(data))
    data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))


def _add(rng: Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at] = (data[at] + rng.randrange(-16, 17)) % 256


def _cut(rng: Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _remove(rng: Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + 1 + int(rng.expovariate(0.2))]


def _repeat(rng: Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    piece = data[at : at + 1 + int(rng.expovariate(0.05))]
    data[at:at] = piece * rng.choice((1, 1, 2, 8, 100))


def _insert(rng: Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(1 + int(rng.expovariate(0.3)))


def _head(rng: Random, data: bytearray) -> None:
    head, at = rng.choice(HEADS), rng.randrange(len(data))
    data[at : at + rng.choice((0, 1, len(head)))] = head


def _swap(rng: Random, data: bytearray) -> None:
    a, b, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 33)
    data[a : a + size] = data[b : b + size]


_OPERATIONS = (_bit, _bit, _byte, _any_byte, _integer, _add, _cut, _remove, _repeat, _insert)
_OPERATIONS = (*_OPERATIONS, _head, _swap)


def mutate_bytes(rng: Random, data: bytes, other: bytes = b"") -> bytes:
    """One to a few changes of ``data``; sometimes its tail comes from ``other``."""
    out = bytearray(data)
    if other and rng.random() < 0.1:
        out[rng.randrange(len(out) + 1) :] = other[rng.randrange(len(other)) :]
    for _ in range(1 + min(int(rng.expovariate(0.7)), 12)):
        if not out:
            out += rng.randbytes(rng.randrange(1, 9))
        rng.choice(_OPERATIONS)(rng, out)
    return bytes(out[:SIZE_MAX])


def _some(rng: Random) -> Any:
    """A copy: containers are changed in place later on."""
    return copy.deepcopy(rng.choice(SCALARS))


def _nested(rng: Random) -> Any:
    value: Any = _some(rng)
    for _ in range(rng.choice((2, 20, 300))):
        value = [value] if rng.random() < 0.7 else {"a": value}
    return value


def _near(rng: Random, value: Any) -> Any:
    """Another value of the same kind, or nearly."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 2, *EDGES, *WIDE))
    if isinstance(value, float):
        return rng.choice((-value, value * 1e30, math.nan, math.inf, -math.inf, 5e-324, 0, 1e308))
    if isinstance(value, (str, bytes)):
        nothing, some = ("", "xé\x00") if isinstance(value, str) else (b"", b"\xff\x00\x80")
        if rng.random() < 0.4 and value:
            at = rng.randrange(len(value))
            return value[:at] + value[at + 1 :] if rng.random() < 0.5 else value[:at] + some
        return rng.choice((nothing, value + value, value + some, value * 20, value[::-1]))
    return _some(rng)


def _grow(rng: Random, items: list[Any]) -> None:
    """A list with an item more, fewer, doubled, many, or two exchanged."""
    choice = rng.randrange(6)
    at = rng.randrange(len(items)) if items else 0
    if choice == 0 and items:
        del items[at]
    elif choice == 1 and items:
        items.insert(at, copy.deepcopy(items[at]))
    elif choice == 2 and items:
        plain = not isinstance(items[at], (list, dict))  # or it grows beyond all use
        items.extend([copy.deepcopy(items[at])] * rng.choice((3, 70, 1100) if plain else (3,)))
    elif choice == 3 and items:
        other = rng.randrange(len(items))
        items[at], items[other] = items[other], items[at]
    elif choice == 4:
        items.clear()
    else:
        items.append(_some(rng))


def mutate_value(rng: Random, value: Any) -> Any:
    """The value with one place changed; containers are changed in place."""
    if isinstance(value, dict) and value and rng.random() < 0.92:
        key = rng.choice(list(value))
        choice = rng.random()
        if choice < 0.08:
            del value[key]
        elif choice < 0.14:
            value[rng.choice(("", "type", "no such key", "\u202e"))] = _some(rng)
        else:
            value[key] = mutate_value(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.92:
        if rng.random() < 0.25:
            _grow(rng, value)
        else:
            at = rng.randrange(len(value))
            value[at] = mutate_value(rng, value[at])
        return value
    choice = rng.random()
    if choice < 0.55:
        return _near(rng, value)
    return _some(rng) if choice < 0.97 else _nested(rng)


_packer = msgpack.Packer()  # each has a buffer of a megabyte


def splice_msgpack(rng: Random, data: bytes) -> bytes:
    """Change the structure of a MessagePack input; any other input is changed as bytes."""
    try:
        value = msgpack.unpackb(data, strict_map_key=False)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            value = mutate_value(rng, value)
        return bytes(_packer.pack(value)[:SIZE_MAX])
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.StackError):
        _packer.reset()
        return mutate_bytes(rng, data)


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)


def splice_json(rng: Random, data: bytes) -> bytes:
    """As ``splice_msgpack``, for JSON; NaN and infinities come out as JavaScript writes them."""
    try:
        value = mutate_value(rng, json.loads(data))
        return json.dumps(value, default=_plain).encode("utf-8", "surrogatepass")[:SIZE_MAX]
    except (ValueError, TypeError, RecursionError):
        return mutate_bytes(rng, data)


WORDS = (
    b"\x00", b"\r\n", b"../", b"/", b"%00", b"%2e%2e", b"'", b'"', b"<script>", b"\xe2\x80\xae",
    b"99999999999999999999", b"-1", b"1e999", b"nan", b"inf", b"[", b"]", b":", b"#", b",", b"=",
    b"[[", b"{", b"[" * 4000, b'{"a":' * 3000,
    b"\xff", b"\xed\xa0\x80", b"0x10", b"true", b"auto", b"A" * 300,
)  # fmt: skip


def splice_text(rng: Random, data: bytes) -> bytes:
    """Words that parsers of text stumble over, put in, or in the place of a piece."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(out) + 1)
        out[at : at + rng.choice((0, 0, 1, 4))] = rng.choice(WORDS)
    return bytes(out[:SIZE_MAX])
