"""Local steps in torch: one stage's arithmetic, and a whole run against one process's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from swarmtrain.training.stages.local import LocalRules, LocalStage
from swarmtrain.training.stages.reference import Whole
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_protocols.codecs.boundary import encode_tokens
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.messages.pipeline import EMPTY, HopReply, Tensor
from swarmtrain_protocols.outer import outer_step
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.hops import plain_path
from swarmtrain_protocols.pipeline.localsteps import LocalPolicy
from swarmtrain_protocols.pipeline.requests import inline_tensor
from tests.protocols.pipeline.local_kit import BLOCKS, DRIVER, ME, Bench
from tests.protocols.rounds_kit import hash_of, sent, take
from tests.swarmtrain.training.stages.models import BYTE_GPT, byte_gpt, tokens, whole

F64 = NDArray[np.float64]
LAYOUT = [("weight", (3, 2)), ("gain", (4,))]
RULES = LocalRules("adamw", 0.1, 0.5, 0.0, 0, 0)
LR, BETA, CLIP = 0.7, 0.9, 0.5
INNER_STEPS, BATCHES, LOCAL_STEPS = 8, 2, 20
FIRSTS = (8, 2, 4, 6)
"""Local steps before the first exchange of each of four stages, by spec 11 §2.8."""


def stage(rules: LocalRules = RULES) -> LocalStage:
    made = LocalStage(LAYOUT, rules, torch.device("cpu"), torch.float64)
    made.start(torch.arange(10, dtype=torch.float64))
    return made


def test_the_first_step_of_adamw_by_hand() -> None:
    one = stage()
    one.step(torch.full((10,), 2.0, dtype=torch.float64), 0)
    start = np.arange(10.0)
    moved = start * np.where(np.arange(10) < 6, 1 - 0.1 * 0.5, 1.0) - 0.1
    np.testing.assert_allclose(one.theta.numpy(), moved, atol=1e-8)
    np.testing.assert_allclose(one.delta().numpy(), start - moved, atol=1e-8)


def test_a_step_is_clipped_by_the_norm_of_its_stage_and_warms_up() -> None:
    one = stage(LocalRules("sgd", 1.0, 0.0, 0.5, 4, 0))
    one.step(torch.full((10,), 2.0, dtype=torch.float64), 0)
    np.testing.assert_allclose(one.delta().numpy(), 0.25 * 0.5 / np.sqrt(10), rtol=1e-5)
    one.step(torch.full((10,), 0.01, dtype=torch.float64), 1)
    np.testing.assert_allclose(
        one.delta().numpy(), 0.25 * 0.5 / np.sqrt(10) + 0.5 * 0.01, rtol=1e-5
    )


def test_taking_up_a_state_keeps_the_moments() -> None:
    one, cold = stage(), stage()
    one.step(torch.full((10,), 2.0, dtype=torch.float64), 0)
    one.start(torch.arange(10, dtype=torch.float64))
    assert not one.moved and not one.delta().any()
    for each in (one, cold):
        each.step(torch.full((10,), -2.0, dtype=torch.float64), 1)
    assert not torch.allclose(one.theta, cold.theta)


def test_only_diloco_runs_have_local_steps() -> None:
    assert LocalRules.of(byte_gpt()) is None
    runtime = whole(byte_gpt())
    for call in (lambda: runtime.step(1, 0), lambda: runtime.delta(1)):
        with pytest.raises(LocalProtocolError):
            call()


def local_keys(**changes: Any) -> dict[str, Any]:
    fields = {
        "pipeline_mode": "diloco",
        "inner_optimizer": "adamw",
        "inner_lr": 0.01,
        "inner_weight_decay": 0.1,
        "inner_clip": CLIP,
        "inner_warmup_steps": 5,
        "total_steps": 40,
        "model": {**BYTE_GPT, "layers": BLOCKS},
        "stages": BLOCKS,
        **changes,
    }
    return byte_gpt(**fields)


def test_others_see_the_state_and_not_what_is_trained_from_it() -> None:
    runtime = whole(local_keys())
    ids = encode_tokens(tokens(0))
    hidden = runtime.forward(0, b"", ids).output
    gradient = runtime.backward(1, hidden, hidden).output
    before = runtime.evaluate(1, hidden).output
    assert gradient and runtime.forward(1, hidden).output == before
    runtime.step(1, 0)
    assert runtime.forward(1, hidden).output != before
    assert runtime.evaluate(1, hidden).output == before
    assert runtime.run("evaluate", 1, hidden).output == before
    assert runtime.generate(1, hidden).output == before
    assert runtime.run("forward", 1, hidden).output != before, "and it trains on from its own"
    assert not runtime.accumulator(1).any()
    with pytest.raises(LocalProtocolError):
        runtime.step(1, 1)


class TorchBench(Bench):
    """A worker that serves all stages of a real model, and has all rounds to itself."""

    def __init__(self, runtime: StageRuntime) -> None:
        policy = LocalPolicy(BATCHES, INNER_STEPS, 3, 0, "fp32")
        super().__init__(*range(BLOCKS + 1), policy=policy)
        self.runtime = runtime
        self.theta = {s: runtime.theta0(s).copy() for s in range(BLOCKS + 1)}
        self.momentum = {s: np.zeros_like(theta) for s, theta in self.theta.items()}
        self.exchanged: list[tuple[int, int]] = []
        """(stage, micro-batches when it was exchanged)."""
        self.count = 0

    def _do(self, effect: Any) -> None:
        if isinstance(effect, px.Compute):
            parts = (effect.inputs.data, effect.gradient.data, effect.tokens)
            sign = int(effect.accumulate)
            done = self.runtime.run(effect.kind, effect.hop, *parts, sign=sign)
            output = inline_tensor(done.output)
            self.worker.computed(0.0, effect.job, output, done.loss, 0.01)
        elif isinstance(effect, px.LocalStep):
            self.runtime.step(effect.stage, effect.step)
        elif isinstance(effect, px.HandOver):
            self.handed.append(effect)

    def _hop(self, kind: str, hop: int, k: int, **given: Any) -> Tensor:
        request = self.request(kind, hop, k, **given)
        self.worker.receive(0.0, PeerId(DRIVER), request)
        self.work()
        ((_, reply),) = sent(take(self.out), HopReply)
        found: Tensor = reply.output
        return found

    def micro_batch(self, k: int) -> None:
        ids, inputs, path = encode_tokens(tokens(k)), [EMPTY], plain_path(BLOCKS)

        def given(hop: int, gradient: Tensor = EMPTY) -> dict[str, Any]:
            ends = hop in (0, BLOCKS + 1)
            return {"inputs": inputs[hop], "gradient": gradient, "tokens": ids if ends else b""}

        for hop in path[:-1]:
            inputs.append(self._hop("forward", hop, k, **given(hop)))  # noqa: PERF401, reads it
        gradient = EMPTY
        for hop in reversed(path):
            gradient = self._hop("backward", hop, k, **given(hop, gradient))
        self.count += 1
        while self.handed:
            self._exchange()

    def _exchange(self) -> None:
        """A round with this contribution alone: the real outer step, and its state comes back."""
        number = self.handed[0].stage
        delta = self.runtime.delta(number)
        self.hand(f"delta {self.count}")
        self.commit(self.open(number, ME, root=hash_of(f"delta {self.count}")))
        outer_step(
            self.theta[number], self.momentum[number], delta, np.float32(LR), np.float32(BETA)
        )
        self.runtime.load(number, self.theta[number])
        self.arrive(number)
        self.exchanged.append((number, self.count))


class OneProcess:
    """The same run without stages: one graph, an optimizer and an outer step for each part."""

    def __init__(self, runtime: StageRuntime, keys: dict[str, Any]) -> None:
        stages = range(BLOCKS + 1)
        self.keys = keys
        self.model = Whole(runtime.cut, {s: runtime.theta0(s) for s in stages}, dtype=torch.float64)
        self.optimizers = [self._optimizer(self.model.parameters[s]) for s in stages]
        self.state = {s: self.flat(s) for s in stages}
        self.momentum = {s: np.zeros_like(theta) for s, theta in self.state.items()}

    def _optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if self.keys["inner_optimizer"] == "sgd":
            return torch.optim.SGD(parameters, lr=0.0)
        decay = self.keys["inner_weight_decay"]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8)

    def flat(self, number: int) -> F64:
        parts = [p.detach().reshape(-1) for p in self.model.parameters[number]]
        found: F64 = torch.cat(parts).numpy().copy()
        return found

    def step(self, number: int, batches: list[int]) -> None:
        """Local step ``number`` (from 0) of all parts, then the exchanges that are due."""
        for k in batches:
            ids = torch.from_numpy(tokens(k).astype(np.int64))
            logits = self.model.logits(ids[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            (loss / len(batches)).backward()  # type: ignore[no-untyped-call]
        total, warm = self.keys["total_steps"], self.keys["inner_warmup_steps"]
        progress = max(0.0, (number - warm) / (total - warm))
        rise = min(1.0, (number + 1) / warm)
        rate = self.keys["inner_lr"] * rise * (0.1 + 0.45 * (1 + np.cos(np.pi * progress)))
        for part, optimizer in enumerate(self.optimizers):
            parameters = self.model.parameters[part]
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            if (number + 1 - FIRSTS[part]) % INNER_STEPS == 0 and number + 1 >= FIRSTS[part]:
                self._exchange(part)

    def _exchange(self, part: int) -> None:
        """Nesterov's momentum in the form of PyTorch's SGD, in fp64."""
        delta = self.state[part] - self.flat(part)
        self.momentum[part] = BETA * self.momentum[part] + delta
        self.state[part] = self.state[part] - LR * (delta + BETA * self.momentum[part])
        start = 0
        for p in self.model.parameters[part]:
            values = torch.from_numpy(self.state[part][start : start + p.numel()])
            p.data.copy_(values.view(p.shape))
            start += p.numel()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_four_stages_equal_one_process_that_does_the_same(optimizer: str) -> None:
    """Twenty local steps of two micro-batches, exchanges spread over eight steps.

    Gradients here are a pipeline's, hop by hop through the worker's core; states are fp32.
    """
    keys = local_keys(
        boundary_codec="fp64", inner_optimizer=optimizer, inner_lr=0.01 if optimizer != "sgd" else 1
    )
    runtime = StageRuntime.build(keys, range(BLOCKS + 1), dtype="float64")
    bench, alone = TorchBench(runtime), OneProcess(runtime, keys)
    for number in range(LOCAL_STEPS):
        batches = [number * BATCHES + k for k in range(BATCHES)]
        for k in batches:
            bench.micro_batch(k)
        alone.step(number, batches)
    due = [
        (part, step * BATCHES)
        for step in range(1, LOCAL_STEPS + 1)
        for part in range(BLOCKS + 1)
        if step >= FIRSTS[part] and (step - FIRSTS[part]) % INNER_STEPS == 0
    ]
    assert bench.exchanged == due and len(due) == 10
    for part in range(BLOCKS + 1):
        start = runtime.theta0(part)
        assert np.abs(runtime.theta(part) - alone.flat(part)).max() < 1e-5, part
        assert np.abs(bench.theta[part] - alone.state[part]).max() < 1e-5, part
        assert np.abs(runtime.theta(part) - start).max() > 1e-2, "and it has gone somewhere"
