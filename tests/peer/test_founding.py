"""Founding pins the corpus: the founder's bytes, or the hash that it was given."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.corpusfile import corpus_path, hash_corpus, open_corpus
from swarmtrain_peer.founding import found_run, pin_corpus, same_run
from swarmtrain_peer.site import list_sites
from swarmtrain_protocols.errors import DataUnavailable
from swarmtrain_protocols.manifest import RunKeys


@pytest.fixture
def keys(tmp_path: Path) -> RunKeys:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"some text " * 100)
    return RunKeys(corpus=f"path:{folder}")


def test_the_hash_is_in_the_manifest_and_the_copy_at_the_site(
    tmp_path: Path, keys: RunKeys
) -> None:
    site = found_run(tmp_path / "home", keys, PeerConfig())
    manifest = site.manifest()
    assert manifest is not None
    assert manifest.keys.corpus_hash == hash_corpus(keys.corpus)
    assert msgspec.structs.replace(manifest.keys, corpus_hash=b"") == keys
    file = open_corpus(corpus_path(site.corpus_path, manifest.keys.corpus_hash))
    assert bytes(file.train) + bytes(file.held_out) == b"some text " * 100


def test_without_the_corpus_nothing_is_founded(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable) as caught:
        found_run(tmp_path / "home", RunKeys(corpus="path:/does/not/exist"), PeerConfig())
    assert "train.corpus_hash" in caught.value.todo
    assert list_sites(tmp_path / "home") == []


def test_a_founder_that_lacks_it_may_know_its_hash(tmp_path: Path, keys: RunKeys) -> None:
    given = RunKeys(corpus="path:/does/not/exist", corpus_hash=b"h" * 32)
    site = found_run(tmp_path / "home", given, PeerConfig())
    manifest = site.manifest()
    assert manifest is not None and manifest.keys == given
    assert not site.corpus_path.exists()


def test_a_given_hash_must_be_that_of_what_is_here(tmp_path: Path, keys: RunKeys) -> None:
    right = pin_corpus(keys)
    assert pin_corpus(right) == right
    assert found_run(tmp_path / "home", right, PeerConfig()).corpus_path.is_dir()
    wrong = msgspec.structs.replace(keys, corpus_hash=b"h" * 32)
    with pytest.raises(DataUnavailable, match=right.corpus_hash.hex()):
        found_run(tmp_path / "other", wrong, PeerConfig())
    assert list_sites(tmp_path / "other") == []


def test_a_run_is_the_same_with_the_corpus_of_then(keys: RunKeys) -> None:
    founded = pin_corpus(keys)
    assert same_run(keys, founded) and same_run(founded, founded)
    assert not same_run(msgspec.structs.replace(keys, seed=7), founded)
    assert not same_run(msgspec.structs.replace(keys, corpus_hash=b"h" * 32), founded)
