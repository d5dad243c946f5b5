"""Randomness by counting: draw number i of stream s is a hash of (seed, s, i).

A stream per link and per purpose means that taking one fault out of a schedule, or one message out
of a link, leaves the luck of all others as it was. Shrinking depends on it.
"""

from __future__ import annotations

import hashlib
import math
import random
import struct

_SCALE = 1.0 / (1 << 53)
_FOUR = struct.Struct("<4Q")


class Stream:
    """An endless row of uniform draws, named by ``seed`` and ``names``."""

    __slots__ = ("_count", "_prefix")

    def __init__(self, seed: int, *names: str) -> None:
        text = "\0".join((str(seed), *names))
        self._prefix = hashlib.blake2b(text.encode(), digest_size=24).digest()
        self._count = 0

    def four(self) -> tuple[float, float, float, float]:
        """Four independent uniforms in [0, 1), for the price of one hash."""
        self._count += 1
        data = self._prefix + self._count.to_bytes(8, "little")
        a, b, c, d = _FOUR.unpack(hashlib.blake2b(data, digest_size=32).digest())
        return ((a >> 11) * _SCALE, (b >> 11) * _SCALE, (c >> 11) * _SCALE, (d >> 11) * _SCALE)

    def third(self) -> float:
        """The third of ``four``, for whom the others decide nothing."""
        self._count += 1
        data = self._prefix + self._count.to_bytes(8, "little")
        digest = hashlib.blake2b(data, digest_size=32).digest()
        return (int.from_bytes(digest[16:24], "little") >> 11) * _SCALE

    def uniform(self) -> float:
        """One uniform in [0, 1)."""
        return self.four()[0]

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.uniform()

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def integer(self, below: int) -> int:
        """0 ≤ result < ``below``."""
        return min(below - 1, int(self.uniform() * below))


def exponential(uniform: float, mean: float) -> float:
    """Turn a uniform draw into an exponential one."""
    return -mean * math.log(1.0 - uniform)


def generator(seed: int, *names: str) -> random.Random:
    """A ``random.Random`` for code that wants one; the string seed does not depend on hash()."""
    return random.Random("\0".join((str(seed), *names)))
