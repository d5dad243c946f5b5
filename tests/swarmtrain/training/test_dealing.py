"""Dealt data at the trainer: every sample once, whatever rounds do; equal to a single process."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from swarmtrain.training.dealing import Batches, InOrder, by_turns, data_digest
from swarmtrain.training.port import Document
from swarmtrain.training.swarm import Swarm
from swarmtrain_protocols.errors import ConfigError, DataUnavailable, LocalProtocolError
from swarmtrain_protocols.messages.common import Span
from swarmtrain_protocols.order import samples_at
from swarmtrain_protocols.shards import DataState, data_state
from tests.swarmtrain.training.fake_peer import FakeRun, FakeSite, samples_of
from tests.swarmtrain.training.loops import Trainer, make_model, train_step, vector

CHANNEL = "train/0/0"
SAMPLES, SHARDS, SIZE, STEPS = 48, 8, 3, 2


class Numbered(torch.utils.data.Dataset[Any]):
    """A sample is a function of its number; what is asked for is noted."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append(index)
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, generator=generator), torch.randn(2, generator=generator)


class DealtRun(FakeRun):
    """Rounds as ever, and shards as the ledger deals them."""

    def __init__(self, folder: Path, sites: int = 1, **keys: Any) -> None:
        super().__init__(folder, sites, shards=SHARDS, inner_steps=STEPS, batch_size=SIZE, **keys)
        self.data: DataState = data_state(SHARDS, STEPS * SIZE)
        self.positions: Counter[int] = Counter()
        self.refusals: list[str] = []
        for site in self.sites.values():
            site._data = lambda args, site=site: self.define(args, site)  # type: ignore[attr-defined]

    @property
    def members(self) -> list[bytes]:
        return [name.encode() for name, site in self.sites.items() if site.alive]

    def define(self, args: Document, site: FakeSite) -> Document:
        self.data.define(args["samples"], bytes.fromhex(args["digest"]), 0)
        assert self.data.digest.hex() == args["digest"]
        self.data.deal(self.members)
        return self.leases(site)

    def leases(self, site: FakeSite) -> Document:
        def pairs(spans: tuple[Span, ...]) -> list[list[int]]:
            return [[span.first, span.count] for span in spans]

        me = site.name.encode()
        held, listed = self.data.held(me), self.data.claimed.get(me, ())
        return {"generation": 0, "round": self.data.round, "held": pairs(held), "listed": listed}

    def decide(self, channel: str) -> None:
        with self.lock:
            given = {name: it for (name, c), it in self.waiting.items() if c == channel}
            claims = {
                name.encode(): tuple(Span(*pair) for pair in it["claims"])
                for name, it in given.items()
            }
            for member, spans in claims.items():
                why = self.data.refusal(member, spans, samples_of(given[member.decode()]))
                assert not why, (member, why, spans)
            self.data.opened(claims.items())
            super().decide(channel)
            counted = [name.encode() for name in self.decisions[-1][2]]
            aborted = all(self.sites[n].outcomes[CHANNEL]["outcome"] == "aborted" for n in given)
            counted = [] if aborted else counted
            for member in counted:
                for span in claims[member]:
                    self.positions.update(range(span.first, span.first + span.count))
            self.data.decided(counted, self.rounds[channel])
            self.data.deal(self.members)
            for site in self.sites.values():
                if site.alive:
                    site.push(event="leases", **self.leases(site))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(trainer: Trainer, data: Numbered, epochs: float) -> None:
    loader = torch.utils.data.DataLoader(data, batch_size=SIZE)
    for batch in trainer.swarm.data(loader):
        train_step(trainer.model, trainer.optimizer, batch)
        run: Any = trainer.run
        if run.data.counted >= epochs * SAMPLES:
            break


@pytest.mark.parametrize("overlap", ["off", "delayed", "eager"])
def test_rounds_that_fail_neither_lose_nor_repeat_a_sample(tmp_path: Path, overlap: str) -> None:
    run = DealtRun(tmp_path, resolved={"overlap": overlap, "outer_lr": 0.5})
    luck = np.random.default_rng(5)
    fates = ("committed", "committed", "aborted", "excluded")
    run.fate = lambda site, round_: fates[luck.integers(4)]
    trainer, data = Trainer(run, 0), Numbered()
    train(trainer, data, 3)
    trainer.swarm.close()
    assert set(run.positions.values()) == {1}
    assert all(run.positions[position] for position in range(2 * SAMPLES))
    # What was aborted goes along with the next hand-over, and is not trained on again.
    first = [int(n) for n in samples_at(np.arange(SAMPLES), SAMPLES, run.keys.seed)]
    assert data.asked[:SAMPLES] == first and sorted(first) == list(range(SAMPLES))


def test_two_trainers_share_an_epoch(tmp_path: Path) -> None:
    run = DealtRun(tmp_path, 2)
    datas = Numbered(), Numbered()
    barrier, errors = threading.Barrier(2), []

    def work(site: int) -> None:
        try:
            trainer = Trainer(run, site)
            barrier.wait(timeout=20)
            train(trainer, datas[site], 2)
            run.sites[f"site{site}"].alive = False
            trainer.swarm.close()
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(site,)) for site in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    assert set(run.positions.values()) == {1}
    assert min(len(data.asked) for data in datas) >= SAMPLES // 2


def test_one_process_can_follow_the_order_of_the_swarm(tmp_path: Path) -> None:
    """Off, SGD, H = 2, outer (1, 0), one site: the same weights as a plain loop in that order."""
    run = DealtRun(tmp_path)
    trainer, data = Trainer(run, 0), Numbered()
    train(trainer, data, 2)
    trainer.swarm.close()
    model = make_model(seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    order = samples_at(np.arange(2 * SAMPLES), SAMPLES, run.keys.seed).reshape(-1, SIZE)
    plain = Numbered()
    for numbers in order:
        rows = torch.utils.data.default_collate([plain[int(n)] for n in numbers])
        train_step(model, optimizer, rows)
    assert data.asked[: 2 * SAMPLES] == plain.asked
    assert np.allclose(run.theta[CHANNEL], vector(model), atol=1e-6)


def test_whoever_has_nothing_left_hands_over_early(tmp_path: Path) -> None:
    run = DealtRun(tmp_path, resolved={"overlap": "eager"})
    run.data.phase_samples = 1  # leases of one shard: less than a phase of its own
    trainer, data = Trainer(run, 0), Numbered()
    train(trainer, data, 1)
    trainer.swarm.close()
    assert set(run.positions.values()) == {1} and run.data.counted >= SAMPLES


def test_progress_on_what_others_hold_by_now_is_thrown_away(tmp_path: Path) -> None:
    run = DealtRun(tmp_path)
    trainer, data = Trainer(run, 0), Numbered()
    batches = iter(trainer.swarm.data(torch.utils.data.DataLoader(data, batch_size=SIZE)))
    begun = next(batches)
    with run.lock:
        run.data.deal([b"somebody else"])
        run.data.deal([b"site0", b"somebody else"])
    site = run.sites["site0"]
    site.push(event="leases", **run.leases(site))
    train_step(trainer.model, trainer.optimizer, begun)
    train_step(trainer.model, trainer.optimizer, next(batches))
    dropped = next(event for event in trainer.events if event["event"] == "progress_dropped")
    assert dropped["why"] == "its data" and not run.positions
    for _ in range(2 * STEPS):
        train_step(trainer.model, trainer.optimizer, next(batches))
    trainer.swarm.close()
    held_by_others = {
        p for s in run.data.held(b"somebody else") for p in range(s.first, s.first + s.count)
    }
    assert run.positions and not held_by_others & set(run.positions)


def test_data_that_cannot_be_dealt_are_refused(tmp_path: Path) -> None:
    run = DealtRun(tmp_path)
    trainer = Trainer(run, 0)
    with pytest.raises(ConfigError, match="without length"):
        trainer.swarm.data(iter([1, 2]))
    trainer.swarm.close()
    model = make_model()
    with Swarm(model, torch.optim.SGD(model.parameters(), lr=0.1)) as offline:
        with pytest.raises(LocalProtocolError):
            offline.deal(10, bytes(32))
        assert list(offline.data([1, 2])) == [1, 2]


def test_a_loader_or_a_plain_list_will_do() -> None:
    loader = torch.utils.data.DataLoader(Numbered(), batch_size=5)
    found = Batches(loader, lambda rows: rows)
    assert (found.samples, found.size) == (SAMPLES, 5)
    assert (Batches([1, 2, 3], sum).samples, Batches([1, 2, 3], sum).size) == (3, 1)


def test_streams_are_read_in_order_and_skipped_through() -> None:
    rows = datasets.Dataset.from_dict({"n": range(30)}).to_iterable_dataset()
    for data in (rows, [{"n": n} for n in range(30)]):
        found = InOrder(data, 30)
        assert [found[n]["n"] for n in (3, 4, 5, 20, 7, 8, 0, 29)] == [3, 4, 5, 20, 7, 8, 0, 29]
        assert len(found) == 30
    with pytest.raises(DataUnavailable, match="no row 30"):
        InOrder(rows, 40)[30]


def test_a_stream_is_dealt_in_its_own_order(tmp_path: Path) -> None:
    run = DealtRun(tmp_path)
    trainer = Trainer(run, 0)
    stream = datasets.Dataset.from_dict({"n": range(SAMPLES)}).to_iterable_dataset()
    seen: list[int] = []
    for batch in trainer.swarm.data(stream, rows=SAMPLES):
        seen += batch["n"].tolist()
        train_step(trainer.model, trainer.optimizer, (torch.zeros(1, 3), torch.zeros(1, 2)))
        if run.data.counted >= SAMPLES:
            break
    trainer.swarm.close()
    assert seen[:SAMPLES] == list(range(SAMPLES)) and set(run.positions.values()) == {1}


def test_names_tell_data_apart() -> None:
    assert len(data_digest("dataset", "")) == 32
    assert len({data_digest("a", "b"), data_digest("ab"), data_digest("a", "c")}) == 3


def test_turns_follow_the_members() -> None:
    members = iter([("x", "y"), ("x", "y"), ("w", "x"), ("w", "x"), ("y",)])
    assert list(by_turns("abcde", "x", lambda: next(members), lambda: False)) == ["a", "d", "e"]
    assert list(by_turns("abc", "x", lambda: ("x",), lambda: True)) == []


@pytest.mark.parametrize("known", [True, False])
def test_a_peer_process_that_dies_with_a_hand_over_neither_loses_nor_repeats(
    tmp_path: Path, known: bool
) -> None:
    """Its successor knows what became of the hand-over, or the trainer takes it with it again."""
    run = DealtRun(tmp_path, resolved={"overlap": "eager", "outer_lr": 0.5})
    site, (trainer, data) = run.sites["site0"], (Trainer(run, 0), Numbered())
    batches = iter(trainer.swarm.data(torch.utils.data.DataLoader(data, batch_size=SIZE)))

    def steps(count: int) -> None:
        for _ in range(count):
            train_step(trainer.model, trainer.optimizer, next(batches))

    steps(3 * STEPS)
    site.withheld = True
    steps(STEPS)
    deadline_s = time.monotonic() + 20
    while not run.waiting:
        steps(1)
        assert time.monotonic() < deadline_s
    if known:
        run.decide(CHANNEL)  # counted, and nobody was told
    site.kill()
    site.withheld = False
    site.restart()
    while "peer_attached" not in trainer.names():
        trainer.swarm.flush(0.05)
        assert time.monotonic() < deadline_s
    while run.data.counted < 2 * SAMPLES:
        steps(1)
        assert time.monotonic() < deadline_s
    trainer.swarm.close()
    assert set(run.positions.values()) == {1}
    assert all(run.positions[position] for position in range(SAMPLES))
