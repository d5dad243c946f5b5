"""Real peers that share after every step are one worker on all their data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from swarmtrain.training.data import load_corpus, position_of
from swarmtrain.training.presets import build
from swarmtrain_peer.spawn import start_process, stop_process
from swarmtrain_peer.store import StateStore
from swarmtrain_protocols.manifest import RunKeys
from tests.swarm.harness import CHANNEL, WAIT_S, Seat, Swarm

SITES, STEPS = 3, 20
KEYS = {
    "seed": 7,
    "inner_steps": 1,
    "inner_optimizer": "sgd",
    "inner_lr": 0.1,
    "inner_warmup_steps": 0,
    "inner_clip": 0.0,
    "outer_lr": 1.0,
    "outer_momentum": 0.0,
    "max_rounds": STEPS,
    "start_peers": SITES,
    "min_peers": SITES,
    "checkpoint_every_rounds": STEPS,
}


def trainer(seat: Seat) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "swarmtrain.training.trainer", str(seat.site.folder)]
    return start_process([*arguments, "--device", "cpu"], seat.site.folder / "trainer.log")


def reference() -> np.ndarray:
    """One process, no swarm: every step takes the mean gradient over the batches of all sites."""
    keys = RunKeys(**KEYS)  # type: ignore[arg-type]
    preset = build({name: getattr(keys, name) for name in keys.__struct_fields__}, CPU)
    corpus = load_corpus("stdlib")
    for step in range(STEPS):
        places = [position_of(ordinal, step) for ordinal in range(SITES)]
        parts = [corpus.batch(keys.seed, p, keys.batch_size, preset.context) for p in places]
        tokens, targets = (torch.from_numpy(np.concatenate(x)) for x in zip(*parts, strict=True))
        torch.autograd.backward(preset.loss(tokens, targets))
        preset.optimizer.step()
        preset.optimizer.zero_grad()
    values = [p.detach().numpy().ravel() for p in preset.model.parameters()]
    return np.concatenate(values)


CPU = torch.device("cpu")


@pytest.mark.timeout(240)
def test_peers_that_share_every_step_equal_one_process(tmp_path: Path) -> None:
    """fp32, off, SGD, H = 1, 20 steps: θ within 1e-5 of its norm, on every site the same bytes."""
    with Swarm(tmp_path) as swarm:
        founder = swarm.found(**KEYS)
        others = [swarm.enter(f"site-{n}", founder.ticket()) for n in range(1, SITES)]
        seats = [founder, *others]
        processes = [trainer(seat) for seat in seats]
        try:
            stands = {seat.wait_applied(STEPS, timeout_s=5 * WAIT_S) for seat in seats}
            for seat in seats:
                seat.wait_event("checkpoint_saved", lambda r: r["round"] == STEPS)
        finally:
            for process in processes:
                stop_process(process)
        assert len(stands) == 1
        assert not founder.events("round_aborted")
        theta = StateStore(founder.site.state_path).load().channels[CHANNEL].state.theta
    expected = reference()
    error = float(np.linalg.norm(theta - expected) / np.linalg.norm(expected))
    assert error < 1e-5, error
    moved = float(np.linalg.norm(expected - start()) / np.linalg.norm(expected))
    assert moved > 1e-2, "the steps must matter, or being equal says nothing"


def start() -> np.ndarray:
    """θ⁰ of the preset."""
    keys = RunKeys(**KEYS)  # type: ignore[arg-type]
    preset = build({name: getattr(keys, name) for name in keys.__struct_fields__}, CPU)
    return np.concatenate([p.detach().numpy().ravel() for p in preset.model.parameters()])
