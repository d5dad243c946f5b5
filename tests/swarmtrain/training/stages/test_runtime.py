"""The runtime of stages: exactly once on request, refusals that change nothing, the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from swarmtrain.training.stages.cut import cut_parts
from swarmtrain.training.stages.families import cut_preset
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_protocols.codecs.boundary import (
    Bounds,
    encode_tokens,
    get_boundary_codec,
    pack_header,
)
from swarmtrain_protocols.errors import ConfigError, Diverged, LocalProtocolError, PeerFault
from swarmtrain_protocols.pipeline.candidates import fresh
from tests.swarmtrain.training.stages.models import away_from_start, keys, tokens, whole

HEAD = 5
FP32 = get_boundary_codec("fp32")
WIDE = Bounds(3, 16, 32)


def activation(seed: int, shape: tuple[int, ...] = (3, 16, 32)) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def encoded(seed: int, shape: tuple[int, ...] = (3, 16, 32)) -> bytes:
    return FP32.encode(activation(seed, shape))


@pytest.fixture
def runtime() -> StageRuntime:
    found = whole(keys())
    for stage in found.served:
        found.load(stage, away_from_start(found.theta0(stage), stage))
    return found


def test_the_accumulator_changes_exactly_when_asked(runtime: StageRuntime) -> None:
    x, g = encoded(1), encoded(2)
    assert not runtime.accumulator(2).any()
    dropped = runtime.backward(2, x, g, sign=0)
    assert not runtime.accumulator(2).any()
    added = runtime.backward(2, x, g)
    once = runtime.accumulator(2)
    assert added.output == dropped.output and np.abs(once).max() > 1e-3
    runtime.backward(2, x, g)
    np.testing.assert_allclose(runtime.accumulator(2), 2 * once, rtol=1e-6)
    assert not any(runtime.accumulator(stage).any() for stage in (0, 1, 3, 4))
    with pytest.raises(LocalProtocolError):
        runtime.backward(2, x, g, sign=2)


def test_undoing_all_there_is_leaves_zeros(runtime: StageRuntime) -> None:
    for hop, tokens_ in ((0, encode_tokens(tokens(0))), (3, b""), (HEAD, encode_tokens(tokens(0)))):
        x, g = (b"" if hop == 0 else encoded(1)), (b"" if hop == HEAD else encoded(2))
        runtime.backward(hop, x, g, tokens_)
        stage = 0 if hop in (0, HEAD) else hop
        assert runtime.accumulator(stage).any()
        runtime.undo(hop, x, g, tokens_)
        assert not runtime.accumulator(stage).any()


def test_undoing_one_of_many_leaves_the_others(runtime: StageRuntime) -> None:
    for k in range(6):
        runtime.backward(1, encoded(k), encoded(10 + k))
    before = runtime.accumulator(1)
    runtime.backward(1, encoded(20), encoded(30))
    runtime.undo(1, encoded(20), encoded(30))
    difference = np.abs(runtime.accumulator(1) - before).max()
    assert difference <= 1e-6 * np.abs(before).max()


def test_evaluation_and_generation_never_touch_the_accumulator(runtime: StageRuntime) -> None:
    runtime.backward(2, encoded(1), encoded(2))
    before = [runtime.accumulator(stage) for stage in range(5)]
    ids = encode_tokens(tokens(0))
    for call in (runtime.forward, runtime.evaluate, runtime.generate):
        for hop in range(HEAD + 1):
            given = ids if hop in (0, HEAD) else b""
            given = encode_tokens(tokens(0, time=16)) if call == runtime.generate else given
            assert call(hop, b"" if hop == 0 else encoded(3), given)
    for stage, was in enumerate(before):
        np.testing.assert_array_equal(runtime.accumulator(stage), was)


def test_clearing(runtime: StageRuntime) -> None:
    for stage in (1, 2):
        runtime.backward(stage, encoded(1), encoded(2))
    runtime.clear([1, 17])
    assert not runtime.accumulator(1).any() and runtime.accumulator(2).any()


def test_a_forward_here_and_its_recomputation_elsewhere_agree_to_the_bit() -> None:
    """int8: what is recomputed begins from the decoded bytes, not from what was encoded."""
    here, there = (StageRuntime.build(keys(boundary_codec="int8"), [2]) for _ in range(2))
    data = get_boundary_codec("int8").encode(activation(1))
    assert here.forward(2, data).output == there.forward(2, data).output
    g = get_boundary_codec("int8").encode(activation(2))
    assert here.backward(2, data, g).output == there.backward(2, data, g).output
    np.testing.assert_array_equal(here.accumulator(2), there.accumulator(2))


def test_the_head_merges_forward_and_backward(runtime: StageRuntime) -> None:
    """Against logits and cross entropy written out in NumPy and by torch on plain tensors."""
    x, ids = activation(4), tokens(4)
    layout, theta = runtime.layout(0), runtime.theta(0)
    offset = dict(zip([n for n, _ in layout], np.cumsum([0, 40 * 32, 32]), strict=True))
    gain = theta[offset["head.norm.gain"] :][:32]
    matrix = theta[offset["head.logits.weight"] :][: 40 * 32].reshape(40, 32)
    leaf = torch.tensor(x, requires_grad=True)
    normed = leaf / (leaf.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * torch.tensor(gain)
    logits = normed @ torch.tensor(matrix).T
    logp = logits.log_softmax(-1)
    targets = torch.tensor(ids[:, 1:].astype(np.int64))
    loss = -logp.gather(-1, targets[..., None]).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    done = runtime.backward(HEAD, FP32.encode(x), b"", encode_tokens(ids))
    assert done.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert leaf.grad is not None
    found = FP32.decode(done.output, WIDE)
    np.testing.assert_allclose(found, leaf.grad.numpy(), atol=1e-7)
    assert runtime.evaluate(HEAD, FP32.encode(x), encode_tokens(ids)).loss == done.loss


def test_generation_answers_the_logits_of_the_last_position(runtime: StageRuntime) -> None:
    ids = tokens(1, batch=2, time=9)
    data = encode_tokens(ids)
    for hop in range(HEAD + 1):
        data = runtime.generate(hop, data if hop else b"", encode_tokens(ids)).output
    found = FP32.decode(data, Bounds(2, 1, 40))
    assert found.shape == (2, 1, 40)
    parts = [runtime.module(stage) for stage in range(5)]
    with torch.no_grad():
        x = parts[0].embed(torch.tensor(ids.astype(np.int64)))  # type: ignore[operator]
        for part in parts[1:]:
            x = part(x)
        expected = parts[0].head(x)[:, -1]  # type: ignore[operator]
    np.testing.assert_allclose(found[:, 0], expected.numpy(), rtol=1e-5, atol=1e-6)


SHORT = encode_tokens(tokens(0, time=5))
REFUSED: dict[str, tuple[str, Callable[[StageRuntime], Any]]] = {
    "another codec": (
        "malformed",
        lambda r: r.forward(1, get_boundary_codec("int8").encode(activation(1))),
    ),
    "another width": ("malformed", lambda r: r.forward(1, encoded(1, (3, 16, 31)))),
    "too many sequences": ("oversize", lambda r: r.forward(1, encoded(1, (4, 16, 32)))),
    "too many tokens": ("oversize", lambda r: r.forward(1, encoded(1, (3, 17, 32)))),
    "a promise of 256 GiB": (
        "oversize",
        lambda r: r.forward(1, pack_header(1, (1 << 31, 16, 32)) + bytes(64)),
    ),
    "no input": ("malformed", lambda r: r.forward(1, b"")),
    "a value that is no number": (
        "non_finite",
        lambda r: r.forward(1, encoded(1)[:-4] + np.array([np.nan], "<f4").tobytes()),
    ),
    "a gradient of another shape": (
        "malformed",
        lambda r: r.backward(1, encoded(1), encoded(2, (3, 15, 32))),
    ),
    "no gradient": ("malformed", lambda r: r.backward(1, encoded(1), b"")),
    "an infinite gradient": (
        "non_finite",
        lambda r: r.backward(1, encoded(1), encoded(2)[:-4] + np.array([np.inf], "<f4").tobytes()),
    ),
    "targets of another shape": ("malformed", lambda r: r.backward(HEAD, encoded(1), b"", SHORT)),
    "no tokens": ("malformed", lambda r: r.backward(HEAD, encoded(1), b"", b"")),
    "a token outside the vocabulary": (
        "malformed",
        lambda r: r.forward(0, b"", encode_tokens(np.full((1, 3), 40, np.int32))),
    ),
    "one token": ("malformed", lambda r: r.forward(0, b"", encode_tokens(tokens(0, time=1)))),
    "a long sequence": ("oversize", lambda r: r.forward(0, b"", encode_tokens(tokens(0, time=18)))),
    "a long prompt": ("oversize", lambda r: r.generate(0, b"", encode_tokens(tokens(0, time=17)))),
    "a gradient for the embedding of another shape": (
        "malformed",
        lambda r: r.backward(0, b"", encoded(2), SHORT),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peers_may_send_wrong_is_refused_and_changes_nothing(
    name: str, runtime: StageRuntime
) -> None:
    code, call = REFUSED[name]
    runtime.backward(1, encoded(7), encoded(8))
    before = [runtime.accumulator(stage) for stage in range(5)]
    with pytest.raises(PeerFault) as caught:
        call(runtime)
    assert caught.value.code == code
    for stage, was in enumerate(before):
        np.testing.assert_array_equal(runtime.accumulator(stage), was)


def test_what_a_stage_computes_is_looked_at(runtime: StageRuntime) -> None:
    theta = runtime.theta(2)
    theta[:] = 1e25
    runtime.load(2, theta)
    with pytest.raises(Diverged):
        runtime.forward(2, encoded(1))
    runtime.backward(1, encoded(1), encoded(2))
    before = runtime.accumulator(2)
    with pytest.raises(Diverged):
        runtime.backward(2, encoded(1), encoded(2))
    np.testing.assert_array_equal(runtime.accumulator(2), before)


class Explosive(nn.Module):
    """Passes x on and has a weight whose gradient overflows while that of x does not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.huge = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.huge * 1e38 * 1e38


def test_a_gradient_of_weights_that_overflows_is_not_added() -> None:
    head = nn.Linear(4, 6)
    cut = cut_parts(nn.Embedding(6, 4), [Explosive()], head, 1, context=4)
    runtime = StageRuntime(cut, [1], codec="fp32", batch_max=2, seed=0)
    runtime.load(1, np.ones(8, np.float32) * np.array([1] * 4 + [0] * 4, np.float32))
    x = encoded(1, (2, 4, 4))
    with pytest.raises(Diverged):
        runtime.backward(1, x, encoded(2, (2, 4, 4)))
    assert not runtime.accumulator(1).any()


def test_loading(runtime: StageRuntime) -> None:
    theta = away_from_start(runtime.theta0(3), 8)
    runtime.backward(3, encoded(1), encoded(2))
    before, output = runtime.accumulator(3), runtime.forward(3, encoded(1)).output
    runtime.load(3, theta)
    np.testing.assert_array_equal(runtime.theta(3), theta)
    np.testing.assert_array_equal(runtime.accumulator(3), before)
    assert runtime.forward(3, encoded(1)).output != output
    theta[5] = np.nan
    for bad in (theta, theta[:-1], theta[None]):
        with pytest.raises(LocalProtocolError):
            runtime.load(3, bad)
    assert np.isfinite(runtime.theta(3)).all()


def test_what_is_not_served_is_refused(runtime: StageRuntime) -> None:
    runtime.backward(1, encoded(1), encoded(2))
    kept = runtime.accumulator(1)
    runtime.serve([1, 4])
    np.testing.assert_array_equal(runtime.accumulator(1), kept)
    assert runtime.served == (1, 4)
    for call in (
        lambda: runtime.forward(2, encoded(1)),
        lambda: runtime.forward(0, b"", encode_tokens(tokens(0))),
        lambda: runtime.forward(6, encoded(1)),
        lambda: runtime.forward(-1, encoded(1)),
        lambda: runtime.load(3, np.zeros(3, np.float32)),
        lambda: runtime.accumulator(2),
        lambda: runtime.serve([5]),
        lambda: runtime.serve([-1]),
    ):
        with pytest.raises(LocalProtocolError):
            call()
    runtime.serve([])
    assert runtime.served == ()


def test_weights_start_from_the_seed_and_need_no_service() -> None:
    runtime, other = StageRuntime.build(keys(), []), StageRuntime.build(keys(seed=8), [2])
    assert runtime.values == tuple(runtime.theta0(stage).size for stage in range(5))
    cut = cut_preset(keys())
    np.testing.assert_array_equal(runtime.theta0(2), fresh(cut.layout(2), 7, 2, depth=4))
    assert np.abs(runtime.theta0(2) - other.theta0(2)).max() > 0.01
    np.testing.assert_array_equal(other.theta(2), other.theta0(2))
    assert runtime.schema_hash == other.schema_hash
    assert runtime.schema_hash != StageRuntime.build(keys(stages=2), []).schema_hash
    assert runtime.layout(1) == runtime.layout(4) != runtime.layout(0)


def test_only_served_stages_take_memory() -> None:
    runtime = StageRuntime.build(keys(), [1])
    assert all(p.is_meta for stage in range(5) for p in runtime.cut.modules[stage].parameters())
    assert not any(p.is_meta for p in runtime.module(1).parameters())


def test_a_given_models_own_values_are_where_a_run_starts() -> None:
    head = nn.Linear(4, 6)
    cut = cut_parts(nn.Embedding(6, 4), [nn.Linear(4, 4), nn.Linear(4, 4)], head, 2, context=4)
    runtime = StageRuntime(cut, [0, 2], codec="fp32", batch_max=2, seed=0)
    block = cut.modules[2].blocks[0]  # type: ignore[index]
    expected = torch.cat([block.weight.reshape(-1), block.bias]).detach().numpy()
    np.testing.assert_array_equal(runtime.theta0(2), expected)
    runtime.load(2, np.zeros(20, np.float32))
    np.testing.assert_array_equal(runtime.theta0(2), expected)  # the given model is not written


def test_double_precision_is_double_throughout() -> None:
    runtime = StageRuntime.build(keys(boundary_codec="fp64"), [1], dtype="float64")
    theta = np.random.default_rng(0).standard_normal(runtime.values[1])
    runtime.load(1, theta)
    np.testing.assert_array_equal(runtime.theta(1), theta)
    fp64 = get_boundary_codec("fp64")
    x, g = fp64.encode(activation(1).astype(np.float64)), fp64.encode(activation(2).astype("f8"))
    runtime.backward(1, x, g)
    assert runtime.gradient_sum(1).dtype == np.float64
    assert runtime.accumulator(1).dtype == np.float32
    with pytest.raises(ConfigError):
        StageRuntime.build(keys(), [], dtype="float16")


def test_any_hop_by_its_kind(runtime: StageRuntime) -> None:
    x, g, ids = encoded(1), encoded(2), encode_tokens(tokens(0))
    assert runtime.run("forward", 1, x) == runtime.forward(1, x)
    assert runtime.run("evaluate", HEAD, x, tokens=ids) == runtime.evaluate(HEAD, x, ids)
    assert runtime.run("generate", HEAD, x) == runtime.generate(HEAD, x)
    assert not runtime.accumulator(1).any()
    assert runtime.run("backward", 1, x, g, sign=1).output
    once = runtime.accumulator(1)
    runtime.run("backward", 1, x, g, sign=0)
    np.testing.assert_array_equal(runtime.accumulator(1), once)
    runtime.run("backward", 1, x, g, sign=-1)
    assert not runtime.accumulator(1).any()


def test_the_loss_is_the_mean_of_the_micro_batch(runtime: StageRuntime) -> None:
    """A micro-batch of two equal sequences has the loss and the gradient of one of them."""
    x, ids = activation(3, (1, 16, 32)), tokens(3, batch=1)
    one = runtime.backward(HEAD, FP32.encode(x), b"", encode_tokens(ids))
    gradient = runtime.accumulator(0)
    runtime.clear([0])
    twice = FP32.encode(np.concatenate([x, x]))
    two = runtime.backward(HEAD, twice, b"", encode_tokens(np.concatenate([ids, ids])))
    assert two.loss == pytest.approx(one.loss, rel=1e-6)
    np.testing.assert_allclose(runtime.accumulator(0), gradient, atol=1e-7)
    rows = FP32.decode(two.output, WIDE)
    np.testing.assert_allclose(rows[0], FP32.decode(one.output, WIDE)[0] / 2, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"batch_size": 800}, "tokens of a micro-batch"), ({"batch_size": 1 << 20}, "activations")],
)
def test_micro_batches_that_no_message_has_room_for_are_refused(
    changes: dict[str, int], what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        StageRuntime.build(keys(**changes), [])
    assert StageRuntime.build(keys(batch_size=700), []).batch_max == 700
