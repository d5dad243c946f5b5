"""Real text that needs no download, and batches that are a pure function of (seed, position).

A *position* names one batch of the run: ``position = ordinal << 40 | counter``. The ordinal is the
member's place in the log (the index of its ``MEMBER_JOINED`` entry), so no two members ever share
a position; the counter is kept by the member's peer process, which hands the next one to a trainer
that attaches and moves it on with every hand-over. Steps of a trainer that died before its
hand-over never counted, and their positions are given out again: each counts at most once.

Corpora: ``stdlib``, the sources of Python's standard library without its tests, or ``path:FOLDER``,
every text file below a folder. A file belongs to the held-out set by the hash of its bytes, so two
copies of one file are always on the same side.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from swarmtrain_protocols.errors import DataUnavailable

COUNTER_BITS = 40
HELD_OUT_OF_256 = 26
CORPUS_BYTES_MAX = 1 << 30
_TEXT = (".py", ".txt", ".md", ".rst", ".c", ".h", ".json", ".html", ".toml", ".tex", ".csv")
_SKIPPED = (
    "test",
    "tests",
    "idlelib",
    "__pycache__",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "ensurepip",
)

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]


def position_of(ordinal: int, counter: int) -> int:
    """The global data position of a member's ``counter``-th batch.

    Args:
        ordinal: place of the member in the log, below 2²⁴.
        counter: its own count of batches, below 2⁴⁰.
    """
    assert 0 <= ordinal < 1 << (64 - COUNTER_BITS) and 0 <= counter < 1 << COUNTER_BITS
    return ordinal << COUNTER_BITS | counter


class Corpus:
    """Bytes to train on and bytes to evaluate on.

    ``hash`` is BLAKE3 over the length of the training part (u64 LE), that part and the held-out
    part: the bytes of ``to_bytes``, which is also what a member sends to one that lacks the corpus.
    """

    def __init__(self, train: U8, held_out: U8) -> None:
        self.train = train
        self.held_out = held_out
        self.hash = blake3(self._head()).update(train.data).update(held_out.data).digest()

    def _head(self) -> bytes:
        return len(self.train).to_bytes(8, "little")

    def to_bytes(self) -> bytes:
        """One blob that ``from_bytes`` reads."""
        return self._head() + self.train.tobytes() + self.held_out.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Corpus:
        """Read what ``to_bytes`` wrote.

        Raises:
            DataUnavailable: the blob is too short for what it says.
        """
        split = int.from_bytes(data[:8], "little")
        if len(data) < 8 or split > len(data) - 8:
            raise DataUnavailable("corpus", "the file is cut off", "remove it and fetch it again")
        body = np.frombuffer(data, np.uint8, offset=8)
        return cls(body[:split], body[split:])

    def batch(self, seed: int, position: int, batch_size: int, context: int) -> tuple[I64, I64]:
        """The batch at a position: (tokens, next tokens), int64 [batch_size, context] each.

        Window starts come from Philox keyed by (seed, position), raw words modulo the number of
        windows, so that they do not depend on how a library draws bounded integers.
        """
        windows = len(self.train) - context
        if windows < 1:
            raise DataUnavailable(
                "corpus",
                f"{len(self.train)} bytes, context is {context}",
                "use a larger corpus or a shorter context",
            )
        raw = np.random.Philox(key=np.array([seed, position], np.uint64)).random_raw(batch_size)
        return _windows(self.train, (raw % np.uint64(windows)).astype(np.int64), context)

    def evaluation(self, windows: int, context: int) -> tuple[I64, I64]:
        """``windows`` evenly spread windows of the held-out part, the same ones every time."""
        room = len(self.held_out) - context
        if room < 1:
            raise DataUnavailable(
                "corpus",
                f"only {len(self.held_out)} bytes are held out",
                "use a corpus of more files",
            )
        starts = np.arange(windows, dtype=np.int64) * room // windows
        return _windows(self.held_out, starts, context)


def _windows(text: U8, starts: I64, context: int) -> tuple[I64, I64]:
    taken = text[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return taken[:, :-1], taken[:, 1:]


def _files(folder: Path, suffixes: tuple[str, ...], skipped: tuple[str, ...]) -> list[Path]:
    """Files below ``folder`` by relative path; links are not followed, ``skipped`` not entered."""
    found: list[tuple[str, Path]] = []
    for parent, below, names in os.walk(folder):
        below[:] = [name for name in below if name not in skipped]
        for name in names:
            path = Path(parent, name)
            if name.endswith(suffixes) and path.is_file() and not path.is_symlink():
                found.append((path.relative_to(folder).as_posix(), path))
    return [path for _, path in sorted(found)]


def _read(paths: Iterable[Path], what: str) -> Corpus:
    train: list[bytes] = []
    held_out: list[bytes] = []
    nbytes = 0
    for path in paths:
        data = path.read_bytes()
        nbytes += len(data)
        if nbytes > CORPUS_BYTES_MAX:
            raise DataUnavailable(what, f"more than {CORPUS_BYTES_MAX} bytes", "use a part of it")
        (held_out if blake3(data).digest()[0] < HELD_OUT_OF_256 else train).append(data)
    if not train:
        raise DataUnavailable(what, "no text files there", "name a folder of text files")
    # A folder of very few files may have none held out: then its last twentieth is.
    if not held_out:
        whole = b"".join(train)
        cut = len(whole) - len(whole) // 20
        train, held_out = [whole[:cut]], [whole[cut:]]
    return Corpus(*(np.frombuffer(b"".join(part), np.uint8) for part in (train, held_out)))


def load_corpus(name: str, expect_hash: bytes = b"", cache: Path | None = None) -> Corpus:
    """The corpus ``stdlib`` or ``path:FOLDER``.

    Args:
        expect_hash: what the run pins, 32 bytes, or empty if it pins nothing.
        cache: a folder with ``<hash>.corpus`` files fetched from other members, tried first.

    Raises:
        DataUnavailable: not there, empty, or not what the run pins.
    """
    if expect_hash and cache is not None:
        kept = cache / f"{expect_hash.hex()}.corpus"
        if kept.is_file():
            found = Corpus.from_bytes(kept.read_bytes())
            if found.hash == expect_hash:
                return found
            raise DataUnavailable("corpus", f"{kept} has another hash", "remove that file")
    if name == "stdlib":
        folder = Path(sysconfig.get_path("stdlib"))
        found = _read(_files(folder, (".py",), _SKIPPED), "corpus stdlib")
    elif name.startswith("path:"):
        folder = Path(name.removeprefix("path:")).expanduser()
        if not folder.is_dir():
            raise DataUnavailable("corpus", f"{folder} is not a folder here")
        found = _read(_files(folder, _TEXT, ("__pycache__",)), f"corpus {name}")
    else:
        raise DataUnavailable("corpus", f"unknown source {name!r}", "use stdlib or path:FOLDER")
    if expect_hash and found.hash != expect_hash:
        raise DataUnavailable(
            f"corpus {name}",
            f"its hash here is {found.hash.hex()[:16]}, the run's is {expect_hash.hex()[:16]}",
            "use the same Python version as the founder, or fetch the corpus from a member",
        )
    return found
