"""A slow link costs no training time: the exchange is hidden behind inner steps."""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path

import pytest
import torch

from swarmtrain.training.swarm import Swarm as Trainer
from swarmtrain_peer.events import Record
from tests.swarm.harness import Seat, Swarm, closing_all
from tests.swarm.proxy import Proxy

STEP_S = 0.02
WIDTH = 512
VECTOR_BYTES = WIDTH * (WIDTH + 1)
"""int8, and scales on top."""


class Loop:
    """An ordinary training loop on a thread; ``steps`` are (begin, end) of each, monotonic s."""

    def __init__(self, seat: Seat) -> None:
        torch.manual_seed(1)
        model = torch.nn.Linear(WIDTH, WIDTH)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self.steps: list[tuple[float, float]] = []
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(seat, model, optimizer), name="loop", daemon=True
        )
        self._thread.start()

    def _run(self, seat: Seat, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        try:
            with Trainer(model, optimizer, connect=seat.site.connect) as trainer:
                x = torch.ones(4, WIDTH)
                while not self._stop.is_set() and not trainer.should_stop:
                    began_s = time.monotonic()
                    self._stop.wait(STEP_S)  # a device that is busy
                    model(x).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    self.steps.append((began_s, time.monotonic()))
        except BaseException as error:
            self.failure = error
            raise

    def close(self) -> None:
        self._stop.set()
        self._thread.join(60.0)

    def within(self, first_s: float, last_s: float) -> list[float]:
        """Seconds of every step that lies in that time."""
        return [end - begin for begin, end in self.steps if first_s <= begin and end <= last_s]


def by_round(seat: Seat, name: str) -> dict[int, Record]:
    return {record["round"]: record for record in seat.events(name)}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("delay_s", "inner_steps"),
    [pytest.param(0.25, 200), pytest.param(5.0, 3600, marks=pytest.mark.slow)],
)
def test_a_slow_link_raises_neither_step_time_nor_hook_time(
    tmp_path: Path, delay_s: float, inner_steps: int
) -> None:
    line = Proxy()
    wait_s = 30.0 + 4 * inner_steps * STEP_S
    with Swarm(tmp_path) as swarm, closing_all(line):
        founder = swarm.found(
            overlap="eager",
            codec_scatter="int8",
            codec_gather="int8",
            inner_steps=inner_steps,
            start_peers=2,
            grace_s=60.0,
            outer_lr=0.4,
            outer_momentum=0.9,
            config={"announce": (line.address,)},
        )
        line.target_port = int(founder.site.port_path.read_text())
        ticket = founder.ticket()
        assert ticket.addresses == (line.address,)
        far = swarm.enter("far", ticket, config={"votes": False})
        loops = [Loop(founder), Loop(far)]
        with closing_all(*loops):
            founder.wait_event("round_committed", lambda r: r["round"] == 0, timeout_s=wait_s)
            line.delay_s = delay_s
            slow_from_s = time.monotonic()
            for seat in swarm.seats:
                seat.wait_event("round_figures", lambda r: r["round"] == 2, timeout_s=wait_s)
        assert [loop.failure for loop in loops] == [None, None]
        assert not founder.events("round_aborted")
        opened, committed = by_round(founder, "round_opened"), by_round(founder, "round_committed")
        for round_ in (1, 2):
            first_s, last_s = opened[round_]["mono_s"], committed[round_]["mono_s"]
            assert first_s > slow_from_s
            assert last_s - first_s > 4 * delay_s, "the delay is in the exchange"
            moved = sum(nbytes for at_s, nbytes in line.moved if first_s < at_s < last_s)
            assert moved > VECTOR_BYTES, "the bytes move between opening and commit"
            for loop in loops:
                usual = statistics.median(loop.within(0.0, slow_from_s))
                during = loop.within(first_s, last_s)
                assert statistics.median(during) < 1.25 * usual
                assert len(during) > 0.6 * (last_s - first_s) / usual, "training goes on meanwhile"
        for seat in swarm.seats:
            figures, handovers = by_round(seat, "round_figures"), seat.events("handover")
            assert all(figures[round_]["wait_s"] < delay_s / 2 for round_ in (1, 2))
            assert {record["inner_steps"] for record in handovers} == {inner_steps}
        swarm.check_hashes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_auto_goes_eager_where_the_exchange_is_slow_at_every_member_alike(tmp_path: Path) -> None:
    """Run keys as they are by default, phases of half a second, a link of 40 ms."""
    line = Proxy()
    with Swarm(tmp_path) as swarm, closing_all(line):
        founder = swarm.found(
            overlap="auto",
            outer_lr=None,
            outer_momentum=None,
            inner_steps=25,
            start_peers=2,
            grace_s=60.0,
            config={"announce": (line.address,)},
        )
        line.target_port = int(founder.site.port_path.read_text())
        far = swarm.enter("far", founder.ticket(), config={"votes": False})
        line.delay_s = 0.04
        loops = [Loop(founder), Loop(far)]
        with closing_all(*loops):
            changed = founder.wait_event("config_changed", timeout_s=90.0)
            for seat in swarm.seats:
                seat.wait_applied(changed["round"] + 4, timeout_s=60.0)
            states = [seat.status() for seat in swarm.seats]
        assert [loop.failure for loop in loops] == [None, None]
        assert (changed["key"], changed["value"]) == ("overlap", "eager")
        for seat, status in zip(swarm.seats, states, strict=True):
            (told,) = seat.events("config_changed")
            assert (told["round"], told["value"]) == (changed["round"], "eager")
            assert (status["overlap"], status["overlap_key"]) == ("eager", "auto")
            assert (status["outer_lr"], status["outer_momentum"]) == (0.4, 0.9)
            waits = {r["base_round"]: r["blocked_s"] for r in seat.events("handover")}
            off = [s for number, s in waits.items() if 1 <= number < changed["round"]]
            eager = [s for number, s in waits.items() if number > changed["round"]]
            assert min(off) > 2 * line.delay_s, "it stood still for the exchange"
            assert statistics.median(eager) < statistics.median(off) / 2
        swarm.check_hashes()
