"""Corpora on disk: the same bytes everywhere, whole or not there, and nothing damaged is used."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
from blake3 import blake3

from swarmtrain_peer import corpusfile
from swarmtrain_peer.corpusfile import (
    CorpusFile,
    CorpusText,
    PartialCorpus,
    build_corpus,
    corpus_path,
    hash_corpus,
    local_corpus,
    open_corpus,
)
from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import CheckpointError, DataUnavailable, DiskFull
from swarmtrain_protocols.merkle import Blob, leaf_hash, merkle_root
from tests.crash_points import Crash, Ending, FaultyDisk

MIB = 1 << 20


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def many_files(seed: int = 1) -> dict[str, bytes]:
    rng = random.Random(seed)
    return {f"d{i % 3}/f{i}.txt": rng.randbytes(rng.randrange(150_000)) for i in range(60)}


@pytest.fixture
def text(tmp_path: Path) -> str:
    write(tmp_path / "text", many_files())
    return f"path:{tmp_path / 'text'}"


def test_a_folder_splits_by_content_and_ignores_names_and_order(tmp_path: Path) -> None:
    files = many_files()
    write(tmp_path / "a", files)
    write(tmp_path / "b", dict(reversed(files.items())))
    write(tmp_path / "b", {"__pycache__/x.txt": b"no", "x.bin": b"no", "empty.txt": b""})
    one, two = (build_corpus(f"path:{tmp_path / n}", tmp_path / f"site-{n}") for n in "ab")
    assert one.hash == two.hash == hash_corpus(f"path:{tmp_path / 'a'}")
    ordered = [files[name] for name in sorted(files)]
    held = [data for data in ordered if blake3(data).digest()[0] < 26]
    kept = [data for data in ordered if blake3(data).digest()[0] >= 26]
    assert 0 < len(held) < 20
    assert bytes(one.train) == b"".join(kept) and bytes(one.held_out) == b"".join(held)


def test_the_file_serves_what_its_hash_promises(tmp_path: Path, text: str) -> None:
    file = build_corpus(text, tmp_path / "site")
    body = bytes(file.train) + bytes(file.held_out)
    assert len(body) > 3 * MIB
    first, second = file.blobs()
    assert first.root == file.hash and bytes(first.chunks[0]) == file.descriptor.to_bytes()
    chunks = [body[i : i + MIB] for i in range(0, len(body), MIB)]
    assert second.root == merkle_root([leaf_hash(c) for c in chunks]) == file.descriptor.root
    assert [bytes(c) for c in second.chunks] == chunks
    raw = file.path.read_bytes()
    assert raw == body + b"".join(leaf_hash(c) for c in chunks) + file.descriptor.to_bytes()
    assert file.path == corpus_path(tmp_path / "site", file.hash)
    assert [p.name for p in (tmp_path / "site").iterdir()] == [file.path.name]


def test_few_files_still_hold_something_out(tmp_path: Path) -> None:
    write(tmp_path / "text", {"a.txt": b"x" * 1000})
    file = build_corpus(f"path:{tmp_path / 'text'}", tmp_path / "site")
    assert (len(file.train), len(file.held_out)) == (950, 50)


def test_the_standard_library_is_a_corpus(tmp_path: Path) -> None:
    file = build_corpus("stdlib", tmp_path)
    assert len(file.train) > 4_000_000 and len(file.held_out) > 200_000
    assert b"import os" in bytes(file.train)
    assert file.hash == build_corpus("stdlib", tmp_path, file.hash).hash


def test_the_pinned_hash_decides(tmp_path: Path, text: str) -> None:
    site = tmp_path / "site"
    with pytest.raises(DataUnavailable, match="its hash here is") as caught:
        build_corpus(text, site, b"h" * 32)
    assert caught.value.exit_code == 10
    assert not site.exists() or not list(site.iterdir())
    file = build_corpus(text, site, hash_corpus(text))
    write(tmp_path / "text", {"new.txt": b"later"})
    assert local_corpus(text, site, file.hash).path == file.path  # the file of before is used
    with pytest.raises(DataUnavailable):
        local_corpus(text, tmp_path / "other", file.hash)


@pytest.mark.parametrize("name", ["nowhere", "path:/does/not/exist"])
def test_missing_corpora_are_typed_errors(name: str) -> None:
    with pytest.raises(DataUnavailable) as caught:
        hash_corpus(name)
    assert caught.value.exit_code == 10


def test_an_empty_folder_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match="no text files"):
        hash_corpus(f"path:{tmp_path}")


def test_too_much_is_refused_before_it_is_read(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CORPUS_BYTES_MAX", 1000)
    with pytest.raises(DataUnavailable, match="at most 1000"):
        hash_corpus(text)
    monkeypatch.setattr(limits, "CORPUS_FILES_MAX", 10)
    with pytest.raises(DataUnavailable, match="more than 10 files"):
        hash_corpus(text)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, text: str) -> None:
    source = CorpusText(text)
    path = next((tmp_path / "text").rglob("*.txt"))
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(DataUnavailable, match="changed while it was read"):
        list(source.chunks())
    path.unlink()
    with pytest.raises(DataUnavailable, match=path.name):
        list(source.chunks())


def test_any_damage_is_refused(tmp_path: Path, text: str) -> None:
    file = build_corpus(text, tmp_path / "site")
    whole = file.path.read_bytes()
    rng = random.Random(5)
    places = [0, len(whole) - 1, len(whole) - 40, file.descriptor.nbytes + 3]
    for place in [*places, *(rng.randrange(len(whole)) for _ in range(6))]:
        broken = bytearray(whole)
        broken[place] ^= 1 << rng.randrange(8)
        file.path.write_bytes(bytes(broken))
        with pytest.raises(DataUnavailable):
            open_corpus(file.path)
    for cut in (b"", whole[:50], whole[:-1], whole + b"\0"):
        file.path.write_bytes(cut)
        with pytest.raises(DataUnavailable):
            open_corpus(file.path)
    other = corpus_path(tmp_path / "site", b"n" * 32)
    other.write_bytes(whole)
    with pytest.raises(DataUnavailable, match="name"):
        open_corpus(other)
    assert local_corpus(text, tmp_path / "site", file.hash).hash == file.hash  # built again


def test_a_crash_at_any_call_leaves_no_file_or_the_whole(tmp_path: Path) -> None:
    rng = random.Random(2)
    write(tmp_path / "text", {f"{i}.txt": rng.randbytes(220_000) for i in range(5)})
    text = f"path:{tmp_path / 'text'}"
    wanted = hash_corpus(text)
    crashes = 0
    for at in range(1, 200):
        for number, ending in enumerate((None, Ending(0.0, undo=True), Ending(0.5, undo=False))):
            site = tmp_path / f"site-{at}-{number}"
            disk = FaultyDisk(at, Crash, ending)
            try:
                build_corpus(text, site, fs=disk)
            except Crash:
                crashes += 1
            path = corpus_path(site, wanted)
            if path.exists():
                assert open_corpus(path).hash == wanted
            assert build_corpus(text, site).hash == wanted
            assert [p.name for p in site.iterdir()] == [path.name]
        if disk.calls < at:
            break
    assert crashes >= 10


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DiskFull), (errno.EIO, CheckpointError)]
)
def test_disk_errors_are_typed(
    tmp_path: Path, text: str, number: int, kind: type[Exception]
) -> None:
    for at in range(1, 12):
        with pytest.raises(kind):
            build_corpus(text, tmp_path / "site", fs=FaultyDisk(at, lambda: OSError(number, "no")))
    assert not list((tmp_path / "site").glob("*.corpus"))


# -- downloads --------------------------------------------------------------------------------


def fill(place: PartialCorpus, body: Blob, chunks: list[int]) -> None:
    for index in chunks:
        place.place(index)[:] = body.chunks[index]
        place.proven(index, body.leaves[index : index + 1])


@pytest.fixture
def whole(tmp_path: Path, text: str) -> CorpusFile:
    return build_corpus(text, tmp_path / "donor")


def test_a_download_goes_on_where_it_was(tmp_path: Path, whole: CorpusFile) -> None:
    body = whole.blobs()[1]
    first = PartialCorpus(tmp_path / "site", whole.descriptor)
    assert first.there() == []
    fill(first, body, [0, 3])
    again = PartialCorpus(tmp_path / "site", whole.descriptor)
    assert again.there() == [0, 3]
    fill(again, body, [i for i in range(len(body.chunks)) if i not in (0, 3)])
    done = again.finish()
    assert done.path.read_bytes() == whole.path.read_bytes()
    assert bytes(done.train) == bytes(whole.train)
    assert [p.name for p in (tmp_path / "site").iterdir()] == [done.path.name]


def test_what_a_crash_tore_is_not_taken_for_there(tmp_path: Path, whole: CorpusFile) -> None:
    body, rng = whole.blobs()[1], random.Random(3)
    for _ in range(20):
        place = PartialCorpus(tmp_path / "site", whole.descriptor)
        missing = [i for i in range(len(body.chunks)) if i not in place.there()]
        fill(place, body, rng.sample(missing, min(2, len(missing))))
        torn = bytearray(place._partial.read_bytes())
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(torn))
            torn[at : at + 4096] = rng.randbytes(len(torn[at : at + 4096]))
        place._partial.write_bytes(bytes(torn))
        again = PartialCorpus(tmp_path / "site", whole.descriptor)
        for index in again.there():
            assert leaf_hash(again.place(index)) == body.leaves[index]


def test_a_wrong_whole_is_thrown_away(tmp_path: Path, whole: CorpusFile) -> None:
    body = whole.blobs()[1]
    place = PartialCorpus(tmp_path / "site", whole.descriptor)
    everything = list(range(len(body.chunks)))
    fill(place, body, everything)
    place.place(1)[:] = bytes(MIB)
    place.proven(1, [leaf_hash(bytes(MIB))])  # consistent, and not the corpus
    with pytest.raises(DataUnavailable, match="hash is wrong"):
        place.finish()
    assert not whole.path.with_name("x").exists()
    again = PartialCorpus(tmp_path / "site", whole.descriptor)
    assert again.there() == []
    fill(again, body, everything)
    assert again.finish().hash == whole.hash


def test_damage_behind_the_proof_is_found_at_the_end(tmp_path: Path, whole: CorpusFile) -> None:
    body = whole.blobs()[1]
    place = PartialCorpus(tmp_path / "site", whole.descriptor)
    fill(place, body, list(range(len(body.chunks))))
    place.place(2)[5] ^= 1
    with pytest.raises(DataUnavailable):
        place.finish()
    assert not corpus_path(tmp_path / "site", whole.hash).exists()
    assert PartialCorpus(tmp_path / "site", whole.descriptor).there() == []


def test_no_room_is_said_before_anything_is_fetched(
    tmp_path: Path, whole: CorpusFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(corpusfile, "reserve", full)
    with pytest.raises(DiskFull):
        PartialCorpus(tmp_path / "site", whole.descriptor)
