"""Batches that are a pure function of (seed, position), and the corpus they come from.

A *position* names one batch of the run: ``position = ordinal << 40 | counter``. The ordinal is the
member's place in the log (the index of its ``MEMBER_JOINED`` entry), so no two members ever share
a position; the counter is kept by the member's peer process, which hands the next one to a trainer
that attaches and moves it on with every hand-over. Steps of a trainer that died before its
hand-over never counted, and their positions are given out again: each counts at most once.

The corpus is made from what is on this machine if that has the hash that the run pins, else the
peer process fetches it from other members (``swarmtrain_peer/corpusfile.py``, ``librarian.py``).
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swarmtrain.training.place import await_peer
from swarmtrain_peer.control import ControlClosed, ControlTimeout
from swarmtrain_peer.corpus_sources import TOKEN_BYTES, parse_source
from swarmtrain_peer.corpusfile import (
    CorpusFile,
    CorpusText,
    build_corpus,
    corpus_path,
    local_corpus,
    open_corpus,
)
from swarmtrain_peer.site import Site
from swarmtrain_protocols.errors import DataUnavailable
from swarmtrain_protocols.manifest import RunKeys

COUNTER_BITS = 40
CALL_TIMEOUT_S = 30.0

Items = NDArray[Any]
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
    """Bytes or tokens to train on and to evaluate on, uint8 or uint16 [n] each.

    They may be a mapped file's.
    """

    def __init__(self, train: Items, held_out: Items) -> None:
        self.train = train
        self.held_out = held_out

    @classmethod
    def of(cls, file: CorpusFile, name: str) -> Corpus:
        """The corpus of a file, over its mapping; run key ``corpus`` says what is in it."""
        kind = item_type(name)
        return cls(*(np.frombuffer(part, kind) for part in (file.train, file.held_out)))

    def check_vocabulary(self, vocabulary: int) -> None:
        """Whether a model that knows so many tokens can read this.

        Raises:
            DataUnavailable: it cannot.
        """
        parts = [part for part in (self.train, self.held_out) if part.size]
        highest = max((int(part.max()) for part in parts), default=0)
        if highest >= vocabulary:
            raise DataUnavailable(
                "corpus",
                f"there is a token {highest}, the model knows {vocabulary}",
                "raise train.model.vocabulary to what the tokenizer has",
            )

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

    def samples(self, context: int) -> int:
        """Windows in an epoch where the data are dealt: side by side, each byte a target once."""
        return max(0, len(self.train) // context - 1)

    def windows(self, numbers: I64, epochs: I64, context: int) -> tuple[I64, I64]:
        """The windows of those numbers, as ``batch``; they begin elsewhere in every epoch."""
        return _windows(self.train, numbers * context + epochs % context, context)

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


def item_type(name: str) -> np.dtype[Any]:
    """What stands in the corpus of that name: bytes, or tokens as little-endian u16."""
    return np.dtype("<u2" if parse_source(name).item_bytes == TOKEN_BYTES else np.uint8)


def _windows(text: Items, starts: I64, context: int) -> tuple[I64, I64]:
    taken = text[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return taken[:, :-1], taken[:, 1:]


def load_corpus(name: str) -> Corpus:
    """The corpus of a source of this machine (``corpus_sources.py``), in memory.

    Raises:
        DataUnavailable: not here, or empty.
    """
    text = CorpusText(name)
    whole = np.frombuffer(b"".join(text.chunks()), item_type(name))
    first = text.train_bytes // text.item_bytes
    return Corpus(whole[:first], whole[first:])


def obtain_corpus(
    site: Site, keys: RunKeys, wait_s: float = 0.0, stop: threading.Event | None = None
) -> Corpus:
    """The run's corpus: what is on this machine if it fits, else other members' copy.

    Args:
        wait_s: for a peer process to come up, which is needed only to fetch.

    Raises:
        DataUnavailable: no member in reach has it, or ``stop`` is set while it is fetched.
        ControlClosed: no peer process answers.
        DiskFull, CheckpointError: it cannot be written.
    """
    pinned = keys.corpus_hash
    if not pinned:
        return Corpus.of(build_corpus(keys.corpus, site.corpus_path), keys.corpus)
    try:
        return Corpus.of(local_corpus(keys.corpus, site.corpus_path, pinned), keys.corpus)
    except DataUnavailable as error:
        why = error.why
    while not (stop is not None and stop.is_set()):
        await_peer(site, wait_s, stop)
        with contextlib.suppress(ControlClosed, ControlTimeout), site.connect() as client:
            if client.call("corpus", {"why": why}, CALL_TIMEOUT_S)["ready"]:
                file = open_corpus(corpus_path(site.corpus_path, pinned))
                return Corpus.of(file, keys.corpus)
            why = ""  # said once
    raise DataUnavailable("the run's corpus did not arrive", "the trainer was told to end")


def announce_corpus(site: Site, keys: RunKeys) -> None:
    """Let the peer process serve the corpus that lies in its folder now."""
    if keys.corpus_hash:
        with contextlib.suppress(ControlClosed, ControlTimeout), site.connect() as client:
            client.call("corpus", {}, CALL_TIMEOUT_S)
