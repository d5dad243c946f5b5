"""Streaming (fragments that are shared in turn, taken up with delay and mixed) in a whole swarm."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from swarmtrain.training.swarm import Swarm as Trainer
from tests.swarm.harness import Seat, Swarm, closing_all

CHANNELS = ("train/0/0", "train/0/1")
DELAY = 4


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))


def examples(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and the outputs of one teacher for all."""
    teacher = torch.randn(16, 4, generator=torch.Generator().manual_seed(7)) / 4
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return x, torch.sin(x @ teacher)


class Loop:
    """An ordinary training loop on a thread, on examples of its own; until the run ends."""

    def __init__(self, seat: Seat, number: int) -> None:
        self.theta: dict[str, torch.Tensor] = {}
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(seat, number), name=f"loop-{number}", daemon=True
        )
        self._thread.start()

    def _run(self, seat: Seat, number: int) -> None:
        try:
            model = make_model()
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            with Trainer(model, optimizer, connect=seat.site.connect, fragments=2) as trainer:
                step = 0
                while not self._stop.is_set() and not trainer.should_stop:
                    x, y = examples(1000 * number + step, 16)
                    loss = (model(x) - y).square().mean()
                    loss.backward()
                    trainer.log(loss=loss.item())
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1
                    self._stop.wait(0.005)  # a device that is busy
                self.theta = trainer.canonical()
        except BaseException as error:
            self.failure = error
            raise

    def close(self) -> None:
        self._stop.set()
        self._thread.join(60.0)


def loss_of(theta: dict[str, torch.Tensor] | None) -> float:
    model = make_model()
    if theta is not None:
        model.load_state_dict(theta)
    x, y = examples(5, 512)
    with torch.no_grad():
        return (model(x) - y).square().mean().item()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_fragments_are_shared_in_turn_by_three_peers_one_of_whom_comes_late(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(
            fragments=2,
            delay=DELAY,
            mix=0.5,
            inner_steps=20,
            start_peers=2,
            codec_scatter="int8",
            codec_gather="int8",
            outer_lr=1.0,
            outer_momentum=0.0,
        )
        ticket = founder.ticket()
        seats = [founder, swarm.enter("second", ticket)]
        loops = [Loop(seat, number) for number, seat in enumerate(seats)]
        with closing_all(*loops):
            founder.wait_event("round_committed", lambda r: r["round"] >= 1, timeout_s=60.0)
            seats.append(swarm.enter("late", ticket))
            loops.append(Loop(seats[2], 2))
            with closing_all(loops[2]):
                last = {channel: last_round(seats, channel) for channel in CHANNELS}
                steps = founder.status()["trainer"]["step"]
        assert [loop.failure for loop in loops] == [None] * 3
        for channel in CHANNELS:
            check_states(seats, channel, last[channel])
        handed = {c: [r for r in founder.events("handover") if r["channel"] == c] for c in CHANNELS}
        assert [handed[c][0]["inner_steps"] for c in CHANNELS] == [10, 20], "in turn"
        assert all(r["inner_steps"] == 20 for c in CHANNELS for r in handed[c][1:])
        told = [r["inner_steps"] for r in handed[CHANNELS[0]]]
        assert steps in [sum(told[:count]) for count in range(1, len(told) + 1)], "each step once"
        assert loss_of(loops[0].theta) < loss_of(None) / 2


def last_round(seats: list[Seat], channel: str) -> int:
    """Wait until a round of all three is applied everywhere; the round after it."""
    found = seats[0].wait_event(
        "round_set", lambda r: (r["channel"], r["contributors"]) == (channel, 3), timeout_s=90.0
    )
    number = int(found["round"]) + 1
    for seat in seats:
        seat.wait_event(
            "state_applied",
            lambda r: r["channel"] == channel and r["round"] >= number,
            timeout_s=60.0,
        )
    return number


def check_states(seats: list[Seat], channel: str, last: int) -> None:
    """One state per round, at all members that had it; every round at those who began."""
    hashes = [seat.hashes(channel) for seat in seats]
    assert last >= 3
    for round_ in range(1, last + 1):
        assert all(round_ in found for found in hashes[:2])
        told = [found[round_] for found in hashes if round_ in found]
        assert len(set().union(*told)) == 1, f"{channel} round {round_}"
    assert last in hashes[2]
