"""Batches are a pure function of (seed, position); the corpus is the one that the run pins."""

from __future__ import annotations

import contextlib
import threading

import msgspec
import numpy as np
import pytest

from swarmtrain.training.data import (
    Corpus,
    announce_corpus,
    load_corpus,
    obtain_corpus,
    position_of,
)
from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.control import ControlClosed
from swarmtrain_peer.founding import found_run
from swarmtrain_protocols.errors import DataUnavailable
from swarmtrain_protocols.manifest import RunKeys
from tests.swarmtrain.training.served import serving


def small() -> Corpus:
    text = np.frombuffer(bytes(range(256)) * 4, np.uint8)
    return Corpus(text, text[:300])


def test_positions_never_meet():
    assert position_of(0, 0) == 0 and position_of(3, 5) == (3 << 40) + 5
    assert position_of(1, 0) > position_of(0, (1 << 40) - 1)
    with pytest.raises(AssertionError):
        position_of(0, 1 << 40)


def test_batches_are_pinned_and_shifted_by_one():
    tokens, targets = small().batch(seed=7, position=11, batch_size=3, context=4)
    assert tokens.dtype == np.int64 and tokens.shape == targets.shape == (3, 4)
    assert np.array_equal(tokens[:, 1:], targets[:, :-1])
    # Independent: Philox 4x64-10 by NumPy's raw stream, modulo the number of windows.
    raw = np.random.Philox(key=np.array([7, 11], np.uint64)).random_raw(3)
    assert tokens[:, 0].tolist() == [int(r) % 1020 % 256 for r in raw]
    assert tokens[:, 0].tolist() == [90, 8, 33]
    again, _ = small().batch(7, 11, 3, 4)
    other, _ = small().batch(7, 12, 3, 4)
    assert np.array_equal(tokens, again) and not np.array_equal(tokens, other)


def test_windows_reach_both_ends_of_the_text():
    corpus = Corpus(np.arange(6, dtype=np.uint8), np.arange(9, dtype=np.uint8))
    starts = {int(corpus.batch(0, p, 8, 4)[0][i, 0]) for p in range(20) for i in range(8)}
    assert starts == {0, 1}
    tokens, targets = corpus.evaluation(4, 2)
    assert tokens.tolist() == [[0, 1], [1, 2], [3, 4], [5, 6]]
    assert targets[:, -1].tolist() == [2, 3, 5, 7]


def test_too_short_a_text_is_said_so():
    corpus = Corpus(np.arange(6, dtype=np.uint8), np.arange(2, dtype=np.uint8))
    with pytest.raises(DataUnavailable, match="context is 6"):
        corpus.batch(0, 0, 1, 6)
    with pytest.raises(DataUnavailable, match="held out"):
        corpus.evaluation(1, 4)


def pinned_site(tmp_path, text: bytes):
    """A founded site whose corpus is a folder with one file."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_bytes(text)
    keys = RunKeys(corpus=f"path:{folder}")
    site = found_run(tmp_path / "home", keys, PeerConfig())
    manifest = site.manifest()
    assert manifest is not None and len(manifest.keys.corpus_hash) == 32
    return site, manifest.keys


def test_the_sites_copy_is_used_and_mapped(tmp_path):
    site, keys = pinned_site(tmp_path, b"abcd" * 500)
    (tmp_path / "text" / "a.txt").unlink()
    corpus = obtain_corpus(site, keys)
    assert corpus.train.tobytes() + corpus.held_out.tobytes() == b"abcd" * 500
    assert not corpus.train.flags.owndata and not corpus.train.flags.writeable
    tokens, _ = corpus.batch(1, 2, 3, 4)
    assert tokens.shape == (3, 4)


def test_what_is_on_this_machine_is_used_if_it_fits(tmp_path):
    site, keys = pinned_site(tmp_path, b"abcd" * 500)
    (path,) = site.corpus_path.iterdir()
    path.unlink()
    assert len(obtain_corpus(site, keys).train) == 1900
    assert path.exists(), "it is kept, so that others can have it"


def test_without_a_pin_it_is_whatever_is_here(tmp_path):
    site, keys = pinned_site(tmp_path, b"abcd" * 500)
    loose = msgspec.structs.replace(keys, corpus_hash=b"")
    (tmp_path / "text" / "a.txt").write_bytes(b"other" * 200)
    assert len(obtain_corpus(site, loose).train) == 950


class Asked:
    """A peer process that has the corpus after some calls, or never."""

    def __init__(self, site, answers) -> None:
        self.site, self.answers, self.calls = site, list(answers), []

    async def call(self, name, args, connection):
        if name == "ping":
            return {}
        self.calls.append((name, args))
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return {"ready": answer(), "bytes_have": 0, "bytes": 0}


@contextlib.contextmanager
def answering(site, *answers):
    backend = Asked(site, answers)
    with serving(site, backend):
        yield backend


def test_what_does_not_fit_is_asked_of_the_peer_process(tmp_path):
    site, keys = pinned_site(tmp_path, b"abcd" * 500)
    (path,) = site.corpus_path.iterdir()
    whole = path.read_bytes()
    path.unlink()
    (tmp_path / "text" / "a.txt").write_bytes(b"other")

    def arrives() -> bool:
        path.write_bytes(whole)
        return True

    with answering(site, lambda: False, arrives, lambda: True) as backend:
        assert len(obtain_corpus(site, keys).train) == 1900
        announce_corpus(site, keys)
    first, second, third = backend.calls
    assert first[0] == "corpus" and "its hash here is" in first[1]["why"]
    assert second == ("corpus", {"why": ""}) and third == ("corpus", {})


def test_if_nobody_has_it_the_trainer_is_told(tmp_path):
    site, keys = pinned_site(tmp_path, b"abcd" * 500)
    (path,) = site.corpus_path.iterdir()
    path.unlink()
    (tmp_path / "text" / "a.txt").unlink()
    with answering(site, DataUnavailable("corpus", "nobody has it", "wait")):
        with pytest.raises(DataUnavailable, match="nobody has it") as caught:
            obtain_corpus(site, keys)
    assert caught.value.exit_code == 10
    stop = threading.Event()
    stop.set()
    with pytest.raises(DataUnavailable, match="told to end"):
        obtain_corpus(site, keys, 0.0, stop)
    with pytest.raises(ControlClosed):
        obtain_corpus(site, keys)  # no peer process


def test_a_corpus_in_memory():
    corpus = load_corpus("stdlib")
    assert len(corpus.train) > 4_000_000 and len(corpus.held_out) > 200_000
    assert b"import os" in corpus.train.tobytes()
    with pytest.raises(DataUnavailable):
        load_corpus("path:/does/not/exist")


def test_a_corpus_of_tokens_is_read_as_tokens(tmp_path):
    ids = np.arange(4000) % 700
    np.save(tmp_path / "a.npy", ids)
    corpus = load_corpus(f"tokens:{tmp_path}")
    assert corpus.train.dtype == np.uint16 and len(corpus.held_out) == 200
    tokens, targets = corpus.batch(1, 2, 4, 16)
    assert np.array_equal((tokens + 1) % 700, targets) and tokens.max() > 255
    corpus.check_vocabulary(700)
    with pytest.raises(DataUnavailable, match="a token 699, the model knows 256"):
        corpus.check_vocabulary(256)


def test_windows_of_an_epoch_make_every_byte_a_target_once():
    corpus = Corpus(np.arange(250, dtype=np.uint8), np.zeros(0, np.uint8))
    count = corpus.samples(16)
    assert count == 14
    for epoch in (0, 1, 15, 16):
        _, targets = corpus.windows(np.arange(count), np.full(count, epoch), 16)
        flat = targets.ravel().tolist()
        assert flat == list(range(1 + epoch % 16, 1 + epoch % 16 + 16 * count))
    assert Corpus(np.zeros(20, np.uint8), np.zeros(0, np.uint8)).samples(16) == 0
