"""Trainers and a log in any order of events: what shards promise, without rounds.

Truth is kept apart from what is tested: which positions a contribution really was trained on (what
was re-queued goes along), and how often each has gone into a committed result.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from swarmtrain_protocols.shards import DataState, LeaseBook, Spans, data_state

NAMES = tuple(bytes([65 + i]) * 32 for i in range(5))
SAMPLES, SHARDS, PHASE = 60, 12, 4
EPOCHS = 2


class Broken(AssertionError):
    """A promise was broken; its text begins with the name of the promise."""


def positions(spans: Spans) -> list[int]:
    return [p for span in spans for p in range(span.first, span.first + span.count)]


@dataclass
class Contribution:
    claims: Spans
    content: tuple[int, ...]
    generation: int


@dataclass
class Trainer:
    """A life of a trainer: its book, what it has really trained on, what it has not heard yet."""

    book: LeaseBook = field(default_factory=LeaseBook)
    fresh: list[int] = field(default_factory=list)
    queued: list[int] = field(default_factory=list)
    flying: Contribution | None = None
    news: list[Callable[[], None]] = field(default_factory=list)
    decisions: list[Callable[[], None]] = field(default_factory=list)
    """These come another way, and may be faster than news that is older."""

    def drop(self) -> None:
        self.book.dropped()
        self.fresh, self.queued = [], []


class World:
    """Everything that may happen is a method; ``seed`` decides what does."""

    def __init__(self, seed: int, calm: bool = False) -> None:
        self.calm = calm
        self.luck = random.Random(seed)
        self.state: DataState = data_state(SHARDS, PHASE)
        self.state.define(SAMPLES, b"", 0)
        self.generation = self.round = 0
        self.members: list[bytes] = []
        self.trainers: dict[bytes, Trainer] = {}
        self.waiting: dict[bytes, Contribution] = {}
        self.open: dict[bytes, Contribution] = {}
        self.trained: Counter[int] = Counter()
        self.history: dict[int, Counter[int]] = {0: Counter()}
        self.seen: Counter[str] = Counter()
        for name in NAMES[:3]:
            self.join(name)

    def logged(self) -> None:
        """An entry was applied: shards are dealt, and everybody will hear of it."""
        self.state.deal(self.members)
        for name, trainer in self.trainers.items():
            self._tell(name, trainer)
        self.check()

    def _tell(self, name: bytes, trainer: Trainer) -> None:
        held, listed = self.state.held(name), self.state.claimed.get(name, ())
        generation, number = self.generation, self.round
        trainer.news.append(lambda: trainer.book.update(generation, number, held, listed))

    # --- what may happen ---

    def join(self, name: bytes) -> None:
        if name not in self.members:
            self.members = sorted([*self.members, name])
            self.trainers[name] = Trainer()
            self.logged()

    def leave(self, name: bytes) -> None:
        """Declared lost, dead or not."""
        if name in self.members and len(self.members) > 1:
            self.members.remove(name)
            self.waiting.pop(name, None)
            if self.luck.random() < 0.5:
                self.trainers.pop(name)
            self.seen["left while listed"] += name in self.open
            self.logged()

    def restart(self, name: bytes) -> None:
        """The trainer dies; what it had announced may be taken back or not."""
        if name in self.trainers:
            trainer = self.trainers[name] = Trainer()
            if self.luck.random() < 0.5:
                self.waiting.pop(name, None)
            self._tell(name, trainer)
            self.seen["restarted while listed"] += name in self.open

    def hear(self, name: bytes) -> None:
        trainer = self.trainers.get(name)
        if trainer is not None:
            some = trainer.news if self.luck.random() < 0.6 else trainer.decisions
            if some:
                some.pop(0)()

    def train(self, name: bytes) -> None:
        trainer = self.trainers.get(name)
        if trainer is not None:
            trainer.fresh += trainer.book.take(self.luck.randint(1, 5))

    def hand_over(self, name: bytes) -> None:
        trainer = self.trainers.get(name)
        if trainer is None or trainer.flying is not None or name in self.waiting:
            return
        claims = trainer.book.boundary()
        if claims is None:
            if self.calm:
                raise Broken(f"wasted: {name[:1]!r} throws progress away for nothing")
            self.seen["void"] += 1
            trainer.drop()
            return
        content = tuple(sorted(trainer.queued + trainer.fresh))
        trainer.queued, trainer.fresh = [], []
        trainer.flying = Contribution(claims, content, self.generation)
        if not content:
            trainer.flying = None
            trainer.book.decided(False, self.round)
            return
        if tuple(positions(claims)) != content:
            raise Broken(f"claims: {positions(claims)} of {content}")
        self.waiting[name] = trainer.flying

    def lose_progress(self, name: bytes) -> None:
        """Not finite, or too old."""
        trainer = self.trainers.get(name)
        if trainer is not None:
            trainer.drop()

    def open_round(self) -> None:
        if self.open:
            return
        for name, offer in list(self.waiting.items()):
            weight = float(len(offer.content))
            why = self.state.refusal(name, offer.claims, weight)
            if name not in self.members:
                why = "not_a_member"
            if why or self.luck.random() < 0.2:
                if why or offer.generation != self.generation:
                    del self.waiting[name]
                    self.seen[why] += 1
                    self._decide(name, offer, False)
                continue
            self.open[name] = self.waiting.pop(name)
        if self.open:
            self.state.opened((name, one.claims) for name, one in self.open.items())
            self.logged()

    def close_round(self, commit: bool) -> None:
        if not self.open:
            return
        chosen = [name for name in self.open if self.luck.random() < 0.8] if commit else []
        if chosen:
            self.round += 1
            for name in chosen:
                self.trained.update(self.open[name].content)
            self.history[self.round] = Counter(self.trained)
        self.state.decided(chosen, self.round)
        for name, offer in self.open.items():
            self.seen["counted" if name in chosen else "not counted"] += 1
            self._decide(name, offer, name in chosen)
        self.open = {}
        self.logged()

    def _decide(self, name: bytes, offer: Contribution, counted: bool) -> None:
        trainer = self.trainers.get(name)
        if trainer is None or trainer.flying is not offer:
            return
        number = self.round

        def heard() -> None:
            trainer.flying = None
            trainer.book.decided(counted, number)
            if not counted:
                trainer.queued = sorted([*trainer.queued, *offer.content])

        trainer.decisions.append(heard)

    def rewind(self) -> None:
        number = self.luck.randint(max(0, self.round - 3), self.round)
        self.generation += 1
        for name, offer in [*self.open.items(), *self.waiting.items()]:
            self._decide(name, offer, False)
        self.open, self.waiting, self.round = {}, {}, number
        self.trained = Counter(self.history[number])
        self.state.rewound(number)
        self.seen["rewound"] += 1
        self.logged()

    # --- promises ---

    def check(self) -> None:
        twice = [p for p, times in self.trained.items() if times > 1]
        if twice:
            raise Broken(f"twice: {twice[:5]}")
        if self.state.counted != sum(self.trained.values()):
            raise Broken(f"counted: {self.state.counted} of {sum(self.trained.values())}")
        ahead: list[int] = []
        for name in self.state.leases:
            ahead += positions(self.state.held(name))
        for shard, done in self.state.free.items():
            ahead += range(done, self.state.first(shard + 1))
        begun = range(self.state.first(self.state.next))
        if sorted([*ahead, *self.trained]) != list(begun):
            missing = set(begun) - set(ahead) - set(self.trained)
            raise Broken(f"lost: {sorted(missing)[:5]} or held twice")

    def step(self) -> None:
        name = self.luck.choice(NAMES)
        kinds: list[tuple[float, Callable[[], None]]] = [
            (10, lambda: self.train(name)),
            (10, lambda: self.hear(name)),
            (5, lambda: self.hand_over(name)),
            (5, self.open_round),
            (4, lambda: self.close_round(True)),
            (1, lambda: self.close_round(False)),
            (0.6, lambda: self.join(name)),
            (0.5, lambda: self.leave(name)),
            (0.5, lambda: self.restart(name)),
            (0.2, lambda: self.lose_progress(name)),
            (0.1, self.rewind),
        ]
        weights, calls = zip(*(kinds[:6] if self.calm else kinds), strict=True)
        self.luck.choices(calls, weights)[0]()
        self.check()

    def settle(self) -> None:
        """No more trouble: everything that was begun is finished, each sample once."""
        goal = EPOCHS * SAMPLES
        for _ in range(400):
            if all(self.trained[p] for p in range(goal)):
                return
            for name in self.members:
                trainer = self.trainers.setdefault(name, Trainer())
                for some in (trainer.news, trainer.decisions):
                    while some:
                        some.pop(0)()
                self.train(name)
                self.hand_over(name)
            self.open_round()
            self.close_round(True)
        missing = [p for p in range(goal) if not self.trained[p]]
        raise Broken(f"never: {missing[:5]} are never trained on")


def play(seed: int, steps: int = 250, *, calm: bool = False) -> World:
    """One schedule from beginning to end; ``calm``: nobody leaves, fails or goes back."""
    world = World(seed, calm)
    for _ in range(steps):
        world.step()
    world.settle()
    return world
