"""Corpora are the same bytes everywhere; batches are a pure function of (seed, position)."""

from __future__ import annotations

import numpy as np
import pytest
from blake3 import blake3

from swarmtrain.training.data import Corpus, load_corpus, position_of
from swarmtrain_protocols.errors import DataUnavailable


def small() -> Corpus:
    text = np.frombuffer(bytes(range(256)) * 4, np.uint8)
    return Corpus(text, text[:300])


def write(folder, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


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


def test_a_folder_splits_by_content_and_ignores_names_and_order(tmp_path):
    files = {f"d{i % 3}/f{i}.txt": f"file number {i}\n".encode() * 9 for i in range(60)}
    write(tmp_path / "a", files)
    write(tmp_path / "b", dict(reversed(files.items())))
    write(tmp_path / "b", {"__pycache__/x.txt": b"no", "x.bin": b"no"})
    one, two = (load_corpus(f"path:{tmp_path / name}") for name in "ab")
    assert one.hash == two.hash
    held = [data for data in files.values() if blake3(data).digest()[0] < 26]
    assert 0 < len(held) < 20
    assert sorted(one.held_out.tobytes().split(b"\n")) == sorted(b"".join(held).split(b"\n"))
    assert len(one.train) + len(one.held_out) == sum(map(len, files.values()))


def test_hash_is_of_the_blob_and_the_blob_reads_back():
    corpus = small()
    assert corpus.hash == blake3(corpus.to_bytes()).digest()
    again = Corpus.from_bytes(corpus.to_bytes())
    assert np.array_equal(again.train, corpus.train) and again.hash == corpus.hash
    for cut in (0, 7, 900):
        with pytest.raises(DataUnavailable, match="cut off"):
            Corpus.from_bytes(corpus.to_bytes()[:cut])


def test_few_files_still_hold_something_out(tmp_path):
    write(tmp_path, {"a.txt": b"x" * 1000})
    corpus = load_corpus(f"path:{tmp_path}")
    assert (len(corpus.train), len(corpus.held_out)) == (950, 50)


def test_the_pinned_hash_decides(tmp_path):
    write(tmp_path / "text", {"a.txt": b"x" * 1000})
    name = f"path:{tmp_path / 'text'}"
    wanted = small()
    with pytest.raises(DataUnavailable, match="hash here"):
        load_corpus(name, wanted.hash)
    cache = tmp_path / "cache"
    write(cache, {f"{wanted.hash.hex()}.corpus": wanted.to_bytes()})
    assert load_corpus(name, wanted.hash, cache).hash == wanted.hash
    damaged = bytearray(wanted.to_bytes())
    damaged[50] ^= 1
    write(cache, {f"{wanted.hash.hex()}.corpus": bytes(damaged)})
    with pytest.raises(DataUnavailable, match="another hash"):
        load_corpus(name, wanted.hash, cache)


@pytest.mark.parametrize("name", ["nowhere", "path:/does/not/exist"])
def test_missing_corpora_are_typed_errors(name):
    with pytest.raises(DataUnavailable) as caught:
        load_corpus(name)
    assert caught.value.exit_code == 10


def test_an_empty_folder_is_said_so(tmp_path):
    with pytest.raises(DataUnavailable, match="no text files"):
        load_corpus(f"path:{tmp_path}")


def test_the_standard_library_is_a_corpus():
    corpus = load_corpus("stdlib")
    assert len(corpus.train) > 4_000_000 and len(corpus.held_out) > 200_000
    assert b"import os" in corpus.train.tobytes()
    assert corpus.hash == load_corpus("stdlib", corpus.hash).hash
