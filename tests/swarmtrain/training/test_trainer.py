"""The preset trainer against a fake peer process behind a real control socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from swarmtrain.training import trainer
from swarmtrain.training.data import load_corpus, position_of
from swarmtrain.training.model import ByteGPT, Sizes
from swarmtrain.training.presets import build, evaluate
from swarmtrain_protocols.errors import ConfigError, NoDevice
from swarmtrain_protocols.manifest import RunKeys
from tests.swarmtrain.training.served import served

KEYS = {
    "inner_steps": 3,
    "inner_warmup_steps": 2,
    "model": {"d_model": 16, "heads": 2},
    "overlap": "off",
    "outer_lr": 1.0,
    "outer_momentum": 0.0,
}
CHANNEL = "train/0/0"


def test_it_trains_evaluates_reports_and_ends(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with served(tmp_path, **KEYS) as (site, run, backend):
        backend.site.next_position = 10
        assert trainer.run(site, "cpu", 6, 1) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    said = dict(backend.said)
    names = [name for name, _ in backend.said]
    assert names[:2] == ["attach", "define"] and names[-1] == "detach"
    handovers = [args for name, args in backend.said if name == "handover"]
    assert [(a["steps"], a["samples"], a["next_position"]) for a in handovers] == [
        (3, 12.0, 13),
        (3, 12.0, 16),
    ]
    assert all(a["phase_s"] > 0 and a["blocked_s"] >= 0 for a in handovers)
    assert run.rounds == {CHANNEL: 2}
    # One site and outer (1, 0): θ is what plain AdamW makes of the same positions.
    keys = RunKeys(**KEYS)
    fields = {name: getattr(keys, name) for name in RunKeys.__struct_fields__}
    preset, corpus = build(fields, torch.device("cpu")), load_corpus("stdlib")
    losses = []
    for step in range(6):
        preset.set_lr(step, step)
        batch = corpus.batch(keys.seed, position_of(0, 10 + step), keys.batch_size, 64)
        loss = preset.loss(*map(torch.from_numpy, batch))
        losses.append(loss.item())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(preset.model.parameters(), preset.clip)
        preset.optimizer.step()
        preset.optimizer.zero_grad()
    theta = np.concatenate([p.detach().numpy().ravel() for p in preset.model.parameters()])
    assert np.abs(run.theta[CHANNEL] - theta).max() < 1e-5
    assert handovers[1]["loss"] == pytest.approx(np.mean(losses[3:]), rel=1e-5)
    held_out = [torch.from_numpy(a) for a in corpus.evaluation(trainer.EVALUATION_WINDOWS, 64)]
    assert said["evaluated"]["round"] == 2
    assert said["evaluated"]["loss"] == pytest.approx(evaluate(preset.model, *held_out), rel=1e-4)
    assert said["evaluated"]["tokens"] == 128 * 64


def test_theta0_is_the_seeds(tmp_path):
    with served(tmp_path, **KEYS) as (site, run, backend):
        backend.site.port.set_should_stop = lambda reason: None  # only the steps end it
        start: list[np.ndarray] = []
        define = backend.site._define

        def watched(args):
            answer = define(args)
            start.append(run.theta[CHANNEL].copy())
            backend.site.port.side.set_should_stop("enough")
            return answer

        backend.site._define = watched  # type: ignore[method-assign]
        assert trainer.run(site, "cpu", 0, 1) == 0
    model = ByteGPT(Sizes(d_model=16, heads=2), RunKeys().seed)
    expected = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    assert np.array_equal(start[0], expected)


def test_an_evaluation_does_not_wait_for_a_round_that_will_never_end(tmp_path):
    """The last request comes while the hook waits for a decision: it is answered in the wait."""
    with served(tmp_path, **KEYS) as (site, run, backend):
        backend.site.withheld = True
        handover = backend.site._handover

        def asking(args):
            answer = handover(args)
            backend.push({"event": "evaluate", "round": 0})
            return answer

        backend.site._handover = asking  # type: ignore[method-assign]
        assert trainer.run(site, "cpu", 0, 1) == 0
    assert [name for name, _ in backend.said].count("evaluated") == 1
    assert run.rounds == {CHANNEL: 0}


def test_devices():
    assert trainer.choose_device("cpu").type == "cpu"
    assert trainer.choose_device("auto").type in ("cpu", "cuda")
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(NoDevice) as caught:
            trainer.choose_device(name)
        assert caught.value.exit_code == 9


def test_errors_are_three_lines_and_an_exit_code(tmp_path, capsys):
    with served(tmp_path, **{**KEYS, "preset": "nope"}) as (site, _, _):
        assert trainer.main([str(site.folder), "--device", "cpu"]) == ConfigError.exit_code
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "why", "do"]
    assert "preset" in lines[0]
    assert trainer.main([str(site.folder), "--device", "cpu"]) == 3


def test_without_a_peer_process_it_says_so(tmp_path, capsys):
    with served(tmp_path, **KEYS) as (site, _, _):
        pass
    assert trainer.main([str(site.folder), "--device", "cpu"]) == 75
    assert "no peer process" in capsys.readouterr().err


def test_sigterm_is_a_polite_end(tmp_path):
    with served(tmp_path, **KEYS) as (site, run, backend):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "swarmtrain.training.trainer", str(site.folder)]
        with subprocess.Popen([*command, "--device", "cpu"], env=environment) as process:
            assert backend.handed_over.wait(timeout=60)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert backend.said[-1][0] == "detach"
    assert all(np.isfinite(theta).all() for theta in run.theta.values())
