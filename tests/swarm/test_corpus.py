"""A corpus among real processes: fetched by whoever lacks it, from whoever is honest.

The text is noise of several chunks, so that nothing about it can be guessed or left out.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.corpusfile import build_corpus, corpus_path, open_corpus
from swarmtrain_peer.founding import found_run
from swarmtrain_peer.site import Site
from swarmtrain_peer.spawn import child_environment, output_tail
from swarmtrain_protocols.manifest import RunKeys
from tests.swarm.harness import WAIT_S, Document, Seat, Swarm, poll_until
from tests.swarm.text import check_rounds, listen

MIB = 1 << 20
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def write_text(folder: Path, files: int = 12, nbytes: int = MIB) -> str:
    rng = random.Random(7)
    folder.mkdir()
    for number in range(files):
        (folder / f"{number}.txt").write_bytes(rng.randbytes(nbytes))
    return f"path:{folder}"


def keys_of(corpus: str, **more: object) -> RunKeys:
    base: Document = {
        "corpus": corpus,
        "overlap": "off",
        "inner_steps": 4,
        "inner_warmup_steps": 2,
        "model": {"d_model": 16, "heads": 2},
        "grace_s": 1.0,
    }
    return RunKeys(**{**base, **more})


class Founded(Swarm):
    """A swarm whose founder pins a corpus."""

    def found_with(self, keys: RunKeys) -> Seat:
        config = PeerConfig(name="founder", listen="127.0.0.1:0", votes=True)
        return self._add(found_run(self.folder / "founder", keys, config), "founder", True)

    @property
    def pinned(self) -> bytes:
        manifest = self.seats[0].site.manifest()
        assert manifest is not None
        return manifest.keys.corpus_hash

    def holder(self, name: str, corpus: str) -> Seat:
        """A member that has the corpus from the start."""
        seat = self.enter(name, self.seats[0].ticket(), start=False, config={"votes": False})
        build_corpus(corpus, seat.site.corpus_path, self.pinned)
        return seat.start()

    def lacking(self, name: str) -> Seat:
        return self.enter(name, self.seats[0].ticket(), config={"votes": False})


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Founded]:
    with Founded(tmp_path) as made:
        yield made


def ask(site: Site) -> Document:
    """Begin, or go on; the answer says how far it is."""
    with site.connect() as client:
        return client.call("corpus", {"why": "a test has none", "wait_s": 0.1}, WAIT_S)


def obtain(seat: Seat) -> bytes:
    """Ask as a trainer does, until the corpus is there; returns the text."""
    poll_until(lambda: ask(seat.site)["ready"], f"{seat.name} has no corpus")
    manifest = seat.site.manifest()
    assert manifest is not None
    file = open_corpus(corpus_path(seat.site.corpus_path, manifest.keys.corpus_hash))
    return bytes(file.train) + bytes(file.held_out)


def damage(seat: Seat, pinned: bytes, chunks: list[int]) -> None:
    """Flip a byte of each chunk under the feet of the process that serves them."""
    with corpus_path(seat.site.corpus_path, pinned).open("r+b") as file:
        for index in chunks:
            file.seek(index * MIB + 77)
            byte = file.read(1)
            file.seek(index * MIB + 77)
            file.write(bytes([byte[0] ^ 1]))


def text_of(corpus: str) -> list[bytes]:
    folder = Path(corpus.removeprefix("path:"))
    return sorted(path.read_bytes() for path in folder.iterdir())


def test_a_member_without_the_text_fetches_it_and_serves_it(swarm: Founded) -> None:
    corpus = write_text(swarm.folder / "text")
    founder = swarm.found_with(keys_of(corpus))
    first = swarm.lacking("first")
    text = obtain(first)
    assert sorted(text[i : i + MIB] for i in range(0, len(text), MIB)) == text_of(corpus)
    ready = first.wait_event("corpus_ready")
    assert (ready["bytes"], ready["donors"]) == (12 * MIB, 1)
    assert first.wait_event("fallback")["why"] == "a test has none"
    last = first.events("corpus_progress")[-1]
    assert last["bytes"] == 12 * MIB
    files = [corpus_path(s.site.corpus_path, swarm.pinned).read_bytes() for s in (founder, first)]
    assert files[0] == files[1]
    # The second one has two donors: the first serves what it fetched.
    second = swarm.lacking("second")
    assert obtain(second) == text
    assert second.wait_event("corpus_ready")["donors"] == 2


@pytest.mark.slow
def test_wrong_bytes_are_refused_and_another_donor_is_taken(swarm: Founded) -> None:
    """The founder has only the hash; the first holder lies about two chunks of twelve."""
    corpus = write_text(swarm.folder / "text")
    pinned = build_corpus(corpus, swarm.folder / "made").hash
    swarm.found_with(keys_of("path:/does/not/exist", corpus_hash=pinned))
    liar = swarm.holder("liar", corpus)
    damage(liar, pinned, [3, 9])
    joiner = swarm.lacking("joiner")
    assert ask(joiner.site)["ready"] is False
    fault = joiner.wait_event("peer_fault")
    assert (fault["peer"], fault["fault"]) == (liar.id, "corrupt")
    assert not corpus_path(joiner.site.corpus_path, pinned).exists()
    honest = swarm.holder("honest", corpus)
    text = obtain(joiner)
    assert sorted(text[i : i + MIB] for i in range(0, len(text), MIB)) == text_of(corpus)
    # Who lied was not asked again for what it had lied about, and is not called a donor.
    assert joiner.wait_event("corpus_ready")["donors"] == 1
    assert {f["peer"] for f in joiner.events("peer_fault")} == {liar.id}
    assert honest.id not in {f["peer"] for f in joiner.events("peer_fault")}


@pytest.mark.slow
def test_a_killed_download_goes_on_where_it_was(swarm: Founded) -> None:
    corpus = write_text(swarm.folder / "text")
    pinned = build_corpus(corpus, swarm.folder / "made").hash
    swarm.found_with(keys_of("path:/does/not/exist", corpus_hash=pinned))
    liar = swarm.holder("liar", corpus)
    damage(liar, pinned, [11])  # it can never be completed
    joiner = swarm.lacking("joiner")
    ask(joiner.site)
    joiner.wait_event("peer_fault")
    had = poll_until(lambda: ask(joiner.site)["bytes_have"], "some of it")
    assert MIB <= had < 12 * MIB
    joiner.kill()
    liar.stop()
    seq = joiner.last_seq
    swarm.holder("honest", corpus)
    joiner.start()
    obtain(joiner)
    begun = joiner.wait_event("corpus_progress", since_seq=seq)
    assert begun["bytes_have"] >= had - MIB  # the last one may have been torn
    assert joiner.wait_event("corpus_ready")["bytes"] == 12 * MIB


@pytest.mark.slow
def test_a_trainer_without_the_text_trains(swarm: Founded) -> None:
    """Founder with a folder of its own; the joiner lacks it and trains on what it fetched."""
    corpus = write_text(swarm.folder / "text", files=3)
    founder = swarm.found_with(keys_of(corpus, start_peers=2, max_rounds=2))
    joiner = swarm.lacking("joiner")
    folder = Path(corpus.removeprefix("path:"))
    trainers = [_trainer(founder.site)]
    try:
        founder.wait_event("trainer_attached", timeout_s=2 * WAIT_S)
        # The round waits for the second trainer: until then the model is θ⁰. Who has no trainer
        # asks another one's.
        joiner.wait_event("state_applied", timeout_s=WAIT_S)
        check_rounds(founder.site.manifest().keys, listen(joiner, b"import ", 12), [founder])
        folder.rename(folder.with_name("hidden"))  # both are on one machine: take it away
        trainers.append(_trainer(joiner.site))
        joiner.wait_event("corpus_ready", timeout_s=2 * WAIT_S)
        hashes = [seat.wait_applied(2, timeout_s=2 * WAIT_S) for seat in (founder, joiner)]
        assert hashes[0] == hashes[1]
        opened = founder.wait_event("round_committed")["round"]
        assert opened == 0
        contributors = founder.events("round_opened")[0]["contributors"]
        assert sorted(contributors) == sorted([founder.id, joiner.id])
        assert [t.wait(WAIT_S) for t in trainers] == [0, 0], output_tail(
            joiner.site.folder / "trainer.log"
        )
    finally:
        for trainer in trainers:
            trainer.kill()
            trainer.wait()


def _trainer(site: Site) -> subprocess.Popen[bytes]:
    with open(site.folder / "trainer.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "swarmtrain.training.trainer", str(site.folder)],
            stdout=log,
            stderr=log,
            env=child_environment(ONE_THREAD),
        )
